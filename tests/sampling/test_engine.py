"""The decode cache against the full forward pass, truncation, and when `generate` stops."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from attnrl_jax.compilation.counts import Collectives, bytes_per_device, count_collectives
from attnrl_jax.models.transformer import KeyValues, decode, forward, group_layers, unembed
from attnrl_jax.sampling.cache import (
    append_in_loop,
    append_scattered,
    append_token,
    constrain_cache,
    empty_cache,
    fork_in_loop,
    fork_rows,
    fork_scattered,
)
from attnrl_jax.sampling.engine import (
    Admissions,
    Sampling,
    empty_state,
    generate,
    insert,
    narrow,
    prefill,
    sample_tokens,
    truncate_logits,
)
from attnrl_jax.shapes import bucket_length
from attnrl_jax.sharding import CACHE_SPEC, MeshConfig, batch_devices, fit_spec, make_mesh


@pytest.mark.parametrize(("length", "wanted"), [(0, 64), (1, 64), (64, 64), (65, 128)])
def test_buckets(length, wanted):
    assert bucket_length(length, 64) == wanted


def key_values(x) -> KeyValues:
    """`x` with time before head_dim as values, its negative as keys."""
    return KeyValues(-jnp.swapaxes(x, 3, 4), x)


def alone(write):
    """`write` for a cache of one group of layers."""

    def writes_one(cache, new, *where):
        new = (new,) if write is append_token else new
        [written] = write((cache,), new, *where)
        return written

    return writes_one


def test_cache_writes():
    """One row goes to two slots, a padding entry nowhere, a token to its slot's position."""
    cache = key_values(jnp.zeros((2, 3, 2, 6, 4)))
    rng = np.random.default_rng(0)
    prefix = jnp.asarray(rng.normal(size=(2, 2, 2, 5, 4)), jnp.float32)
    rows, slots = jnp.array([1, 0, 1]), jnp.array([2, 3, 0])
    wanted = np.zeros((2, 3, 2, 6, 4), np.float32)
    wanted[:, 2, :, :5] = wanted[:, 0, :, :5] = prefix[:, 1]
    empty = cache
    for fork in (alone(fork_rows), fork_in_loop, fork_scattered):
        cache = fork(empty, key_values(prefix), rows, slots)
        np.testing.assert_array_equal(cache.keys, -wanted.swapaxes(3, 4))
        np.testing.assert_array_equal(cache.values, wanted)

    token = jnp.asarray(rng.normal(size=(2, 3, 2, 1, 4)), jnp.float32)
    for slot, position in enumerate([5, 0, 3]):
        wanted[:, slot, :, position] = token[:, slot, :, 0]
    for append in (alone(append_token), append_in_loop, append_scattered):
        appended = append(cache, key_values(token), jnp.array([5, 0, 3]))
        np.testing.assert_array_equal(appended.keys, -wanted.swapaxes(3, 4))
        np.testing.assert_array_equal(appended.values, wanted)


def on_mesh(function, mesh, *arrays):
    """What a function returns under a mesh, laid out as in the sampler, and its collectives."""
    with jax.set_mesh(mesh):
        specs = [CACHE_SPEC if isinstance(x, KeyValues) else PartitionSpec() for x in arrays]
        arrays = [
            jax.tree.map(lambda x, s=spec: jax.device_put(x, fitted(s, x, mesh)), array)
            for array, spec in zip(arrays, specs, strict=True)
        ]
        jitted = jax.jit(lambda *arrays: constrain_cache((function(*arrays),))[0])
        compiled = jitted.lower(*arrays).compile()
        return compiled(*arrays), count_collectives(compiled.as_text())


def fitted(spec, x, mesh):
    return NamedSharding(mesh, fit_spec(spec, x.shape, mesh.shape))


