"""One forward pass: log-probabilities, entropy, step importance."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax import scoring
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from attnrl_jax.packing import problem_groups, row_paths, take_rows
from attnrl_jax.scoring import packed_forward, score, score_rows, token_logprobs
from attnrl_jax.training.rollout import empty_rollouts, own_tokens
from attnrl_jax.types import PackedTokens
from tests.golden_data import load_json, load_npz
from tests.trees import random_rollouts


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_length", [256, 5])
def test_golden_logprobs_and_entropy(model, temperature, chunk_length):
    tokens, lengths = model.arrays["input_ids_right"], model.arrays["lengths"]
    scores = score(
        model.params, model.config, tokens, lengths, tokens * 0, temperature,
        with_fci=False, chunk_length=chunk_length,
    )  # fmt: skip
    name = "next_logprob" if temperature == 1.0 else "next_logprob_t0p6"
    inside = np.arange(1, tokens.shape[1])[None, :] < lengths[:, None]
    np.testing.assert_allclose(
        np.where(inside, scores.logprobs[:, 1:], 0),
        np.where(inside, model.arrays[name], 0), atol=1e-4,
    )  # fmt: skip
    if temperature == 1.0:
        np.testing.assert_allclose(
            np.where(inside, scores.entropy[:, 1:], 0),
            np.where(inside, model.arrays["entropy"][:, :-1], 0), atol=1e-4,
        )  # fmt: skip
    assert np.all(np.asarray(scores.logprobs)[~np.pad(inside, [(0, 0), (1, 0)])] == 0)


def fci_rows(model_name):
    """The golden FCI sequences of a model as one right-padded batch."""
    about, arrays = load_json("fci"), load_npz("fci")
    cases = [k for k, case in enumerate(about["cases"]) if case["model"] == model_name]
    time = max(about["cases"][k]["length"] for k in cases)
    tokens = np.zeros((len(cases), time), np.int32)
    step_ids = np.full((len(cases), time), -1, np.int32)
    for row, k in enumerate(cases):
        tokens[row, : len(arrays[f"c{k}_ids"])] = arrays[f"c{k}_ids"]
        for step, (start, end) in enumerate(arrays[f"c{k}_ranges"]):
            step_ids[row, start:end] = step
    return cases, tokens, (step_ids >= 0).sum(axis=1).astype(np.int32), step_ids


def test_scored_fci_is_golden_fci(golden_model):
    """The scorer's FCI of whole batches, before any range but those past the last is zeroed."""
    golden = golden_model("qwen2_tied")
    cases, tokens, lengths, step_ids = fci_rows("qwen2_tied")
    about, arrays = load_json("fci"), load_npz("fci")
    checked = 0
    for row, k in enumerate(cases):
        for v, variant in enumerate(about["cases"][k]["variants"]):
            if variant["delta"] != 4 or variant["zero_first"]:
                continue
            scores = score(golden.params, golden.config, tokens, lengths, step_ids, delta=4)
            expected = arrays[f"c{k}_v{v}_fci"]
            np.testing.assert_allclose(scores.fci[row, 1 : len(expected)], expected[1:], atol=2e-5)
            checked += 1
    assert checked > 0


def alone(model, rows, row, delta=1, with_fci=True):
    """The readable path: one row, right padded to the width that all share."""
    return score(
        model.params, model.config, rows.tokens[row : row + 1], rows.length[row : row + 1],
        rows.step_ids[row : row + 1], delta=delta, with_fci=with_fci,
    )  # fmt: skip


