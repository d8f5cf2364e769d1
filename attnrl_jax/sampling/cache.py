"""The key/value cache of the decode slots: allocation, lengths, and its two writes.

Layout `[layer, slot, kv_head, time, head_dim]`: the keys of one head lie side by side in time,
which is the order in which attention reads them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import KeyValues
from attnrl_jax.sharding import CACHE_SPEC, constrain


def constrain_cache(cache: KeyValues) -> KeyValues:
    """Pins the cache to its layout under the current mesh."""
    return jax.tree.map(lambda x: constrain(x, *CACHE_SPEC), cache)


def empty_cache(config: ModelConfig, slots: int, length: int) -> KeyValues:
    """A cache of zeros in the compute dtype of the model."""
    shape = (config.num_layers, slots, config.num_kv_heads, length, config.head_dim)
    # Two arrays, not one twice: a donated buffer may occur only once.
    return KeyValues(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def append_token(cache: KeyValues, token: KeyValues, positions: Int[Array, "slot"]) -> KeyValues:
    """Writes the keys and values of one token per slot, every layer at once, in place.

    Args:
      cache: of all slots.
      token: `[layer, slot, kv_head, 1, head_dim]`, from the forward pass of that token.
      positions: where in time, inside the cache.
    """
    # The slot is a batch axis of the scatter, so that a cache cut over slots is written locally.
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, 2, 3),
        inserted_window_dims=(3,),
        scatter_dims_to_operand_dims=(3,),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )

    def write(rows: Array, new: Array) -> Array:
        return jax.lax.scatter(
            rows,
            positions[:, None],
            new[:, :, :, 0],
            numbers,
            unique_indices=True,
            mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    return jax.tree.map(write, cache, token)


def fork_rows(
    cache: KeyValues,
    prefix: KeyValues,
    rows: Int[Array, "fork"],
    slots: Int[Array, "fork"],
) -> KeyValues:
    """Copies prefilled rows to the start of slots; one row may go to many.

    Args:
      cache: of all slots.
      prefix: `[layer, row, kv_head, prefix time, head_dim]`, no longer than the cache.
      rows: row of the prefix for each copy.
      slots: slot for each copy, all different; those out of range are left out.
    """
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, 2, 3, 4),
        inserted_window_dims=(1,),
        scatter_dims_to_operand_dims=(1,),
    )

    def write(target: Array, source: Array) -> Array:
        # Updates carry the copies where the slots were: [layer, fork, kv_head, time, head_dim].
        return jax.lax.scatter(
            target,
            slots[:, None],
            jnp.take(source, rows, axis=1),
            numbers,
            mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
        )

    return jax.tree.map(write, cache, prefix)
