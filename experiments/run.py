"""Trains a policy with AttnRL, or with one of the methods it is compared to.

    python -m experiments.run
    python -m experiments.run --config=experiments/configs/attnrl_hf.py \\
        --config.model.path=DIR --config.data.train=FILE.jsonl --workdir=runs/mine

Without arguments the small policy that comes with the project learns problems that the program
makes. The same command with the same `--workdir` continues a run that was stopped, however it was;
Ctrl-C and SIGTERM save first, and end with exit code 130 and 143.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from attnrl_jax import processes
from attnrl_jax.interruption import InterruptedRunError, Interruption
from attnrl_jax.sharding import make_meshes
from attnrl_jax.training.checkpoint import Checkpointer, SaveError
from attnrl_jax.training.guards import GuardConfig, collapse_warnings
from attnrl_jax.training.loop import (
    NotFiniteError,
    StepReport,
    evaluate,
    finished,
    start,
    train_steps,
)
from attnrl_jax.training.process_metrics import compilations, process_metrics
from attnrl_jax.training.setup import Setup
from attnrl_jax.training.state import LoopState, TrainState, abstract_state, init_state
from experiments import reporting
from experiments.commands import config_fault, interrupted, stop
from experiments.folders import differences, flat
from experiments.records import METRICS_FILE, RunFolder, read_metrics
from experiments.run_folder import (
    ALLOW,
    as_json,
    check_notes,
    check_same_settings,
    check_shared,
    claimed_run,
    freed,
    record_changes,
    record_problems,
)
from experiments.settings import build
from experiments.tasks import build_task, load_policy

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "attnrl_graph.py"


def run(
    config: ConfigDict, folder: Path, console: Console, allowed: Sequence[str] = ()
) -> list[dict[str, float]]:
    """Runs, or continues, a run in its folder. Nothing is written before all was checked.

    Args:
      config: of the run.
      folder: of the run.
      console: shows progress.
      allowed: settings that may differ from those the run began with, besides `FREE_TO_CHANGE`.

    Returns:
      metrics of every step, the first of them step 0, before training; of several processes none
      but in the first.

    Raises:
      SettingError, ModelError, DataError, FolderError, CheckpointError: what was given cannot be
        used.
      InterruptedRunError: it was asked to stop, and what it had is saved.
      NotFiniteError, SaveError: it cannot go on; its last checkpoint is whole.
    """
    compilations()
    settings = build(config)
    free = freed(config, allowed)
    check_same_settings(as_json(config))
    mesh, sampling_mesh = make_meshes(settings.mesh)
    processes.exchange_over(sampling_mesh)
    policy = load_policy(settings, mesh)
    # What holds the policy below does not hold its parameters: the state has a copy of its own.
    params, policy = policy.params, policy._replace(params=None)
    with processes.first_ahead():
        task, skipped, prepared = build_task(settings, policy)
    train = settings.train
    terminal = reporting.Terminal(train.steps, console)
    with ExitStack() as held:
        held.callback(task.judge.close)
        held.enter_context(claimed_run(folder, config, free))
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
        session = Session(setup, folder, flat(as_json(config)), settings.guards, saved, terminal)
        begun = session.begin(first) if done is None else session.resume(first, config, free)
        session.train(begun)
    return read_metrics(folder / METRICS_FILE) if processes.is_first() else []


@dataclass(frozen=True)
class Begun:
    """A run between two steps.

    Attributes:
      state: of the run.
      pending: metrics of earlier steps that are not on disk.
      unfinished: metrics of `state.step`, which is still to be evaluated and recorded; None if it
        was.
      saved_step: of the checkpoint it comes from; -1 if from none.
    """

    state: LoopState
    pending: tuple[dict[str, float], ...] = ()
    unfinished: dict[str, float] | None = None
    saved_step: int = -1


class Session:
    """One run in one process, from its begin or its last checkpoint to its end.

    Args:
      setup: of the run.
      folder: of the run.
      settings: all of them by dotted name, for the checkpoints.
      guards: when to warn.
      checkpointer: of the run.
      terminal: shows progress.
    """

    def __init__(
        self,
        setup: Setup,
        folder: Path,
        settings: dict[str, Any],
        guards: GuardConfig,
        checkpointer: Checkpointer,
        terminal: reporting.Terminal,
    ):
        self.setup, self.folder, self.settings, self.guards = setup, folder, settings, guards
        self.checkpointer, self.terminal = checkpointer, terminal

    def begin(self, first: TrainState) -> Begun:
        """Warms up the pipeline of a new run."""
        begin = time.perf_counter()
        state = start(self.setup, first)
        warm_up = {
            "step": 0,
            "tokens/sampled_total": state.sampled_tokens,
            "seconds/warm_up": time.perf_counter() - begin,
        }
        return Begun(state, unfinished=warm_up)

    def resume(self, template: TrainState, config: ConfigDict, free: Sequence[str]) -> Begun:
        """Reads the newest checkpoint that is whole."""
        state, notes = self.checkpointer.restore(
            template,
            check=lambda notes: check_notes(notes, config, free),
            on_damaged=self.terminal.warn,
        )
        if processes.is_first():
            record_changes(self.folder, state.step, differences(notes["settings"], self.settings))
        unfinished = notes["unfinished"]
        nothing_left = finished(state, self.setup.config) and unfinished is None
        left = "nothing left to do" if nothing_left else "continuing"
        self.terminal.console.print(f"{left} after step {state.step}")
        return Begun(state, tuple(notes["pending"]), unfinished, state.step)

    def train(self, begun: Begun) -> None:
        """Runs to the end.

        What ends it early (a signal, a fault) finds it between two steps, or in one that has not
        begun to change the parameters; then what it has is saved first.
        """
        setup, config, terminal = self.setup, self.setup.config, self.terminal
        state, unfinished = begun.state, begun.unfinished
        tree, spans = None, []
        # A step that is still to be recorded may be on disk all the same.
        recorded = begun.saved_step - (unfinished is not None)
        with closing(
            RunFolder(self.folder, recorded, begun.pending, processes.is_first(), terminal.warn)
        ) as files:
            try:
                if unfinished is not None:
                    score = self._conclude(state, unfinished, files)
                    unfinished = None
                    if begun.saved_step < 0:
                        self._save(state, files, score=score)
                for state, report in train_steps(state, setup):  # noqa: B020 (the state goes on)
                    unfinished, spans = report.metrics, report.spans
                    tree = self._keep(report, files) or tree
                    score = self._conclude(state, unfinished, files)
                    unfinished = None
                    self.checkpointer.check()
                    if finished(state, config) or state.step % config.checkpoint_every == 0:
                        self._save(state, files, score=score)
                    setup.interrupt()
            except InterruptedRunError as wish:
                terminal.console.print(f"{wish}: saving what there is after step {state.step}")
                self._save_last(state, files, unfinished)
                raise
            except (NotFiniteError, SaveError):
                raise
            except Exception:
                self._rescue(state, files, unfinished)
                raise
            self.checkpointer.wait()
            files.flush()
            if tree is not None:
                terminal.console.print(reporting.draw_tree(tree))
            if spans and config.overlap != "none":
                seconds = report.metrics["seconds/step"]
                terminal.console.print(f"the last step, {seconds:.1f} s:")
                terminal.console.print(reporting.draw_timeline(spans))
        if processes.is_first():
            history = read_metrics(self.folder / METRICS_FILE)
            reporting.plot_history(history, self.folder / "curve.png")

    def _keep(self, report: StepReport, files: RunFolder) -> dict[str, Any] | None:
        """Writes what is left of a step besides its metrics; its example tree."""
        for path in files.write_post_mortem(report):
            self.terminal.warn(
                f"an update of step {report.metrics['step']:.0f} was skipped, because loss, "
                f"gradient or parameters were not finite; its rows are in {path}"
            )
        tree = reporting.example_tree(report, self.setup.task.tokenizer)
        if tree is not None:
            files.write_tree(int(report.metrics["step"]), tree)
        return tree

    def _conclude(
        self, state: LoopState, metrics: dict[str, float], files: RunFolder
    ) -> float | None:
        """Evaluates where it is due, and records the step; the accuracy, if it was evaluated."""
        config = self.setup.config
        every = config.eval_every
        if state.step == 0 or finished(state, config) or (every and state.step % every == 0):
            metrics = metrics | evaluate(state, self.setup)
        metrics = {"step": metrics["step"], **metrics, **process_metrics()}
        files.write_metrics(metrics)
        self.terminal.step(metrics)
        self.terminal.warn_of(collapse_warnings(metrics, files.first, self.guards))
        return metrics.get("held_out/accuracy")

    def _save(
        self,
        state: LoopState,
        files: RunFolder,
        unfinished: dict[str, float] | None = None,
        score: float | None = None,
    ) -> None:
        notes = {"settings": self.settings, "pending": files.pending, "unfinished": unfinished}
        self.checkpointer.save(state, notes, score)

    def _save_last(
        self, state: LoopState, files: RunFolder, unfinished: dict[str, float] | None
    ) -> None:
        """Saves the state between two steps, unless it is on disk; waits until it is."""
        self.checkpointer.wait()
        if self.checkpointer.latest_step() != state.step:
            self._save(state, files, unfinished)
        self.checkpointer.wait()

    def _rescue(
        self, state: LoopState, files: RunFolder, unfinished: dict[str, float] | None
    ) -> None:
        """Saves the state before the step in which something failed, if that can be done.

        Several processes need not fail together, and cannot save one by one. An update that has
        begun has taken the buffers of the state.
        """
        leaves = jax.tree.leaves(state.train)
        if processes.count() > 1 or any(leaf.is_deleted() for leaf in leaves):
            return
        try:
            self._save_last(state, files, unfinished)
        except Exception as error:
            self.terminal.warn(f"step {state.step} could not be saved: {error}")
        else:
            self.terminal.console.print(f"what there is after step {state.step} is saved")


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
    flag, again = flags.FLAGS, "nothing was begun"
    try:
        config = flag.config
        name = f"{config.get('method')}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path(flag.workdir or Path("runs") / processes.from_first(name)).absolute()
        again = f"continue with the same command and --workdir={folder}"
        console = Console(quiet=not processes.is_first())
        history = run(config, folder, console, flag.allow_change)
    except InterruptedRunError as wish:
        processes.disconnect()
        interrupted(again, wish.exit_code)
    except KeyboardInterrupt:
        interrupted(again)
    except Exception as error:
        if flag.debug:
            raise
        stop(error, told=isinstance(error, NotFiniteError | SaveError))
    if processes.is_first():
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