@pytest.mark.parametrize(
    ("mesh", "rows", "heads"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, 2),
        # Heads, and in the second case rows, are not cut.
        (MeshConfig(data=4, tensor=2), 4, 1),
        (MeshConfig(data=8), 6, 2),
    ],
    ids=["all", "rows", "slots"],
)
def test_every_device_writes_its_own_slots(mesh, rows, heads):
    """The loops of a TPU, cut over devices. A bug: tokens were sent to all devices slot by slot,
    and the whole cache copy by copy."""
    mesh = make_mesh(mesh)
    rng = np.random.default_rng(0)
    cache, prefix, token = (
        key_values(jnp.asarray(rng.normal(size=(3, count, heads, time, 4)), jnp.float32))
        for count, time in ((16, 6), (rows, 5), (16, 1))
    )
    positions = jnp.asarray(rng.integers(0, 6, 16))
    found, sent = on_mesh(append_in_loop, mesh, cache, token, positions)
    wanted = append_scattered(cache, token, positions)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert not sent

    # Into both ends of a device's slots, from its own rows and from others; one goes nowhere.
    chosen = jnp.array([rows - 1, 0, 2, 0, 1, 3])
    slots = jnp.array([0, 15, 7, 16, 8, 3])
    found, sent = on_mesh(fork_in_loop, mesh, cache, prefix, chosen, slots)
    wanted = fork_scattered(cache, prefix, chosen, slots)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    gathered = sent.pop("all-gather", Collectives())
    assert not sent
    if rows % batch_devices(mesh):
        assert not gathered.count
    else:
        # Keys and values of all prefixes once, a layer at a time; of the heads, those that lie on
        # the device.
        share = bytes_per_device(prefix) // (mesh.shape["tensor"] if heads > 1 else 1)
        assert (gathered.count, gathered.result) == (2 * 3, share)


def test_narrowing_keeps_slots_on_their_device(golden_model):
    """Two devices of four slots each; the third block of a slot's numbers is its own number."""
    config = golden_model("qwen2_untied").config
    state = jax.tree.map(
        lambda x: jnp.arange(8).reshape(8, *(1,) * (x.ndim - 1)).astype(x.dtype)
        + jnp.zeros_like(x), replace(empty_state(config, 8, 16), cache=()),
    )  # fmt: skip
    [cache] = empty_cache(config, 8, 16)
    numbers = jnp.arange(8.0)[None, :, None, None, None]
    cache = KeyValues(cache.keys + numbers, cache.values - numbers)
    got = narrow(replace(state, cache=(cache,)), np.array([[3, 0], [1, 2]]))
    slots = np.array([3, 0, 5, 6])
    assert got.length.tolist() == slots.tolist()
    assert got.tokens.shape == (4, 16)
    np.testing.assert_array_equal(got.tokens[:, 7], slots)
    np.testing.assert_array_equal(got.sampling.key[:, 1], slots)
    [kept] = got.cache
    np.testing.assert_array_equal(kept.keys[1, :, 0, 2, 5], slots)
    np.testing.assert_array_equal(kept.values[0, :, 1, 5, 2], -slots)


@partial(jax.jit, static_argnums=1)
def _decode_all(params, config, cache, tokens, starts):
    """Logits of 6 tokens per slot from `starts` on, one at a time over the cache."""

    def step(cache, ahead):
        positions = starts + ahead
        token = jnp.take_along_axis(tokens, positions[:, None], axis=1)
        hidden, new = decode(params, config, token, positions[:, None], cache, positions)
        logits = unembed(params, config, hidden[:, 0])
        return append_token(cache, new, positions), logits

    return jax.lax.scan(step, cache, jnp.arange(6))[1]


def test_cached_decoding_equals_the_full_forward_pass(model):
    """Slots start at different cuts of the same two prefilled rows."""
    tokens = np.random.default_rng(1).integers(0, 256, size=(2, 20)).astype(np.int32)
    full = forward(model.params, model.config, jnp.asarray(tokens), jnp.array([20, 20]))
    logits = np.asarray(unembed(model.params, model.config, full.hidden))
    # Rows hold other tokens from 12 and 9 on: their keys must never be read.
    lengths = np.array([12, 9])
    prefixes = np.where(np.arange(20)[None] < lengths[:, None], tokens, 7)
    prefix = prefill(model.params, model.config, prefixes, lengths)
    rows, starts = np.array([0, 1, 0, 1]), np.array([11, 8, 4, 0])
    groups = model.config.num_layers
    cache = fork_rows(empty_cache(model.config, 4, 24, groups), prefix, rows, np.arange(4))
    params = group_layers(model.params, groups)
    decoded = _decode_all(params, model.config, cache, tokens[rows], starts)
    for slot, (row, start) in enumerate(zip(rows, starts, strict=True)):
        wanted = logits[row, start : start + 6]
        np.testing.assert_allclose(decoded[:, slot], wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, {0, 1, 2, 3, 4}),
        (1.0, 2, {1, 3}),
        (1.0, 99, {0, 1, 2, 3, 4}),
        (0.4, 0, {3}),
        (0.45, 0, {1, 3}),
        (0.94, 0, {0, 1, 2, 3}),
        (1e-6, 0, {3}),
        # Of the two best, 0.4 / 0.7 < 0.6: the nucleus is taken of what top-k left.
        (0.6, 2, {1, 3}),
        (0.5, 2, {3}),
        # Tokens 0 and 2 tie.
        (1.0, 3, {0, 1, 2, 3}),
    ],
)
def test_truncation_by_hand(top_p, top_k, kept):
    probabilities = jnp.array([[0.125, 0.3, 0.125, 0.4, 0.05]])
    cut = truncate_logits(jnp.log(probabilities), jnp.array([top_p]), jnp.array([top_k]))
    assert set(np.flatnonzero(np.isfinite(cut[0])).tolist()) == kept
    np.testing.assert_array_equal(cut[0, list(kept)], jnp.log(probabilities)[0, list(kept)])


