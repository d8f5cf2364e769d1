"""Compiles every program of a run for a TPU that is not there, and says what it would need.

    pip install -r requirements-tpu-aot.txt
    python -m experiments.aot --topology=v5e:4x4 \\
        --config=experiments/configs/r1_distill_qwen_1p5b.py
    python -m experiments.aot --config=FILE:METHOD --topology=v5p:2x2x2 \\
        --config.sampler.slots=64 --json=FILE.json

Topologies are `CHIP:AxB` (v5e, v6e) or `CHIP:AxBxC` (v4, v5p). Of a model only its `config.json` is
read, from the folder of `model.path`; those of the models of experiments/configs come with the
project, so that nothing is downloaded. Slices are of whole hosts (v5e and v6e: 2x2, 2x4, ...); for
a mesh that is split (`mesh.sampling_devices`) the TPU compiler may abort. It takes minutes, one CPU
core and a few GB of memory. It ends with code 1 if something does not fit.

What is counted, for each program and device:

    arguments, temporaries, outputs
                  by the compiler; outputs without those that take the place
                  of an argument
    held          what else the run has on the device meanwhile
    FLOPs         of matrix products, from the program's jaxpr, over all
                  devices; Pallas kernels as if they skipped no block
    roofline      the longest of FLOPs at the chip's bfloat16 rate, arguments
                  and outputs at its memory's, and what collectives send at its
                  links': a bound, no forecast
    collectives   from the compiled text, loops as often as they run

The numbers of `generate` are those of one token of every slot, with the whole cache read.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from jax.experimental import topologies
from ml_collections import ConfigDict, config_flags

from attnrl_jax.compilation.chips import Topology, parse_topology
from attnrl_jax.compilation.programs import Compiled, Program, compile_program, run_programs
from attnrl_jax.datasets.hub import model_folder
from attnrl_jax.models.attention import check_route
from attnrl_jax.models.config import ModelConfig, read_config
from attnrl_jax.sharding import make_meshes
from experiments.commands import config_fault, interrupted, show_help, stop
from experiments.settings import ModelSettings, Settings, build
from experiments.tables import table
from experiments.tasks import shipped_policy
from experiments.terminal import make_console, working

SHAPES = Path(__file__).parent / "configs" / "shapes"
# Published models whose `config.json` comes with the project.
SHIPPED = (
    "hf:deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "hf:deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "hf:Qwen/Qwen3-1.7B",
)
REQUIREMENTS = "requirements-tpu-aot.txt"
GIB = 2**30


def use_tpu_compiler(topology: Topology) -> None:
    """Tells jax to stay on the CPU, and the TPU compiler which slice is meant.

    Called before anything asks jax for a device.
    """
    jax.config.update("jax_platforms", "cpu")
    # Programs for devices that are not there cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=topology.accelerator_type,
        TPU_WORKER_HOSTNAMES="localhost",
        # No TPU is touched, whoever uses those that are there.
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


def slice_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a slice that is not there.

    Raises:
      ValueError: the TPU compiler is missing, or knows no such slice.
    """
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except Exception as error:
        text = str(error).strip().splitlines()[0]
        if "not installed" in text or isinstance(error, ImportError | OSError):
            raise ValueError(
                f"the TPU compiler is missing: pip install -r {REQUIREMENTS} ({text})"
            ) from error
        raise ValueError(f"topology {topology.name!r} ({topology.accelerator_type}): {text}") from (
            error
        )
    devices = list(found.devices)
    if len(devices) != topology.devices:
        raise ValueError(
            f"topology {topology.name!r}: {topology.devices} chips, but {len(devices)} devices"
        )
    return devices


def model_shape(settings: ModelSettings) -> ModelConfig:
    """The model of a run from its `config.json` alone.

    Raises:
      ModelError, DataError: there is none, or it cannot be used.
    """
    folder = shipped_policy()
    if settings.path:
        name = settings.path.partition("@")[0]
        shipped = SHAPES / name.rpartition("/")[2]
        known = name in SHIPPED
        folder = shipped if known else model_folder(settings.path)
    return dataclasses.replace(
        read_config(folder, settings.dtype),
        attention=settings.attention,
        block_length=settings.block_length,
        remat=settings.remat,
    )


