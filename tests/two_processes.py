"""Programs that run in several real processes, and how tests start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import ROOT

# A run whose steps are short and which compiles soon.
SMALL_RUN = (
    "experiments.run", "--config.num_responses=3", "--config.data.held_out_size=8",
    "--config.response_budget=96", "--config.sampler.slots=16", "--config.sampler.unroll=False",
    "--config.sampler.attend_parts=1", "--config.sampler.halvings=0",
    "--config.sampler.cache_length=192", "--config.micro_batch_tokens=2048",
    "--config.score_batch_tokens=2048",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return int(bound.getsockname()[1])


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many simulated devices."""
    values = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return values | {
        "JAX_PLATFORMS": "cpu",
        # Devices of one process must meet their collectives in the same order: by default XLA's CPU
        # scheduler runs independent ones in any, and they wait for each other.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def start_processes(
    command: Sequence[str], number: int, devices: int, logs: Path
) -> list[subprocess.Popen[bytes]]:
    """Starts `python *command` so often; each gets the flags that name it to the others, and
    writes to `logs/K.log`."""
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    started = []
    for k in range(number):
        flags = [
            f"--coordinator=localhost:{port}",
            f"--num_processes={number}",
            f"--process_id={k}",
        ]
        with (logs / f"{k}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, *command, *(flags if number > 1 else [])],
                    cwd=ROOT, env=environment(devices), stdout=log, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    return started


def run_processes(command: Sequence[str], number: int, devices: int, logs: Path) -> list[str]:
    """Runs it to its end, which must be a good one; what each process wrote."""
    codes = [
        process.wait(timeout=300) for process in start_processes(command, number, devices, logs)
    ]
    written = [(logs / f"{k}.log").read_text() for k in range(number)]
    assert codes == [0] * number, "\n".join(written)
    return written
