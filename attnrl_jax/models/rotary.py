"""Rotary positions.

Suffixes name the axes: B batch, T time, H heads, D head_dim.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnrl_jax.models.config import RopeScaling


def rotary_tables(
    positions: Int[Array, "batch time"],
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
) -> tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]]:
    """Cosine and sine of the rotary angles, float32 (RoFormer, arXiv 2104.09864, eq. 34)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        # Llama 3.1: long wavelengths are stretched, short ones kept, with a ramp between.
        turns = scaling.original_max_length * frequencies / (2 * np.pi)
        ramp = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        ramp = np.clip(ramp, 0.0, 1.0)
        frequencies = frequencies * (ramp + (1 - ramp) / scaling.factor)
    table = jnp.asarray(frequencies, jnp.float32)
    angles = positions.astype(jnp.float32)[:, :, None] * table[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHD: Array, cos: Array, sin: Array) -> Array:
    """Applies rotary embeddings to halves of head_dim, as Hugging Face checkpoints expect."""
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHD.dtype)
