"""One page of recorded trees: no network, no build step, nothing beside the file.

Texts are most of a tree. Each problem is compressed on its own and unpacked by the browser when it
is looked at, so that the page is there at once however much it holds.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from experiments.trees import is_right
from experiments.viewer.attention import Attention
from experiments.viewer.recorded import Recorded, ViewError, read_step

SCRIPTS = ("d3.min.js", "unpack.js", "tree.js", "path.js", "heat_map.js", "viewer.js")
STYLES = ("viewer.css",)
# Attention of a response, by training step, number of the problem in its file, row of the leaf.
Attentions = Mapping[tuple[int, int, int], Attention]
LONGEST_TITLE = 120


class Tree(NamedTuple):
    """A recorded tree: its training step, what the lists say of it, all the rest compressed."""

    step: int
    about: dict[str, Any]
    blob: str


@dataclass(frozen=True)
class Page:
    """A page, and what it left out.

    Attributes:
      html: the file.
      shown, recorded: training steps in it, and those that the first run has.
    """

    html: str
    shown: int
    recorded: int


def build_page(
    runs: Sequence[Recorded], max_bytes: int, attentions: Attentions | None = None
) -> Page:
    """The page of a run, and of others to compare it with.

    Args:
      runs: the first is the one that is looked at.
      max_bytes: of the page. Where not everything fits, an even subset of the first run's training
        steps is kept, its first and its last among them. Of the other runs there is what is shown
        beside those: of each problem the tree of the nearest step.
      attentions: of responses of the first run.

    Raises:
      ViewError: a file of trees cannot be shown.
      ValueError: the page has no room for a single step.
    """
    assets = {name: _asset(name) for name in (*SCRIPTS, *STYLES, "page.html.jinja2")}
    room = max_bytes - sum(len(text.encode()) for text in assets.values())
    packed = [_packed(run, attentions if k == 0 else None) for k, run in enumerate(runs)]
    kept, trees = _that_fit(packed, room)
    blobs: list[str] = []
    described = []
    for run, shown in zip(runs, trees, strict=True):
        listed = []
        for step, about, blob in shown:
            listed.append({**about, "step": step, "blob": len(blobs)})
            blobs.append(blob)
        described.append(
            {
                "name": run.folder.name,
                "method": run.config.get("method", "?"),
                "delta": run.config.get("branching", {}).get("delta"),
                "accuracies": run.accuracies,
                "problems": listed,
            }
        )
    index = {"runs": described, "shown": len(kept), "recorded": len(packed[0])}
    script = "\n".join(assets[name] for name in SCRIPTS)
    style = "\n".join(assets[name] for name in STYLES)
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    html = environment.from_string(assets["page.html.jinja2"]).render(
        title=runs[0].folder.name,
        script=Markup(script), script_hash=_csp_hash(script),
        style=Markup(style), style_hash=_csp_hash(style),
        index=Markup(_json_in_html(index)),
        blobs=blobs,
    )  # fmt: skip
    return Page(html, len(kept), len(packed[0]))


def _asset(name: str) -> str:
    file = resources.files("experiments.viewer") / "assets" / name
    return file.read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    """How a Content-Security-Policy names the one script (or style) that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json_in_html(value: Any) -> str:
    """JSON that no HTML parser takes for the end of its element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _packed(run: Recorded, attentions: Attentions | None) -> dict[int, list[Tree]]:
    """Of every step its trees: what the lists say of them, and all the rest compressed."""
    packed: dict[int, list[Tree]] = {}
    for step, file in run.files.items():
        packed[step] = []
        for number, problem in enumerate(read_step(file)):
            leaves = problem["leaves"]
            about = {
                "id": problem["problem"]["id"],
                "text": problem["problem"]["text"][:LONGEST_TITLE],
                "leaves": len(leaves),
                "right": sum(is_right(leaf) for leaf in leaves),
                "branches": sum(leaf["row"] != leaf["root"] for leaf in leaves),
            }
            whole = _shown(problem)
            whole["attention"] = {
                row: _attention(found)
                for (at, which, row), found in (attentions or {}).items()
                if (at, which) == (step, number)
            }
            text = json.dumps(whole, ensure_ascii=False, allow_nan=False)
            packed_text = gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)
            packed[step].append(Tree(step, about, base64.b64encode(packed_text).decode()))
    return packed


def _shown(problem: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a problem: no ids of tokens, numbers as long as they are read."""
    return {
        "problem": problem["problem"],
        "value": _short(problem["value"]),
        "leaves": [
            {
                **{k: leaf[k] for k in ("row", "root", "split", "length")},
                "reward": _short(leaf["reward"]),
                "ended": bool(leaf.get("ended", True)),
                "trained": bool(leaf.get("trained", True)),
                "steps": [{**step, "fci": _short(step["fci"])} for step in leaf["steps"]],
                "segments": [
                    {k: _short(x) for k, x in segment.items()} for segment in leaf["segments"]
                ],
            }
            for leaf in problem["leaves"]
        ],
    }


