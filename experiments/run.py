"""Trains a policy with AttnRL, or with one of the methods it is compared to.

    python -m experiments.run
    python -m experiments.run --config=experiments/configs/attnrl_hf.py \\
        --config.model.path=DIR --config.data.train=FILE.jsonl \\
        --workdir=runs/mine

Without arguments the small policy that comes with the project learns problems that the program
makes. The same command with the same `--workdir` continues a run that was stopped, however it was;
Ctrl-C and SIGTERM save first, and end with exit code 130 and 143.

    python -m experiments.run --settings
    python -m experiments.run --config=FILE --config.method=grpo --settings

prints every setting with its value and its meaning; `--config.NAME=VALUE` changes it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from attnrl_jax import processes
from attnrl_jax.branching.selection import branch_positions
from attnrl_jax.compilation.memory import (
    DeviceMemoryError,
    check_memory,
    compile_every_size,
    device_limit,
    explain_out_of_memory,
)
from attnrl_jax.host_memory import limit_arenas
from attnrl_jax.interruption import InterruptedRunError, Interruption
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.sharding import make_meshes
from attnrl_jax.training.checkpoint import Checkpointer, NotFiniteStateError, SaveError
from attnrl_jax.training.loop import NotFiniteError
from attnrl_jax.training.process_metrics import compilations
from attnrl_jax.training.setup import Setup
from attnrl_jax.training.state import abstract_state, init_state
from experiments.commands import config_fault, interrupted, show_help, stop
from experiments.folders import flat
from experiments.parts import Parts, load_parts, with_parts
from experiments.records import METRICS_FILE, read_metrics
from experiments.run_folder import (
    ALLOW,
    as_json,
    check_same_settings,
    check_shared,
    claimed_run,
    freed,
    record_problems,
)
from experiments.session import Session
from experiments.setting_list import setting_list
from experiments.settings import Settings, build
from experiments.tasks import build_task, load_policy
from experiments.terminal import Terminal, make_console
from experiments.weights_and_biases import WeightsAndBiases, check_installed

# Of glibc. One would have all threads wait for each other.
MOST_ARENAS = 2
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "attnrl_graph.py"


def run(
    config: ConfigDict,
    folder: Path,
    console: Console,
    allowed: Sequence[str] = (),
    parts: Parts | None = None,
    on_begun: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Runs, or continues, a run in its folder. Nothing is written before all was checked.

    Args:
      config: of the run.
      folder: of the run.
      console: shows progress.
      allowed: settings that may differ from those the run began with, besides `FREE_TO_CHANGE`.
      parts: of the user's own.
      on_begun: called before the first step, when all was checked and the checkpoint was read.

    Returns:
      metrics of every step, the first of them step 0, before training; of several processes none
      but in the first.

    Raises:
      SettingError, ModelError, DataError, FolderError, CheckpointError: what was given cannot be
        used.
      InterruptedRunError: it was asked to stop, and what it had is saved.
      DeviceMemoryError: it does not fit the devices.
      NotFiniteError, SaveError: it cannot go on; its last checkpoint is whole.
    """
    compilations()
    parts = parts or Parts()
    config = with_parts(config, parts)
    settings = build(config)
    check_installed(settings.logging.wandb)
    free = freed(config, allowed)
    check_same_settings(as_json(config))
    mesh, sampling_mesh = make_meshes(settings.mesh)
    processes.exchange_over(sampling_mesh)
    policy = load_policy(settings, mesh)
    check_devices(settings, policy.model, mesh, sampling_mesh)
    # What holds the policy below does not hold its parameters: the state has a copy of its own.
    params, policy = policy.params, policy._replace(params=None)
    with processes.first_ahead():
        task, skipped, prepared = build_task(settings, policy, parts)
    train = settings.train
    terminal = Terminal(train.steps, console, train.max_sampled_tokens)
    with ExitStack() as held:
        held.callback(task.judge.close)
        held.enter_context(claimed_run(folder, config, free))
        values, tracker = flat(as_json(config)), None
        if settings.logging.wandb and processes.is_first():
            # Before the live display, which would hide that wandb asks for an account.
            tracker = WeightsAndBiases(settings.logging.wandb, folder, values, terminal.warn)
            held.enter_context(closing(tracker))
        held.enter_context(terminal)
        interruption = held.enter_context(Interruption())
        check_shared(folder)
        console.print(f"run folder: {folder}", soft_wrap=True)
        if len(jax.devices()) > 1:
            console.print(describe_devices(mesh, sampling_mesh), soft_wrap=True)
        console.print(
            f"{len(task.held_out)} held-out problems, {skipped} left out for their prompts; "
            "the first step compiles"
        )
        if prepared is not None:
            record_problems(folder, prepared, console)
        setup = Setup(
            task, policy.model, train, mesh, sampling_mesh,
            reference=params if train.loss.kl_beta > 0 else None,
            sampling_dtype=settings.model.sampling_dtype,
            branch_rule=parts.branch_rule or branch_positions,
            on_stage=terminal.stage,
            interrupt=interruption.check,
        )  # fmt: skip
        saved = held.enter_context(
            closing(Checkpointer(folder / "checkpoints", train.keep_checkpoints, train.keep_best))
        )
        done = saved.latest_step()
        processes.check_agreement("the newest checkpoint", -1 if done is None else done)
        # A run that goes on needs no arrays beside those of its checkpoint.
        first = (init_state if done is None else abstract_state)(params, train.optimizer, mesh)
        del params
        session = Session(
            setup, folder, values, settings.guards, settings.trees.per_step, saved, terminal,
            tracker,
        )  # fmt: skip
        try:
            begun = session.begin(first) if done is None else session.resume(first, config, free)
            on_begun()
            session.train(begun)
        except Exception as error:
            explained = explain_out_of_memory(
                error, terminal.doing, setup.model, train, mesh, sampling_mesh
            )
            if explained:
                raise DeviceMemoryError(explained) from error
            raise
    return read_metrics(folder / METRICS_FILE) if processes.is_first() else []


