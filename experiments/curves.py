"""Curves of a sweep: held-out accuracy of its runs, means over seeds, and the picture of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tables import one_line

# With fewer seeds a bootstrap says little: the lowest and the highest are shown instead.
BOOTSTRAP_SEEDS = 5
# More lines cannot be told apart, more bands hide the lines.
MOST_NAMED = 10
MOST_BANDS = 4
LONGEST_LABEL = 90
# Two columns of longer labels do not fit the width of the picture.
LONGEST_IN_COLUMNS = 54


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
class Line:
    """Runs that differ in their seed alone.

    Attributes:
      overrides: of any of them.
      runs: evaluations of each run that counts, at least one per run; may be empty.
      whole: the runs have finished.
    """

    overrides: Mapping[str, Any]
    runs: Sequence[Sequence[Point]]
    whole: bool


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


def mean_curve(runs: Sequence[Sequence[Point]], axis: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Accuracies of several runs at the same places.

    Args:
      runs: evaluations of each, at least one per run.
      axis: `step` or `sampled_tokens`.

    Returns:
      places `[places]`, where any of the runs was evaluated and all of them had begun and not
      yet ended; accuracy of each run there `[runs, places]`, linear between its evaluations.
      None if there is no such place.
    """
    at = [np.array([getattr(p, axis) for p in points], float) for points in runs]
    places = np.unique(np.concatenate(at))
    places = places[(places >= max(x[0] for x in at)) & (places <= min(x[-1] for x in at))]
    if not len(places):
        return None
    accuracy = [np.array([p.accuracy for p in points]) for points in runs]
    return places, np.stack([np.interp(places, x, y) for x, y in zip(at, accuracy, strict=True)])


def labels(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Short names of groups that tell them apart.

    What all groups share is left out, settings go by their last name where that is clear, long
    texts lose their middle. Groups that would then have one name are given their number, from 1.

    Args:
      groups: overrides of each; `seed` is ignored.
    """
    names = sorted({name for overrides in groups for name in overrides} - {"seed"})
    if len(groups) > 1:
        names = [
            name
            for name in names
            if not all(name in g and g[name] == groups[0].get(name) for g in groups)
        ]
    short = {name: name.rpartition(".")[2] for name in names}
    often = Counter(short.values())
    short = {name: last if often[last] == 1 else name for name, last in short.items()}
    made = []
    for overrides in groups:
        parts = [
            f"{short[name]}={_shortened(one_line(str(overrides[name])), 40)}"
            for name in names
            if name in overrides
        ]
        made.append(_shortened(", ".join(parts) or "default", LONGEST_LABEL))
    often = Counter(made)
    return [
        label if often[label] == 1 else f"line {number}: {label}"
        for number, label in enumerate(made, 1)
    ]


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    begin = (longest - 3) * 3 // 5
    return f"{text[:begin]}...{text[begin + 3 - longest :]}"


def plot(path: Path, name: str, lines: Sequence[Line]) -> bool:
    """Draws held-out accuracy against steps and against sampled tokens, a line per group.

    Of many groups those with the highest last accuracy are told apart; the others are thin.

    Args:
      path: of the PNG.
      name: of the sweep.
      lines: as in the table, in its order; those without runs are left out.

    Returns:
      whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, MaxNLocator

    texts = labels([line.overrides for line in lines])
    drawn = [(text, line) for text, line in zip(texts, lines, strict=True) if line.runs]
    if not drawn:
        return False
    ends = [np.mean([points[-1].accuracy for points in line.runs]) for _, line in drawn]
    named = {int(i) for i in np.argsort(ends, kind="stable")[::-1][:MOST_NAMED]}
    others = f"{len(drawn) - len(named)} other groups, which end lower"
    styles = iter(_styles(len(named)))
    legend: dict[str, Any] = {}
    bands = len(drawn) <= MOST_BANDS
    figure, panels = plt.subplots(1, 2, sharey=True, layout="constrained")
    for index, (text, line) in enumerate(drawn):
        label, style = f"{text} ({len(line.runs)}{'' if line.whole else ', unfinished'})", {}
        if index in named:
            style = next(styles)
        else:
            label = others
            style = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
        for panel, axis in zip(panels, ("step", "sampled_tokens"), strict=True):
            curve = mean_curve(line.runs, axis)
            if curve is None:
                continue
            places, accuracy = curve
            # Beside those of lines that run together, and always where the line ends.
            apart = max(1, len(places) // 8)
            marked = [*range(index % apart, len(places) - 1, apart), len(places) - 1]
            [legend[label]] = panel.plot(places, accuracy.mean(axis=0), markevery=marked, **style)
            if bands and len(line.runs) > 1:
                panel.fill_between(places, *interval(accuracy), color=style["color"], alpha=0.15)
    if others in legend:
        legend[others] = legend.pop(others)
    panels[0].set_xlabel("training step")
    panels[0].set_ylabel("held-out accuracy")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].set_xlabel("sampled tokens")
    panels[1].xaxis.set_major_formatter(EngFormatter(sep=" "))
    for panel in panels:
        panel.grid(alpha=0.3)
    title = f"{_shortened(one_line(name), 50)}: mean over seeds (their number in brackets)"
    title = figure.suptitle(title + (", band as in results.md" if bands else ""))
    columns = 1 if max(map(len, legend)) > LONGEST_IN_COLUMNS else min(2, len(legend))
    figure.set_size_inches(10.0, 4.0 + 0.2 * -(-len(legend) // columns))
    # Placeholders: a label that begins with "_" would be left out.
    below = figure.legend(
        [*legend.values()], [*map(str, range(len(legend)))],
        loc="outside lower center", ncols=columns, fontsize=9, handlelength=4.5,
    )  # fmt: skip
    for written, label in zip(below.get_texts(), legend, strict=True):
        written.set_text(label)
    # Overrides may hold dollars, which stand for themselves.
    for written in (title, *below.get_texts()):
        written.set_parse_math(False)
    # Never half a picture, should the machine go away.
    staging = path.with_name(f".{path.name}")
    figure.savefig(staging, dpi=150, format="png", bbox_inches="tight")
    plt.close(figure)
    staging.replace(path)
    return True


def _styles(count: int) -> list[dict[str, Any]]:
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
