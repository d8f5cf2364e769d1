"""The attention compass as a picture: which step looks back at which, and FCI below."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.compass import Look

LONGEST_LABEL = 32
# More labels than this cannot be read: every 2nd, 5th, 10th ... is written.
MOST_LABELS = 40


def plot_attention(seen: Look) -> Any:
    """Attention between the steps of a response, averaged over heads and of the heads that give
    FCI, and FCI of every step below.

    Args:
      seen: the response.

    Returns:
      a matplotlib figure. The prompt is left out of the columns' scale, since it draws most
      attention; branch positions have a diamond.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    attention = seen.attention
    ranges = len(attention.fci)
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if ranges / s <= MOST_LABELS)
    size = float(np.clip(0.28 * ranges, 3.2, 8.0))
    figure = Figure(figsize=(2 * size + 3.2, size + 2.0), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, height_ratios=[size, 1.2])
    labels = [_label(step, text) for step, text in enumerate(seen.texts)]

    def name(value: float, _: Any) -> str:
        step = round(value)
        return labels[step] if 0 <= step < ranges else ""

    maps = (
        (attention.mean, "averaged over layers and heads"),
        (attention.strongest, "of the layer and head that give each step's FCI"),
    )
    for column, (values, title) in enumerate(maps):
        panel, below = grid[:, column]
        shown = np.where(np.tri(ranges, dtype=bool), values, np.nan)
        # Of other steps: a step's attention to itself says nothing of influence.
        earlier = values[np.tri(ranges, k=-1, dtype=bool) & (np.arange(ranges) > 0)[None, :]]
        limit = float(earlier.max(initial=0.0)) or 1.0
        image = panel.imshow(shown, cmap="viridis", vmin=0, vmax=limit, aspect="auto")
        figure.colorbar(image, ax=panel, extend="max", label="mean attention")
        panel.set_title(title, fontsize=10)
        panel.yaxis.set_major_locator(MultipleLocator(stride))
        if column == 0:
            panel.yaxis.set_major_formatter(FuncFormatter(name))
            panel.set_ylabel("looks back from step")
            below.set_ylabel("FCI")
        steps = np.arange(1, ranges)
        below.bar(steps, attention.fci[1:], color="0.6", width=0.8)
        marked = seen.branch_steps
        below.plot(marked, attention.fci[marked], "kD", markersize=5, label="branch position")
        below.xaxis.set_major_locator(MultipleLocator(stride))
        below.set_xlabel("at step (0: the prompt)")
        if marked and column == 1:
            below.legend(fontsize=8)
    # Model text may hold dollars, which stand for themselves.
    for written in grid[0, 0].get_yticklabels():
        written.set_parse_math(False)
    return figure


def _label(step: int, text: str) -> str:
    if step == 0:
        return "prompt"
    line = " ".join(text.split())
    return f"{line[:LONGEST_LABEL]}{'...' if len(line) > LONGEST_LABEL else ''}  {step}"