@dataclasses.dataclass(frozen=True)
class Result:
    """A program, compiled or refused by the compiler.

    Attributes:
      program: the program.
      seconds: of compilation.
      compiled: what the compiler says; None where it refuses.
      error: why it refuses.
    """

    program: Program
    seconds: float
    compiled: Compiled | None
    error: str = ""

    def fits(self, topology: Topology) -> bool:
        return self.compiled is not None and self.compiled.total <= topology.chip.hbm

    def bounds(self, topology: Topology) -> dict[str, float]:
        """Seconds that computing, memory and interconnect take at the least."""
        assert self.compiled is not None
        chip, sent = topology.chip, sum(c.sent for c in self.compiled.collectives.values())
        devices = self.program.mesh.size
        return {
            "compute": self.compiled.flops / (devices * chip.flops),
            "memory": self.compiled.traffic / chip.hbm_rate,
            "interconnect": sent / chip.ici_rate,
        }


def check(
    settings: Settings,
    topology: Topology,
    only: str = "",
    report: Callable[[str], None] = print,
) -> list[Result]:
    """Compiles the programs of a run for a slice.

    Args:
      settings: of the run.
      topology: the slice.
      only: part of the names of the programs that are wanted.
      report: called with a line about each program as it is done.

    Raises:
      ValueError: the slice cannot be had, the mesh does not fit it, or no program has that name.
    """
    model = model_shape(settings.model)
    check_route(model, "tpu")
    devices = slice_devices(topology)
    mesh, sampling_mesh = make_meshes(settings.mesh, devices)
    programs = run_programs(
        model, settings.train, mesh, sampling_mesh, settings.model.sampling_dtype
    )
    wanted = [program for program in programs if only in program.name]
    if not wanted:
        names = ", ".join(program.name for program in programs)
        raise ValueError(f"no program is called {only!r}; there are: {names}")
    results = []
    for program in wanted:
        begin = time.perf_counter()
        compiled, error = None, ""
        try:
            compiled = compile_program(program)
        except jax.errors.JaxRuntimeError as fault:
            error = next(line for line in str(fault).splitlines() if line.strip())
        results.append(Result(program, time.perf_counter() - begin, compiled, error))
        report(f"{program.name}: {results[-1].seconds:.0f} s {error}".rstrip())
    return results


def memory_table(results: list[Result], topology: Topology) -> str:
    """GiB per device of every program, against what the chip has."""
    heading = ["program", "compiled in s", "arguments", "temporaries", "outputs", "held", "sum",
               f"of {topology.chip.hbm / GIB:.2f}"]  # fmt: skip
    rows = [heading]
    for result in results:
        name, seconds = result.program.name, f"{result.seconds:.0f}"
        found = result.compiled
        if found is None:
            rows.append([name, seconds, *["-"] * 5, "refused"])
            continue
        held = sum(found.held.values())
        parts = (found.arguments, found.temporaries, found.outputs, held, found.total)
        share = f"{found.total / topology.chip.hbm:.0%}"
        fits = share if result.fits(topology) else f"{share}, does not fit"
        rows.append([name, seconds, *(f"{part / GIB:.2f}" for part in parts), fits])
    return table(rows)


def held_table(results: list[Result]) -> str:
    """GiB per device of what programs find on the device, by name."""
    held = {}
    for result in results:
        held |= result.program.held
    return table([["held", "GiB"], *([name, f"{n / GIB:.2f}"] for name, n in held.items())])


def time_table(results: list[Result], topology: Topology) -> str:
    """Bounds on the time of one execution of every program, in milliseconds."""
    rows = [["program", "one execution", "TFLOP", "compute ms", "memory ms", "interconnect ms",
             "bound by"]]  # fmt: skip
    for result in results:
        if result.compiled is None:
            continue
        bounds = result.bounds(topology)
        rows.append([
            result.program.name, result.program.unit, f"{result.compiled.flops / 1e12:.3g}",
            *(f"{1e3 * seconds:.3g}" for seconds in bounds.values()),
            max(bounds, key=bounds.__getitem__),
        ])  # fmt: skip
    return table(rows, left=2)


