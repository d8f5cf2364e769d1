"""What a run shows of a step: an example tree, when its stages ran."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.tree import Tree

from attnrl_jax.branching.steps import step_bounds
from attnrl_jax.tasks.tokenizer import Tokenizer
from attnrl_jax.training.loop import StepReport


def example_tree(report: StepReport, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The step's most telling tree as plain data: of a problem with most branches and both right
    and wrong leaves. None if nothing branched.

    Steps carry their text, FCI and first token; leaves their reward and the value, advantage and
    extent of every segment of their path.
    """
    everything = report.leaves
    continued = everything.root != np.arange(len(everything.root))
    if not continued.any():
        return None
    problems, group = np.unique(everything.problem, return_inverse=True)
    highest, lowest = np.full(len(problems), -np.inf), np.full(len(problems), np.inf)
    np.maximum.at(highest, group, everything.reward)
    np.minimum.at(lowest, group, everything.reward)
    branches = np.bincount(group, continued)
    problem = int(problems[np.lexsort((branches, highest - lowest))[-1]])
    members = np.flatnonzero(everything.problem == problem)
    rows = report.lay_out(members)
    advantages = report.leaf_advantages.lay_out(everything, members, rows.tokens.shape[1])
    starts, ends = step_bounds(rows.step_ids)
    # Methods that do not need it do not compute it.
    has_fci = bool(rows.fci.any())
    leaves = []
    for k, row in enumerate(members):
        prompt = int(rows.prompt_length[k])
        steps = []
        for step in range(1, int(rows.step_ids[k].max()) + 1):
            start, end = int(starts[k, step]), int(ends[k, step])
            steps.append(
                {
                    "text": tokenizer.decode(rows.tokens[k, start:end]).strip(),
                    "start": start - prompt,
                    "fci": float(rows.fci[k, step]) if has_fci and not continued[row] else None,
                    "version": int(rows.version[k, start]),
                }
            )
        segments = [
            {
                "start": int(report.segments.start[row, s]),
                "end": int(report.segments.end[row, s]),
                "value": float(report.segments.value[row, s]),
                "leaves": int(report.segments.num_leaves[row, s]),
                "advantage": float(advantages[k, prompt + int(report.segments.start[row, s])]),
            }
            for s in range(report.segments.valid.shape[1])
            if report.segments.valid[row, s]
        ]
        leaves.append(
            {
                "row": int(row),
                "root": int(rows.root[k]),
                "split": int(rows.split[k]),
                "reward": float(rows.reward[k]),
                "ended": bool(rows.ended[k]),
                "trained": bool(report.trained[row]),
                "steps": steps,
                "segments": segments,
            }
        )
    shown = report.problems[problem]
    return {
        "problem": {"id": shown.id, "text": shown.text, "answers": list(shown.answers)},
        "step": int(report.metrics["step"]),
        "value": float(report.segments.root_value[leaves[0]["row"]]),
        "leaves": leaves,
    }


def draw_tree(tree: dict[str, Any]) -> Tree:
    """An example tree for the terminal: one branched response, its steps' FCI, its branches."""
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
