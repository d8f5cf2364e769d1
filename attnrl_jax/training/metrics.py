"""What is measured of a training step's rows. Host code on numpy arrays."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from attnrl_jax.training.rollout import BranchPlan, own_tokens, response_tokens
from attnrl_jax.types import Rollouts


def sampling_metrics(
    rows: Rollouts,
    plan: BranchPlan,
    trained: Bool[np.ndarray, "row"],
    advantages: Float[np.ndarray, "row time"],
) -> dict[str, float]:
    """What a step's rows look like before the update; names and units are listed in the README.

    Args:
      rows: every leaf of the step's trees.
      plan: where the initial responses branched.
      trained: which rows are trained on.
      advantages: of every token of `rows`, before filtering.
    """
    initial = rows.root == np.arange(len(rows.root))
    response = response_tokens(rows)
    own = own_tokens(rows)
    lengths = (rows.length - rows.prompt_length)[initial]
    # What is exactly 0 in the equation is not always in float32.
    signal = (np.abs(advantages) > 1e-6) & response
    positions = len(plan.list())
    allowed = int(plan.expanded.sum()) * plan.positions.valid.shape[1]
    return {
        "train/accuracy": float(rows.reward[initial].mean()),
        "train/leaf_accuracy": float(rows.reward.mean()),
        "train/entropy": float(rows.entropy[own].mean()) if own.any() else 0.0,
        "train/response_length": float(lengths.mean()),
        "train/truncated": float(1.0 - rows.ended[initial].mean()),
        "problems/drawn": int(rows.problem.max()) + 1,
        "problems/kept": len(np.unique(rows.problem[trained])),
        "problems/dropped_easy": int(plan.dropped.sum()),
        "rows/sampled": len(rows.length),
        "rows/trained": int(trained.sum()),
        "rows/with_advantage": float((signal.any(axis=1) & trained).mean()),
        "branching/responses_expanded": int(plan.expanded.sum()),
        "branching/responses_branched": int(plan.branched().sum()),
        "branching/positions": positions,
        "branching/positions_found": positions / max(allowed, 1),
        "branching/by_importance": plan.share_by_importance(),
    }
