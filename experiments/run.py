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
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from attnrl_jax.datasets.preparation import Prepared
from attnrl_jax.sharding import make_mesh
from attnrl_jax.training.checkpoint import Checkpointer
from attnrl_jax.training.loop import evaluate, finished, start, train_steps
from attnrl_jax.training.stages import Setup
from attnrl_jax.training.state import TrainState, init_state
from experiments import reporting
from experiments.commands import config_fault, interrupted, stop
from experiments.folders import FolderError, claimed, is_same, write_atomically
from experiments.settings import build
from experiments.tasks import build_task, load_policy

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "attnrl_graph.py"
CONFIG_FILE = "config.json"
# Settings that may differ when a run is continued: they do not change what a step computes.
FREE_TO_CHANGE = (
    "steps", "max_sampled_tokens", "checkpoint_every", "keep_checkpoints", "data.cache",
)  # fmt: skip


@contextmanager
def claimed_run(folder: Path, config: ConfigDict) -> Iterator[None]:
    """Holds a run folder: makes it, or checks that the one there is of the same configuration.

    Raises:
      FolderError: it belongs to another run (the difference is named), holds other files, or is in
        use by another process.
    """
    with claimed(folder, "run", CONFIG_FILE, as_json(config), FREE_TO_CHANGE):
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
    mesh = make_mesh(settings.mesh)
    policy = load_policy(settings, mesh)
    task, skipped, prepared = build_task(settings, policy)
    terminal = reporting.Terminal(settings.train.steps, console)
    try:
        with jax.set_mesh(mesh), claimed_run(folder, config), terminal:
            console.print(f"run folder: {folder}", soft_wrap=True)
            console.print(
                f"{len(task.held_out)} held-out problems, {skipped} left out for their prompts; "
                "the first step compiles"
            )
            if prepared is not None:
                record_problems(folder, prepared, console)
            params, train = policy.params, settings.train
            # A copy: the update gives the policy's own buffers away.
            reference = jax.tree.map(jnp.copy, params) if train.loss.kl_beta > 0 else None
            setup = Setup(task, policy.model, train, mesh, reference, on_stage=terminal.stage)
            return _run(setup, folder, init_state(params, train.optimizer, mesh), terminal)
    finally:
        task.judge.close()


def record_problems(folder: Path, prepared: Prepared, console: Console) -> None:
    """Writes, and shows the first time, which problems the run has and how they were cleaned.

    Raises:
      FolderError: the run began with other problems, whose responses are in its checkpoint.
    """
    path = folder / "data.json"
    version = prepared.folder.parent.name
    if path.exists():
        before = json.loads(path.read_text())["version"]
        if before != version:
            raise FolderError(
                f"{folder}: the problems (data.train, data.held_out, data.benchmarks or the "
                f"tokenizer) have changed since the run began: version {before} then, {version} "
                "now; give them back, or begin another run"
            )
        return
    console.print(prepared.report.to_table(), soft_wrap=True, highlight=False)
    values = {"version": version} | prepared.report.to_dict()
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def _run(
    setup: Setup, folder: Path, train: TrainState, terminal: reporting.Terminal
) -> list[dict[str, float]]:
    config = setup.config
    with closing(Checkpointer(folder / "checkpoints", config.keep_checkpoints)) as checkpointer:
        done = checkpointer.latest_step()
        if done is None:
            begin = time.perf_counter()
            state = start(setup, train)
            warm_up = {
                "step": 0,
                "tokens/sampled_total": state.sampled_tokens,
                "seconds/warm_up": time.perf_counter() - begin,
            }
        else:
            state = checkpointer.restore(train)
            left = "nothing left to do" if finished(state, config) else "continuing"
            terminal.console.print(f"{left} after step {state.step}")
        with closing(reporting.RunFolder(folder, -1 if done is None else done)) as files:
            if done is None:
                record(files, terminal, warm_up | evaluate(state, setup))
                checkpointer.save(state)
            tree = None
            for state, report in train_steps(state, setup):  # noqa: B020 (the state goes on)
                last = finished(state, config)
                metrics = report.metrics
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
    try:
        config = flags.FLAGS.config
        name = f"{config.get('method')}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path(flags.FLAGS.workdir or Path("runs") / name).absolute()
        history = run(config, folder, Console())
    except KeyboardInterrupt:
        interrupted(f"continue with the same command and --workdir={folder}")
    except Exception as error:
        if flags.FLAGS.debug:
            raise
        stop(error)
    print(f"metrics, trees, checkpoints and curve.png are in {folder}")
    print(result_line(history))


def command() -> None:
    """The command line. Flags are defined here, so that importing this file does nothing."""
    flags.DEFINE_string("workdir", None, "Run folder; by default a new one under runs/.")
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    app.define_help_flags()
    try:
        config_flags.DEFINE_config_file("config", str(DEFAULT_CONFIG), "Experiment to run.")
        # ml_collections runs the file, and applies --config.name=value, as flags are parsed.
        arguments = flags.FLAGS(sys.argv)
    except Exception as error:
        stop(ValueError(config_fault(error)))
    app.run(main, argv=arguments, flags_parser=lambda arguments: arguments)


if __name__ == "__main__":
    command()
