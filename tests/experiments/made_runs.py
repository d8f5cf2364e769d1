"""Run folders with made trees, for the viewer: any size, any text, always the same."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

WORDS = (
    "so", "we", "have", "value", "of", "and", "then", "that", "is", "7", "+", "5", "=", "12", "x"
)  # fmt: skip


def steps_of(rng, start, length, step_tokens, fci, version):
    made = []
    while start < length:
        end = min(start + rng.randint(step_tokens // 2, step_tokens * 3 // 2), length)
        text = " ".join(rng.choice(WORDS) for _ in range(end - start))
        made.append(
            {
                "text": text,
                "start": start,
                "end": end,
                "fci": round(rng.random() ** 3 * 0.3, 6) if fci else None,
                "version": version,
            }
        )
        start = end
    return made


def problem(seed, responses=6, length=80, step_tokens=8, branching=True, name=None, text=None):
    """A problem with `responses` initial responses, of which all branch twice at two steps."""
    rng = random.Random(seed)
    leaves = []
    for row in range(responses):
        own = rng.randint(length * 3 // 4, length)
        leaves.append(
            {
                "row": row, "root": row, "split": 0, "length": own, "reward": float(row % 3 == 0),
                "ended": row != 1, "trained": row != 2, "tokens": [1] * own,
                "steps": steps_of(rng, 0, own, step_tokens, branching, 3), "segments": [],
            }
        )  # fmt: skip
    for root in leaves[: responses * branching]:
        cuts = sorted(step["start"] for step in rng.sample(root["steps"][1:], 2))
        for split in (cuts[0], cuts[0], cuts[1], cuts[1]):
            own = rng.randint(max(length * 3 // 4, split + 2), length + 2)
            leaves.append(
                {
                    "row": len(leaves), "root": root["row"], "split": split, "length": own,
                    "reward": float(rng.random() < 0.4), "ended": True, "trained": True,
                    "tokens": None, "steps": steps_of(rng, split, own, step_tokens, False, 4),
                    "segments": [],
                }
            )  # fmt: skip
    for leaf in leaves:
        children = [x for x in leaves if x["root"] == leaf["root"] and x["row"] != x["root"]]
        offsets = sorted({x["split"] for x in children})
        if leaf["row"] != leaf["root"]:
            offsets = [x for x in offsets if x <= leaf["split"]]
        bounds = [0, *offsets, leaf["length"]]
        for start, end in itertools.pairwise(bounds):
            shared = end != leaf["length"]
            leaf["segments"].append(
                {
                    "start": start, "end": end, "leaves": 3 if shared else 1,
                    "value": 1 / 3 if shared else leaf["reward"],
                    "advantage": (-1) ** leaf["row"] * 0.25 if shared else leaf["reward"] - 0.4,
                }
            )  # fmt: skip
    return {
        "problem": {
            "id": name or f"problem-{seed}",
            "text": text or f"What is {seed} + {seed}?",
            "answers": [str(2 * seed)],
        },
        "prompt": [1, 2, 3],
        "value": 0.4,
        "leaves": leaves,
    }


def make_run(folder: Path, steps: dict[int, list[dict]], method="attnrl") -> Path:
    (folder / "trees").mkdir(parents=True)
    config = {"method": method, "branching": {"delta": 1}, "model": {"path": ""}}
    (folder / "config.json").write_text(json.dumps(config))
    last = max(steps)
    history = [
        {"step": step, "held_out/accuracy": 0.4 + 0.3 * step / last} for step in range(last + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in history))
    for step, problems in steps.items():
        path = folder / "trees" / f"step_{step:06d}.json"
        path.write_text(json.dumps({"step": step, "problems": problems}))
    return folder