def check_devices(settings: Settings, model: ModelConfig, mesh: Mesh, sampling_mesh: Mesh) -> None:
    """Asks the compiler whether the run fits its devices, where these say what they have; compiles
    the rest, where that is wanted.

    Raises:
      DeviceMemoryError: it does not; which settings to lower, and how far.
    """
    if settings.memory.every_size:
        compile_every_size(
            model, settings.train, mesh, sampling_mesh, settings.model.sampling_dtype
        )
    if not settings.memory.check:
        return
    devices = [*mesh.devices.flat, *sampling_mesh.devices.flat]
    limit = settings.memory.bytes_per_device or device_limit(devices) or 0
    if processes.count() > 1:
        # All compile the same. (MiB fit 32 bits.)
        limit = int(processes.of_all(np.int32(limit // 2**20)).min()) * 2**20
    if limit:
        check_memory(
            model, settings.train, mesh, sampling_mesh, limit, settings.model.sampling_dtype
        )


def describe_devices(mesh: Mesh, sampling_mesh: Mesh) -> str:
    """What the run runs on, in a line."""
    layouts = [" x ".join(f"{k} {n}" for k, n in m.shape.items()) for m in (mesh, sampling_mesh)]
    return (
        f"{len(jax.devices())} devices in {processes.count()} process(es): {layouts[0]}; "
        f"sampling on {layouts[1]}"
    )


def result_line(history: list[dict[str, float]]) -> str:
    """What a run achieved, as its last line says it."""
    measured = [m for m in history if "held_out/accuracy" in m]
    first, last = measured[0], measured[-1]
    return (
        f"held-out accuracy: {first['held_out/accuracy']:.3f} -> {last['held_out/accuracy']:.3f} "
        f"(n={last['held_out/problems']:.0f})"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        stop(ValueError(f"unexpected arguments: {' '.join(argv[1:])} (--help explains)"))
    # Orbax reports every file it closes at INFO.
    logging.set_verbosity(logging.WARNING)
    flag, again, begun = flags.FLAGS, "nothing was begun", threading.Event()
    try:
        config = flag.config
        name = f"{config.get('method')}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path(flag.workdir or Path("runs") / processes.from_first(name)).absolute()
        again = f"continue with the same command and --workdir={folder}"
        console = make_console(quiet=flag.quiet or not processes.is_first())
        parts = load_parts(config_flags.get_config_filename(flag["config"]))
        history = run(config, folder, console, flag.allow_change, parts, begun.set)
    except InterruptedRunError as wish:
        processes.disconnect()
        interrupted(again, wish.exit_code)
    except KeyboardInterrupt:
        interrupted(again)
    except Exception as error:
        if flag.debug:
            raise
        # A run goes on exactly where it was: numbers and memory will be what they were.
        repeats = isinstance(error, NotFiniteError | NotFiniteStateError | DeviceMemoryError)
        stop(error, isinstance(error, NotFiniteError | SaveError), begun.is_set(), repeats)
    if processes.is_first():
        if not flag.quiet:
            print(f"metrics, trees, checkpoints and curve.png are in {folder}")
        print(result_line(history))


def command() -> None:
    """The command line. Flags are defined here, so that importing this file does nothing."""
    flags.DEFINE_string("workdir", None, "Run folder; by default a new one under runs/.")
    flags.DEFINE_list(
        ALLOW.lstrip("-"),
        [],
        "Settings, by their names, that may differ from those the run began with.",
    )
    flags.DEFINE_string(
        "coordinator", None, "Of several processes: address:port of the first. TPU pod slices and "
        "SLURM say it themselves.",
    )  # fmt: skip
    flags.DEFINE_integer(
        "num_processes", None, "Of several processes: how many; 1 alone runs without the cluster."
    )
    flags.DEFINE_integer("process_id", None, "Of several processes: which one, from 0.")
    flags.DEFINE_integer(
        "process_timeout",
        100,
        "Seconds that the other processes are waited for, at the start and when one is silent.",
    )
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    flags.DEFINE_bool("quiet", False, "Show nothing but warnings, errors and the last line.")
    flags.DEFINE_bool(
        "settings", False, "Print every setting with its value and its meaning, and run nothing."
    )
    app.define_help_flags()
    try:
        config_flags.DEFINE_config_file("config", str(DEFAULT_CONFIG), "Experiment to run.")
        show_help(__doc__)
        # ml_collections runs the file, and applies --config.name=value, as flags are parsed.
        arguments = flags.FLAGS(sys.argv)
    except Exception as error:
        stop(ValueError(config_fault(error)))
    flag = flags.FLAGS
    if flag.settings:
        try:
            print(setting_list(build(flag.config)))
        except ValueError as error:
            stop(error)
        return
    try:
        processes.connect(
            flag.coordinator, flag.num_processes, flag.process_id, flag.process_timeout
        )
    except (ValueError, processes.ProcessError) as error:
        stop(error)
    # Before XLA starts its threads: with an arena for each, the memory of a long run grows.
    limit_arenas(MOST_ARENAS)
    with processes.ending_together():
        app.run(main, argv=arguments, flags_parser=lambda arguments: arguments)


if __name__ == "__main__":
    command()
