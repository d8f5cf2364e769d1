"""One forward pass: log-probabilities, entropy, step importance."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax import scoring
from attnrl_jax.compilation.counts import count_collectives
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from attnrl_jax.packing import problem_groups, row_paths, take_rows
from attnrl_jax.scoring import packed_forward, score, score_rows, token_logprobs
from attnrl_jax.sharding import (
    MeshConfig,
    batch_devices,
    batch_sharding,
    constrain_parameters,
    make_mesh,
    parameter_shardings,
)
from attnrl_jax.training.leaves import empty_rollouts
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
    first = rows.prompt_length.copy()
    first[1] += 3
    time = tokens.shape[1]
    packed = score_rows(
        golden.params, golden.config, tokens, row_paths(rows, np.ones(len(lengths), bool)), first,
        step_ids, 1 + step_ids.max(axis=1), 1.0, delta=1, batch_tokens=2 * 2 * time,
        pack_length=2 * time,
    )  # fmt: skip
    expected = [alone(golden, rows, row) for row in range(len(lengths))]
    assert_pieces(packed, expected, first, lengths)
    for fci, other, ids in zip(packed.fci, expected, step_ids, strict=True):
        np.testing.assert_allclose(fci, other.fci[0, : 1 + ids.max()], atol=1e-5)
    assert np.concatenate(packed.fci).max() > 0.1


def assert_pieces(packed, expected, first, lengths):
    """Values of exactly the tokens that were asked for."""
    for name in ("logprobs", "entropy"):
        rows = zip(getattr(packed, name), expected, first, lengths, strict=True)
        for values, other, begin, end in rows:
            np.testing.assert_allclose(values, getattr(other, name)[0, begin:end], 1e-5, 1e-5)


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
    first = rows.prompt_length + rows.split
    packed = score_rows(
        golden.params, golden.config, rows.tokens, paths, first, None, rows.length * 0, 1.0,
        batch_tokens=64, pack_length=64,
    )  # fmt: skip
    expected = [alone(golden, rows, row, with_fci=False) for row in range(len(rows.length))]
    assert_pieces(packed, expected, first, rows.length)
    assert not any(map(len, packed.fci))


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


def values_and_gradients(config, chunk):
    """Jitted, of parameters, hidden states, packed tokens, wanted ones and their weights."""

    @jax.checkpoint
    def loss(params, hidden, packed, wanted, weights):
        logprobs, entropy = token_logprobs(
            params, config, hidden, packed, wanted, 0.7, chunk_length=chunk, with_entropy=True
        )
        return jnp.sum(weights * logprobs + entropy), (logprobs, entropy)

    @jax.jit
    def program(*inputs):
        (of_params, of_hidden), values = jax.grad(loss, argnums=(0, 1), has_aux=True)(*inputs)
        return constrain_parameters(of_params), of_hidden, values

    return program


@pytest.mark.parametrize(
    ("vocab", "dtype", "mesh"),
    [
        (VOCAB, "float32", MeshConfig(data=2, fsdp=4)),
        (264, "bfloat16", MeshConfig(data=2, fsdp=2, tensor=2)),
    ],
    ids=["odd vocabulary", "cut vocabulary"],
)
def test_the_gradient_of_the_output_matrix_is_added_up_once(vocab, dtype, mesh):
    """A bug: it was added up over devices in every chunk, 16 GiB of a model of 1.5 billion, and
    in every chunk the devices asked each other whether any wants it."""
    config = ModelConfig("qwen2", vocab, 64, 1, 4, 2, 16, 64, dtype=dtype)
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(0.1 * rng.normal(size=(64, vocab)), jnp.float32)
    params = {"lm_head": {"kernel": kernel}}
    packed = as_packed(jnp.asarray(rng.integers(0, VOCAB, (8, 32)), jnp.int32))
    # Rows differ in how many chunks they have.
    counts = np.array([0, 3, 31, 8, 1, 9, 0, 17])
    wanted = jnp.asarray((np.arange(32) > 0) & (np.arange(32) <= counts[:, None]))
    hidden = jnp.asarray(rng.normal(size=(8, 32, 64)), dtype)
    inputs = (hidden, packed, wanted, jnp.asarray(rng.normal(size=(8, 32)), jnp.float32))
    alone = values_and_gradients(config, 4)(params, *inputs)
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, parameter_shardings(params, mesh))
        inputs = jax.device_put(inputs, batch_sharding(mesh))
        few, many = (
            values_and_gradients(config, chunk).lower(params, *inputs).compile()
            for chunk in (16, 4)
        )
        sharded = many(params, *inputs)
    gradient = sharded[0]["lm_head"]["kernel"]
    assert gradient.sharding.is_equivalent_to(params["lm_head"]["kernel"].sharding, 2)
    for one, other in zip(*map(jax.tree.leaves, (sharded, alone)), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        tolerance = 1e-5 if dtype == "float32" else 0.02 * np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=tolerance)
    few, many = (count_collectives(compiled.as_text()) for compiled in (few, many))
    if mesh.shape["tensor"] == 1:
        assert few == many
    # The matrix in float32 and, over `tensor`, one number for each place and the gradient of its
    # hidden state.
    share = 4 * 64 * vocab // mesh.shape["tensor"]
    places = 32 * 8 // batch_devices(mesh)
    assert share <= many["all-reduce"].result < share + 4 * places * (64 + 16)