def test_samples_have_the_distribution_of_their_slot():
    """Frequencies over positions, per slot: plain, warm, top-p with top-k, greedy."""
    count = 4000
    logits = jnp.log(jnp.array([0.1, 0.3, 0.15, 0.4, 0.05]))
    temperature = jnp.array([1.0, 2.0, 1.0, 0.0])
    key = jax.random.key_data(jax.random.key(3))
    sampling = Sampling(
        key=jnp.tile(key, (4, 1)),
        temperature=temperature,
        top_p=jnp.array([1.0, 1.0, 0.9, 0.5]),
        top_k=jnp.array([0, 0, 2, 1]),
    )
    tokens, logprobs = jax.jit(
        jax.vmap(lambda position: sample_tokens(
            jnp.tile(logits, (4, 1)), sampling, jnp.full(4, position), True
        ))
    )(jnp.arange(count))  # fmt: skip
    frequency = np.stack([np.bincount(tokens[:, s], minlength=5) for s in range(4)]) / count
    warm = np.asarray(jax.nn.softmax(logits / 2))
    wanted = [np.exp(logits), warm, [0, 3 / 7, 0, 4 / 7, 0], [0, 0, 0, 1, 0]]
    np.testing.assert_allclose(frequency, np.stack(wanted), atol=0.03)
    assert not frequency[2, [0, 2, 4]].any()
    full = np.stack([logits, np.log(warm), logits, logits])
    reported = np.take_along_axis(full, np.asarray(tokens).T, axis=1)
    np.testing.assert_allclose(np.asarray(logprobs).T, reported, atol=1e-5)


def test_generate_stops_when_the_host_is_needed(golden_model):
    """After `max_steps`, once enough slots are free, or when all are; idle slots never change."""
    model = golden_model("qwen2_untied")
    tokens = np.full((2, 64), 9, np.int32)
    prefix = prefill(model.params, model.config, tokens, np.array([5, 3], np.int32))
    state = empty_state(model.config, 4, 64)
    entering = Admissions(
        slot=np.array([0, 2, 3, 4], np.int32),
        row=np.array([0, 1, 1, 0], np.int32),
        length=np.array([5, 3, 2, 1], np.int32),
        limit=np.array([7, 8, 22, 30], np.int32),
        seed=np.ones((4, 2), np.uint32),
        sample=np.arange(4, dtype=np.int32),
        temperature=np.ones(4, np.float32),
        top_p=np.ones(4, np.float32),
        top_k=np.zeros(4, np.int32),
    )
    state = insert(state, prefix, tokens, entering)
    assert state.active.tolist() == [True, False, True, True]
    none = np.zeros(0, np.int32)

    def run(state, max_steps, refill_at):
        limits = np.int32(max_steps), np.int32(refill_at)
        return generate(group_layers(model.params, 1), model.config, state, none, *limits)

    state, steps = run(state, 1, 9)
    assert (int(steps), state.length.tolist()) == (1, [6, 0, 4, 3])
    state, steps = run(state, 50, 2)
    assert (int(steps), state.length.tolist()) == (4, [7, 0, 8, 7])
    kept = np.asarray(state.tokens)
    state, steps = run(state, 50, 9)
    assert (int(steps), state.length.tolist()) == (15, [7, 0, 8, 22])
    np.testing.assert_array_equal(state.tokens[:3], kept[:3])
    assert not state.active.any()
    assert not state.ended.any()
    state, steps = run(state, 50, 9)
    assert int(steps) == 0
