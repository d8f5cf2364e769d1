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
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from attnrl_jax.sharding import make_mesh, parameter_shardings
from attnrl_jax.training.checkpoint import Checkpointer
from attnrl_jax.training.loop import evaluate, start, train_steps
from attnrl_jax.training.stages import Setup
from attnrl_jax.training.state import TrainState, init_state
from experiments import reporting
from experiments.settings import Settings, build
from experiments.tasks import build_task, load_policy

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "attnrl_graph.py"
# Settings that may differ when a run is continued: they do not change what a step computes.
FREE_TO_CHANGE = ("steps", "checkpoint_every")


class RunError(ValueError):
    """A run folder that cannot be used."""


def claim_folder(folder: Path, config: ConfigDict) -> None:
    """Makes a run folder, or checks that the one there is of the same configuration.

    Raises:
      RunError: it belongs to another run (the difference is named), or holds other files.
    """
    path = folder / "config.json"
    values = json.loads(config.to_json_best_effort())
    if path.exists():
        try:
            stored = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise RunError(f"{path} is not valid JSON: {error}") from error
        differences = [
            f"{name}: {old!r} there, {new!r} here"
            for name, old, new in _differences(stored, values)
            if name not in FREE_TO_CHANGE
        ]
        if differences:
            raise RunError(f"{folder} is the folder of another run; " + "; ".join(differences))
    elif folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} holds files but no config.json: it is no run folder")
    folder.mkdir(parents=True, exist_ok=True)
    reporting.write_atomically(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _differences(old: object, new: object, name: str = "") -> list[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            inner = f"{name}.{key}" if name else key
            found += _differences(old.get(key), new.get(key), inner)
        return found
    return [] if old == new else [(name, old, new)]


def run(settings: Settings, folder: Path, terminal: reporting.Terminal) -> list[dict[str, float]]:
    """Runs, or continues, a run in its folder.

    Args:
      settings: of the run.
      folder: claimed by `claim_folder`.
      terminal: shows progress.

    Returns:
      metrics of every step, the first of them step 0, before training.

    Raises:
      ModelError, DataError, SettingError: what was given cannot be used.
    """
    _, model, params, tokenizer = load_policy(settings)
    task = build_task(settings, tokenizer)
    mesh = make_mesh(settings.mesh)
    checkpointer = Checkpointer(folder / "checkpoints")
    try:
        with jax.set_mesh(mesh):
            params = jax.device_put(params, parameter_shardings(params, mesh))
            # A copy: the update gives the policy's own buffers away.
            reference = jax.tree.map(jnp.copy, params) if settings.train.loss.kl_beta > 0 else None
            setup = Setup(task, model, settings.train, mesh, reference, on_stage=terminal.stage)
            train = init_state(params, settings.train.optimizer, mesh)
            return _run(setup, folder, checkpointer, train, terminal)
    finally:
        checkpointer.close()
        task.judge.close()


def _run(
    setup: Setup,
    folder: Path,
    checkpointer: Checkpointer,
    train: TrainState,
    terminal: reporting.Terminal,
) -> list[dict[str, float]]:
    done = checkpointer.latest_step()
    files = reporting.RunFolder(folder, last_step=-1 if done is None else done)
    if done is None:
        state = start(setup, train)
        record(files, terminal, {"step": 0} | evaluate(state, setup))
        checkpointer.save(state)
    else:
        state = checkpointer.restore(train)
        terminal.console.print(f"continuing {folder} after step {state.step}")
    config = setup.config
    tree = None
    for state, report in train_steps(state, setup):  # noqa: B020 (the loop's state goes on)
        metrics = report.metrics
        last = state.step == config.steps
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
    files.close()
    return files.history


def record(
    files: reporting.RunFolder, terminal: reporting.Terminal, metrics: dict[str, float]
) -> None:
    """Metrics of one step to the run folder and the terminal."""
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


def stop(error: Exception | str) -> NoReturn:
    """Ends the command with an error in one paragraph."""
    print(f"error: {str(error).strip()}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        stop(f"unexpected arguments: {' '.join(argv[1:])}")
    # Orbax reports every file it closes at INFO.
    logging.set_verbosity(logging.WARNING)
    config = flags.FLAGS.config
    try:
        settings = build(config)
        name = f"{settings.method}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path(flags.FLAGS.workdir or Path("runs") / name).absolute()
        claim_folder(folder, config)
        with reporting.Terminal(settings.train.steps) as terminal:
            terminal.console.print(f"run folder: {folder}")
            history = run(settings, folder, terminal)
    except (ValueError, OSError) as error:
        if flags.FLAGS.debug:
            raise
        stop(error)
    print(f"metrics, trees, checkpoints and curve.png are in {folder}")
    print(result_line(history))


def command() -> None:
    """The command line. Flags are defined here, so that importing this file does nothing."""
    try:
        config_flags.DEFINE_config_file("config", str(DEFAULT_CONFIG), "Experiment to run.")
    except (AttributeError, KeyError) as error:
        # ml_collections applies --config.name=value as soon as the flag is defined.
        words = str(error).replace("\\n", ". ").replace("\\", "")
        stop("unknown setting " + words.replace("'", "").replace('"', ""))
    except (TypeError, ValueError, OSError, SyntaxError) as error:
        stop(error)
    flags.DEFINE_string("workdir", None, "Run folder; by default a new one under runs/.")
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    app.run(main)


if __name__ == "__main__":
    command()
