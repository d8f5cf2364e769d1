"""One forward pass: log-probabilities, entropy, step importance."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import forward, init_params
from attnrl_jax.scoring import score, score_rows, token_logprobs
from tests.golden_data import load_json, load_npz


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


def test_rows_in_batches_equal_rows_alone(golden_model):
    """Sorting, padding and batching change no number, and results come back in order."""
    golden = golden_model("qwen2_tied")
    _, tokens, lengths, step_ids = fci_rows("qwen2_tied")
    batched = score_rows(
        golden.params, golden.config, tokens, lengths, step_ids, 1.0,
        delta=1, with_fci=True, batch_rows=2, length_multiple=64,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        alone = score(
            golden.params, golden.config, tokens[row : row + 1, :length],
            lengths[row : row + 1], step_ids[row : row + 1, :length], delta=1,
        )  # fmt: skip
        for name in ("logprobs", "entropy", "fci"):
            np.testing.assert_allclose(
                getattr(batched, name)[row, :length], getattr(alone, name)[0], atol=1e-4
            )


def test_logits_of_the_whole_sequence_never_exist():
    """Not in float32, neither forward nor backward: only a chunk's."""
    batch, time, vocab, chunk = 2, 128, 263, 16
    config = ModelConfig("qwen2", vocab, 64, 2, 4, 2, 16, 128, tie_embeddings=True)
    params = init_params(config, jax.random.key(0))
    tokens = jnp.zeros((batch, time), jnp.int32)
    lengths = jnp.full((batch,), time)

    def loss(params):
        hidden = forward(params, config, tokens, lengths).hidden
        return token_logprobs(params, config, hidden, tokens, 1.0, chunk_length=chunk)[0].sum()

    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)}
    # The vocabulary is a prime that nothing else has: these are logits or embeddings.
    with_vocab = [s for s in shapes if vocab in s]
    assert max(np.prod(s) for s in with_vocab) <= max(batch * chunk, config.width) * vocab
    assert any(np.prod(s) == batch * chunk * vocab for s in with_vocab)
