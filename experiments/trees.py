"""Trees of a step as plain data: what `trees/step_NNNNNN.json` holds and the viewer shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from attnrl_jax.branching.steps import step_bounds
from attnrl_jax.tasks.tokenizer import Tokenizer
from attnrl_jax.training.loop import StepReport


def recorded_problems(report: StepReport, tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """Some problems of a step with the trees of their responses.

    The first is the most telling one: right and wrong leaves, then most branches. The others are
    those of the lowest hash of their ids, so that runs on the same problems record the same ones,
    and can be compared.

    Args:
      report: of the step.
      tokenizer: of the policy.
      count: how many problems, at most.

    Returns:
      for each problem its text and answers, the ids of its prompt, the value of the root, and its
      leaves. A leaf has its reward, the ids of an initial response, the value, advantage and extent
      of every segment of its path, and its steps with text, extent in tokens, FCI (None where it
      was not computed) and the version of the parameters that sampled them; of a continuation those
      steps that it does not wholly share with its root.
    """
    leaves = report.leaves
    problems, group = np.unique(leaves.problem, return_inverse=True)
    highest, lowest = np.full(len(problems), -np.inf), np.full(len(problems), np.inf)
    np.maximum.at(highest, group, leaves.reward)
    np.minimum.at(lowest, group, leaves.reward)
    continued = leaves.root != np.arange(len(leaves.root))
    branches = np.bincount(group, continued)
    telling = int(np.lexsort((branches, highest - lowest))[-1])
    ids = [report.problems[int(problem)].id for problem in problems]
    others = sorted({*range(len(problems))} - {telling}, key=lambda k: _hash(ids[k]))
    chosen = [telling, *others][:count]
    return [_recorded(report, tokenizer, int(problems[k])) for k in chosen]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _recorded(report: StepReport, tokenizer: Tokenizer, problem: int) -> dict[str, Any]:
    leaves = report.leaves
    members = np.flatnonzero(leaves.problem == problem)
    rows = report.lay_out(members)
    advantages = report.leaf_advantages.lay_out(leaves, members, rows.tokens.shape[1])
    starts, ends = step_bounds(rows.step_ids)
    # Methods that do not need it do not compute it.
    has_fci = bool(rows.fci.any())
    recorded = []
    # Where the steps of each initial response begin; these come first.
    cuts: dict[int, set[int]] = {}
    for k, row in enumerate(members):
        prompt, split = int(rows.prompt_length[k]), int(rows.split[k])
        is_initial = bool(rows.root[k] == row)
        if is_initial:
            cuts[int(row)] = {int(start) - prompt for start in starts[k]}
        # Steps that both have in common end where both have a cut, up to the branch.
        own = [int(start) - prompt for start in starts[k, 1:]]
        begin = max((x for x in own if x <= split and x in cuts[int(rows.root[k])]), default=0)
        steps = []
        for step in range(1, int(rows.step_ids[k].max()) + 1):
            start, end = int(starts[k, step]), int(ends[k, step])
            if start - prompt < begin:
                continue
            steps.append(
                {
                    "text": tokenizer.decode(rows.tokens[k, start:end]).strip(),
                    "start": start - prompt,
                    "end": end - prompt,
                    "fci": float(rows.fci[k, step]) if has_fci and is_initial else None,
                    "version": int(rows.version[k, end - 1]),
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
        recorded.append(
            {
                "row": int(row),
                "root": int(rows.root[k]),
                "split": split,
                "length": int(rows.length[k]) - prompt,
                "reward": float(rows.reward[k]),
                "ended": bool(rows.ended[k]),
                "trained": bool(report.trained[row]),
                # Of what is scored again to look at its attention.
                "tokens": rows.tokens[k, prompt : rows.length[k]].tolist() if is_initial else None,
                "steps": steps,
                "segments": segments,
            }
        )
    shown = report.problems[problem]
    return {
        "problem": {"id": shown.id, "text": shown.text, "answers": list(shown.answers)},
        "prompt": rows.tokens[0, : rows.prompt_length[0]].tolist(),
        "value": float(report.segments.root_value[members[0]]),
        "leaves": recorded,
    }


def is_right(leaf: dict[str, Any]) -> bool:
    """Whether a recorded leaf counts as right, as it does in the expansion by difficulty."""
    return leaf["reward"] >= 0.5


def has_branches(problem: dict[str, Any]) -> bool:
    """Whether a recorded problem is a tree: some leaf continues another."""
    return any(leaf["root"] != leaf["row"] for leaf in problem["leaves"])


def read_problems(workdir: str | Path, step: int | None = None) -> list[dict[str, Any]]:
    """Problems that a run recorded with their trees, the most telling one first.

    Args:
      workdir: run folder.
      step: of training; by default the last that is there.

    Raises:
      FileNotFoundError: there are none of that step; those that there are, are named.
    """
    folder = Path(workdir) / "trees"
    steps = sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.json"))
    chosen = steps[-1] if step is None and steps else step
    if chosen not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(f"{folder} has no trees of step {step}; there are: {there}")
    return json.loads((folder / f"step_{chosen:06d}.json").read_text())["problems"]
