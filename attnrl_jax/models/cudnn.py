"""Attention on an NVIDIA GPU: cuDNN's flash attention through `jax.nn`.

It knows the length of a sequence, not sequences packed behind each other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LARGEST_HEAD_DIM = 128


def why_not(head_dim: int, dtype: Any, layout: str) -> str | None:
    """What keeps cuDNN's attention from running on a GPU, or None."""
    if layout != "single":
        return f"it knows one right-padded row per sequence (layout 'single'), not {layout!r}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16, not {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > LARGEST_HEAD_DIM:
        return f"head_dim {head_dim} is no multiple of 8 up to {LARGEST_HEAD_DIM}"
    return None


def attention(
    q_BTHD: Array,
    k_BKUD: Array,
    v_BKUD: Array,
    lengths: Int[Array, "batch"],
    interpret: bool = False,
) -> tuple[Array, Float[Array, "batch time head"]]:
    """Outputs `[B, T, H, D]` (0 for padding) and log-sum-exp, differentiable in the outputs.

    jax rounds the log-sum-exp to the compute dtype: with bfloat16, column sums made from it carry
    an error of up to 2^-8 of a query's log-sum-exp, like the logits themselves.

    Args:
      q_BTHD, k_BKUD, v_BKUD: queries, keys, values.
      lengths: tokens of each right-padded row.
      interpret: the same call with the plain implementation of `jax.nn`.
    """
    lengths = lengths.astype(jnp.int32)
    out, logsumexp = jax.nn.dot_product_attention(
        q_BTHD,
        jnp.swapaxes(k_BKUD, 1, 2),
        jnp.swapaxes(v_BKUD, 1, 2),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="xla" if interpret else "cudnn",
        return_residual=True,
    )
    real = jnp.arange(q_BTHD.shape[1])[None, :] < lengths[:, None]
    return jnp.where(real[..., None, None], out, 0), logsumexp.astype(jnp.float32)
