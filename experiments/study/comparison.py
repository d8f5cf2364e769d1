"""Methods of the study held against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from attnrl_jax.evaluation import Estimate
from attnrl_jax.tasks.graph import GraphTaskConfig
from experiments.study import bootstrap
from experiments.study.outcomes import Outcome
from experiments.study.policies import SAMPLES
from experiments.study.protocol import Protocol

Axis = Literal["sampled_tokens", "trained_tokens", "seconds"]
Runs = Mapping[int, Outcome]
# Where a mean curve is looked at.
PLACES = 301
# Lengths of problems, in operations, that are looked at together.
DIFFICULTIES = ((2, 5), (6, 9), (10, 12))


def by_method(outcomes: Sequence[Outcome], protocol: Protocol) -> dict[str, dict[int, Outcome]]:
    """The runs of every method that has any, by seed; methods in the order of the protocol.

    Raises:
      ValueError: two runs of a method have the same seed, so different learning rates.
    """
    found: dict[str, dict[int, Outcome]] = {name: {} for name in protocol.methods}
    for outcome in outcomes:
        runs = found[outcome.method]
        if outcome.seed in runs:
            raise ValueError(f"{outcome.method} has two runs of seed {outcome.seed}")
        runs[outcome.seed] = outcome
    return {name: dict(sorted(runs.items())) for name, runs in found.items() if runs}


def correct(runs: Runs, greedy: bool = False) -> Float[np.ndarray, "seed problem"]:
    """Share of right responses of each run to each problem of the test.

    Args:
      runs: of a method, with their test.
      greedy: of the greedy response, rather than of the sampled ones.
    """
    rows = [run.greedy if greedy else run.sampled for run in runs.values()]
    return np.stack(rows) / (1 if greedy else SAMPLES)


def of_difficulty(
    values: Float[np.ndarray, "seed problem"], fewest: int, most: int
) -> Float[np.ndarray, "seed chosen"]:
    """The columns of the problems that have so many operations."""
    task = GraphTaskConfig()
    operations = task.min_operations + np.arange(values.shape[1]) % task.difficulties
    return values[:, (operations >= fewest) & (operations <= most)]


def common(one: Runs, other: Runs) -> tuple[dict[int, Outcome], dict[int, Outcome]]:
    """The runs of the seeds that both have."""
    seeds = sorted(one.keys() & other.keys())
    return {seed: one[seed] for seed in seeds}, {seed: other[seed] for seed in seeds}


def lead(one: Runs, other: Runs) -> Estimate:
    """avg@8 of one method less that of another, paired by seed and problem."""
    ours, theirs = common(one, other)
    return bootstrap.difference(correct(ours), correct(theirs))


def curves(
    runs: Runs, axis: Axis, places: Float[np.ndarray, "place"]
) -> Float[np.ndarray, "seed place"]:
    """Held-out accuracy of each run at some places, linear between its evaluations."""
    return np.stack(
        [
            np.interp(
                places,
                [getattr(point, axis) for point in run.curve],
                [point.accuracy for point in run.curve],
            )
            for run in runs.values()
        ]
    )


def last(runs: Runs, axis: Axis) -> float:
    """The largest place that all runs reach."""
    return min(getattr(run.curve[-1], axis) for run in runs.values())


def lead_at(one: Runs, other: Runs, axis: Axis, place: float) -> Estimate:
    """Held-out accuracy of one method less that of another at a place, paired by seed. Problems are
    not drawn anew: evaluations on the way are not kept by problem."""
    ours, theirs = common(one, other)
    at = np.array([place])
    return bootstrap.interval(curves(ours, axis, at) - curves(theirs, axis, at))


def tokens_to_reach(one: Runs, other: Runs, budget: int) -> Estimate:
    """Sampled tokens at which one method's mean curve first is where another's is at the budget,
    as a share of the budget; infinite where it never is. The interval is over seeds, paired."""
    ours, theirs = common(one, other)
    places = np.linspace(0, budget, PLACES)
    mine = curves(ours, "sampled_tokens", places)
    level = curves(theirs, "sampled_tokens", places[-1:])[:, 0]

    def reached(weights: np.ndarray) -> np.ndarray:
        """For each resample, with how often it has each seed."""
        curve, wanted = weights @ mine / len(mine), weights @ level / len(mine)
        above = curve >= wanted[:, None]
        return np.where(above.any(axis=1), places[above.argmax(axis=1)] / budget, np.inf)

    drawn = bootstrap.draws(len(mine), seed=0).astype(float)
    whole = reached(np.ones((1, len(mine))))[0]
    # Percentiles interpolate, which infinity does not bear.
    ordered = np.sort(reached(drawn))
    low, high = ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered))]
    return Estimate(float(whole), float(low), float(high))


def trained_on(runs: Runs) -> float:
    """Share of sampled tokens that are in an update, each counted once, mean over seeds."""
    shares = [
        run.per_step["tokens/trained_distinct"].sum() / run.curve[-1].sampled_tokens
        for run in runs.values()
    ]
    return float(np.mean(shares))


def rows_with_advantage(runs: Runs) -> float:
    """Share of sampled rows that are trained on with an advantage other than 0, mean over seeds."""
    shares = [
        np.average(run.per_step["rows/with_advantage"], weights=run.per_step["rows/sampled"])
        for run in runs.values()
    ]
    return float(np.mean(shares))


def rounds(runs: Runs, overrides: Mapping[str, Any]) -> float:
    """Rounds of generation of a run, mean over seeds: one a step, and another for continuations
    where they are not sampled with the initial responses of the next step; then one to begin with.

    Args:
      runs: of a method.
      overrides: the method's own.
    """
    steps = np.mean([run.curve[-1].step for run in runs.values()])
    if overrides.get("schedule") != "on_policy":
        return float(steps + 1)
    return float(steps * (1 if overrides["method"] == "grpo" else 2))


def seconds_ratio(one: Runs, other: Runs) -> Estimate:
    """Wall clock of one method over that of another, of the whole runs; interval over seeds."""
    ours, theirs = common(one, other)
    seconds = [
        np.array([run.curve[-1].seconds / run.curve[-1].sampled_tokens for run in runs.values()])
        for runs in (ours, theirs)
    ]
    return bootstrap.ratio(*seconds)


def tuning_scores(tuning: Sequence[Outcome]) -> dict[str, dict[float, list[float]]]:
    """By method and learning rate, the mean of the last two evaluations of each tuning seed."""
    found: dict[str, dict[float, list[float]]] = {}
    for outcome in sorted(tuning, key=lambda one: (one.learning_rate, one.seed)):
        scores = found.setdefault(outcome.method, {})
        points = [point.accuracy for point in outcome.curve[-2:]]
        scores.setdefault(outcome.learning_rate, []).append(float(np.mean(points)))
    return found


def best_rate(scores: Mapping[float, Sequence[float]]) -> float:
    """The rate of the highest mean, of those that most seeds were spent on."""
    return max(scores, key=lambda rate: (len(scores[rate]), np.mean(scores[rate])))
