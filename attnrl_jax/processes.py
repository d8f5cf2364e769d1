"""Several processes that run one program: one per host, with the devices of all in one mesh.

Every process runs the same code and takes the same decisions about all rows of a step; device
arrays are cut over the devices of all, and each process makes its own part of them. What one
process alone knows (verdicts on its share of the answers, branch positions in its share of the
problems, whether a file could be written) is exchanged here, and here it is checked that all decide
the same. With one process everything here is the plain thing.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class ProcessError(RuntimeError):
    """Processes that cannot go on together; raised in all of them."""


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = 100,
) -> None:
    """Joins the other processes of this run; call it before anything asks for devices.

    Without arguments the cluster is asked (TPU pod slices, SLURM, Open MPI and others that
    `jax.distributed` knows); where there is none, this process runs alone.

    Args:
      coordinator: `address:port` of process 0.
      num_processes, process_id: how many there are, and which this is. One process, without the
        two others, runs alone, whatever cluster it is in.
      timeout_seconds: how long the others are waited for, at the start and whenever one is silent.

    Raises:
      ValueError: some of the three were given but not all, or cannot be.
      ProcessError: the others were not found.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if num_processes == 1 and sum(given) == 1:
        return
    if any(given):
        _check_given(coordinator, num_processes, process_id)
    if timeout_seconds < 1:
        raise ValueError(f"the timeout of processes must be at least a second: {timeout_seconds}")
    # It takes SIGTERM, and tells all processes of one that any of them got (`interruption`).
    jax.config.update("jax_enable_preemption_service", True)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=timeout_seconds,
            shutdown_timeout_seconds=timeout_seconds,
        )
    except ValueError as error:
        # What jax says where it finds no cluster.
        if any(given) or "coordinator_address" not in str(error):
            raise ProcessError(str(error)) from error
        return
    except RuntimeError as error:
        raise ProcessError(f"the other processes were not found: {error}") from error
    # Programs of one CPU device in each process, dispatched ahead, run in any order, and processes
    # in which it differs would wait for each other.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _check_given(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError("coordinator, num_processes and process_id are given together or not")
    if num_processes < 1:
        raise ValueError(f"num_processes must be at least 1; got {num_processes}")
    if process_id not in range(num_processes):
        raise ValueError(f"process_id must be within 0 .. {num_processes - 1}; got {process_id}")
    address, _, port = coordinator.rpartition(":")
    if not address or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator must be address:port; got {coordinator!r}")


def disconnect() -> None:
    """Leaves the other processes in order: waits until all of them want to."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def count() -> int:
    """Processes of this run."""
    return jax.process_count()


def index() -> int:
    """Number of this process, 0 .. count() - 1."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return jax.process_index() == 0


def exchange_over(mesh: Mesh) -> None:
    """Chooses the devices over which processes tell each other what they know; all, unless said.

    Where some devices update while others sample, what goes on meanwhile must not wait for the
    update.

    Args:
      mesh: has as many devices of every process.

    Raises:
      ValueError: it has not.
    """
    own = [sum(d.process_index == k for d in mesh.devices.flat) for k in range(count())]
    if len(set(own)) > 1:
        raise ValueError(f"processes have different numbers of devices in {mesh}: {own}")
    _exchange_devices[:] = mesh.devices.flat


_exchange_devices: list[jax.Device] = []


def of_all(x: Any) -> np.ndarray:
    """`[process, ...]`: the array that each process has, in all of them."""
    devices = sorted(_exchange_devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    mesh = Mesh(np.array(devices).reshape(count(), -1), ("process", "device"))
    cut, whole = NamedSharding(mesh, PartitionSpec("process")), NamedSharding(mesh, PartitionSpec())
    own = np.asarray(x)
    # In a few sizes: every one is a program of its own.
    padded = np.zeros((1, 1 << max(own.size - 1, 0).bit_length()), own.dtype)
    padded[0, : own.size] = own.reshape(-1)
    dealt = jax.make_array_from_process_local_data(cut, padded, (count(), padded.shape[1]))
    found = np.asarray(_laid_out(whole)(dealt))
    return found[:, : own.size].reshape(count(), *own.shape)


@functools.cache
def _laid_out(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def share(items: int) -> np.ndarray:
    """Which of `items` things this process sees to: every one is some process's."""
    return np.arange(items) % count() == index()


def from_shares(tree: Any, items: int) -> Any:
    """What every process says of its `share` of some things, put together: of all of them.

    Args:
      tree: of arrays `[own item, ...]`.
      items: things in all.
    """
    if count() == 1:
        return tree
    most = -(-items // count())

    def whole(x: np.ndarray) -> np.ndarray:
        # As bytes: jax would make 32 bits of 64.
        flat = np.ascontiguousarray(x).reshape(len(x), math.prod(x.shape[1:])).view(np.uint8)
        padded = np.pad(flat, ((0, most - len(x)), (0, 0)))
        dealt = of_all(padded)
        in_order = dealt.reshape(count(), most, -1).swapaxes(0, 1).reshape(count() * most, -1)
        return in_order[:items].copy().view(x.dtype).reshape(items, *x.shape[1:])

    return jax.tree.map(whole, tree)


def own_rows(rows: int, sharding: jax.sharding.Sharding | None) -> np.ndarray:
    """Which rows of a device array of so many lie on devices of this process, ascending."""
    if count() == 1 or sharding is None:
        return np.arange(rows)
    places = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[place] for place in places]))


