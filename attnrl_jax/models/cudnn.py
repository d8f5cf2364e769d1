"""Attention on an NVIDIA GPU: cuDNN's flash attention through `jax.nn`.

It knows the length of a sequence, not sequences packed behind each other: cuDNN has these, jax only
in functions that it does not publish.

Its gradient is jax's own rule, whose results have no names: every `ModelConfig.remat` but `none`
runs the forward pass once more.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

LARGEST_HEAD_DIM = 128


def why_never(head_dim: int, dtype: Any) -> str | None:
    """What keeps cuDNN's attention from running for any input of a model, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16, not {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > LARGEST_HEAD_DIM:
        return f"head_dim {head_dim} is no multiple of 8 up to {LARGEST_HEAD_DIM}"
    return None


def why_not(head_dim: int, dtype: Any, layout: str) -> str | None:
    """What keeps cuDNN's attention from running on a GPU, or None."""
    if layout != "single":
        return f"it knows one right-padded row per sequence (layout 'single'), not {layout!r}"
    return why_never(head_dim, dtype)


def attention(
    q_BTHD: Array,
    k_BKUD: Array,
    v_BKUD: Array,
    lengths: Int[Array, "batch"],
    interpret: bool = False,
) -> Array:
    """Outputs `[B, T, H, D]` (0 for padding), differentiable.

    Args:
      q_BTHD, k_BKUD, v_BKUD: queries, keys, values.
      lengths: tokens of each right-padded row.
      interpret: the same call with the plain implementation of `jax.nn`.
    """
    lengths = lengths.astype(jnp.int32)
    out = jax.nn.dot_product_attention(
        q_BTHD,
        jnp.swapaxes(k_BKUD, 1, 2),
        jnp.swapaxes(v_BKUD, 1, 2),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="xla" if interpret else "cudnn",
    )
    real = jnp.arange(q_BTHD.shape[1])[None, :] < lengths[:, None]
    return jnp.where(real[..., None, None], out, 0)
