"""Abstract arrays of a run: shapes, dtypes and layouts of what its programs are called with."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnrl_jax.compilation.counts import bytes_per_device
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from attnrl_jax.sharding import batch_devices, batch_sharding, parameter_shardings
from attnrl_jax.training import step
from attnrl_jax.training.state import TrainConfig, abstract_state


class Trees:
    """Abstract arrays of a run: those that stay for a while by name, and batches."""

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        mesh: Mesh,
        sampling_mesh: Mesh,
        sampling_dtype: str,
    ):
        self.model, self.config, self.mesh, self.sampling_mesh = model, config, mesh, sampling_mesh
        self.sampling_model = model.with_dtype(sampling_dtype or model.dtype)
        self.is_split = set(mesh.devices.flat).isdisjoint(sampling_mesh.devices.flat)
        shapes = jax.eval_shape(partial(init_params, model), jax.random.key(0))
        self.state = abstract_state(shapes, config.optimizer, mesh)
        self.params = self.state.params
        zeros, sums = jax.eval_shape(step.no_gradients, shapes)
        # Laid out as they come out of a program, so that the run finds its programs compiled.
        whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), sums)
        self.gradients = (
            laid_out(zeros, parameter_shardings(zeros, mesh)),
            laid_out(sums, whole),
        )
        dtype = self.sampling_model.dtype
        cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
        self.copy = laid_out(cast, parameter_shardings(cast, sampling_mesh))
        self.held = {
            "parameters": self.params,
            "optimizer state": self.state.opt_state,
            "sampling copy": self.copy,
            "gradients": self.gradients,
        }
        if config.loss.kl_beta > 0:
            self.held["reference"] = self.params
        self.always = ("parameters", "optimizer state", "reference")

    def with_batches_of(self, part: int) -> Trees:
        """The same, but that whole batches are a half or a quarter, rounded up."""
        devices = batch_devices(self.mesh)
        length = self.config.packed_length(devices)
        sizes: dict[str, Any] = {"pack_length": length}
        for name in ("score_batch_tokens", "micro_batch_tokens"):
            whole = max(getattr(self.config, name) // length // devices, 1)
            sizes[name] = -(-whole // part) * length * devices
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, **sizes)
        return other

    def bytes_of(self, mesh: Mesh, names: Sequence[str]) -> dict[str, int]:
        """Bytes per device of what is held on the devices of a mesh."""
        there = {name: tree for name, tree in self.held.items() if name in names}
        return {
            name: bytes_per_device(tree)
            for name, tree in there.items()
            if set(devices_of(tree)) & set(mesh.devices.flat)
        }

    def around(self, mesh: Mesh, names: Sequence[str], given: Sequence[str]) -> dict[str, Any]:
        """What a program finds on its devices: `held` and `given` of `Program`.

        Args:
          mesh: of the program.
          names: of what lies there.
          given: those of them that it is called with.
        """
        held = [name for name in names if name not in given]
        return {"held": self.bytes_of(mesh, held), "given": self.bytes_of(mesh, given)}

    def rows(self, mesh: Mesh, tokens: int, dtype: Any) -> Any:
        """`[batch, time]` of the largest batch of about so many packed tokens."""
        devices = batch_devices(mesh)
        length = self.config.packed_length(devices)
        each = max(tokens // length // devices, 1)
        return jax.ShapeDtypeStruct((each * devices, length), dtype, sharding=batch_sharding(mesh))


def laid_out(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def platform_of(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def devices_of(tree: Any) -> list[jax.Device]:
    return list(jax.tree.leaves(tree)[0].sharding.mesh.devices.flat)


def host_array(*shape: int, dtype: Any = jnp.int32) -> Any:
    """An array that comes from the host: the compiler decides where it lies."""
    return jax.ShapeDtypeStruct(shape, dtype)
