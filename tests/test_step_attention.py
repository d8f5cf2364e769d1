"""Attention between steps, against the model's whole maps, the scorer and golden influence."""

from __future__ import annotations

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax import step_attention as module
from attnrl_jax.branching.importance import forward_context_influence
from attnrl_jax.models.transformer import forward
from attnrl_jax.scoring import score
from attnrl_jax.step_attention import step_attention


@pytest.fixture(scope="module")
def response(golden_dir):
    """Ids and ranges of a golden case, and its influence at several distances."""
    case = json.loads((golden_dir / "fci.json").read_text())["cases"][0]
    with np.load(golden_dir / "fci.npz") as arrays:
        ranges = arrays["c0_ranges"]
        step_ids = np.repeat(np.arange(len(ranges)), ranges[:, 1] - ranges[:, 0])
        fci = [arrays[f"c0_v{v}_fci"] for v in range(len(case["variants"]))]
        return case, arrays["c0_ids"], step_ids, fci


@pytest.mark.parametrize("block", [7, 1024])
def test_it_is_the_mean_of_the_map_and_gives_the_golden_influence(golden_model, response, block):
    case, tokens, step_ids, golden = response
    model = golden_model(case["model"])
    config = replace(model.config, block_length=block)
    delta = case["variants"][0]["delta"]
    found = step_attention(model.params, config, tokens, step_ids, delta=delta, length_multiple=32)
    output = forward(
        model.params, config, jnp.asarray(tokens)[None], jnp.array([len(tokens)]),
        keep_attention=True,
    )  # fmt: skip
    maps = np.asarray(output.attention)[:, 0]
    ranges = step_ids.max() + 1
    expected = np.zeros((*maps.shape[:2], ranges, ranges))
    for j in range(ranges):
        for k in range(ranges):
            part = maps[:, :, step_ids == j][:, :, :, step_ids == k]
            expected[:, :, j, k] = part.mean(axis=(2, 3))
    np.testing.assert_allclose(found.mean, expected.mean(axis=(0, 1)), atol=1e-6)
    columns = expected[found.layer, found.head, :, np.arange(ranges)].T
    np.testing.assert_allclose(found.strongest, columns, atol=1e-6)
    # The strongest columns sum up to the influence, whichever way it is computed.
    ahead = np.tri(ranges, k=-delta)
    np.testing.assert_allclose((found.strongest * ahead).sum(axis=0), found.fci, atol=1e-6)
    whole = forward_context_influence(jnp.asarray(maps), jnp.asarray(step_ids), delta, int(ranges))
    np.testing.assert_allclose(found.fci, whole, atol=1e-6)
    scored = score(
        model.params, config, tokens[None], np.array([len(tokens)]), step_ids[None], delta=delta
    )
    np.testing.assert_allclose(found.fci, scored.fci[0, :ranges], atol=1e-5)
    assert golden[0].max() > 0
    # Golden cases have the prompt zeroed, and the first step in some.
    shown = golden[0] > 0
    np.testing.assert_allclose(found.fci[shown], golden[0][shown], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_shown_is_refused(golden_model, response, monkeypatch):
    case, tokens, step_ids, _ = response
    model = golden_model(case["model"])
    with pytest.raises(ValueError, match="0 tokens"):
        step_attention(model.params, model.config, tokens[:0], step_ids[:0])
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="fewer, longer steps"):
        step_attention(model.params, model.config, tokens, step_ids)
