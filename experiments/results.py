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

from experiments.folders import write_atomically
from experiments.reporting import read_metrics

# With fewer seeds a bootstrap says little: the lowest and the highest are shown instead.
BOOTSTRAP_SEEDS = 5
# Last line that a sweep writes into the log of a run that ended by itself.
EXIT_CODE = "[sweep] exit code {}"


@dataclass(frozen=True)
class Point:
    """One held-out evaluation.

    Attributes:
      step: training steps done.
      accuracy: share of held-out problems solved.
      sampled_tokens, trained_tokens: since the start of the run.
      seconds: wall clock of the steps and evaluations so far.
    """

    step: int
    accuracy: float
    sampled_tokens: int
    trained_tokens: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """What is known of one run.

    Attributes:
      name: of its folder.
      overrides: what sets it apart.
      state: `finished`, `unfinished`, `failed` or `not started`.
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
    """Whether a run has its steps, or has sampled its tokens.

    Args:
      folder: of the run.
      steps: it is to do.
      max_sampled_tokens: it may sample; 0 sets no limit.
    """
    history = read_metrics(folder / "metrics.jsonl")
    if not history:
        return False
    last = history[-1]
    spent = 0 < max_sampled_tokens <= last.get("tokens/sampled_total", 0)
    return last["step"] >= steps or spent


def read_result(
    folder: Path, overrides: Mapping[str, Any], steps: int, max_sampled_tokens: int
) -> Result:
    """Reads a run folder and the log beside it.

    Args:
      folder: of the run; may be missing.
      overrides: of the run.
      steps, max_sampled_tokens: as for `finished`.
    """
    history = read_metrics(folder / "metrics.jsonl")
    if finished(folder, steps, max_sampled_tokens):
        state = "finished"
    elif _failed(log_path(folder)):
        state = "failed"
    else:
        state = "unfinished" if (folder / "config.json").exists() else "not started"
    points = []
    sampled = trained = 0
    seconds = 0.0
    if len(history) > 1:
        # Step 0 has no counts; the warm-up's tokens are what step 1 has besides its own.
        sampled = int(history[1]["tokens/sampled_total"] - history[1]["tokens/sampled"])
    for metrics in history:
        sampled = int(metrics.get("tokens/sampled_total", sampled))
        trained = int(metrics.get("tokens/trained_total", trained))
        seconds += sum(metrics.get(f"seconds/{n}", 0.0) for n in ("warm_up", "step", "evaluate"))
        if "held_out/accuracy" in metrics:
            accuracy = metrics["held_out/accuracy"]
            points.append(Point(int(metrics["step"]), accuracy, sampled, trained, seconds))
    done = int(history[-1]["step"]) if history else 0
    return Result(
        folder.name, overrides, state, done, sampled, trained, seconds, tuple(points)
    )  # fmt: skip


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
    return found is not None and found[1] != "0"


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Runs by `group_name`: those of a group differ in nothing but `seed`."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(group_name(result.overrides), []).append(result)
    return found


def group_name(overrides: Mapping[str, Any]) -> str:
    """Overrides but for the seed, in words."""
    parts = [f"{name}={value}" for name, value in overrides.items() if name != "seed"]
    return ", ".join(parts) or "all"


def counted(group: Sequence[Result]) -> list[Result]:
    """Runs of a group that its means are of: the finished ones, without any those that are not.

    A mean of finished and unfinished runs would be one of different lengths of training.
    """
    measured = [result for result in group if result.points]
    return [result for result in measured if result.state == "finished"] or measured


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of a mean over seeds.

    Args:
      values: one row per seed, `[seeds, ...]`.

    Returns:
      lower and upper bound, `[...]`: from 5 seeds on the 95 % percentile bootstrap of the mean
      (10,000 resamples, always the same ones), otherwise the lowest and the highest value.
    """
    if len(values) < BOOTSTRAP_SEEDS:
        return values.min(axis=0), values.max(axis=0)
    drawn = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    # How often each seed was drawn: the means are one matrix product.
    counts = np.stack([(drawn == seed).sum(axis=1) for seed in range(len(values))], axis=1)
    means = np.tensordot(counts / len(values), values, axes=1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def write_results(folder: Path, name: str, results: Sequence[Result]) -> str:
    """Writes `results.csv`, `results.json`, `results.md` and `curves.png` of a sweep.

    Args:
      folder: of the sweep.
      name: of the sweep.
      results: of its runs, in its order.

    Returns:
      the text of `results.md`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(result) for result in results]
    write_atomically(folder / "results.json", json.dumps(rows, indent=1, default=str) + "\n")
    write_atomically(folder / "results.csv", _csv(rows))
    drawn = plot(folder / "curves.png", name, results)
    text = markdown(name, results)
    if drawn:
        text += "\nCurves: curves.png. Every run: results.csv, and with its curve results.json.\n"
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
    rows = [heading, ["---"] * len(settings) + ["---:"] * (len(heading) - len(settings))]
    for group in by_group.values():
        overrides = group[0].overrides
        given = [str(overrides.get(setting, "")) for setting in settings]
        rows.append([*given, *_means(group)])
    lines = [f"# {name}", "", *_aligned(rows), ""]
    lines += [
        "Held-out accuracy before training, at the end and at its best, means over seeds (as are "
        "the other columns). Interval of the end: 95 % bootstrap from "
        f"{BOOTSTRAP_SEEDS} seeds on, otherwise lowest to highest."
    ]
    if any(counted(group) and counted(group)[0].state != "finished" for group in by_group.values()):
        lines += ["", "*: no run of the line has finished; it is of those that have begun."]
    left = [result for result in results if result.state != "finished"]
    if left:
        rows = [["run", "state", "steps", "last accuracy"], ["---", "---", "---:", "---:"]]
        for result in left:
            last = f"{result.points[-1].accuracy:.3f}" if result.points else "-"
            rows.append([result.name, result.state, str(result.steps), last])
        lines += ["", f"Not finished, {len(left)} of {len(results)} runs:", "", *_aligned(rows)]
    return "\n".join(lines) + "\n"


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
        seeds if done else seeds + "*",
        mean([result.points[0].accuracy for result in runs], ".3f"),
        mean(last.tolist(), ".3f"),
        f"{low:.3f} to {high:.3f}" if len(runs) > 1 else "-",
        mean([max(point.accuracy for point in result.points) for result in runs], ".3f"),
        mean([result.steps for result in runs]),
        mean([result.sampled_tokens for result in runs]),
        mean([result.trained_tokens for result in runs]),
        mean([result.seconds / 60 for result in runs], ".1f"),
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that also reads well as text; the second row says how columns align."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [cell.endswith(":") for cell in rows[1]]
    lines = []
    for number, row in enumerate(rows):
        if number == 1:
            cells = [
                "-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)
            ]
        else:
            cells = [
                cell.rjust(w) if r else cell.ljust(w)
                for cell, w, r in zip(row, widths, right, strict=True)
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def mean_curve(runs: Sequence[Result], axis: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Accuracies of several runs at the same places.

    Args:
      runs: with at least one evaluation each.
      axis: `step` or `sampled_tokens`.

    Returns:
      places `[places]`, where any of the runs was evaluated and all of them had begun and not
      yet ended; accuracy of each run there `[runs, places]`, linear between its evaluations.
      None if there is no such place.
    """
    at = [np.array([getattr(p, axis) for p in run.points], float) for run in runs]
    places = np.unique(np.concatenate(at))
    places = places[(places >= max(x[0] for x in at)) & (places <= min(x[-1] for x in at))]
    if not len(places):
        return None
    accuracy = [np.array([p.accuracy for p in run.points]) for run in runs]
    return places, np.stack([np.interp(places, x, y) for x, y in zip(at, accuracy, strict=True)])


def plot(path: Path, name: str, results: Sequence[Result]) -> bool:
    """Draws held-out accuracy against steps and against sampled tokens, a line per group.

    Args:
      path: of the PNG.
      name: of the sweep.
      results: of its runs.

    Returns:
      whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, MaxNLocator

    lines = {name: counted(group) for name, group in groups(results).items()}
    lines = {name: runs for name, runs in lines.items() if runs}
    if not lines:
        return False
    figure, panels = plt.subplots(1, 2, figsize=(10.0, 4.2), sharey=True, layout="constrained")
    styles = ("-", "--", "-.", ":")
    markers = "osD^vPX*"
    # From dark to light: told apart in print as well.
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.8, len(lines)))
    handles = {}
    for index, (label, runs) in enumerate(lines.items()):
        whole = runs[0].state == "finished"
        for panel, axis in zip(panels, ("step", "sampled_tokens"), strict=True):
            curve = mean_curve(runs, axis)
            if curve is None:
                continue
            places, accuracy = curve
            shown = f"{label} ({len(runs)}{'' if whole else ', unfinished'})"
            [handles[label]] = panel.plot(
                places, accuracy.mean(axis=0), styles[index % 4], label=shown,
                marker=markers[index % len(markers)], markersize=5, color=colors[index],
                markevery=0.08, markerfacecolor="white" if index % 2 else None,
            )  # fmt: skip
            if len(runs) > 1:
                panel.fill_between(places, *interval(accuracy), color=colors[index], alpha=0.15)
    panels[0].set_xlabel("training step")
    panels[0].set_ylabel("held-out accuracy")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].set_xlabel("sampled tokens")
    panels[1].xaxis.set_major_formatter(EngFormatter(sep=" "))
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.suptitle(f"{name}: mean over seeds (their number in brackets), band as in results.md")
    figure.legend(
        handles=list(handles.values()), loc="outside lower center", ncols=min(4, len(handles))
    )
    # Never half a picture, should the machine go away.
    staging = path.with_name(f".{path.name}")
    figure.savefig(staging, dpi=150, format="png")
    plt.close(figure)
    staging.replace(path)
    return True
