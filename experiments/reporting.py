"""What a run shows: the terminal, the curve, example trees, the timeline of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.tree import Tree

# What the terminal shows of a step, in 80 columns: metric, heading, format.
COLUMNS = (
    ("step", "step", "{:.0f}"),
    ("held_out/accuracy", "heldout", "{:.3f}"),
    ("train/accuracy", "train", "{:.3f}"),
    ("rows/with_advantage", "adv", "{:.2f}"),
    ("problems/kept", "kept", "{:.0f}"),
    ("branching/by_importance", "by FCI", "{:.2f}"),
    ("train/entropy", "entropy", "{:.3f}"),
    ("train/response_length", "length", "{:.0f}"),
    ("tokens/sampled", "tokens", "{:.0f}"),
    ("seconds/step", "seconds", "{:.1f}"),
)


def plot_history(history: Sequence[dict[str, float]], path: Path) -> None:
    """Draws held-out and training accuracy against training steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, label, style in (
        ("train/accuracy", "training problems, initial responses", "-"),
        ("held_out/accuracy", "held-out problems", "o--"),
    ):
        points = [(m["step"], m[name]) for m in history if name in m]
        if points:
            color = "0.6" if style == "-" else "black"
            axes.plot(*zip(*points, strict=True), style, label=label, color=color)
    axes.set_xlabel("training step")
    axes.set_ylabel("share of responses that are right")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_tree(tree: dict[str, Any]) -> Tree:
    """A recorded problem (`experiments.trees`) for the terminal: one branched response, its steps'
    FCI, its branches."""
    children: dict[int, list[dict[str, Any]]] = {}
    for leaf in tree["leaves"]:
        if leaf["root"] != leaf["row"]:
            children.setdefault(leaf["root"], []).append(leaf)
    roots = [leaf for leaf in tree["leaves"] if leaf["row"] in children]
    drawn = Tree(
        f"[bold]{_escape(tree['problem']['text'])}[/bold]\n"
        f"gold {_escape(', '.join(tree['problem']['answers']))}, value of the problem "
        f"{tree['value']:.2f}, {len(tree['leaves'])} leaves; one response of {len(roots)} that "
        "branch, FCI before each step (branches never start at the first):"
    )
    root = max(roots, key=lambda leaf: len({c["reward"] for c in children[leaf["row"]]}))
    ends = [*(step["start"] for step in root["steps"][1:]), float("inf")]
    for step, end in zip(root["steps"], ends, strict=True):
        fci = "     -" if step["fci"] is None else f"{step['fci']:6.3f}"
        node = drawn.add(f"{fci}  {_escape(step['text'])}")
        for child in children[root["row"]]:
            # Entropy branches inside steps: what is shown begins with the step it changes.
            if step["start"] <= child["split"] < end:
                text = " | ".join(s["text"] for s in child["steps"] if s["start"] >= step["start"])
                advantage = child["segments"][-1]["advantage"]
                node.add(f"{_verdict(child)} branch, advantage {advantage:+.2f}: {_escape(text)}")
    drawn.add(f"{_verdict(root)} this response")
    return drawn


def _verdict(leaf: dict[str, Any]) -> str:
    return "✓ right" if leaf["reward"] > 0 else "✗ wrong"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text if len(text) <= 400 else text[:400] + " ...")


def draw_timeline(spans: Sequence[tuple[str, float, float]], width: int = 80) -> str:
    """When each stage of a step ran: a line for each, in the order in which they began.

    Args:
      spans: of `StepReport`.
      width: columns from the begin of the first stage to the end of the last.
    """
    first = min(begin for _, begin, _ in spans)
    total = max(end for _, _, end in spans) - first
    per_column = total / width or 1.0
    lines = []
    for name in dict.fromkeys(name for name, _, _ in sorted(spans, key=lambda span: span[1])):
        row = [" "] * width
        seconds = 0.0
        for _, begin, end in (span for span in spans if span[0] == name):
            seconds += end - begin
            left = min(int((begin - first) / per_column), width - 1)
            right = max(math.ceil((end - first) / per_column), left + 1)
            row[left:right] = "#" * (min(right, width) - left)
        lines.append(f"{name:>9} {seconds:7.2f} s |{''.join(row)}|")
    return "\n".join(lines)


class Terminal:
    """Progress of a run: a table of metrics, and in a terminal a bar below it.

    Attributes:
      doing: the stage the run is in.
    """

    def __init__(self, steps: int, console: Console):
        self.console = console
        if not self.console.is_terminal:
            # Nobody said how wide a file is; the usual guess of 80 columns cuts trees short.
            self.console.width = 120
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=steps)
        self._printed = 0
        self._lasting: set[str] = set()
        self.doing = "starting"

    def __enter__(self) -> Terminal:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def stage(self, name: str) -> None:
        """Shows what the run is doing."""
        self.doing = name
        self._progress.update(self._task, description=name)

    def warn(self, message: str) -> None:
        """Prints a warning."""
        self.console.print(f"warning: {message}", style="bold", markup=False, soft_wrap=True)

    def warn_of(self, found: Mapping[str, str]) -> None:
        """Prints warnings by name, each when it begins and not while it lasts."""
        for name, message in found.items():
            if name not in self._lasting:
                self.warn(message)
        self._lasting = set(found)

    def step(self, metrics: dict[str, float]) -> None:
        """Prints one row of metrics."""
        if self._printed % 20 == 0:
            heading = " ".join(f"{heading:>7}" for _, heading, _ in COLUMNS)
            self.console.print(heading, style="bold", soft_wrap=True)
        cells = (form.format(metrics[name]) if name in metrics else "" for name, _, form in COLUMNS)
        row = " ".join(f"{cell:>7}" for cell in cells)
        self.console.print(row, highlight=False, soft_wrap=True)
        if metrics.get("step/skipped"):
            self.console.print(
                "        skipped: no problem had both right and wrong responses; "
                f"{metrics['judge/unanswered']:.0f} responses without an answer, "
                f"{metrics['train/truncated']:.0%} cut at their budget",
                soft_wrap=True,
            )
        self._printed += 1
        self._progress.update(self._task, completed=metrics["step"])
