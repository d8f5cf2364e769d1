"""Attention of decoding against attention over the whole sequence."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from attnrl_jax.models.attention import Route, attention
from attnrl_jax.models.cached_attention import cached_attention

BATCH, TIME, HEADS, KV_HEADS, DIM = 2, 13, 4, 2, 6


def random_qkv():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(BATCH, TIME, HEADS, DIM)).astype(np.float32)
    k, v = rng.normal(size=(2, BATCH, KV_HEADS, TIME, DIM)).astype(np.float32)
    return q, k, v


def test_cache_equals_whole_sequence():
    """The last three tokens over a cache filled to different lengths, garbage behind."""
    q, k, v = random_qkv()
    whole = attention(q, k, v, jnp.full((BATCH, TIME), TIME), Route("plain"))[0]
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
    got = cached_attention(
        *map(np.stack, tails), cache_k.swapaxes(2, 3), cache_v, jnp.asarray(lengths)
    )
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(got[b], whole[b, n : n + new], atol=2e-6)


def test_empty_cache_sees_itself_only():
    q, k, v = random_qkv()
    cache = np.full((BATCH, KV_HEADS, 8, DIM), 1e4, np.float32)
    got = cached_attention(q, k, v, cache.swapaxes(2, 3), cache, jnp.zeros(BATCH, jnp.int32))
    whole = attention(q, k, v, jnp.full((BATCH, TIME), TIME), Route("plain"))[0]
    np.testing.assert_allclose(got, whole, atol=2e-6)
