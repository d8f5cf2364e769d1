"""What the routes of attention have in common: step weights, hidden logits, blocks of an axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

# Finite, so that rows without any visible key (padding) stay finite.
MASKED = float(np.finfo(np.float32).min) / 2


@struct.dataclass
class StepWeights:
    """What attention needs to sum each key's column over the queries far enough ahead.

    Attributes:
      step_ids: range of each token.
      weights: 1 / tokens of the query's range, 0 for padding.
      delta: least distance in ranges between a key and the queries that count.
    """

    step_ids: Int[Array, "batch time"]
    weights: Float[Array, "batch time"]
    delta: int = struct.field(pytree_node=False, default=4)


def cut(x: Array, axis: int, block: int) -> Array:
    """Pads an axis with zeros to whole blocks and moves the blocks in front."""
    time = x.shape[axis]
    blocks = -(-time // block)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, blocks * block - time)
    x = jnp.pad(x, widths).reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def join(x: Array, axis: int, time: int) -> Array:
    """Undoes `cut`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, time, axis=axis)
