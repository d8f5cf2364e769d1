"""Results of a sweep: a table of its runs, means over seeds, and curves, from the run folders.

All is read from `metrics.jsonl`, so that runs may be gathered while others are going on.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.curves import BOOTSTRAP_SEEDS, Line, Point, evaluations, interval, so_far
from experiments.folders import write_atomically
from experiments.pictures import plot
from experiments.records import read_metrics
from experiments.tables import one_line, table

# Exit codes of a run that was stopped from outside (Ctrl-C, SIGTERM), and saved what it had.
INTERRUPTED = ("130", "143")
# Last line that a sweep writes into the log of a run that ended by itself.
EXIT_CODE = "[sweep] exit code {}"


@dataclass(frozen=True)
class Result:
    """What is known of one run.

    Attributes:
      name: of its folder.
      overrides: what sets it apart.
      state: `finished`, `unfinished`, `failed`, `not started`, or from a sweep that came upon
        another process in its folder `running`.
      steps: training steps done.
      sampled_tokens, trained_tokens, seconds: of these.
      points: its held-out evaluations.
    """

    name: str
    overrides: Mapping[str, Any]
    state: str
    steps: int = 0
    sampled_tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    points: tuple[Point, ...] = ()

    @property
    def best(self) -> Point | None:
        """The earliest evaluation with the highest accuracy."""
        return max(self.points, key=lambda point: point.accuracy, default=None)


def finished(folder: Path, steps: int, max_sampled_tokens: int) -> bool:
    """Whether a run has its steps, or has sampled its tokens, and has ended.

    A run writes the metrics of a step, then its checkpoint, and `curve.png` at its end. All must be
    there; of a run whose `checkpoints` folder was deleted as a whole, the other two.

    Args:
      folder: of the run.
      steps: it is to do.
      max_sampled_tokens: it may sample; 0 sets no limit.
    """
    history = read_metrics(folder / "metrics.jsonl")
    _, reached = _within(history, steps, max_sampled_tokens)
    if not reached or not (folder / "curve.png").exists():
        return False
    checkpoints = folder / "checkpoints"
    return not checkpoints.exists() or (checkpoints / f"{history[-1]['step']:.0f}").is_dir()


def _within(
    history: Sequence[dict[str, float]], steps: int, max_sampled_tokens: int
) -> tuple[list[dict[str, float]], bool]:
    """The part of a history that is within the limits, and whether it reaches them."""
    kept = []
    for metrics in history:
        if metrics["step"] > steps:
            break
        kept.append(metrics)
        spent = 0 < max_sampled_tokens <= metrics.get("tokens/sampled_total", 0)
        if spent or metrics["step"] == steps:
            return kept, True
    return kept, False


def read_result(
    folder: Path, overrides: Mapping[str, Any], steps: int, max_sampled_tokens: int
) -> Result:
    """Reads a run folder and the log beside it.

    What a run did beyond the limits, when they were wider, is left out: the runs of a sweep are
    compared at the same length.

    Args:
      folder: of the run; may be missing.
      overrides: of the run.
      steps, max_sampled_tokens: as for `finished`.
    """
    if finished(folder, steps, max_sampled_tokens):
        state = "finished"
    elif _failed(log_path(folder)):
        state = "failed"
    else:
        state = "unfinished" if (folder / "config.json").exists() else "not started"
    history, _ = _within(read_metrics(folder / "metrics.jsonl"), steps, max_sampled_tokens)
    done, sampled, trained, seconds = 0, 0, 0, 0.0
    for metrics, sampled, trained, seconds in so_far(history):  # noqa: B007 (the last counts)
        done = int(metrics["step"])
    points = evaluations(history)
    return Result(folder.name, overrides, state, done, sampled, trained, seconds, points)


def log_path(folder: Path) -> Path:
    """Where a sweep writes the output of a run, beside its folder."""
    return folder.with_name(folder.name + ".log")


def _failed(log: Path) -> bool:
    """Whether the last attempt ended by itself, and not well."""
    if not log.exists():
        return False
    lines = log.read_text(errors="replace").splitlines()
    pattern = re.escape(EXIT_CODE.format("@")).replace("@", r"(-?\d+)")
    found = re.fullmatch(pattern, lines[-1]) if lines else None
    return found is not None and found[1] not in ("0", *INTERRUPTED)


def groups(results: Sequence[Result]) -> list[list[Result]]:
    """Runs that differ in nothing but `seed`, together; in the order of the first of each."""
    found: dict[Any, list[Result]] = {}
    for result in results:
        # The order in which a sweep file names settings says nothing.
        items = ((n, repr(v)) for n, v in result.overrides.items() if n != "seed")
        found.setdefault(frozenset(items), []).append(result)
    return [*found.values()]


def counted(group: Sequence[Result]) -> list[Result]:
    """Runs of a group that its means are of: the finished ones, without any those that are not.

    A mean of finished and unfinished runs would be one of different lengths of training.
    """
    measured = [result for result in group if result.points]
    return [result for result in measured if result.state == "finished"] or measured


def write_results(folder: Path, name: str, results: Sequence[Result]) -> str:
    """Writes `results.csv`, `results.json`, `results.md` and `curves.png` of a sweep.

    Args:
      folder: of the sweep.
      name: of the sweep.
      results: of its runs, in its order.

    Returns:
      the text of `results.md`, which says so if the curves could not be drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(result) for result in results]
    write_atomically(folder / "results.json", json.dumps(rows, indent=1, default=str) + "\n")
    write_atomically(folder / "results.csv", _csv(rows))
    text = markdown(name, results)
    write_atomically(folder / "results.md", text)
    lines = []
    for group in groups(results):
        runs = counted(group)
        whole = bool(runs) and runs[0].state == "finished"
        lines.append(Line(group[0].overrides, [run.points for run in runs], whole))
    picture = folder / "curves.png"
    try:
        drawn = plot(picture, name, lines)
    # A table of many hours of runs must not depend on what a library makes of their labels.
    except Exception as error:
        drawn = False
        text += f"\nNo curves: {type(error).__name__}: {one_line(str(error))}\n"
    if drawn:
        text += "\nCurves: curves.png. Every run: results.csv, and with its curve results.json.\n"
    else:
        # An older one would be of other results.
        picture.unlink(missing_ok=True)
    write_atomically(folder / "results.md", text)
    return text