def test_packed_rows_equal_rows_alone(golden_model):
    """Packing, padding and batching change no number, and results come back in order: FCI of every
    range, and values of exactly the tokens that were asked for."""
    golden = golden_model("qwen2_tied")
    _, tokens, lengths, step_ids = fci_rows("qwen2_tied")
    rows = empty_rollouts(*tokens.shape)
    for name, value in (("tokens", tokens), ("length", lengths), ("step_ids", step_ids)):
        getattr(rows, name)[:] = value
    rows.problem[:] = np.arange(len(lengths))
    rows.prompt_length[:] = (step_ids == 0).sum(axis=1)
    wanted = own_tokens(rows)
    wanted[1, lengths[1] - 3 :] = False
    time = tokens.shape[1]
    packed = score_rows(
        golden.params, golden.config, tokens, row_paths(rows, np.ones(len(lengths), bool)), wanted,
        step_ids, 1.0, delta=1, batch_tokens=2 * 2 * time, pack_length=2 * time,
    )  # fmt: skip
    for row in range(len(lengths)):
        expected = alone(golden, rows, row)
        for name in ("logprobs", "entropy"):
            values = np.where(wanted[row], getattr(expected, name)[0], 0)
            np.testing.assert_allclose(getattr(packed, name)[row], values, 1e-5, 1e-5)
        np.testing.assert_allclose(packed.fci[row], expected.fci[0], atol=1e-5)
    assert packed.fci.max() > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_continuations_scored_as_trees_equal_rows_alone(golden_model, seed, monkeypatch):
    """Their roots are not among them, what they share is computed once, and groups of problems
    that are packed one after the other come back in their places."""
    monkeypatch.setattr(scoring, "GROUP_BATCHES", 1)
    golden = golden_model("qwen2_tied")
    whole = random_rollouts(np.random.default_rng(seed))
    continued = whole.root != np.arange(len(whole.root))
    rows = take_rows(whole, continued)
    paths = row_paths(rows, np.zeros(continued.sum(), bool))
    assert len(problem_groups(paths, 64)) > 1
    wanted = own_tokens(rows)
    packed = score_rows(
        golden.params, golden.config, rows.tokens, paths, wanted, None, 1.0, batch_tokens=64,
        pack_length=64,
    )  # fmt: skip
    for row in range(len(rows.length)):
        expected = alone(golden, rows, row, with_fci=False)
        for name in ("logprobs", "entropy"):
            values = np.where(wanted[row], getattr(expected, name)[0], 0)
            np.testing.assert_allclose(getattr(packed, name)[row], values, 1e-5, 1e-5)
    assert not packed.fci.any()


def as_packed(tokens):
    """Whole rows, one a sequence."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return PackedTokens(tokens, index, index * 0 + tokens.shape[1], jnp.maximum(index - 1, 0))


VOCAB = 263
PRIME = ModelConfig("qwen2", VOCAB, 64, 2, 4, 2, 16, 128, tie_embeddings=True)


def test_logits_of_the_whole_sequence_never_exist():
    """Not in float32, neither forward nor backward: only a chunk's."""
    batch, time, chunk = 2, 128, 16
    params = init_params(PRIME, jax.random.key(0))
    packed = as_packed(jnp.zeros((batch, time), jnp.int32))

    def loss(params):
        hidden = packed_forward(params, PRIME, packed).hidden
        wanted = packed.positions > 0
        logprobs, _ = token_logprobs(params, PRIME, hidden, packed, wanted, 1.0, chunk_length=chunk)
        return logprobs.sum()

    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)}
    # The vocabulary is a prime that nothing else has: these are logits or embeddings.
    with_vocab = [s for s in shapes if VOCAB in s]
    assert max(np.prod(s) for s in with_vocab) <= max(batch * chunk, PRIME.width) * VOCAB
    assert any(np.prod(s) == batch * chunk * VOCAB for s in with_vocab)


def test_chunks_without_a_wanted_token_are_left_out():
    """Values of wanted tokens move to the front. Hidden states of all others are not a number here,
    in the chunks that are left out and in those that are not."""
    rng = np.random.default_rng(0)
    params = init_params(PRIME, jax.random.key(0))
    packed = as_packed(jnp.asarray(rng.integers(0, VOCAB, (2, 40)), jnp.int32))
    wanted = jnp.asarray(rng.random((2, 40)) < 0.3).at[:, 0].set(False)
    hidden = jnp.asarray(rng.normal(size=(2, 40, 64)), jnp.float32)
    needed = jnp.roll(wanted, -1, axis=1)[..., None]

    def run(hidden, wanted):
        return token_logprobs(
            params, PRIME, hidden, packed, wanted, 1.0, chunk_length=8, with_entropy=True
        )

    one, other = run(hidden, wanted), run(hidden, jnp.ones_like(wanted))
    for some, every in zip(one, other, strict=True):
        np.testing.assert_allclose(some, jnp.where(wanted, every, 0), atol=1e-5)
    slope = jax.grad(lambda h: run(h, wanted)[0].sum())(hidden)
    np.testing.assert_array_equal(jnp.where(needed, 0, slope), 0)
    assert np.abs(slope).sum() > 0
    spoiled = run(jnp.where(needed, hidden, jnp.nan), wanted)
    jax.tree.map(np.testing.assert_array_equal, spoiled, one)
