"""Checkpoints of a whole run with Orbax: everything the next step depends on.

They are written beside training, to another name that is changed when all is there, so that a
checkpoint is whole or absent. What was saved is known by its checksums: a checkpoint that was
damaged since is not trained on, and the one before it takes its place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from attnrl_jax import processes
from attnrl_jax.training.checkpoint_reading import (
    FORMAT,
    CheckpointError,
    DamagedError,
    check_checksums,
    check_same_model,
    read_values,
    stored_score,
    together,
)
from attnrl_jax.training.checksums import array_checksums, row_checksums, text_checksum
from attnrl_jax.training.leaves import from_arrays, to_arrays
from attnrl_jax.training.retention import NewestAndBest, best_steps, steps_on_disk
from attnrl_jax.training.state import LoopState, TrainState

# What of a run's state is rows, and what is plain numbers.
ROWS = ("batch", "continued", "following")
COUNTERS = {f.name for f in fields(LoopState)} - {"train", *ROWS}
# Beside the checkpoints: those that could not be read.
DAMAGED = "damaged_checkpoints"
# Of them, those moved last.
MOST_DAMAGED = 3


class SaveError(RuntimeError):
    """A checkpoint that could not be written; those before it are as they were."""


class NotFiniteStateError(SaveError):
    """One that nobody should go on from."""


class Checkpointer:
    """The checkpoints of one run folder.

    Args:
      folder: made if needed, unless it is only read.
      keep: newest checkpoints that stay.
      keep_best: checkpoints of the highest score that stay besides.
      read_only: leaves the folder as it is, so that a run may be using it.
    """

    def __init__(
        self, folder: str | Path, keep: int = 2, keep_best: int = 0, read_only: bool = False
    ):
        self.folder = Path(folder).absolute()
        # Read before Orbax looks: a damaged file must not keep the others from being found.
        self._scores = {
            step: score
            for step in steps_on_disk(self.folder)
            if (score := stored_score(self.folder / str(step))) is not None
        }
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=None
                if read_only
                else NewestAndBest(keep, keep_best, self._scores),
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=not read_only,
            ),
        )

        # Orbax would tell JAX's preemption service of steps, in process 0 alone, where
        # `interruption` counts calls.
        self._manager.reached_preemption = lambda step: False

    def save(
        self,
        state: LoopState,
        notes: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Begins to write the state of a run after `state.step`.

        Returns once the state is copied, so that training may go on; `wait` waits for the disk.

        Args:
          state: of the run.
          notes: anything that JSON holds, given back by `restore`.
          score: by which the best are kept; None is never among them.

        Raises:
          SaveError: this checkpoint, or the one before, could not be written.
          NotFiniteStateError: the state is not finite.
        """
        counters = {f.name: getattr(state, f.name) for f in fields(state) if f.name in COUNTERS}
        # Orbax refuses an empty tree, and an on-policy run has no rows in flight. It refuses empty
        # arrays too.
        rows: dict[str, Any] = {
            name: {field: x for field, x in to_arrays(held).items() if x.size}
            for name in ROWS
            if (held := getattr(state, name)) is not None
        }
        checksums, finite = array_checksums(state.train, "train")
        if not finite:
            raise NotFiniteStateError(
                f"parameters or optimizer state are not finite after step {state.step}, which is "
                "therefore not saved; the checkpoints before it are as they were"
            )
        values = {
            "format": FORMAT,
            "counters": counters,
            "in_flight": list(rows),
            "score": None if score is None else float(score),
            "notes": dict(notes or {}),
            "checksums": checksums | row_checksums(rows),
        }
        # They are written later: what the caller does to its lists meanwhile must not change them.
        values = json.loads(json.dumps(values))
        if score is not None:
            self._scores[state.step] = float(score)
        try:
            self._manager.save(
                state.step,
                args=ocp.args.Composite(
                    train=ocp.args.StandardSave(state.train),
                    rows=ocp.args.StandardSave(rows or {"none": np.zeros(1)}),
                    loop=ocp.args.JsonSave({"values": values, "checksum": text_checksum(values)}),
                ),
                force=True,
            )
        except Exception as error:
            raise self._save_error(error) from error

    def amend(self, step: int, notes: Mapping[str, Any], score: float | None) -> None:
        """Gives a checkpoint that is on disk other notes, and the score that it had not.

        One file takes the place of another, so that the checkpoint is whole all the time.

        Args:
          step: of the checkpoint.
          notes, score: as in `save`.

        Raises:
          SaveError: they could not be written.
        """
        folder = self.folder / str(step)

        def write() -> None:
            score_now = None if score is None else float(score)
            values = read_values(folder) | {"notes": dict(notes), "score": score_now}
            stored = json.dumps({"values": values, "checksum": text_checksum(values)})
            staging = folder / ".loop.tmp"
            with staging.open("w") as file:
                file.write(stored)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staging, folder / "loop" / "metadata")

        try:
            processes.first_then_all(write)
        except OSError as error:
            raise self._save_error(error) from error
        if score is not None:
            self._scores[step] = float(score)

    def check(self) -> None:
        """Raises `SaveError` if a checkpoint that was begun is known to have failed."""
        # The error is kept by Orbax's thread that brings a save to its end, until it is waited for.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          SaveError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            if processes.count() == 1:
                # What this save would have removed is still there, and Orbax has forgotten it.
                self._manager.reload()
            raise self._save_error(error) from error

    def _save_error(self, error: Exception) -> SaveError:
        reason = str(error).strip().splitlines()
        there = ", ".join(map(str, steps_on_disk(self.folder))) or "none"
        return SaveError(
            f"a checkpoint could not be written to {self.folder}: "
            f"{reason[0] if reason else type(error).__name__} (whole are those of steps: {there})"
        )

    def latest_step(self) -> int | None:
        """Newest step saved, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the highest score, the newest of equals; None where none has one."""
        return max(best_steps(self.steps(), self._scores, 1), default=None)

    def would_be_best(self, score: float) -> bool:
        """Whether no checkpoint that is kept has such a score."""
        return score > max((self._scores[s] for s in self.steps() if s in self._scores), default=-1)

    def steps(self) -> list[int]:
        """Steps saved, the oldest first."""
        return sorted(self._manager.all_steps())

    def restore(
        self,
        template: TrainState,
        check: Callable[[dict[str, Any]], None] = lambda notes: None,
        on_damaged: Callable[[str], None] = lambda message: None,
    ) -> tuple[LoopState, dict[str, Any]]:
        """Reads the newest checkpoint that is whole, and its notes.

        Newer ones that are damaged are moved to a folder of their own (`DAMAGED`).

        Args:
          template: a fresh state of the same run, whose arrays give shapes, dtypes and shardings.
          check: of the notes, before arrays are read; what it raises is raised.
          on_damaged: is told of every checkpoint that was passed over.

        Raises:
          FileNotFoundError: there is none.
          CheckpointError: it is of another model or another version of this program; or all are
            damaged, and then they stay where they are.
        """
        self.wait()
        steps = self.steps()[::-1]
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.folder}")
        damaged: list[tuple[int, str]] = []
        for step in steps:
            try:
                restored = self._restore(step, template, check)
            except DamagedError as error:
                damaged.append((step, str(error)))
                continue
            for bad, reason in damaged:
                moved = self._move_away(bad)
                on_damaged(f"{reason}; it was moved to {moved}, and step {step} takes its place")
            return restored
        raise CheckpointError("; ".join(reason for _, reason in damaged))

    def _restore(
        self, step: int, template: TrainState, check: Callable[[dict[str, Any]], None]
    ) -> tuple[LoopState, dict[str, Any]]:
        folder = self.folder / str(step)
        values = together(folder, lambda: read_values(folder))
        check(values["notes"])
        together(folder, lambda: check_same_model(folder, "params", template.params))
        train = together(
            folder,
            lambda: ocp.StandardCheckpointHandler().restore(
                folder / "train",
                args=ocp.args.StandardRestore(
                    jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
                ),
            ),
        )

        def read_rows() -> dict[str, dict[str, np.ndarray]]:
            # Rows differ in number from step to step: shapes come from the checkpoint.
            stored = ocp.StandardCheckpointHandler().restore(
                folder / "rows", args=ocp.args.StandardRestore()
            )
            return {
                name: {field: np.array(x) for field, x in stored[name].items()}
                for name in values["in_flight"]
            }

        rows = together(folder, read_rows)

        def puttogether() -> LoopState:
            found = array_checksums(train, "train")[0] | row_checksums(rows)
            check_checksums(folder, values["checksums"], found)
            held: dict[str, Any] = dict.fromkeys(ROWS) | {
                name: from_arrays(arrays) for name, arrays in rows.items()
            }
            return LoopState(train=train, **held, **values["counters"])

        return together(folder, puttogether), values["notes"]

    def _move_away(self, step: int) -> Path:
        target = self.folder.parent / DAMAGED / str(step)
        while target.exists():
            target = target.with_name(f"{target.name}_again")

        def move() -> None:
            target.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)
            # Their own time is that of their writing; this is when they were found.
            os.utime(target)
            there = sorted(target.parent.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            for old in there[:-MOST_DAMAGED]:
                shutil.rmtree(old)

        processes.first_then_all(move)
        self._manager.reload()
        return target

    def restore_params(self, step: int, template: Any) -> Any:
        """Reads the parameters of a step into host memory; the optimizer's state is not read.

        Args:
          step: one of `steps()`.
          template: the parameters' tree of shapes and dtypes.

        Returns:
          the tree as numpy arrays, whatever devices the run had.

        Raises:
          FileNotFoundError: there is no such step.
          CheckpointError: it is damaged, or of another model (the first parameter that differs is
            named).
        """
        folder = self.folder / str(step)
        if step not in self.steps():
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.folder}")
        values = together(folder, lambda: read_values(folder))
        wanted = {"params": template}
        to_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)

        def read() -> Any:
            check_same_model(folder, "params", template)
            params = ocp.PyTreeCheckpointHandler().restore(
                folder / "train",
                args=ocp.args.PyTreeRestore(wanted, to_host, partial_restore=True),
            )["params"]
            found = array_checksums(params, "train/params")[0]
            saved = {name: values["checksums"].get(name) for name in found}
            check_checksums(folder, saved, found)
            return params

        return together(folder, read)

    def close(self) -> None:
        """Waits for what was begun, and lets go of the folder.

        Raises:
          SaveError: it could not be written.
        """
        try:
            self.wait()
        finally:
            try:
                self._manager.close()
            except Exception as error:
                raise self._save_error(error) from error
