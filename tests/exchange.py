"""What `attnrl_jax.processes` does in two real processes; run by tests/test_processes.py."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnrl_jax import processes
from attnrl_jax.algorithms.losses import LossConfig
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from attnrl_jax.sharding import (
    MeshConfig,
    batch_devices,
    batch_sharding,
    cast_to_mesh,
    make_meshes,
    parameter_shardings,
)
from attnrl_jax.training.state import init_state
from attnrl_jax.training.step import accumulate, no_gradients, pack_rows
from experiments.run_folder import check_same_settings, check_shared
from tests.training.tiny import tiny_config
from tests.trees import random_rollouts, train_rows_of


def raised(function, *arguments) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def some_gradients() -> dict[str, np.ndarray]:
    """Gradients and metric sums of a mini-batch of random trees, over two micro-batches."""
    mesh = make_meshes(MeshConfig(data=2, fsdp=2, tensor=2))[0]
    model = ModelConfig("qwen2", 256, 32, 2, 4, 2, 8, 64, qkv_bias=True)
    config = tiny_config(pack_length=32, micro_batch_tokens=8 * 32)
    rng = np.random.default_rng(0)
    rows = train_rows_of(random_rollouts(rng), rng)
    sharding = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        params = init_state(init_params(model, jax.random.key(0)), config.optimizer, mesh).params
        accumulated = no_gradients(params)
        for packed in pack_rows(rows, config, batch_devices(mesh), sharding=sharding)[1]:
            micro = processes.rows_to_devices(packed.batch, packed.own, packed.sequences, sharding)
            accumulated = accumulate(
                accumulated, params, model, LossConfig(kl_beta=0.0), micro, None,
                np.float32(packed.denominator), 1.0,
            )  # fmt: skip
    found = jax.tree_util.tree_leaves_with_path(processes.to_host(accumulated))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    parser.add_argument("--folder", type=Path)
    flags = parser.parse_args()
    processes.connect(flags.coordinator, flags.num_processes, flags.process_id, 20)
    own = processes.index()

    # Verdicts of each process's share, as all of them know them.
    share = processes.share(5)
    assert share.tolist() == [k % 2 == own for k in range(5)]
    summed, counts = processes.total((np.where(share, 1.0 + np.arange(5), 0), np.array([own, 3])))
    assert summed.tolist() == [1, 2, 3, 4, 5]
    assert counts.tolist() == [1, 6]
    assert processes.from_first("the first" if own == 0 else "another, longer") == "the first"

    # Items are dealt out in turn; what has 64 bits keeps them.
    items = np.arange(5)
    values = {"x": items / 3, "pairs": np.stack([items, items > 2], axis=1), "flags": items > 1}
    own_values = {name: x[processes.share(5)] for name, x in values.items()}
    for name, x in processes.from_shares(own_values, 5).items():
        assert x.dtype == values[name].dtype
        np.testing.assert_array_equal(x, values[name])

    # Rows over the devices of both, and back.
    mesh, sampling = make_meshes(MeshConfig(data=4, fsdp=2))
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    there = processes.to_devices(
        {"rows": rows}, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    )
    assert not there["rows"].is_fully_addressable
    np.testing.assert_array_equal(processes.to_host(there)["rows"], rows)
    sharding = there["rows"].sharding
    here = processes.own_rows(8, sharding)
    assert sorted(set(here)) == [*range(4 * own, 4 * own + 4)]
    sent = processes.rows_to_devices({"rows": rows[here]}, here, 8, sharding)
    np.testing.assert_array_equal(processes.to_host(sent)["rows"], rows)

    # Parameters to the layout of sampling: on the same devices, and on others.
    kernel = np.arange(64, dtype=np.float32).reshape(8, 8)
    params = {"lm_head": {"kernel": kernel}}
    for config in (MeshConfig(fsdp=2, sampling_tensor=2), MeshConfig(sampling_devices=2, fsdp=2)):
        mesh, sampling = make_meshes(config)
        sharding = parameter_shardings(params, mesh)["lm_head"]["kernel"]
        laid_out = {"lm_head": {"kernel": processes.to_devices(kernel, sharding)}}
        cast = cast_to_mesh(laid_out, "bfloat16", sampling)["lm_head"]["kernel"]
        assert set(cast.sharding.device_set) == set(sampling.devices.flat)
        np.testing.assert_array_equal(np.asarray(processes.to_host(cast), np.float32), kernel)
    said = raised(make_meshes, MeshConfig(sampling_devices=1))
    assert "must be half of each one's devices" in said, said

    # Disagreement stops both, and both say where.
    processes.check_agreement("the same", {"x": np.arange(3), "name": "a"})
    said = raised(processes.check_agreement, "the settings", {"x": np.arange(3) + own})
    assert said.startswith(
        "ProcessError: processes disagree about the settings: not as in process 0"
    ), said

    # Only the first tries, and all know that it failed.
    def fails() -> None:
        raise ValueError("the folder is in use")

    said = raised(processes.first_then_all, fails)
    expected = (
        "ValueError: the folder is in use" if own == 0 else "ProcessError: process 0 could not"
    )
    assert said.startswith(expected), said

    # Settings that differ are named where they do.
    check_same_settings({"seed": 0, "mesh": {"fsdp": 2}})
    said = raised(check_same_settings, {"seed": own, "mesh": {"fsdp": 2}})
    expected = (
        "process 1 has other settings than process 0"
        if own == 0
        else "seed: 0 in process 0, 1 here"
    )
    assert expected in said, said

    # A folder that only one of them sees.
    check_shared(flags.folder)
    (flags.folder / str(own)).mkdir()
    said = raised(check_shared, flags.folder / str(own), 1.0)
    assert said.startswith("FolderError: "), said
    assert "/0 of process 0 is not seen by process 1" in said, said
    assert not any((flags.folder / str(own)).iterdir())

    found = some_gradients()
    if own == 0:
        np.savez(flags.folder / "gradients.npz", **found)
    print("exchanged", flush=True)


if __name__ == "__main__":
    main()
