"""Pictures of curves, alike for a run, several runs and a sweep, readable in black and white."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.curves import Line, interval, labels, mean_curve, mean_of, shortened
from experiments.tables import one_line

# More lines cannot be told apart, more bands hide the lines.
MOST_NAMED = 10
MOST_BANDS = 4
# Two columns of longer labels do not fit the width of the picture.
LONGEST_IN_COLUMNS = 54

Curve = tuple[np.ndarray, np.ndarray]


def new_figure(rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """A figure that needs no display, and its panels `[rows, columns]`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)


def draw_mean(panel: Any, curve: Curve | None, style: Mapping[str, Any], index: int, band: bool):
    """Draws the mean over seeds of `mean_of`, with the interval as a band; the line, or None.

    Args:
      panel: of the figure.
      curve: places, and the values of each run there.
      style: of `line_styles`.
      index: of the line: markers of lines that run together lie beside each other.
      band: whether the interval is drawn, where there are several runs.
    """
    if curve is None:
        return None
    places, values = curve
    # Always where the line ends.
    apart = max(1, len(places) // 8)
    marked = [*range(index % apart, len(places) - 1, apart), len(places) - 1]
    [line] = panel.plot(places, values.mean(axis=0), markevery=marked, **style)
    if band and len(values) > 1:
        panel.fill_between(places, *interval(values), color=style["color"], alpha=0.15)
    return line


def label_axis(panel: Any, axis: str) -> None:
    """Names the horizontal axis: `step`, `sampled_tokens`, `trained_tokens` or `minutes`."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panel.grid(alpha=0.3)
    panel.set_xlabel({"step": "training step"}.get(axis, axis.replace("_", " ")))
    if axis == "step":
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axis.endswith("_tokens"):
        panel.xaxis.set_major_formatter(EngFormatter(sep=" "))


def legend_below(figure: Any, legend: Mapping[str, Any]) -> int:
    """A legend of any texts below the panels; the lines of text that it takes."""
    columns = 1 if max(map(len, legend)) > LONGEST_IN_COLUMNS else min(2, len(legend))
    # Placeholders: a label that begins with "_" would be left out.
    below = figure.legend(
        [*legend.values()], [*map(str, range(len(legend)))],
        loc="outside lower center", ncols=columns, fontsize=9, handlelength=4.5,
    )  # fmt: skip
    for written, label in zip(below.get_texts(), legend, strict=True):
        written.set_text(label)
        # Overrides may hold dollars, which stand for themselves.
        written.set_parse_math(False)
    return -(-len(legend) // columns)


def write(figure: Any, *paths: Path) -> None:
    """Writes a figure in the format of each path's ending; never half a picture, should the machine
    go away."""
    import matplotlib.pyplot as plt

    for path in paths:
        staging = path.with_name(f".{path.name}")
        kind = path.suffix.removeprefix(".")
        figure.savefig(staging, dpi=150, format=kind, bbox_inches="tight")
        staging.replace(path)
    plt.close(figure)


def plot(path: Path, name: str, lines: Sequence[Line]) -> bool:
    """Draws held-out accuracy of a sweep against steps and against sampled tokens, a line per
    group.

    Of many groups those with the highest last accuracy are told apart; the others are thin.

    Args:
      path: of the PNG.
      name: of the sweep.
      lines: as in the table, in its order; those without runs are left out.

    Returns:
      whether there was anything to draw.
    """
    texts = labels([line.overrides for line in lines])
    drawn = [(text, line) for text, line in zip(texts, lines, strict=True) if line.runs]
    if not drawn:
        return False
    styles = styles_of([np.mean([run[-1].accuracy for run in line.runs]) for _, line in drawn])
    others = f"{len(drawn) - len([*filter(None, styles)])} other groups, which end lower"
    legend: dict[str, Any] = {}
    bands = len(drawn) <= MOST_BANDS
    figure, [panels] = new_figure(1, 2, sharey=True)
    for index, ((text, line), style) in enumerate(zip(drawn, styles, strict=True)):
        label = f"{text} ({len(line.runs)}{'' if line.whole else ', unfinished'})"
        for panel, axis in zip(panels, ("step", "sampled_tokens"), strict=True):
            curve = mean_curve(line.runs, axis)
            if shown := draw_mean(panel, curve, style or THIN, index, bands):
                legend[label if style else others] = shown
    if others in legend:
        legend[others] = legend.pop(others)
    panels[0].set_ylabel("held-out accuracy")
    for panel, axis in zip(panels, ("step", "sampled_tokens"), strict=True):
        label_axis(panel, axis)
    title = f"{shortened(one_line(name), 50)}: mean over seeds (their number in brackets)"
    title = figure.suptitle(title + (", band as in results.md" if bands else ""))
    title.set_parse_math(False)
    figure.set_size_inches(10.0, 4.0 + 0.2 * legend_below(figure, legend))
    write(figure, path)
    return True


def plot_history(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draws held-out and training accuracy of one run against training steps."""
    figure, [[panel]] = new_figure(1, 1, figsize=(6.4, 4.0))
    names = {
        "held_out/accuracy": "held-out problems",
        "train/accuracy": "training problems, initial responses",
    }
    legend = {}
    for index, (name, label) in enumerate(names.items()):
        points = [(m["step"], m[name]) for m in history if name in m]
        if points:
            places, values = np.array(points, float).T
            style = line_styles(len(names))[index]
            legend[label] = draw_mean(panel, mean_of([(places, values)]), style, index, False)
    panel.set_ylabel("share of responses that are right")
    panel.set_ylim(0, 1)
    label_axis(panel, "step")
    if legend:
        legend_below(figure, legend)
    write(figure, path)


# Of lines that are not told apart.
THIN = {"color": "0.8", "linewidth": 0.8, "zorder": 1}


def styles_of(ends: Sequence[float]) -> list[dict[str, Any] | None]:
    """A style for each line; None for those beyond the `MOST_NAMED` that end highest."""
    named = {int(i) for i in np.argsort(ends, kind="stable")[::-1][:MOST_NAMED]}
    styles = iter(line_styles(len(named)))
    return [next(styles) if index in named else None for index in range(len(ends))]


def line_styles(count: int) -> list[dict[str, Any]]:
    """Line styles that differ in print as well: by shade, dashes and markers."""
    import matplotlib.pyplot as plt

    dashes = ("-", "--", "-.", ":")
    markers = "osD^vPX*<>"
    return [
        {
            "color": color,
            "linestyle": dashes[index % len(dashes)],
            "marker": markers[index],
            "markersize": 6,
            "markerfacecolor": "white" if index % 2 else color,
            "linewidth": 1.3,
        }
        for index, color in enumerate(plt.get_cmap("viridis")(np.linspace(0, 0.65, count)))
    ]
