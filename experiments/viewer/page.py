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
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from experiments.viewer.attention import Attention
from experiments.viewer.recorded import Recorded, read_step

SCRIPTS = ("d3.min.js", "unpack.js", "tree.js", "path.js", "heat_map.js", "viewer.js")
STYLES = ("viewer.css",)
# Attention of a response, by training step, number of the problem in its file, row of the leaf.
Attentions = Mapping[tuple[int, int, int], Attention]
LONGEST_TITLE = 120


@dataclass(frozen=True)
class Page:
    """A page, and what it left out.

    Attributes:
      html: the file.
      shown, recorded: training steps in it, and those that the runs have.
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
      max_bytes: of the page. Where not everything fits, an even subset of the training steps is
        kept, the first and the last among them.
      attentions: of responses of the first run.

    Raises:
      ViewError: a file of trees cannot be shown.
      ValueError: the page has no room for a single step.
    """
    assets = {name: _asset(name) for name in (*SCRIPTS, *STYLES, "page.html.jinja2")}
    room = max_bytes - sum(len(text.encode()) for text in assets.values())
    packed = [_packed(run, attentions if k == 0 else None) for k, run in enumerate(runs)]
    every = sorted({step for run in packed for step in run})
    kept = _that_fit(every, packed, room)
    blobs: list[str] = []
    described = []
    for run, steps in zip(runs, packed, strict=True):
        listed = []
        for step in kept:
            for about, blob in steps.get(step, ()):
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
    index = {"runs": described, "shown": len(kept), "recorded": len(every)}
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
    return Page(html, len(kept), len(every))


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


def _packed(
    run: Recorded, attentions: Attentions | None
) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Of every step its problems: what the lists say of them, and all the rest compressed."""
    packed: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for step, file in run.files.items():
        packed[step] = []
        for number, problem in enumerate(read_step(file)):
            leaves = problem["leaves"]
            about = {
                "id": problem["problem"]["id"],
                "text": problem["problem"]["text"][:LONGEST_TITLE],
                "leaves": len(leaves),
                "right": sum(leaf["reward"] >= 0.5 for leaf in leaves),
                "branches": sum(leaf["row"] != leaf["root"] for leaf in leaves),
            }
            whole = _shown(problem)
            whole["attention"] = {
                row: _attention(found)
                for (at, which, row), found in (attentions or {}).items()
                if (at, which) == (step, number)
            }
            text = json.dumps(whole, ensure_ascii=False).encode("utf-8", "replace")
            blob = base64.b64encode(gzip.compress(text, 9, mtime=0)).decode()
            packed[step].append((about, blob))
    return packed


def _shown(problem: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a problem: no ids of tokens, numbers as long as they are read."""
    return {
        "problem": problem["problem"],
        "value": _short(problem["value"]),
        "leaves": [
            {
                **{k: leaf[k] for k in ("row", "root", "split", "length", "reward")},
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
    steps: Sequence[int],
    packed: Sequence[Mapping[int, Sequence[tuple[dict[str, Any], str]]]],
    room: int,
) -> list[int]:
    """As many steps as there is room for, evenly spaced."""
    # Beside a blob its element, and its line in the index.
    sizes = {
        step: sum(
            len(blob) + len(json.dumps(about)) + 200
            for run in packed
            for about, blob in run.get(step, ())
        )
        for step in steps
    }
    for count in range(len(steps), 0, -1):
        stride = (len(steps) - 1) / max(count - 1, 1)
        chosen = sorted(
            {steps[round(k * stride)] for k in range(count)} if count > 1 else steps[-1:]
        )
        if sum(sizes[step] for step in chosen) <= room:
            return chosen
    raise ValueError(
        f"the trees of one step take {min(sizes.values()) / 2**20:.1f} MiB, more than the page has "
        "room for; raise --max-mb"
    )


def write_page(page: Page, path: Path) -> None:
    """Writes it; never half."""
    staging = path.with_name(f".{path.name}")
    staging.write_text(page.html, encoding="utf-8")
    staging.replace(path)