def collective_table(results: list[Result]) -> str:
    """Collectives of one execution by kind, with MiB per device."""
    rows = [["program", "collective", "count", "results MiB", "sent MiB"]]
    for result in results:
        for kind, found in sorted((result.compiled.collectives if result.compiled else {}).items()):
            rows.append([
                result.program.name, kind, f"{found.count:g}", f"{found.result / 2**20:.4g}",
                f"{found.sent / 2**20:.4g}",
            ])  # fmt: skip
    return table(rows, left=2)


def as_json(results: list[Result], topology: Topology, settings: Settings) -> dict[str, Any]:
    """Everything that was found; bytes are those of one device."""
    programs = []
    for result in results:
        entry = {"name": result.program.name, "unit": result.program.unit,
                 "compile_seconds": round(result.seconds, 1)}  # fmt: skip
        if result.compiled is None:
            programs.append(entry | {"error": result.error})
            continue
        programs.append(
            entry
            | dataclasses.asdict(result.compiled)
            | {
                "total": result.compiled.total,
                "fits": result.fits(topology),
                "roofline_seconds": result.bounds(topology),
            }
        )
    return {
        "command": "python -m experiments.aot " + shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "jax": jax.__version__,
        "libtpu": _version("libtpu"),
        "topology": topology.name,
        "accelerator_type": topology.accelerator_type,
        "devices": topology.devices,
        "chip": dataclasses.asdict(topology.chip),
        "mesh": dataclasses.asdict(settings.mesh),
        "programs": programs,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def aot(
    config: ConfigDict, topology: Topology, only: str, file: str | None, quiet: bool = False
) -> list[str]:
    """Compiles, prints and writes; returns the names of programs that do not fit."""
    settings = build(config)
    console = make_console(quiet)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with working(console, f"compiling for {topology.name}"):
        results = check(settings, topology, only, say)
    for text in (memory_table(results, topology), held_table(results),
                 time_table(results, topology), collective_table(results)):  # fmt: skip
        say(f"\n{text}")
    if file:
        Path(file).write_text(json.dumps(as_json(results, topology, settings), indent=1) + "\n")
    return [result.program.name for result in results if not result.fits(topology)]


def main(argv: list[str]) -> None:
    flag = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments: {' '.join(argv[1:])} (--help explains)")
        if flag.config is None or flag.topology is None:
            raise ValueError("--config=FILE and --topology=CHIP:AxB must be given")
        if flag.json and not Path(flag.json).absolute().parent.is_dir():
            raise ValueError(f"--json: there is no folder {Path(flag.json).absolute().parent}")
        topology = parse_topology(flag.topology)
        use_tpu_compiler(topology)
        too_large = aot(flag.config, topology, flag.only, flag.json, flag.quiet)
    except KeyboardInterrupt:
        interrupted("nothing was written")
    except Exception as error:
        if flag.debug:
            raise
        stop(error)
    if too_large:
        print(f"does not fit {topology.name}: {', '.join(too_large)}", file=sys.stderr)
        sys.exit(1)
    print(f"every program fits {topology.name}")


def command() -> None:
    """The command line. Flags are defined here, so that importing this file does nothing."""
    flags.DEFINE_string("topology", None, "Slice to compile for: v5e:4x4, v5p:2x2x2, ...")
    flags.DEFINE_string("only", "", "Part of the names of the programs to compile; all by default.")
    flags.DEFINE_string("json", None, "File for everything that was found.")
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    flags.DEFINE_bool("quiet", False, "Show nothing but errors and whether it fits.")
    app.define_help_flags()
    try:
        config_flags.DEFINE_config_file("config", None, "Experiment to compile.")
        show_help(__doc__)
        arguments = flags.FLAGS(sys.argv)
    except Exception as error:
        stop(ValueError(config_fault(error)))
    app.run(main, argv=arguments, flags_parser=lambda arguments: arguments)


if __name__ == "__main__":
    command()