def rows_to_devices(
    tree: Any, own: np.ndarray, rows: int, sharding: jax.sharding.Sharding | None
) -> Any:
    """Arrays cut over devices by rows, of which each process has its own.

    Args:
      tree: of host arrays `[own row, ...]`.
      own: of `own_rows`.
      rows: of the device arrays.
      sharding: of these.
    """
    if count() == 1 or sharding is None:
        return jax.device_put(tree, sharding)

    def cut(x: np.ndarray) -> jax.Array:
        def part(at: Any) -> np.ndarray:
            return x[np.searchsorted(own, np.arange(rows)[at[0]])]

        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, part)

    return jax.tree.map(cut, tree)


def to_devices(tree: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """Host arrays, the same in all processes, cut over devices: each process sends its own part."""
    if count() == 1 or sharding is None:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda at: x[at]), tree
    )


def to_host(tree: Any) -> Any:
    """The whole of device arrays, in every process."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            assert isinstance(x.sharding, NamedSharding)
            return _laid_out(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
        return x

    return jax.device_get(jax.tree.map(whole, tree))


def total(tree: Any) -> Any:
    """The sum over processes of the arrays that each has."""
    if count() == 1:
        return tree
    return jax.tree.map(lambda own: of_all(own).sum(axis=0).astype(own.dtype), tree)


def check_agreement(what: str, values: Any) -> None:
    """Makes sure that all processes hold the same.

    Args:
      what: name in the message.
      values: pytree of arrays, numbers and strings.

    Raises:
      ProcessError: in all processes, naming those that differ from process 0.
    """
    if count() == 1:
        return
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(values):
        data = leaf.encode() if isinstance(leaf, str) else np.ascontiguousarray(leaf).tobytes()
        digest.update(f"{jax.tree_util.keystr(path)} {np.shape(leaf)} ".encode() + data)
    own = np.frombuffer(digest.digest(), np.uint32)
    all_of_them = of_all(own)
    differ = np.flatnonzero((all_of_them != all_of_them[0]).any(axis=1))
    if len(differ):
        raise ProcessError(
            f"processes disagree about {what}: not as in process 0 it is in process "
            f"{', '.join(map(str, differ))} (all must run the same program, settings and files)"
        )


def first_then_all(function: Callable[[], None]) -> None:
    """Calls a function in process 0; the others wait for it.

    Raises:
      Exception: what it raised, in process 0.
      ProcessError: that it raised, in the others.
    """
    error: Exception | None = None
    if is_first():
        try:
            function()
        except Exception as raised:
            error = raised
    if total(np.array(error is not None, np.int32)) and error is None:
        raise ProcessError("process 0 could not go on; its message says why")
    if error is not None:
        raise error


@contextmanager
def first_ahead() -> Iterator[None]:
    """Process 0 goes through the body before the others do: for files it makes and they read.

    Raises:
      ProcessError: in the others, that it failed.
    """
    failed = False
    if not is_first():
        first_then_all(lambda: None)
    try:
        yield
    except BaseException:
        failed = True
        raise
    finally:
        if is_first():
            total(np.array(failed, np.int32))


def from_first(text: str) -> str:
    """The text that process 0 has."""
    if count() == 1:
        return text
    own = np.frombuffer(text.encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    length = int(total(np.array(len(own), np.int32)))
    return total(np.pad(own, (0, length - len(own)))).tobytes().decode()


@contextmanager
def ending_together() -> Iterator[None]:
    """Of several processes, one that fails in the body ends at once, with its exit code.

    Leaving in order would wait for the others, which may wait for this one; so they end when they
    miss it.
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not code or not jax.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
