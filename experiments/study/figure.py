"""The study's figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pictures import draw_mean, label_axis, legend_below, new_figure, write
from experiments.study import comparison
from experiments.study.comparison import Axis, Runs

AXES: tuple[tuple[Axis, float, str], ...] = (
    ("sampled_tokens", 1.0, "sampled_tokens"),
    ("trained_tokens", 1.0, "trained_tokens"),
    ("seconds", 1 / 60, "minutes"),
)
# Lines of the curves, told apart without colour as well; the others are in the last panel alone.
# A comparison has one of these, beside groups of 8.
_OTHER_GRPO = {"color": "#7f7f7f", "linestyle": ":", "marker": "s"}
STYLES: dict[str, dict[str, Any]] = {
    "GRPO": _OTHER_GRPO,
    "GRPO, 8 responses": {"color": "#4d4d4d", "linestyle": "--", "marker": "D"},
    "TreeRL": {"color": "#d55e00", "linestyle": "-.", "marker": "^"},
    "random steps": {"color": "#009e73", "linestyle": (0, (1, 1)), "marker": "v"},
    "AttnRL": {"color": "#0072b2", "linestyle": "-", "marker": "o"},
    "AttnRL, on-policy": {"color": "#56b4e9", "linestyle": (0, (5, 1)), "marker": "P"},
    "AttnRL, random steps": {"color": "#cc79a7", "linestyle": (0, (3, 1, 1, 1)), "marker": "X"},
    "GRPO, 16 responses": _OTHER_GRPO,
    "GRPO, updates of 24 rows": _OTHER_GRPO,
}
PLACES = 13


def draw(path: Path, methods: Mapping[str, Runs], ours: str, timed: bool) -> None:
    """Draws held-out accuracy against sampled tokens, trained tokens and time, and the lead of one
    method over each other one on the test.

    Args:
      path: of the PNG.
      methods: runs of each, by seed.
      ours: the method that leads or does not.
      timed: whether time is drawn.
    """
    axes = AXES if timed else AXES[:-1]
    figure, [panels] = new_figure(
        1,
        len(axes) + 1,
        figsize=(15, 4.2),
        gridspec_kw={"width_ratios": [*[1] * len(axes), 1.1]},
    )
    shown = [name for name in STYLES if name in methods]
    legend = {}
    first_grpo = [name for name in shown if name.startswith("GRPO")][:1]
    for panel, (axis, scale, label) in zip(panels, axes, strict=False):
        for index, name in enumerate(shown):
            runs = methods[name]
            style = {**STYLES[name], "markersize": 4}
            begin = max(getattr(run.curve[0], axis) for run in runs.values())
            places = np.linspace(begin, comparison.last(runs, axis), PLACES)
            values = comparison.curves(runs, axis, places)
            # More bands would hide the lines.
            band = name in (ours, "TreeRL", *first_grpo)
            legend[name] = draw_mean(panel, (scale * places, values), style, index, band)
        label_axis(panel, label)
        panel.sharey(panels[0])
    panels[0].set_ylabel("held-out accuracy")
    legend_below(figure, legend)
    _draw_leads(panels[-1], methods, ours)
    write(figure, path)


def _draw_leads(panel, methods: Mapping[str, Runs], ours: str) -> None:
    others = [name for name in methods if name != ours]
    for place, name in enumerate(others):
        found = comparison.lead(methods[ours], methods[name])
        panel.plot([100 * found.low, 100 * found.high], [place, place], color="#0072b2")
        panel.plot([100 * found.value], [place], marker="o", color="#0072b2")
    panel.set_yticks(range(len(others)), others)
    panel.invert_yaxis()
    panel.axvline(0, color="black", linewidth=0.8)
    panel.grid(alpha=0.3, axis="x")
    panel.set_xlabel(f"lead of {ours} on the test, points of avg@8")
