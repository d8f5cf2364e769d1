"""The picture of `experiments.plot`: how runs went, in nine panels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.curves import labels, mean_of, shortened, so_far
from experiments.pictures import (
    MOST_BANDS,
    THIN,
    Curve,
    draw_mean,
    label_axis,
    legend_below,
    new_figure,
    styles_of,
    write,
)
from experiments.tables import one_line

# Points of a longer run, whose metrics of every step are averaged over windows.
MOST_POINTS = 100
STAGES = ("generate", "score", "judge", "branch", "tree", "update", "reshard", "other")
# Told apart without colour: shade and hatching of a stage's part of a bar.
FILLS = (
    ("0.35", ""), ("0.75", "//"), ("1.0", ""), ("0.5", ".."), ("1.0", "xx"), ("0.85", ""),
    ("0.6", "\\\\"), ("1.0", "oo"),
)  # fmt: skip

History = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Runs:
    """Runs that differ in their seed alone.

    Attributes:
      settings: of any of them, by dotted name.
      histories: metrics of the steps of each, of at least one run.
    """

    settings: Mapping[str, Any]
    histories: Sequence[History]


def _named(*names: str) -> Callable[[Mapping[str, float]], float | None]:
    """A metric, or the ratio of two; None for a step that lacks one, or has 0 of the second."""

    def value(metrics: Mapping[str, float]) -> float | None:
        if any(name not in metrics for name in names) or (len(names) > 1 and not metrics[names[1]]):
            return None
        return metrics[names[0]] / (metrics[names[1]] if len(names) > 1 else 1.0)

    return value


ACCURACY = _named("held_out/accuracy")
# Of the panels but for the last: what it shows, its horizontal axis, whose metric.
PANELS = (
    ("held-out accuracy", "step", ACCURACY),
    ("held-out accuracy", "sampled_tokens", ACCURACY),
    ("held-out accuracy", "minutes", ACCURACY),
    ("share of rows with an advantage", "step", _named("rows/with_advantage")),
    ("problems kept of those drawn", "step", _named("problems/kept", "problems/drawn")),
    ("entropy, nats per token", "step", _named("train/entropy")),
    ("KL from the sampling policy, nats", "step", _named("update/approx_kl")),
    ("response length, tokens", "step", _named("train/response_length")),
)
TO_REFERENCE = ("KL from the reference, nats", "step", _named("update/kl"))


def series(history: History, axis: str, metric: Callable[..., float | None]) -> Curve | None:
    """Where a run has a metric, and its values: means over windows of steps where there are many.

    Args:
      history: of the run.
      axis: `step`, `sampled_tokens` or `minutes`.
      metric: its value at a step, None if the step has none.
    """
    points = [
        ({"step": m["step"], "sampled_tokens": sampled, "minutes": seconds / 60}[axis], value)
        for m, sampled, _, seconds in so_far(history)
        if (value := metric(m)) is not None
    ]
    if not points:
        return None
    places, values = np.array(points, float).T
    if metric is ACCURACY or len(points) <= MOST_POINTS:
        return places, values
    windows = [*zip(*(np.array_split(x, MOST_POINTS) for x in (places, values)), strict=True)]
    return np.array([x.mean() for x, _ in windows]), np.array([y.mean() for _, y in windows])


def stage_seconds(histories: Iterable[History]) -> dict[str, float]:
    """Mean seconds of each stage over the steps of all runs, but for the first, which compile."""
    steps = [m for history in histories for m in history if m["step"] > 0]
    later = [m for m in steps if m["step"] > 1] or steps
    return {
        name: float(np.mean([m.get(f"seconds/{name}", 0.0) for m in later])) if later else 0.0
        for name in STAGES
    }


def plot_runs(paths: Sequence[Path], name: str, groups: Sequence[Runs]) -> None:
    """Draws groups of runs.

    Args:
      paths: of the pictures, with endings that say their formats.
      name: what they are of.
      groups: lines, in the order of the legend.
    """
    texts = _texts(groups)
    ends = []
    for group in groups:
        accuracies = [[m[k] for m in h if (k := "held_out/accuracy") in m] for h in group.histories]
        ends.append(float(np.mean([found[-1] if found else 0.0 for found in accuracies])))
    styles = styles_of(ends)
    bands = len(groups) <= MOST_BANDS
    figure, panels = new_figure(3, 3)
    legend: dict[str, Any] = {}
    has_reference = any(m.get("update/kl") for g in groups for h in g.histories for m in h)
    kinds = [TO_REFERENCE if has_reference and k[0].startswith("KL") else k for k in PANELS]
    for panel, (shown, axis, metric) in zip(panels.flat[:-1], kinds, strict=True):
        for index, (text, group, style) in enumerate(zip(texts, groups, styles, strict=True)):
            found = [series(history, axis, metric) for history in group.histories]
            measured = [curve for curve in found if curve is not None]
            curve = mean_of(measured) if measured else None
            if line := draw_mean(panel, curve, style or THIN, index, bands):
                legend[text if style else "other groups, which end lower"] = line
        panel.set_title(shown, fontsize=10)
        label_axis(panel, axis)
    _draw_stages(panels.flat[-1], groups, styles, figure)
    title = shortened(one_line(name), 80)
    if any(len(group.histories) > 1 for group in groups):
        title += ": mean over seeds (their number in brackets)"
        title += ", band: interval over seeds" if bands else ""
    title = figure.suptitle(title)
    title.set_parse_math(False)
    rows = legend_below(figure, legend) if legend else 0
    figure.set_size_inches(13.0, 10.0 + 0.2 * rows)
    write(figure, *paths)


def _texts(groups: Sequence[Runs]) -> list[str]:
    if len(groups) == 1:
        names = [str(groups[0].settings.get("method", "run"))]
    else:
        names = labels([group.settings for group in groups])
    return [f"{n} ({len(group.histories)})" for n, group in zip(names, groups, strict=True)]


def _draw_stages(
    panel: Any, groups: Sequence[Runs], styles: Sequence[dict[str, Any] | None], figure: Any
) -> None:
    """A bar for each group that is told apart, of the seconds of its stages."""
    shown = [(group, style) for group, style in zip(groups, styles, strict=True) if style]
    seconds = [stage_seconds(group.histories) for group, _ in shown]
    whole = max((sum(found[stage] for stage in STAGES) for found in seconds), default=0.0)
    left = np.zeros(len(shown))
    for stage, (shade, hatch) in zip(STAGES, FILLS, strict=True):
        widths = np.array([found[stage] for found in seconds])
        # Parts that are nowhere wider than their edge would only fill the legend.
        if widths.max(initial=0.0) < 0.01 * whole or not whole:
            continue
        panel.barh(
            range(len(shown)), widths, left=left, color=shade, hatch=hatch, edgecolor="black",
            linewidth=0.6, label=stage,
        )  # fmt: skip
        left += widths
    for row, (_, style) in enumerate(shown):
        # The line's own sign in front of its bar: labels would not fit.
        panel.plot(
            [-0.06], [row], clip_on=False, transform=panel.get_yaxis_transform(),
            **{**style, "linestyle": "none"},
        )  # fmt: skip
    panel.set_yticks([])
    panel.set_axisbelow(True)
    panel.set_title("stages of a step", fontsize=10)
    panel.set_xlabel("seconds (mean; the first step, which compiles, left out)")
    panel.grid(alpha=0.3, axis="x")
    if whole:
        # Room for the legend below the bars.
        panel.set_ylim(len(shown) * 1.45 - 0.3, -0.6)
        panel.legend(fontsize=8, ncols=3, loc="lower center", handlelength=2.5)
