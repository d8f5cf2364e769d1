"""Trains a policy with AttnRL, or with one of the methods it is compared to.

    python -m experiments.run
    python -m experiments.run --config=experiments/configs/attnrl_hf.py \\
        --config.model.path=DIR --config.data.train=FILE.jsonl --workdir=runs/mine

Without arguments the small policy that comes with the project learns problems that the program
makes. The same `--workdir` continues a run that was stopped.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from attnrl_jax import processes
from attnrl_jax.datasets.preparation import Prepared
from attnrl_jax.sharding import make_meshes
from attnrl_jax.training.checkpoint import Checkpointer
from attnrl_jax.training.loop import evaluate, finished, start, train_steps
from attnrl_jax.training.setup import Setup
from attnrl_jax.training.state import TrainState, abstract_state, init_state
from experiments import reporting
from experiments.commands import config_fault, interrupted, stop
from experiments.folders import FolderError, claimed, flat, is_same, write_atomically
from experiments.settings import build
from experiments.tasks import build_task, load_policy

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "attnrl_graph.py"
CONFIG_FILE = "config.json"
# Settings that may differ when a run is continued: they do not change what a step computes.
FREE_TO_CHANGE = (
    "steps", "max_sampled_tokens", "checkpoint_every", "keep_checkpoints", "data.cache",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sampling_tensor", "mesh.sampling_devices",
)  # fmt: skip


@contextmanager
def claimed_run(folder: Path, config: ConfigDict) -> Iterator[None]:
    """Holds a run folder: makes it, or checks that the one there is of the same configuration.

    Raises:
      FolderError: it belongs to another run (the difference is named), holds other files, or is in
        use by another process. Of several processes of one run the first holds it for all.
    """
    with ExitStack() as held:
        claim = claimed(folder, "run", CONFIG_FILE, as_json(config), FREE_TO_CHANGE)
        processes.first_then_all(lambda: held.enter_context(claim))
        yield


def check_same_run(folder: Path, config: ConfigDict) -> bool:
    """Whether the folder has a run, which must then be of this configuration.

    Raises:
      FolderError: it belongs to another run; the differences are named.
    """
    return is_same(folder, "run", CONFIG_FILE, as_json(config), FREE_TO_CHANGE)


def as_json(config: ConfigDict) -> dict[str, Any]:
    """All settings as `config.json` keeps them."""
    return json.loads(config.to_json_best_effort())


def run(config: ConfigDict, folder: Path, console: Console) -> list[dict[str, float]]:
    """Runs, or continues, a run in its folder. Nothing is written before all was checked.

    Args:
      config: of the run.
      folder: of the run.
      console: shows progress.

    Returns:
      metrics of every step, the first of them step 0, before training.

    Raises:
      SettingError, ModelError, DataError, FolderError, CheckpointError: what was given cannot be
        used.
    """
    settings = build(config)
    check_same_settings(as_json(config))
    mesh, sampling_mesh = make_meshes(settings.mesh)
    processes.exchange_over(sampling_mesh)
    policy = load_policy(settings, mesh)
    # What holds the policy below does not hold its parameters: the state has a copy of its own.
    params, policy = policy.params, policy._replace(params=None)
    with processes.first_ahead():
        task, skipped, prepared = build_task(settings, policy)
    terminal = reporting.Terminal(settings.train.steps, console)
    try:
        with claimed_run(folder, config), terminal:
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
            train = settings.train
            reference = params if train.loss.kl_beta > 0 else None
            setup = Setup(
                task, policy.model, train, mesh, sampling_mesh, reference, on_stage=terminal.stage
            )
            with closing(Checkpointer(folder / "checkpoints", train.keep_checkpoints)) as saved:
                done = saved.latest_step()
                processes.check_agreement("the newest checkpoint", -1 if done is None else done)
                # A run that goes on needs no arrays beside those of its checkpoint.
                first = (init_state if done is None else abstract_state)(
                    params, train.optimizer, mesh
                )
                del params
                return _run(setup, folder, first, saved, terminal)
    finally:
        task.judge.close()


def check_same_settings(values: dict[str, Any]) -> None:
    """Makes sure that all processes have the settings of process 0.

    Args:
      values: of `as_json`.

    Raises:
      ValueError: some have others, which they name.
    """
    if processes.count() == 1:
        return
    wanted, given = flat(json.loads(processes.from_first(json.dumps(values)))), flat(values)
    changed = [
        f"{key}: {wanted.get(key)!r} in process 0, {given.get(key)!r} here"
        for key in sorted({*wanted, *given})
        if wanted.get(key) != given.get(key)
    ]
    differ = np.flatnonzero(processes.of_all(np.int32(bool(changed))))
    if len(differ):
        others = f"process {', '.join(map(str, differ))} has other settings than process 0"
        raise ValueError("; ".join(changed) or others)


def describe_devices(mesh: Mesh, sampling_mesh: Mesh) -> str:
    """What the run runs on, in a line."""
    layouts = [" x ".join(f"{k} {n}" for k, n in m.shape.items()) for m in (mesh, sampling_mesh)]
    return (
        f"{len(jax.devices())} devices in {processes.count()} process(es): {layouts[0]}; "
        f"sampling on {layouts[1]}"
    )


def check_shared(folder: Path, patience: float = 30.0) -> None:
    """Makes sure that all processes see the run folder that process 0 writes to.

    Args:
      folder: there, in process 0.
      patience: seconds that another host may take to show a file.

    Raises:
      FolderError: some do not.
    """
    if processes.count() == 1:
        return
    first = processes.from_first(str(folder))
    path = folder / processes.from_first(f".seen-{uuid.uuid4().hex}")
    processes.first_then_all(lambda: path.write_text("by all processes?\n"))
    deadline = time.monotonic() + patience
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    missing = np.flatnonzero(~processes.of_all(np.bool_(seen)))
    if processes.is_first():
        path.unlink()
    if len(missing):
        raise FolderError(
            f"the run folder {first} of process 0 is not seen by process "
            f"{', '.join(map(str, missing))}; give all of them one shared folder as --workdir"
        )


def record_problems(folder: Path, prepared: Prepared, console: Console) -> None:
    """Writes, and shows the first time, which problems the run has and how they were cleaned.

    Raises:
      FolderError: the run began with other problems, whose responses are in its checkpoint.
    """
    path = folder / "data.json"
    version = prepared.folder.parent.name
    processes.check_agreement("the training problems", version)
    if path.exists():
        before = json.loads(path.read_text())["version"]
        if before != version:
            raise FolderError(
                f"{folder}: the problems (data.train, data.held_out, data.benchmarks or the "
                f"tokenizer) have changed since the run began: version {before} then, {version} "
                "now; give them back, or begin another run"
            )
        return
    if not processes.is_first():
        return
    console.print(prepared.report.to_table(), soft_wrap=True, highlight=False)
    values = {"version": version} | prepared.report.to_dict()
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def _run(
    setup: Setup,
    folder: Path,
    first: TrainState,
    checkpointer: Checkpointer,
    terminal: reporting.Terminal,
) -> list[dict[str, float]]:
    config, done = setup.config, checkpointer.latest_step()
    if done is None:
        begin = time.perf_counter()
        state = start(setup, first)
        warm_up = {
            "step": 0,
            "tokens/sampled_total": state.sampled_tokens,
            "seconds/warm_up": time.perf_counter() - begin,
        }
    else:
        state = checkpointer.restore(first)
        left = "nothing left to do" if finished(state, config) else "continuing"
        terminal.console.print(f"{left} after step {state.step}")
    last_step = -1 if done is None else done
    with closing(reporting.RunFolder(folder, last_step, processes.is_first())) as files:
        if done is None:
            record(files, terminal, warm_up | evaluate(state, setup))
            checkpointer.save(state)
        tree, spans = None, []
        for state, report in train_steps(state, setup):  # noqa: B020 (the state goes on)
            last = finished(state, config)
            metrics, spans = report.metrics, report.spans
            if last or (config.eval_every and state.step % config.eval_every == 0):
                metrics |= evaluate(state, setup)
            example = reporting.example_tree(report, setup.task.tokenizer)
            if example is not None:
                files.write_tree(state.step, example)
                tree = example
            record(files, terminal, metrics)
            if last or state.step % config.checkpoint_every == 0:
                checkpointer.save(state)
        if tree is not None:
            terminal.console.print(reporting.draw_tree(tree))
        if spans and config.overlap != "none":
            seconds = files.history[-1]["seconds/step"]
            terminal.console.print(f"the last step, {seconds:.1f} s:")
            terminal.console.print(reporting.draw_timeline(spans))
        files.plot()
        return files.history


def record(
    files: reporting.RunFolder, terminal: reporting.Terminal, metrics: dict[str, float]
) -> None:
    """Metrics of one step to the run folder and the terminal."""
    metrics = {"step": metrics["step"], **metrics}
    files.write_metrics(metrics)
    terminal.step(metrics)


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
    flag, again = flags.FLAGS, "nothing was begun"
    try:
        config = flag.config
        name = f"{config.get('method')}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path(flag.workdir or Path("runs") / processes.from_first(name)).absolute()
        again = f"continue with the same command and --workdir={folder}"
        history = run(config, folder, Console(quiet=not processes.is_first()))
    except KeyboardInterrupt:
        interrupted(again)
    except Exception as error:
        if flag.debug:
            raise
        stop(error)
    if processes.is_first():
        print(f"metrics, trees, checkpoints and curve.png are in {folder}")
        print(result_line(history))


def command() -> None:
    """The command line. Flags are defined here, so that importing this file does nothing."""
    flags.DEFINE_string("workdir", None, "Run folder; by default a new one under runs/.")
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
    app.define_help_flags()
    try:
        config_flags.DEFINE_config_file("config", str(DEFAULT_CONFIG), "Experiment to run.")
        # ml_collections runs the file, and applies --config.name=value, as flags are parsed.
        arguments = flags.FLAGS(sys.argv)
    except Exception as error:
        stop(ValueError(config_fault(error)))
    flag = flags.FLAGS
    try:
        processes.connect(
            flag.coordinator, flag.num_processes, flag.process_id, flag.process_timeout
        )
    except (ValueError, processes.ProcessError) as error:
        stop(error)
    with processes.ending_together():
        app.run(main, argv=arguments, flags_parser=lambda arguments: arguments)


if __name__ == "__main__":
    command()
