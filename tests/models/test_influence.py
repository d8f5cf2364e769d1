"""Forward context influence of the model against golden values and against its own maps."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.models.transformer import forward


@functools.cache
def fci_cases(golden_dir):
    with np.load(golden_dir / "fci.npz") as stored:
        arrays = dict(stored)
    cases = json.loads((golden_dir / "fci.json").read_text())["cases"]
    for k, case in enumerate(cases):
        ranges = arrays[f"c{k}_ranges"]
        case |= {
            "ids": arrays[f"c{k}_ids"],
            "step_ids": np.repeat(np.arange(len(ranges)), ranges[:, 1] - ranges[:, 0]),
            "fci": [arrays[f"c{k}_v{v}_fci"] for v in range(len(case["variants"]))],
        }
    return cases


def influence(params, config, tokens, lengths, step_ids, delta):
    return forward(params, config, tokens, lengths, step_ids=step_ids, delta=delta).fci


influence_jitted = jax.jit(influence, static_argnums=(1, 5))


def padded(cases, time: int):
    tokens, step_ids = np.zeros((2, len(cases), time), np.int32) + np.array([0, -1])[:, None, None]
    for b, case in enumerate(cases):
        tokens[b, : len(case["ids"])] = case["ids"]
        step_ids[b, : len(case["ids"])] = case["step_ids"]
    lengths = np.array([len(case["ids"]) for case in cases], np.int32)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths), jnp.asarray(step_ids, jnp.int32)


@pytest.mark.parametrize(
    ("name", "time", "jitted", "attention", "block"),
    [
        ("qwen2_tied", 304, True, "plain", 512),
        ("qwen2_tied", 304, True, "blockwise", 37),
        ("qwen2_tied", 304, False, "blockwise", 37),
        ("qwen2_untied", 208, True, "blockwise", 64),
        ("qwen2_untied", 208, False, "plain", 512),
    ],
)
def test_golden_influence(golden_dir, golden_model, name, time, jitted, attention, block):
    """All cases of a model as one padded batch, so that padding is put to the test as well."""
    cases = [case for case in fci_cases(golden_dir) if case["model"] == name]
    model = golden_model(name)
    config = replace(model.config, attention=attention, block_length=block)
    apply = influence_jitted if jitted else influence
    batch = padded(cases, time)
    by_delta = {
        delta: np.asarray(apply(model.params, config, *batch, delta))
        for delta in sorted({v["delta"] for case in cases for v in case["variants"]})
    }
    checked = 0
    for b, case in enumerate(cases):
        assert len(case["variants"]) == 5
        for variant, expected in zip(case["variants"], case["fci"], strict=True):
            got = by_delta[variant["delta"]][b].copy()
            assert not got[case["S"] :].any()
            got[0] = 0
            if variant["zero_first"]:
                got[1] = 0
                if variant["stop_think_step"] > 0:
                    got[variant["stop_think_step"] :] = 0
            np.testing.assert_allclose(got[: len(expected)], expected, atol=2e-5)
            checked += expected.max() > 0
    assert checked > 2 * len(cases)


def test_padding_changes_no_influence(golden_dir, golden_model):
    cases, model = fci_cases(golden_dir), golden_model("qwen2_tied")
    config = replace(model.config, attention="blockwise", block_length=37)
    alone = influence_jitted(model.params, config, *padded(cases[7:8], len(cases[7]["ids"])), 4)
    batch = influence_jitted(model.params, config, *padded(cases[7:8], 128), 4)
    np.testing.assert_allclose(alone[0], batch[0, : alone.shape[1]], atol=1e-6)
    assert alone.max() > 0.01


def test_every_token_its_own_step(golden_model):
    """Many short blocks and as many steps as tokens, against the map itself."""
    model = golden_model("qwen3")
    tokens = np.random.default_rng(0).integers(1, 256, (1, 96)).astype(np.int32)
    step_ids, lengths, delta = jnp.arange(96)[None], jnp.array([96]), 4
    config = replace(model.config, attention="blockwise", block_length=16)
    got = influence_jitted(model.params, config, tokens, lengths, step_ids, delta)
    whole = jax.jit(partial(forward, keep_attention=True), static_argnums=1)
    maps = np.asarray(whole(model.params, model.config, tokens, lengths).attention)[:, 0]
    expected = np.tril(maps, -delta).sum(axis=2).max(axis=(0, 1))
    np.testing.assert_allclose(got[0], expected, atol=1e-5)
