"""Curves of runs: held-out accuracy and other metrics, means over seeds, what lines are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.tables import one_line

# With fewer seeds a bootstrap says little: the lowest and the highest are shown instead.
BOOTSTRAP_SEEDS = 5
LONGEST_LABEL = 90


@dataclass(frozen=True)
class Point:
    """One held-out evaluation.

    Attributes:
      step: training steps done.
      accuracy: share of held-out problems solved.
      sampled_tokens, trained_tokens: since the start of the run.
      seconds: wall clock of the steps and evaluations so far.
    """

    step: int
    accuracy: float
    sampled_tokens: int
    trained_tokens: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """Runs that differ in their seed alone.

    Attributes:
      overrides: of any of them.
      runs: evaluations of each run that counts, at least one per run; may be empty.
      whole: the runs have finished.
    """

    overrides: Mapping[str, Any]
    runs: Sequence[Sequence[Point]]
    whole: bool


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of a mean over seeds.

    Args:
      values: one row per seed, `[seeds, ...]`.

    Returns:
      lower and upper bound, `[...]`: from 5 seeds on the 95 % percentile bootstrap of the mean
      (10,000 resamples, always the same ones), otherwise the lowest and the highest value.
    """
    if len(values) < BOOTSTRAP_SEEDS:
        return values.min(axis=0), values.max(axis=0)
    drawn = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    # How often each seed was drawn: the means are one matrix product.
    counts = np.stack([(drawn == seed).sum(axis=1) for seed in range(len(values))], axis=1)
    means = np.tensordot(counts / len(values), values, axes=1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def mean_curve(runs: Sequence[Sequence[Point]], axis: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Accuracies of several runs at the same places.

    Args:
      runs: evaluations of each, at least one per run.
      axis: `step` or `sampled_tokens`.

    Returns:
      places `[places]`, where any of the runs was evaluated and all of them had begun and not
      yet ended; accuracy of each run there `[runs, places]`, linear between its evaluations.
      None if there is no such place.
    """
    return mean_of(
        [
            (np.array([getattr(p, axis) for p in run], float), np.array([p.accuracy for p in run]))
            for run in runs
        ]
    )


def mean_of(
    series: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Values of several runs at the same places, as `mean_curve` has them.

    Args:
      series: of each run places, rising, and the values there.
    """
    places = np.unique(np.concatenate([x for x, _ in series]))
    places = places[
        (places >= max(x[0] for x, _ in series)) & (places <= min(x[-1] for x, _ in series))
    ]
    if not len(places):
        return None
    return places, np.stack([np.interp(places, x, y) for x, y in series])


def so_far(
    history: Sequence[Mapping[str, float]],
) -> Iterator[tuple[Mapping[str, float], int, int, float]]:
    """The metrics of every step, and with them what the run had taken by then: sampled tokens,
    trained tokens, seconds of its steps and evaluations."""
    sampled = trained = 0
    seconds = 0.0
    for metrics in history:
        sampled = int(metrics.get("tokens/sampled_total", sampled))
        trained = int(metrics.get("tokens/trained_total", trained))
        seconds += sum(metrics.get(f"seconds/{n}", 0.0) for n in ("warm_up", "step", "evaluate"))
        yield metrics, sampled, trained, seconds


def evaluations(history: Sequence[Mapping[str, float]]) -> tuple[Point, ...]:
    """The held-out evaluations of a run, from its metrics."""
    return tuple(
        Point(int(metrics["step"]), metrics["held_out/accuracy"], sampled, trained, seconds)
        for metrics, sampled, trained, seconds in so_far(history)
        if "held_out/accuracy" in metrics
    )


def labels(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Short names of groups that tell them apart.

    What all groups share is left out, settings go by their last name where that is clear, long
    texts lose their middle. Groups that would then have one name are given their number, from 1.

    Args:
      groups: overrides of each; `seed` is ignored.
    """
    names = sorted({name for overrides in groups for name in overrides} - {"seed"})
    if len(groups) > 1:
        names = [
            name
            for name in names
            if not all(name in g and g[name] == groups[0].get(name) for g in groups)
        ]
    short = {name: name.rpartition(".")[2] for name in names}
    often = Counter(short.values())
    short = {name: last if often[last] == 1 else name for name, last in short.items()}
    made = []
    for overrides in groups:
        parts = [
            f"{short[name]}={shortened(one_line(str(overrides[name])), 40)}"
            for name in names
            if name in overrides
        ]
        made.append(shortened(", ".join(parts) or "default", LONGEST_LABEL))
    often = Counter(made)
    return [
        label if often[label] == 1 else f"line {number}: {label}"
        for number, label in enumerate(made, 1)
    ]


def shortened(text: str, longest: int) -> str:
    """Without its middle, where it is longer."""
    if len(text) <= longest:
        return text
    begin = (longest - 3) * 3 // 5
    return f"{text[:begin]}...{text[begin + 3 - longest :]}"
