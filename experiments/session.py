"""One run in one process, from its begin or its last checkpoint to its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from attnrl_jax import processes
from attnrl_jax.host_memory import return_memory
from attnrl_jax.interruption import InterruptedRunError
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
from attnrl_jax.training.process_metrics import process_metrics
from attnrl_jax.training.setup import Setup
from attnrl_jax.training.state import LoopState, TrainState
from experiments import reporting
from experiments.folders import differences
from experiments.pictures import plot_history
from experiments.records import METRICS_FILE, RunFolder, read_metrics
from experiments.run_folder import check_notes, record_changes
from experiments.terminal import Terminal
from experiments.trees import has_branches, recorded_problems
from experiments.weights_and_biases import WeightsAndBiases


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


@dataclass(frozen=True)
class Session:
    """One run in one process, from its begin or its last checkpoint to its end.

    Attributes:
      setup: of the run.
      folder: of the run.
      settings: all of them by dotted name, for the checkpoints.
      guards: when to warn.
      trees: problems of a step whose trees are recorded.
      checkpointer: of the run.
      terminal: shows progress.
      tracker: is sent the metrics as well.
    """

    setup: Setup
    folder: Path
    settings: dict[str, Any]
    guards: GuardConfig
    trees: int
    checkpointer: Checkpointer
    terminal: Terminal
    tracker: WeightsAndBiases | None = None

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
                    else:
                        self.checkpointer.amend(state.step, self._notes(files), score)
                for state, report in train_steps(state, setup):  # noqa: B020 (the state goes on)
                    unfinished, spans = report.metrics, report.spans
                    tree = self._keep(report, files) or tree
                    score = self._conclude(state, unfinished, files)
                    unfinished = None
                    if report.metrics["train/not_finite"] == 1:
                        # Parameters of no use must not take the place of those that are.
                        continue
                    due = finished(state, config) or state.step % config.checkpoint_every == 0
                    if due or self._is_best(score):
                        self._save(state, files, score=score)
                    setup.interrupt()
                    self.checkpointer.check()
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
            plot_history(history, self.folder / "curve.png")

    def _keep(self, report: StepReport, files: RunFolder) -> dict[str, Any] | None:
        """Writes what is left of a step besides its metrics; a tree to be shown, if it has one."""
        for path in files.write_post_mortem(report):
            self.terminal.warn(
                f"an update of step {report.metrics['step']:.0f} was skipped, because loss or "
                f"gradient was not finite; its rows are in {path}"
            )
        if not self.trees or not processes.is_first():
            return None
        problems = recorded_problems(report, self.setup.task.tokenizer, self.trees)
        files.write_trees(int(report.metrics["step"]), problems)
        return next(filter(has_branches, problems), None)

    def _conclude(
        self, state: LoopState, metrics: dict[str, float], files: RunFolder
    ) -> float | None:
        """Evaluates where it is due, and records the step; the accuracy, if it was evaluated."""
        config = self.setup.config
        every = config.eval_every
        if state.step == 0 or finished(state, config) or (every and state.step % every == 0):
            metrics = metrics | evaluate(state, self.setup)
        # What the step leaves free between what lasts would grow with the steps.
        return_memory()
        metrics = {"step": metrics["step"], **metrics, **process_metrics()}
        files.write_metrics(metrics)
        if self.tracker is not None:
            self.tracker.write(metrics)
        self.terminal.step(metrics)
        self.terminal.warn_of(collapse_warnings(metrics, files.first, self.guards))
        return metrics.get("held_out/accuracy")

    def _is_best(self, score: float | None) -> bool:
        """Whether a step that was evaluated is worth a checkpoint of its own."""
        if score is None or self.setup.config.keep_best == 0:
            return False
        # All save, or none: what each has read of the folder may differ.
        return processes.from_first(str(self.checkpointer.would_be_best(score))) == "True"

    def _save(
        self,
        state: LoopState,
        files: RunFolder,
        unfinished: dict[str, float] | None = None,
        score: float | None = None,
    ) -> None:
        self.checkpointer.save(state, self._notes(files, unfinished), score)

    def _notes(
        self, files: RunFolder, unfinished: dict[str, float] | None = None
    ) -> dict[str, Any]:
        return {"settings": self.settings, "pending": files.pending, "unfinished": unfinished}

    def _save_last(
        self, state: LoopState, files: RunFolder, unfinished: dict[str, float] | None
    ) -> None:
        """Saves the state between two steps, unless it is on disk; waits until it is. That an
        earlier one could not be saved is no reason not to try."""
        try:
            self.checkpointer.wait()
        except SaveError as error:
            self.terminal.warn(f"{error}; step {state.step} is tried now")
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
        try:
            if processes.count() > 1:
                raise SaveError("of several processes one may have failed alone")
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(state.train)):
                raise SaveError("the update had begun to change it")
            self._save_last(state, files, unfinished)
        except Exception as error:
            newest = self.checkpointer.latest_step()
            there = (
                "there is no checkpoint" if newest is None else f"the newest is of step {newest}"
            )
            self.terminal.warn(f"step {state.step} could not be saved: {error}; {there}")
        else:
            self.terminal.console.print(f"what there is after step {state.step} is saved")