def _attention(found: Attention) -> dict[str, Any]:
    attention = found.attention
    return {
        "parameters": found.parameters,
        "delta": attention.delta,
        "mean": [[_short(x) for x in row] for row in attention.mean.tolist()],
        "strongest": [[_short(x) for x in row] for row in attention.strongest.tolist()],
        "heads": list(zip(attention.layer.tolist(), attention.head.tolist(), strict=True)),
        "fci": [_short(x) for x in attention.fci.tolist()],
    }


def _short(value: Any) -> Any:
    """Four digits of a number; None for one that is not finite, which JSON does not have."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _that_fit(
    packed: Sequence[Mapping[int, Sequence[Tree]]], room: int
) -> tuple[list[int], list[list[Tree]]]:
    """As many steps of the first run as there is room for, evenly spaced, and the trees of each run
    that are shown with them."""
    first, *others = packed
    steps = sorted(first)
    same = [_by_problem(run) for run in others]
    for count in range(len(steps), 0, -1):
        stride = (len(steps) - 1) / max(count - 1, 1)
        chosen = [steps[round(k * stride)] for k in range(count)] if count > 1 else steps[-1:]
        shown = [tree for step in chosen for tree in first[step]]
        trees = [shown, *(_beside(shown, run) for run in same)]
        # Beside a blob its element, and its line in the index.
        size = sum(
            len(tree.blob) + len(json.dumps(tree.about)) + 200 for run in trees for tree in run
        )
        if size <= room:
            return chosen, trees
    raise ValueError(
        f"the trees of step {steps[-1]}, with those beside them, take {size / 2**20:.2f} MiB, and "
        f"the page has room for {max(room, 0) / 2**20:.2f} MiB; raise --max-mb"
    )


def _by_problem(run: Mapping[int, Sequence[Tree]]) -> dict[str, list[Tree]]:
    """Of each problem its trees, by their steps."""
    found: dict[str, list[Tree]] = {}
    for step in sorted(run):
        for tree in run[step]:
            found.setdefault(tree.about["id"], []).append(tree)
    return found


def _beside(shown: Sequence[Tree], others: Mapping[str, Sequence[Tree]]) -> list[Tree]:
    """Of another run the trees that the page shows beside these: of the nearest step (of two as
    near, the earlier)."""
    nearest = {}
    for tree in shown:
        same = others.get(tree.about["id"])
        if same:
            found = min(same, key=lambda other, step=tree.step: abs(other.step - step))
            nearest[found.step, found.about["id"]] = found
    return [nearest[key] for key in sorted(nearest)]


def write_page(page: Page, path: Path) -> None:
    """Writes it; never half."""
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise ViewError(f"{path} {wrong}; give a file as --out")
    staging = path.with_name(f".{path.name}")
    # Half a surrogate pair, as JSON can have it, is no text that a file can hold.
    staging.write_text(page.html, encoding="utf-8", errors="replace")
    staging.replace(path)
