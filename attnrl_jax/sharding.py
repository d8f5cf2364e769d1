"""The device mesh and the one table from parameter path to `PartitionSpec`.

Mesh axes: `data` (replicas of the parameters), `fsdp` (parameters and optimizer state cut along
their width), `tensor` (heads and the wide axis of the MLP). Batches are cut over `data` and
`fsdp` together.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# First match wins. Parameters of the layers carry a leading layer axis, never cut.
PARAMETER_SPECS: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed_tokens/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"lm_head/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"layers/.*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel$",
     PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/.*/(o_proj|down_proj)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers/.*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/bias$", PartitionSpec(None, "tensor")),
    (r".*", PartitionSpec()),
)  # fmt: skip

# Keys and values: layer, slot, kv_head, and two axes that are never cut.
CACHE_SPEC = PartitionSpec(None, BATCH, "tensor", None, None)


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out.

    Sampling has a layout of its own, in which parameters are cut over `sampling_tensor` devices
    and otherwise whole: it reads all of them for every token.

    Attributes:
      data, fsdp, tensor: devices per axis; -1 (at most once) takes what is left.
      sampling_tensor: devices over which parameters are cut while sampling; 0 takes `tensor`.
      sampling_devices: devices of each process that sample while the others update (see
        `TrainConfig.overlap`); 0: all devices do both, in turn.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sampling_tensor: int = 0
    sampling_devices: int = 0

    def __post_init__(self):
        for name in ("sampling_tensor", "sampling_devices"):
            if getattr(self, name) < 0:
                raise ValueError(f"mesh.{name} must be >= 0; got {getattr(self, name)}")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh of `data`, `fsdp` and `tensor`.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        _axis_sizes(config, len(devices)), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def make_meshes(config: MeshConfig, devices: list[jax.Device] | None = None) -> tuple[Mesh, Mesh]:
    """Builds the mesh of scoring and updates, and that of sampling.

    Both have all devices, or with `sampling_devices` parts of them that have none in common. Where
    both have as many, they are in the same order, so that one jitted function goes from one layout
    to the other.

    Raises:
      ValueError: the devices do not suffice, or cannot be split so.
    """
    devices = jax.devices() if devices is None else devices
    if config.sampling_devices:
        updating, sampling = _split(devices, config.sampling_devices)
        # Not by `jax.make_mesh`: parts of a slice need not be boxes of its torus.
        mesh = _mesh_of(_axis_sizes(config, len(updating)), updating)
    else:
        mesh = make_mesh(config, devices)
        sampling = list(mesh.devices.flat)
    tensor = config.sampling_tensor or config.tensor
    if len(sampling) % tensor:
        name = "sampling_tensor" if config.sampling_tensor else "tensor"
        raise ValueError(
            f"{len(sampling)} sampling devices are no multiple of {tensor} (mesh.{name})"
        )
    return mesh, _mesh_of((len(sampling) // tensor, 1, tensor), sampling)


def _axis_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    shape = [config.data, config.fsdp, config.tensor]
    if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
        raise ValueError(
            f"mesh.data, fsdp and tensor must be positive, one of them may be -1 (the rest); got "
            f"{config.data}, {config.fsdp} and {config.tensor}"
        )
    if -1 in shape:
        rest = int(np.prod([n for n in shape if n != -1]))
        shape[shape.index(-1)] = devices // rest
    if int(np.prod(shape)) != devices:
        raise ValueError(
            f"mesh.data x fsdp x tensor does not fit {devices} devices: {config.data} x "
            f"{config.fsdp} x {config.tensor}; one of them may be -1, the rest"
        )
    return tuple(shape)


def _mesh_of(shape: tuple[int, ...], devices: list[jax.Device]) -> Mesh:
    """A mesh of devices in the order given."""
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _split(devices: list[jax.Device], each: int) -> tuple[list[jax.Device], list[jax.Device]]:
    """Devices that update and devices that sample, `each` of them of every process; by number."""
    processes = sorted({device.process_index for device in devices})
    updating, sampling = [], []
    for process in processes:
        own = sorted((d for d in devices if d.process_index == process), key=lambda d: d.id)
        if not 0 < each < len(own):
            raise ValueError(
                f"mesh.sampling_devices must leave devices to update with: {each} of the "
                f"{len(own)} of process {process}"
            )
        if len(processes) > 1 and 2 * each != len(own):
            # Parameters go from device to device of the same process, one to one.
            raise ValueError(
                f"with several processes mesh.sampling_devices must be half of each one's "
                f"devices: {each} of the {len(own)} of process {process}"
            )
        updating += own[: len(own) - each]
        sampling += own[len(own) - each :]
    return updating, sampling


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
    """Devices over which the batch axis is cut: row counts are padded to a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def fit_spec(
    spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec:
    """Drops mesh axes that do not divide their array axis (small models, odd vocabularies)."""
    fitted = []
    for axis, names in enumerate(spec):
        group = _group(names)
        size = int(np.prod([sizes[name] for name in group])) if group else 1
        fitted.append(names if axis < len(shape) and shape[axis] % size == 0 else None)
    return PartitionSpec(*fitted)


def _group(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that cut one array axis."""
    return (names,) if isinstance(names, str) else (names or ())


def _path_name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _parameter_spec(path: tuple[Any, ...], leaf: Any, sizes: Mapping[str, int]) -> PartitionSpec:
    name = _path_name(path)
    spec = next(spec for pattern, spec in PARAMETER_SPECS if re.search(pattern, name))
    return PartitionSpec() if len(spec) > len(leaf.shape) else fit_spec(spec, leaf.shape, sizes)


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """`NamedSharding` for every leaf of parameters or of an optimizer state that mirrors them.

    Args:
      tree: pytree of arrays or of `jax.ShapeDtypeStruct`.
      mesh: from `make_mesh`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _parameter_spec(path, leaf, mesh.shape)), tree
    )


