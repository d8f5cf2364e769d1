"""The key/value cache of the decode slots: allocation, lengths, and its two writes.

A cache is a tuple of `KeyValues`, one for each group of layers (`models.transformer.decode`).

Layout as in `KeyValues`: `[layer, slot, kv_head, head_dim, time]` for keys and
`[layer, slot, kv_head, time, head_dim]` for values, each in the order in which attention reads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Int

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import KeyValues
from attnrl_jax.sharding import CACHE_SPEC, batch_devices, constrain, fit_spec

Cache = tuple[KeyValues, ...]


def constrain_cache(cache: Cache) -> Cache:
    """Pins the cache to its layout under the current mesh."""
    return jax.tree.map(lambda x: constrain(x, *CACHE_SPEC), cache)


def empty_cache(config: ModelConfig, slots: int, length: int, groups: int = 1) -> Cache:
    """A cache of zeros in the compute dtype of the model, its layers in so many groups."""
    heads = (config.num_layers // groups, slots, config.num_kv_heads)
    return tuple(
        KeyValues(
            jnp.zeros((*heads, config.head_dim, length), config.dtype),
            jnp.zeros((*heads, length, config.head_dim), config.dtype),
        )
        for _ in range(groups)
    )


def append_token(cache: Cache, token: Cache, positions: Int[Array, "slot"]) -> Cache:
    """Writes the keys and values of one token per slot, every layer at once, in place.

    Args:
      cache: of all slots.
      token: of time 1, from the forward pass of that token.
      positions: where in time, inside the cache.
    """
    # On a TPU a scatter would copy the cache for every token: 4 of 4.1 GiB of temporaries of
    # R1-Distill-Qwen-1.5B with 64 slots of 9,216 tokens, as its compiler counts them.
    return tuple(
        jax.lax.platform_dependent(
            held, new, positions, tpu=append_in_loop, default=append_scattered
        )
        for held, new in zip(cache, token, strict=True)
    )


def append_in_loop(cache: KeyValues, token: KeyValues, positions: Int[Array, "slot"]) -> KeyValues:
    """`append_token` of one group, slot by slot; every device its own slots."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _append_slots(cache, token, positions)
    # By hand: for a loop over slots that lie on several devices the compiler sends every slot's
    # token to all of them.
    cut = _cut(cache, mesh)
    return jax.shard_map(
        _append_slots, in_specs=(cut, cut, PartitionSpec(cut[1])), out_specs=cut, check_vma=False
    )(cache, token, positions)


def _append_slots(cache: KeyValues, token: KeyValues, positions: Int[Array, "slot"]) -> KeyValues:
    def one_slot(slot: Array, cache: KeyValues) -> KeyValues:
        new = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=1), token)
        time = positions[slot]
        update = jax.lax.dynamic_update_slice
        return KeyValues(
            update(cache.keys, new.keys, (0, slot, 0, 0, time)),
            update(cache.values, new.values, (0, slot, 0, time, 0)),
        )

    return jax.lax.fori_loop(0, positions.shape[0], one_slot, cache)


def _cut(cache: KeyValues, mesh: AbstractMesh) -> PartitionSpec:
    """How slots and heads lie on the devices of a mesh; the same for keys and values."""
    return fit_spec(CACHE_SPEC, cache.keys.shape, mesh.shape)


