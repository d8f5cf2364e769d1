"""What a run leaves in its folder: metrics, TensorBoard events, example trees, post-mortems.

A disk that is full or gone costs no step: metrics that could not be written wait for the next try,
and travel with the checkpoints. What only repeats them (events) or shows examples (trees) is left
out with a warning.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnrl_jax.training.loop import StepReport
from experiments.folders import write_atomically

METRICS_FILE = "metrics.jsonl"
# Example trees that stay: beyond it every 2nd, 4th, 8th ... step's.
MOST_TREES = 200
# Of the newest updates that were skipped.
MOST_POST_MORTEMS = 10
# Newest lines of the metrics that are remembered, in case that the file loses them.
MOST_LINES = 1000

Warn = Callable[[str], None]


class RunFolder:
    """Files of one run.

    Args:
      folder: made if needed.
      last_step: the last whose metrics stay, -1 for a new run. Those of later steps, written
        before the run was stopped, are dropped: these steps are run again.
      pending: metrics that this checkpoint holds because they could not be written before it.
      writes: whether this process does; of several one does.
      warn: told of what could not be written.

    Attributes:
      pending: metrics that are not on disk.
      first: metrics of the first step, empty before it.

    Raises:
      OSError: `metrics.jsonl` cannot be written when the run begins.
    """

    def __init__(
        self,
        folder: Path,
        last_step: int = -1,
        pending: Sequence[dict[str, float]] = (),
        writes: bool = True,
        warn: Warn = print,
    ):
        self.folder, self._writes, self._warn = folder, writes, warn
        self.pending: list[dict[str, float]] = []
        self.first: dict[str, float] = {}
        self._is_failing = False
        self._path = folder / METRICS_FILE
        self._events: _Events | None = None
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        held = {m["step"]: m for m in pending}
        kept = [m for m in read_metrics(self._path) if m["step"] <= last_step] + [*held.values()]
        kept = sorted({m["step"]: m for m in kept}.values(), key=lambda m: m["step"])
        if missing := {*range(last_step + 1)} - {int(m["step"]) for m in kept}:
            warn(f"{self._path} has lost the metrics of steps {_ranges(missing)}")
        self.first = next((m for m in kept if m["step"] == 1), {})
        text = "".join(json.dumps(m) + "\n" for m in kept)
        write_atomically(self._path, text)
        self._size = len(text.encode())
        self._newest = deque(kept, MOST_LINES)
        self._events = self._try(
            "TensorBoard events", lambda: _Events(folder / "tensorboard", last_step + 1)
        )

    def write_metrics(self, metrics: dict[str, float]) -> None:
        """Appends one step's metrics to `metrics.jsonl` and the events. JSON has no numbers that
        are not finite: they are left out, with a warning."""
        lost = [name for name, value in metrics.items() if not math.isfinite(value)]
        if lost:
            self._warn(f"step {metrics['step']:.0f}: not finite, not written: {', '.join(lost)}")
            metrics = {name: value for name, value in metrics.items() if name not in lost}
        if metrics["step"] == 1:
            self.first = metrics
        if not self._writes:
            return
        self.pending.append(metrics)
        try:
            self.flush()
            self._is_failing = False
        except OSError as error:
            # Once: the next steps would only say it again.
            if not self._is_failing:
                self._warn(
                    f"metrics cannot be written to {self._path} ({error}); the run goes on, and "
                    "tries again after every step"
                )
            self._is_failing = True
        if self._events is not None and not self._try(
            "TensorBoard events", lambda: self._events is not None and self._events.write(metrics)
        ):
            self._events = None

    def flush(self) -> None:
        """Writes what is pending behind what is known to be there, and waits for the disk, so that
        no checkpoint is newer than the metrics before it.

        Raises:
          OSError: it cannot be written.
        """
        if not self.pending:
            return
        if self._has_lost_lines():
            self._write_anew()
        data = "".join(json.dumps(m, allow_nan=False) + "\n" for m in self.pending).encode()
        with self._path.open("r+b") as file:
            # A write that failed half-way left half a line.
            file.seek(self._size)
            file.truncate()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(data)
        self._newest.extend(self.pending)
        self.pending.clear()

    def _has_lost_lines(self) -> bool:
        """Whether the file is gone, or came back shorter: as from a disk that was restored."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return True
        return stat.S_ISREG(found.st_mode) and found.st_size < self._size

    def _write_anew(self) -> None:
        """Writes what is left of the file and what is remembered of it."""
        known = {m["step"]: m for m in (*read_metrics(self._path), *self._newest)}
        text = "".join(json.dumps(known[step]) + "\n" for step in sorted(known))
        write_atomically(self._path, text)
        self._size = len(text.encode())
        self._warn(f"{self._path} had lost lines; {len(known)} were written again")

    def _try(self, what: str, function: Callable[[], Any]) -> Any:
        """What it returns (True for nothing); None, with a warning, where the disk refuses."""
        try:
            result = function()
            return True if result is None else result
        except OSError as error:
            self._warn(f"{what} cannot be written to {self.folder} ({error}); left out")
            return None

    def write_trees(self, step: int, problems: list[dict[str, Any]]) -> None:
        """Writes a step's trees (`experiments.trees`) as JSON; of a long run only those of every
        2nd, 4th, ... step stay."""

        def write() -> None:
            trees = self.folder / "trees"
            trees.mkdir(exist_ok=True)
            write_atomically(
                trees / f"step_{step:06d}.json", json.dumps({"step": step, "problems": problems})
            )
            steps = sorted(
                int(path.stem.removeprefix("step_")) for path in trees.glob("step_*.json")
            )
            stride = 1
            while sum(number % stride == 0 for number in steps) >= MOST_TREES:
                stride *= 2
            for number in steps if len(steps) > MOST_TREES else ():
                if number % stride and number != step:
                    (trees / f"step_{number:06d}.json").unlink()

        if self._writes:
            self._try("example trees", write)

    def write_post_mortem(self, report: StepReport) -> list[Path]:
        """Writes the rows of every update of a step that was skipped, as `.npz` without pickles.

        `rows` are their numbers among the step's leaves, `advantages` those of the update; the
        other arrays are the fields of `attnrl_jax.types.Rollouts`. `problems` is JSON.
        """
        written: list[Path] = []

        def write() -> None:
            folder = self.folder / "post_mortem"
            folder.mkdir(exist_ok=True)
            step = int(report.metrics["step"])
            for number, rows in enumerate(report.not_finite):
                path = folder / f"step_{step:06d}_update_{number:04d}.npz"
                rollouts = report.lay_out(rows)
                width = rollouts.tokens.shape[1]
                laid_out = report.leaf_advantages.lay_out(report.leaves, rows, width)
                asked = sorted({int(problem) for problem in rollouts.problem})
                problems = {k: report.problems[k].text for k in asked}
                staging = path.with_name(f".{path.name}")
                with staging.open("wb") as file:
                    np.savez_compressed(
                        file, allow_pickle=False, rows=rows, advantages=laid_out,
                        problems=np.array(json.dumps(problems)), **vars(rollouts),
                    )  # fmt: skip
                os.replace(staging, path)
                written.append(path)
            for old in sorted(folder.glob("step_*.npz"))[:-MOST_POST_MORTEMS]:
                old.unlink()

        if self._writes:
            self._try("a post-mortem", write)
        return written

    def close(self) -> None:
        """Lets go of the files."""
        if self._events is not None:
            self._try("TensorBoard events", self._events.close)


class _Events:
    """TensorBoard events of scalars, written at once.

    tensorboardX's `SummaryWriter` writes in a thread, which ends where a disk is full; whoever puts
    the next events into its queue then waits for ever. Its writer of files says so instead.
    """

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        # Events of later steps are of before the run was stopped.
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=purge_step, session_log=start))
        self._writer.flush()

    def write(self, metrics: dict[str, float]) -> None:
        import time

        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        step = int(metrics["step"])
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
            if name != "step"
        ]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _ranges(steps: set[int]) -> str:
    """`{1, 2, 3, 7}` as `1-3, 7`."""
    text: list[str] = []
    for step in sorted(steps):
        if step - 1 in steps:
            text[-1] = f"{text[-1].partition('-')[0]}-{step}"
        else:
            text.append(str(step))
    return ", ".join(text)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Metrics written so far, without lines that are none: one that a crash cut off, or that was
    damaged."""
    if not path.exists():
        return []
    metrics = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            read = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(read, dict) and isinstance(read.get("step"), int | float):
            metrics.append(read)
    return metrics
