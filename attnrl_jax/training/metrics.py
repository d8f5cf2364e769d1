"""What is measured of a training step's rows. Host code on numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from attnrl_jax.training.rollout import Advantages, BranchPlan
from attnrl_jax.types import Leaves

# Tokens that are looked for again in a response: longer than a phrase that may well come twice.
NGRAM = 8


def sampling_metrics(
    rows: Leaves,
    plan: BranchPlan,
    trained: Bool[np.ndarray, "row"],
    advantages: Advantages,
    version: int,
) -> dict[str, float]:
    """What a step's rows look like before the update; names and units are in `docs/metrics.md`.

    Args:
      rows: every leaf of the step's trees.
      plan: where the initial responses branched.
      trained: which rows are trained on.
      advantages: of `rows`, before filtering.
      version: of the parameters that the update changes.
    """
    initial = rows.root == np.arange(len(rows.root))
    response = rows.length - rows.prompt_length
    segments = advantages.segments
    # What is exactly 0 in the equation is not always in float32.
    number = np.arange(advantages.value.shape[1])
    signal = np.abs(advantages.value) > 1e-6
    signal &= segments.valid[:, number] & (
        segments.start[:, number] < np.minimum(segments.end[:, number], response[:, None])
    )
    # Own tokens are of the row's version, those before of its root's.
    age = version - np.stack([rows.version, rows.version[rows.root]])[:, trained]
    tokens = np.stack([rows.own_length, rows.split])[:, trained]
    stale = age[tokens > 0]
    entropy = np.concatenate(rows.entropy)
    usable = np.isfinite(entropy)
    broken = [not np.isfinite(x).all() for x in rows.logprobs]
    positions = len(plan.list())
    allowed = int(plan.expanded.sum()) * plan.positions.valid.shape[1]
    return {
        "train/accuracy": float(rows.reward[initial].mean()),
        "train/leaf_accuracy": float(rows.reward.mean()),
        "train/entropy": float(entropy[usable].mean()) if usable.any() else 0.0,
        "train/not_finite": float(np.mean(broken)),
        "train/response_length": float(response[initial].mean()),
        "train/repetition": repetition(rows.tokens, np.flatnonzero(initial)),
        "train/truncated": float(1.0 - rows.ended[initial].mean()),
        "train/staleness": float((age * tokens).sum() / tokens.sum()) if stale.size else 0.0,
        "train/staleness_max": int(stale.max(initial=0)),
        "tokens/trained_distinct": int(rows.own_length[trained].sum()),
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


def repetition(
    tokens: Sequence[Int[np.ndarray, "time"]], rows: Int[np.ndarray, "chosen"], most: int = 256
) -> float:
    """Mean share of a response's n-grams (n = 8) that it has had before: 1 minus distinct ones over
    all. A policy that has fallen into a loop is near 1.

    Args:
      tokens: of each row.
      rows: which of them count.
      most: rows that are looked at, evenly spaced among these.
    """
    # Two responses that differ in one token share no hash that covers it, but for odds of 2^-64.
    factors = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, NGRAM + 1, dtype=np.uint64)
    shares = []
    for row in rows[:: max(-(-len(rows) // most), 1)]:
        grams = len(tokens[row]) - NGRAM + 1
        if grams > 0:
            x = tokens[row].astype(np.uint64)
            mixed = sum(x[k : k + grams] * factors[k] for k in range(NGRAM))
            shares.append(1 - len(np.unique(mixed)) / grams)
    return float(np.mean(shares)) if shares else 0.0
