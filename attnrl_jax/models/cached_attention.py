"""Attention of decoding: a few new tokens over the cache.

Suffixes name the axes: B batch, T query time, U key time of the new tokens, S cache time, H heads,
K key/value heads, G query heads of one key/value head, D head_dim.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from attnrl_jax.models.attention import MASKED


def cached_attention(
    q_BTHD: Array,
    k_BKUD: Array,
    v_BKUD: Array,
    cache_k_BKDS: Array,
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
    q_BKGTD = jnp.moveaxis(q_BTHD.reshape(batch, time, kv_heads, heads // kv_heads, head_dim), 1, 3)
    scale = head_dim**-0.5
    past = scale * jnp.einsum(
        "BKGTD,BKDS->BKGTS", q_BKGTD, cache_k_BKDS, preferred_element_type=jnp.float32
    )
    filled = jnp.arange(cache_k_BKDS.shape[3])[None, :] < cache_lengths[:, None]
    past = jnp.where(filled[:, None, None, None, :], past, MASKED)
    # The few new tokens as sums, not as many tiny matrix products.
    own = scale * jnp.sum(
        q_BKGTD[:, :, :, :, None].astype(jnp.float32) * k_BKUD[:, :, None, None], axis=-1
    )
    own = jnp.where(jnp.tri(time, dtype=bool)[None, None, None], own, MASKED)
    largest = jnp.maximum(past.max(axis=-1, keepdims=True), own.max(axis=-1, keepdims=True))
    past, own = jnp.exp(past - largest), jnp.exp(own - largest)
    total = past.sum(axis=-1, keepdims=True) + own.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "BKGTS,BKSD->BKGTD",
        past.astype(cache_v_BKSD.dtype),
        cache_v_BKSD,
        preferred_element_type=jnp.float32,
    )
    out = (out + jnp.sum(own[..., None] * v_BKUD[:, :, None, None], axis=-2)) / total
    return jnp.moveaxis(out, 3, 1).reshape(batch, time, heads, head_dim).astype(v_BKUD.dtype)
