"""What a run shows of a step: an example tree, when its stages ran."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.tree import Tree

from experiments.trees import is_right


def draw_tree(tree: dict[str, Any]) -> Tree:
    """A recorded problem (`experiments.trees`) for the terminal: one branched response, its steps'
    FCI, its branches."""
    children: dict[int, list[dict[str, Any]]] = {}
    for leaf in tree["leaves"]:
        if leaf["root"] != leaf["row"]:
            children.setdefault(leaf["root"], []).append(leaf)
    initial = [leaf for leaf in tree["leaves"] if leaf["row"] == leaf["root"]]
    roots = [leaf for leaf in initial if leaf["row"] in children]
    drawn = Tree(
        f"[bold]{_escape(tree['problem']['text'])}[/bold]\n"
        f"gold {_escape(', '.join(tree['problem']['answers']))}, value of the problem "
        f"{tree['value']:.2f}, {len(tree['leaves'])} leaves; one response of {len(roots)} that "
        "branch, FCI before each step (branches never start at the first):"
    )
    branches = {leaf["row"]: children.get(leaf["row"], []) for leaf in initial}
    root = max(roots or initial, key=lambda leaf: len({c["reward"] for c in branches[leaf["row"]]}))
    ends = [*(step["start"] for step in root["steps"][1:]), float("inf")]
    for step, end in zip(root["steps"], ends, strict=True):
        fci = "     -" if step["fci"] is None else f"{step['fci']:6.3f}"
        node = drawn.add(f"{fci}  {_escape(step['text'])}")
        for child in branches[root["row"]]:
            # Entropy branches inside steps: what is shown begins with the step it changes.
            if step["start"] <= child["split"] < end:
                text = " | ".join(s["text"] for s in child["steps"] if s["start"] >= step["start"])
                advantage = child["segments"][-1]["advantage"]
                node.add(f"{_verdict(child)} branch, advantage {advantage:+.2f}: {_escape(text)}")
    drawn.add(f"{_verdict(root)} this response")
    return drawn


def _verdict(leaf: dict[str, Any]) -> str:
    return "✓ right" if is_right(leaf) else "✗ wrong"


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
