"""Attention of decoding: a few new tokens over the cache.

Suffixes name the axes: B batch, T query time, U key time of the new tokens, S cache time, H heads,
K key/value heads, G query heads of one key/value head, D head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from attnrl_jax.models.attention import MASKED


def cached_attention(
    q_BTHD: Array,
    k_BKUD: Array,
    v_BKUD: Array,
    cache_k_BKSD: Array,
    cache_v_BKSD: Array,
    cache_lengths: Int[Array, "batch"],
) -> Array:
    """Attention of a few new tokens over the first `cache_lengths` cache entries and themselves.

    The cache is read only: the caller writes the new keys and values once for all layers, which
    keeps that write in place.

    Returns:
      outputs `[batch, time, head, head_dim]`.
    """
    batch, time, heads, head_dim = q_BTHD.shape
    kv_heads = k_BKUD.shape[1]
    q = q_BTHD.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    scale = head_dim**-0.5
    past = scale * jnp.einsum(
        "BTKGD,BKSD->BKGTS", q, cache_k_BKSD, preferred_element_type=jnp.float32
    )
    filled = jnp.arange(cache_k_BKSD.shape[2])[None, :] < cache_lengths[:, None]
    past = jnp.where(filled[:, None, None, None, :], past, MASKED)
    own = scale * jnp.einsum("BTKGD,BKUD->BKGTU", q, k_BKUD, preferred_element_type=jnp.float32)
    causal = jnp.arange(time)[:, None] >= jnp.arange(time)[None, :]
    own = jnp.where(causal[None, None, None], own, MASKED)
    attention = jax.nn.softmax(jnp.concatenate([past, own], axis=-1), axis=-1)
    attention = attention.astype(v_BKUD.dtype)
    past, own = jnp.split(attention, [cache_k_BKSD.shape[2]], axis=-1)
    out = jnp.einsum("BKGTS,BKSD->BTKGD", past, cache_v_BKSD)
    out = out + jnp.einsum("BKGTU,BKUD->BTKGD", own, v_BKUD)
    return out.reshape(batch, time, heads, head_dim)
