"""The device mesh and the one table from parameter path to `PartitionSpec`.

Mesh axes: `data` (replicas of the parameters), `fsdp` (parameters and optimizer state cut along
their width), `tensor` (heads and the wide axis of the MLP). Batches are cut over `data` and
`fsdp` together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
    """Devices per mesh axis; -1 (at most once) takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [config.data, config.fsdp, config.tensor]
    if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
        raise ValueError(f"mesh axes must be positive, -1 at most once; got {config}")
    if -1 in shape:
        rest = int(np.prod([n for n in shape if n != -1]))
        shape[shape.index(-1)] = len(devices) // rest
    if int(np.prod(shape)) != len(devices):
        raise ValueError(f"{config} does not fit {len(devices)} devices")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_devices(mesh: Mesh) -> int:
    """Devices over which the batch axis is cut: row counts are padded to a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def fit_spec(
    spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec:
    """Drops mesh axes that do not divide their array axis (small models, odd vocabularies)."""
    fitted = []
    for axis, names in enumerate(spec):
        group = (names,) if isinstance(names, str) else (names or ())
        size = int(np.prod([sizes[name] for name in group])) if group else 1
        fitted.append(names if axis < len(shape) and shape[axis] % size == 0 else None)
    return PartitionSpec(*fitted)


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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Pins the layout of an activation under the current mesh; does nothing without one.

    Without these constraints XLA is free to replicate the batch axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    fitted = fit_spec(PartitionSpec(*spec), x.shape, dict(mesh.shape))
    return jax.lax.with_sharding_constraint(x, fitted)