def _row(result: Result) -> dict[str, Any]:
    first, last = (result.points[0], result.points[-1]) if result.points else (None, None)
    best = result.best
    return {
        "run": result.name,
        "overrides": dict(result.overrides),
        "state": result.state,
        "steps": result.steps,
        "first_accuracy": first and first.accuracy,
        "last_accuracy": last and last.accuracy,
        "best_accuracy": best and best.accuracy,
        "best_step": best and best.step,
        "sampled_tokens": result.sampled_tokens,
        "trained_tokens": result.trained_tokens,
        "seconds": round(result.seconds, 1),
        "held_out": [
            [p.step, p.accuracy, p.sampled_tokens, p.trained_tokens, round(p.seconds, 1)]
            for p in result.points
        ],
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    settings = list(dict.fromkeys(name for row in rows for name in row["overrides"]))
    measured = [name for name in rows[0] if name not in ("run", "overrides", "held_out")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *settings, *measured])
    for row in rows:
        given = [row["overrides"].get(name) for name in settings]
        writer.writerow([row["run"], *given, *(row[name] for name in measured)])
    return text.getvalue()


def markdown(name: str, results: Sequence[Result]) -> str:
    """The table of means over seeds, and the runs that are not in it.

    Args:
      name: of the sweep.
      results: of its runs.
    """
    by_group = groups(results)
    settings = list(dict.fromkeys(n for r in results for n in r.overrides if n != "seed"))
    heading = [*settings, "seeds", "start", "end", "interval", "best", "steps", "sampled tokens",
               "trained tokens", "minutes"]  # fmt: skip
    rows = [heading]
    for group in by_group:
        overrides = group[0].overrides
        given = [str(overrides.get(setting, "")) for setting in settings]
        rows.append([*given, *_means(group)])
    lines = [f"# {name}", "", table(rows, left=len(settings)), ""]
    lines += [
        "Held-out accuracy before training, at the end and at its best, means over seeds (as are "
        "the other columns). Interval of the end: 95 % bootstrap from "
        f"{BOOTSTRAP_SEEDS} seeds on, otherwise lowest to highest."
    ]
    marks = {mark for group in by_group for mark in _marks(group)}
    if "*" in marks:
        lines += ["", "*: no run of the line has finished; it is of those that have begun."]
    if "+" in marks:
        lines += [
            "",
            "+: a run of the line was longer than the sweep now says and was not evaluated where "
            "the sweep ends: its end is its last evaluation before.",
        ]
    left = [result for result in results if result.state != "finished"]
    if left:
        rows = [["run", "state", "steps", "last accuracy"]]
        for result in left:
            last = f"{result.points[-1].accuracy:.3f}" if result.points else "-"
            rows.append([result.name, result.state, str(result.steps), last])
        lines += ["", f"Not finished, {len(left)} of {len(results)} runs:", ""]
        lines += [table(rows, left=2)]
    return "\n".join(lines) + "\n"


def _marks(group: Sequence[Result]) -> str:
    """What a reader must know of a group's line; the notes below the table explain it."""
    runs = counted(group)
    marks = "*" if any(run.state != "finished" for run in runs) else ""
    late = any(run.state == "finished" and run.points[-1].step < run.steps for run in runs)
    return marks + "+" * late


def _means(group: Sequence[Result]) -> list[str]:
    """Cells of a group's line."""
    runs = counted(group)
    done = sum(result.state == "finished" for result in group)
    seeds = str(done) if done == len(group) else f"{done} of {len(group)}"
    if not runs:
        return [seeds] + ["-"] * 8
    last = np.array([result.points[-1].accuracy for result in runs])
    low, high = interval(last)

    def mean(values: Sequence[float], form: str = ",.0f") -> str:
        return format(float(np.mean(values)), form)

    return [
        seeds + _marks(group),
        mean([result.points[0].accuracy for result in runs], ".3f"),
        mean(last.tolist(), ".3f"),
        f"{low:.3f} to {high:.3f}" if len(runs) > 1 else "-",
        mean([max(point.accuracy for point in result.points) for result in runs], ".3f"),
        mean([result.steps for result in runs]),
        mean([result.sampled_tokens for result in runs]),
        mean([result.trained_tokens for result in runs]),
        mean([result.seconds / 60 for result in runs], ".1f"),
    ]
