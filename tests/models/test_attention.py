"""Attention against plain numpy, blockwise against whole, rotary tables against formulas."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.branching.importance import query_weights
from attnrl_jax.models.attention import (
    StepWeights,
    blockwise_attention,
    rotary_tables,
    rotate,
)
from attnrl_jax.models.cached_attention import cached_attention
from attnrl_jax.models.config import RopeScaling
from tests.segments import segment_ends

BATCH, TIME, HEADS, KV_HEADS, DIM = 2, 13, 4, 2, 6
DELTA = 2
# Row 0: two packed sequences and right padding. Row 1: left padding.
SEGMENTS = np.array([[1] * 6 + [2] * 5 + [0] * 2, [0] * 3 + [1] * 10], np.int32)
VISIBLE_UNTIL = segment_ends(SEGMENTS)
# Ranges of a row never go back; segments hide one from another.
STEPS = np.array([[0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, -1, -1], [0] * 4 + [1, 1, 2, 3, 3, 4, 5, 6, 6]])


def random_qkv(seed: int = 0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(BATCH, TIME, HEADS, DIM)).astype(np.float32)
    k = rng.normal(size=(BATCH, KV_HEADS, TIME, DIM)).astype(np.float32)
    v = rng.normal(size=(BATCH, KV_HEADS, TIME, DIM)).astype(np.float32)
    return q, k, v


def reference(q, k, v, segments, step_ids, delta):
    """The same by loops over batch and heads, in float64."""
    outputs = np.zeros(q.shape)
    columns = np.zeros((BATCH, HEADS, TIME))
    maps = np.zeros((BATCH, HEADS, TIME, TIME))
    for b in range(BATCH):
        sees = np.tril(segments[b][:, None] == segments[b][None, :]) & (segments[b] > 0)[:, None]
        sizes = {j: np.sum(step_ids[b] == j) for j in set(step_ids[b])}
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            logits = q[b, :, h].astype(np.float64) @ k[b, kv].T / np.sqrt(DIM)
            weights = np.exp(logits - logits.max()) * sees
            maps[b, h] = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
            outputs[b, :, h] = maps[b, h] @ v[b, kv]
            for p in range(TIME):
                for query in range(TIME):
                    if step_ids[b, query] >= max(step_ids[b, p] + delta, 0):
                        columns[b, h, p] += maps[b, h, query, p] / sizes[step_ids[b, query]]
    return outputs, columns, maps


@partial(jax.jit, static_argnums=3)
def attend(q, k, v, block: int):
    steps = StepWeights(jnp.asarray(STEPS), query_weights(jnp.asarray(STEPS)), DELTA)
    return blockwise_attention(q, k, v, jnp.asarray(VISIBLE_UNTIL), block, steps, keep_maps=True)


@pytest.mark.parametrize("block", [1, 5, 13, 64])
def test_equals_plain_numpy(block):
    q, k, v = random_qkv()
    outputs, columns, maps = attend(q, k, v, block)
    expected = reference(q, k, v, SEGMENTS, STEPS, DELTA)
    np.testing.assert_allclose(outputs, expected[0], atol=2e-6)
    np.testing.assert_allclose(maps, expected[2], atol=1e-6)
    real = (SEGMENTS > 0)[:, None]
    np.testing.assert_allclose(columns * real, expected[1] * real, atol=2e-6)


def test_padding_rows_are_zero_and_finite():
    q, k, v = random_qkv()
    outputs, columns, maps = attend(q, k, v, 5)
    padding = SEGMENTS == 0
    assert not np.asarray(outputs)[padding].any()
    assert not np.moveaxis(np.asarray(maps), 1, 2)[padding].any()
    assert not np.moveaxis(np.asarray(columns), 1, 2)[padding].any()


def test_blocks_give_the_gradients_of_one_block():
    q, k, v = random_qkv()
    mix = np.random.default_rng(1).normal(size=(BATCH, HEADS, TIME)).astype(np.float32)

    @partial(jax.jit, static_argnums=1)
    @partial(jax.grad, argnums=0)
    def gradient(qkv, block):
        outputs, columns, _ = attend(*qkv, block)
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(columns * mix)

    whole = gradient((q, k, v), 64)
    for block in (4, 5):
        for a, b in zip(whole, gradient((q, k, v), block), strict=True):
            assert np.isfinite(a).all()
            np.testing.assert_allclose(a, b, atol=2e-6)


def test_nothing_extra_unless_asked():
    q, k, v = random_qkv()
    with jax.disable_jit():
        outputs, columns, maps = blockwise_attention(q, k, v, jnp.asarray(VISIBLE_UNTIL), 5)
    assert columns is None
    assert maps is None
    np.testing.assert_allclose(outputs, attend(q, k, v, 5)[0], atol=1e-6)


def test_cache_equals_whole_sequence():
    """The last three tokens over a cache filled to different lengths, garbage behind."""
    q, k, v = random_qkv()
    whole = blockwise_attention(q, k, v, jnp.full((BATCH, TIME), TIME), 64)[0]
    new, lengths = 3, np.array([10, 6])
    rng = np.random.default_rng(2)
    cache_k = rng.normal(size=(BATCH, KV_HEADS, 16, DIM)).astype(np.float32) * 100
    cache_v = rng.normal(size=(BATCH, KV_HEADS, 16, DIM)).astype(np.float32) * 100
    tails = [[], [], []]
    for b, n in enumerate(lengths):
        cache_k[b, :, :n], cache_v[b, :, :n] = k[b, :, :n], v[b, :, :n]
        tails[0].append(q[b, n : n + new])
        tails[1].append(k[b, :, n : n + new])
        tails[2].append(v[b, :, n : n + new])
    got = cached_attention(*map(np.stack, tails), cache_k, cache_v, jnp.asarray(lengths))
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(got[b], whole[b, n : n + new], atol=2e-6)


def test_empty_cache_sees_itself_only():
    q, k, v = random_qkv()
    cache = np.full((BATCH, KV_HEADS, 8, DIM), 1e4, np.float32)
    got = cached_attention(q, k, v, cache, cache, jnp.zeros(BATCH, jnp.int32))
    whole = blockwise_attention(q, k, v, jnp.full((BATCH, TIME), TIME), 64)[0]
    np.testing.assert_allclose(got, whole, atol=2e-6)


def llama3_frequencies(dim, theta, factor, low, high, original):
    """The published formula of Llama 3.1, by cases of the wavelength."""
    scaled = []
    for i in range(0, dim, 2):
        frequency = theta ** (-i / dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(scaled)


@pytest.mark.parametrize("kind", ["none", "linear", "llama3"])
def test_rotary_angles(kind):
    dim, theta, positions = 128, 5e5, np.array([[0, 1, 7, 100], [3, 2, 1, 0]], np.int32)
    plain = theta ** (-np.arange(0, dim, 2) / dim)
    scaling, frequencies = {
        "none": (None, plain),
        "linear": (RopeScaling("linear", 4.0), plain / 4),
        "llama3": (
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
            llama3_frequencies(dim, theta, 8.0, 1.0, 4.0, 8192),
        ),
    }[kind]
    if kind == "llama3":
        kept, stretched = frequencies == plain, frequencies == plain / 8
        assert kept.sum() > 5
        assert stretched.sum() > 5
        assert (~kept & ~stretched).sum() > 5
    cos, sin = rotary_tables(jnp.asarray(positions), dim, theta, scaling)
    angles = positions[:, :, None] * frequencies
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-5)


def test_rotation_depends_on_distance_only():
    """Scores of rotated queries and keys are unchanged when all positions move together."""
    q, k, _ = random_qkv()
    k = np.swapaxes(k, 1, 2)

    def scores(offset):
        positions = jnp.broadcast_to(jnp.arange(TIME)[None] + offset, (BATCH, TIME))
        cos, sin = rotary_tables(positions, DIM, 1e4, None)
        turned = rotate(jnp.asarray(q[:, :, :KV_HEADS]), cos, sin)
        return jnp.einsum("BTHD,BUHD->BHTU", turned, rotate(jnp.asarray(k), cos, sin))

    np.testing.assert_allclose(scores(0), scores(50), atol=1e-4)
    assert np.abs(scores(0) - np.einsum("BTHD,BUHD->BHTU", q[:, :, :KV_HEADS], k)).max() > 0.5
    turned = rotate(jnp.asarray(q), *rotary_tables(jnp.full((BATCH, TIME), 9), DIM, 1e4, None))
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5
    )
