"""What the study compares, at what cost, and with which learning rates; docs/study.md says why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = "experiments/configs/attnrl_graph.py"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "study"

# Sampled tokens after which a run ends; the default run samples 400,000.
BUDGET = 150_000
COMMON: dict[str, Any] = {
    "steps": 1000,
    "max_sampled_tokens": BUDGET,
    # Of every method: an update for about every 96 rows that are trained on (the paper: 192), as
    # what is learned depends on the number of updates more than on the rows in one.
    "mini_batch_rows": 96,
    "eval_every": 2,
    "data.held_out_size": 256,
    # The state at the end is all that is read.
    "checkpoint_every": 1000,
    "keep_checkpoints": 1,
    "keep_best": 0,
    "trees.per_step": 0,
}

# As TreeRL and GRPO are published: two rounds of generation (or one), and as many problems in every
# step.
_ON_POLICY = {"schedule": "on_policy", "batch_size.adaptive": False}
_ATTNRL = {"method": "attnrl", "num_problems": 8}

# Name of a method in tables, and what it overrides.
METHODS: dict[str, dict[str, Any]] = {
    "GRPO": {"method": "grpo", "num_problems": 8, **_ON_POLICY},
    # 8 responses a problem rather than 30, of four times as many problems: n (1 + N C) = 4 * 2.
    "GRPO, 8 responses": {
        "method": "grpo",
        "num_problems": 30,
        "num_responses": 4,
        "branching.num_positions": 1,
        "branching.num_continuations": 1,
        **_ON_POLICY,
    },
    "TreeRL": {"method": "treerl", "num_problems": 8, **_ON_POLICY},
    "random steps": {"method": "random", "num_problems": 8, **_ON_POLICY},
    "AttnRL": _ATTNRL,
    "AttnRL, left to right": {**_ATTNRL, "branching.order": "position"},
    "AttnRL, random steps": {**_ATTNRL, "branching.rule": "random"},
    "AttnRL, entropy": {**_ATTNRL, "branching.rule": "entropy"},
    "AttnRL, all expanded": {
        **_ATTNRL,
        "expansion.expand_by_difficulty": False,
        "expansion.filter_easy": False,
    },
    "AttnRL, fixed batch": {**_ATTNRL, "batch_size.adaptive": False},
    "AttnRL, on-policy": {**_ATTNRL, "schedule": "on_policy"},
}

LEARNING_RATES = (1e-4, 2e-4, 4e-4)
# Where the best of these was at an end, the grid went on.
FURTHER_RATES: dict[str, tuple[float, ...]] = {
    "TreeRL": (8e-4,),
    "AttnRL, left to right": (5e-5,),
    "AttnRL, all expanded": (5e-5,),
}
# Where the best two were within 2 points, a second seed decided between them.
CLOSE_RATES: dict[str, tuple[float, float]] = {
    "GRPO": (1e-4, 2e-4),
    "TreeRL": (2e-4, 4e-4),
    "random steps": (1e-4, 2e-4),
    "AttnRL, left to right": (1e-4, 2e-4),
    "AttnRL, all expanded": (1e-4, 2e-4),
}
# Of each method, by the recorded outcomes of the tuning.
CHOSEN: dict[str, float] = {
    "GRPO": 2e-4,
    "GRPO, 8 responses": 2e-4,
    "TreeRL": 2e-4,
    "random steps": 2e-4,
    "AttnRL": 2e-4,
    "AttnRL, left to right": 1e-4,
    "AttnRL, random steps": 2e-4,
    "AttnRL, entropy": 2e-4,
    "AttnRL, all expanded": 1e-4,
    "AttnRL, fixed batch": 2e-4,
    "AttnRL, on-policy": 2e-4,
}
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)


def name_of(overrides: Mapping[str, Any]) -> str:
    """The method that a run's overrides are of, whatever its seed and learning rate.

    Raises:
      ValueError: of none.
    """
    own = {k: v for k, v in overrides.items() if k not in ("seed", "optimizer.learning_rate")}
    for name, method in METHODS.items():
        if method == own:
            return name
    raise ValueError(f"no method of the study overrides {own}")