def under(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Makes a mesh the current one of this thread; does nothing without one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def cast_to_mesh(params: Any, dtype: str, mesh: Mesh | None) -> Any:
    """Parameters in another dtype and in the layout of another mesh.

    They are cast where they lie, so that what moves is of `dtype`, and no device holds more than
    its shares before and after and one layer. On the same devices this is one jitted function. To
    as many others every device sends its share to one of them, where that function goes on.

    Args:
      params: parameters on the devices of one mesh.
      dtype: of the result.
      mesh: of the result, from the same `make_meshes`: the same devices, or none of them. None:
        only cast.
    """
    if mesh is None:
        return _cast(params, dtype, None)
    wanted = parameter_shardings(params, mesh)
    first = jax.tree.leaves(params)[0].sharding
    there = list(first.mesh.devices.flat) if isinstance(first, NamedSharding) else []
    here = list(mesh.devices.flat)
    if set(there) == set(here):
        return _cast(params, dtype, wanted)
    shares = _cast(params, dtype, None)
    if len(there) != len(here):
        # Which device gets what from whom is for the runtime to say, which it can in one process.
        return jax.device_put(shares, wanted)
    counterpart = dict(zip(there, here, strict=True))
    arrived = _mesh_of(first.mesh.devices.shape, here)

    def move(x: jax.Array) -> jax.Array:
        parts = [jax.device_put(s.data, counterpart[s.device]) for s in x.addressable_shards]
        assert isinstance(x.sharding, NamedSharding)
        sharding = NamedSharding(arrived, x.sharding.spec)
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    with jax.set_mesh(mesh):
        return _cast(jax.tree.map(move, shares), dtype, wanted)


def _cast(params: Any, dtype: str, target: Any | None) -> Any:
    return cast_function(params, dtype, target)(params)


def cast_function(params: Any, dtype: str, target: Any | None) -> Callable[[Any], Any]:
    """The jitted function of `cast_to_mesh` between two layouts of the same devices.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`, in the layout that is given to it.
      dtype: of the result.
      target: `NamedSharding` of every leaf of the result; None: only cast.
    """
    leaves, structure = jax.tree.flatten(params)
    wanted = None if target is None else tuple(jax.tree.leaves(target))
    return _cast_between(dtype, structure, tuple(x.sharding for x in leaves), wanted)


@functools.cache
def _cast_between(
    dtype: str,
    structure: Any,
    source: tuple[jax.sharding.Sharding, ...],
    target: tuple[NamedSharding, ...] | None,
) -> Callable[[Any], Any]:
    if target is None or source == target or not all(isinstance(s, NamedSharding) for s in source):
        laid_out = None if target is None else jax.tree.unflatten(structure, target)
        return jax.jit(lambda params: _cast_leaves(params, dtype), out_shardings=laid_out)
    before, after = (jax.tree.unflatten(structure, layout) for layout in (source, target))

    def cast(params: Any) -> Any:
        # Cast before it moves.
        params = _pin(_cast_leaves(params, dtype), before)
        if not isinstance(params, dict) or "layers" not in params:
            return params
        # Layer by layer: parameters that arrive all at once lie on the device twice.
        one_before, one_after = (
            jax.tree.map(_of_one_layer, layout["layers"]) for layout in (before, after)
        )

        def move(_: None, layer: Any) -> tuple[None, Any]:
            return None, _pin(_pin(layer, one_before), one_after)

        _, layers = jax.lax.scan(move, None, params["layers"])
        return params | {"layers": layers}

    return jax.jit(cast, out_shardings=after)


def _cast_leaves(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _pin(tree: Any, layout: Any) -> Any:
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, layout)


def _of_one_layer(stacked: NamedSharding) -> NamedSharding:
    return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))


def constrain_parameters(tree: Any) -> Any:
    """Pins parameters, gradients or optimizer moments to the table under the current mesh.

    Does nothing without a mesh. Without it XLA may replicate what has no input to follow, such as
    an accumulator of zeros.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    sizes = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(
            leaf, _parameter_spec(path, leaf, sizes)
        ),
        tree,
    )


def gather_output_matrix(params: Any) -> Any:
    """What `unembed` reads, whole along the width and cut over the vocabulary alone."""
    axes = {"embed_tokens": ("embedding", "tensor", None), "lm_head": ("kernel", None, "tensor")}
    name = "lm_head" if "lm_head" in params else "embed_tokens"
    leaf, *spec = axes[name]
    return {name: {leaf: constrain(params[name][leaf], *spec)}}


def cuts_rows(rows: int) -> bool:
    """Whether so many rows are cut over several devices of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(BATCH) & set(mesh.manual_axes):
        return False
    return batch_devices(mesh) > 1 and rows % batch_devices(mesh) == 0


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Pins the layout of an activation under the current mesh; does nothing without one.

    Without these constraints XLA is free to replicate the batch axis. Inside `jax.shard_map` its
    axes are passed over: every device has its own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    fitted = fit_spec(PartitionSpec(*spec), x.shape, dict(mesh.shape))
    left = (None if set(_group(names)) & set(mesh.manual_axes) else names for names in fitted)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*left))