def append_scattered(
    cache: KeyValues, token: KeyValues, positions: Int[Array, "slot"]
) -> KeyValues:
    """`append_token` of one group, as one scatter for keys and one for values."""

    def write(rows: Array, new: Array, time_axis: int) -> Array:
        # The slot is a batch axis of the scatter: a cache cut over slots is written locally.
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(0, 2, 3),
            inserted_window_dims=(time_axis,),
            scatter_dims_to_operand_dims=(time_axis,),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        )
        return jax.lax.scatter(
            rows,
            positions[:, None],
            jnp.squeeze(new, time_axis),
            numbers,
            unique_indices=True,
            mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    return KeyValues(write(cache.keys, token.keys, 4), write(cache.values, token.values, 3))


def fork_rows(
    cache: Cache,
    prefix: KeyValues,
    rows: Int[Array, "fork"],
    slots: Int[Array, "fork"],
) -> Cache:
    """Copies prefilled rows to the start of slots, in place; one row may go to many.

    Args:
      cache: of all slots.
      prefix: of the rows and all layers, no longer than the cache.
      rows: row of the prefix for each copy.
      slots: slot for each copy, all different; those out of range are left out.
    """
    # As with `append_token`, a TPU would copy the cache for a scatter.
    size = cache[0].keys.shape[0]
    return tuple(
        jax.lax.platform_dependent(
            held,
            jax.tree.map(lambda x, g=group: x[g * size : (g + 1) * size], prefix),
            rows,
            slots,
            tpu=fork_in_loop,
            default=fork_scattered,
        )
        for group, held in enumerate(cache)
    )


def fork_in_loop(
    cache: KeyValues, prefix: KeyValues, rows: Int[Array, "fork"], slots: Int[Array, "fork"]
) -> KeyValues:
    """`fork_rows` to one group, copy by copy; every device into its own slots.

    A row may be asked for on any device. Where rows are cut over devices, all rows of one layer
    are gathered on each of them at a time.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _copy_rows(cache, prefix, rows, slots)
    cut, prefix_cut = _cut(cache, mesh), _cut(prefix, mesh)

    def on_device(cache: KeyValues, prefix: KeyValues, rows: Array, slots: Array) -> KeyValues:
        layers, count = cache.keys.shape[:2]
        if cut[1] is not None:
            # Slots of others are out of range.
            own = jax.lax.axis_index(cut[1]) == slots // count
            slots = jnp.where(own, slots % count, count)
        if prefix_cut[1] is None or batch_devices(mesh) == 1:
            return _copy_rows(cache, prefix, rows, slots)

        def one_layer(layer: Array, cache: KeyValues) -> KeyValues:
            def whole(x: Array) -> Array:
                x = jax.lax.dynamic_slice_in_dim(x, layer, 1, axis=0)
                return jax.lax.all_gather(x, prefix_cut[1], axis=1, tiled=True)

            return _copy_rows(cache, jax.tree.map(whole, prefix), rows, slots, layer)

        return jax.lax.fori_loop(0, layers, one_layer, cache)

    return jax.shard_map(
        on_device,
        in_specs=(cut, prefix_cut, PartitionSpec(), PartitionSpec()),
        out_specs=cut,
        check_vma=False,
    )(cache, prefix, rows, slots)


def _copy_rows(
    cache: KeyValues,
    prefix: KeyValues,
    rows: Int[Array, "fork"],
    slots: Int[Array, "fork"],
    layer: Int[Array, ""] | int = 0,
) -> KeyValues:
    """Copies rows to slots, those of the layers of `prefix` to `layer` and the following."""

    def one_copy(fork: Array, cache: KeyValues) -> KeyValues:
        def write(target: Array, source: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(source, rows[fork], 1, axis=1)
            return jax.lax.dynamic_update_slice(target, row, (layer, slots[fork], 0, 0, 0))

        is_slot = slots[fork] < cache.keys.shape[1]
        return jax.lax.cond(is_slot, lambda c: jax.tree.map(write, c, prefix), lambda c: c, cache)

    return jax.lax.fori_loop(0, slots.shape[0], one_copy, cache)


def fork_scattered(
    cache: KeyValues, prefix: KeyValues, rows: Int[Array, "fork"], slots: Int[Array, "fork"]
) -> KeyValues:
    """`fork_rows` to one group, as one scatter for keys and one for values."""
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, 2, 3, 4),
        inserted_window_dims=(1,),
        scatter_dims_to_operand_dims=(1,),
    )

    def write(target: Array, source: Array) -> Array:
        # Updates carry the copies where the slots were.
        return jax.lax.scatter(
            target,
            slots[:, None],
            jnp.take(source, rows, axis=1),
            numbers,
            mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
        )

    return jax.tree.map(write, cache, prefix)
