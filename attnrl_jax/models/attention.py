"""Causal attention of whole sequences, blockwise over queries.

Suffixes name the axes: B batch, T query time, U key time, H heads, K key/value heads,
G query heads of one key/value head, D head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from attnrl_jax.models.config import RopeScaling

# Finite, so that rows without any visible key (padding) stay finite in the backward pass.
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


def blockwise_attention(
    q_BTHD: Array,
    k_BKUD: Array,
    v_BKUD: Array,
    visible_until: Int[Array, "batch time"],
    block_length: int,
    steps: StepWeights | None = None,
    keep_maps: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """Attention of whole sequences, one block of queries at a time.

    Query q sees key p exactly if p <= q < visible_until[p]. That one interval per key covers
    padding on either side (an empty one), sequences packed behind each other (to the end of the
    sequence) and trees laid out depth first (to the end of what hangs below the key). A block
    holds whole softmax rows, which is what the column sums of forward context influence need:
    they come with the same sweep.

        c[h, p] = sum over q with step(q) >= step(p) + delta of A[h, q, p] / |step(q)|

    Returns:
      outputs `[batch, time, head, head_dim]`; column sums `[batch, head, time]` if `steps` is
      given; maps `[batch, head, query, key]` float32 if `keep_maps`.
    """
    batch, time, heads, head_dim = q_BTHD.shape
    kv_heads = k_BKUD.shape[1]
    scale = head_dim**-0.5
    block = min(block_length, time)
    num_blocks = -(-time // block)
    padding = num_blocks * block - time

    q_BTKGD = q_BTHD.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    key_index = jnp.arange(time)

    def blocked(x, axis_value=0):
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=axis_value)
        return jnp.moveaxis(x.reshape(batch, num_blocks, block, *x.shape[2:]), 1, 0)

    def one_block(columns, inputs):
        q, index, step_ids, weights = inputs
        logits = scale * jnp.einsum(
            "BTKGD,BKUD->BKGTU", q, k_BKUD, preferred_element_type=jnp.float32
        )
        visible = (index[None, :, None] >= key_index[None, None, :]) & (
            index[None, :, None] < visible_until[:, None, :]
        )
        visible = visible[:, None, None]
        # Rows that see nothing come out of softmax uniform: zero them.
        attention = jax.nn.softmax(jnp.where(visible, logits, MASKED), axis=-1) * visible
        out = jnp.einsum("BKGTU,BKUD->BTKGD", attention.astype(v_BKUD.dtype), v_BKUD)
        if steps is not None:
            ahead = step_ids[:, :, None] >= steps.step_ids[:, None, :] + steps.delta
            weighted = weights[:, :, None] * ahead
            columns = columns + jnp.einsum("BKGTU,BTU->BKGU", attention, weighted)
        return columns, (out, attention if keep_maps else None)

    columns = jnp.zeros((batch, kv_heads, heads // kv_heads, time), jnp.float32)
    step_ids = steps.step_ids if steps is not None else jnp.zeros_like(visible_until)
    weights = steps.weights if steps is not None else jnp.zeros(visible_until.shape, jnp.float32)
    index = (jnp.arange(num_blocks * block)).reshape(num_blocks, block)
    inputs = (blocked(q_BTKGD), index, blocked(step_ids), blocked(weights))
    if num_blocks == 1:
        columns, (out, maps) = one_block(columns, jax.tree.map(lambda x: x[0], inputs))
        out, maps = out[None], None if maps is None else maps[None]
    else:
        # Recomputed in the backward pass: kept attention would be quadratic in time.
        body = jax.checkpoint(one_block, prevent_cse=False)
        columns, (out, maps) = jax.lax.scan(body, columns, inputs)

    out = jnp.moveaxis(out, 0, 1).reshape(batch, num_blocks * block, heads, head_dim)[:, :time]
    if maps is not None:
        maps = jnp.moveaxis(maps, 0, 3).reshape(batch, heads, num_blocks * block, time)
        maps = maps[:, :, :time]
    return out, columns.reshape(batch, heads, time) if steps is not None else None, maps
