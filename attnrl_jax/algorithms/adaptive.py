"""Adaptive sampling: which responses are expanded, which problems train, how many are drawn.

Paper, section on adaptive sampling. Host code: numpy and Python floats (float64), which reproduces
the released program's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from attnrl_jax.branching.steps import token_positions
from attnrl_jax.branching.tree import group_of, order_by, sum_by_group
from attnrl_jax.types import ArrayLike


@dataclass(frozen=True)
class AdaptiveExpansionConfig:
    """Which parts of the adaptive expansion are on.

    Attributes:
      expand_by_difficulty: expand `expand_count` responses of a problem; off: all of them.
      filter_easy: leave out problems that are all correct and draw no more attention than such
        problems did so far; off: they are expanded like any other.
    """

    expand_by_difficulty: bool = True
    filter_easy: bool = True


@dataclass(frozen=True)
class CumulativeMean:
    """Mean of all values seen so far, in float64: state of the easy filter, kept in checkpoints."""

    mean: float = 0.0
    count: int = 0

    def update(self, values: Sequence[float] | Float[np.ndarray, "value"]) -> CumulativeMean:
        """The mean with `values` taken in."""
        mean, count = self.mean, self.count
        for value in values:
            count += 1
            mean += (float(value) - mean) / count
        return CumulativeMean(mean, count)


@dataclass(frozen=True)
class Expansion:
    """Which initial responses receive branches.

    Attributes:
      expanded: whether the response does.
      dropped: whether the problem is left out of training as easy; nothing of it is expanded.
    """

    expanded: Bool[np.ndarray, "problem response"]
    dropped: Bool[np.ndarray, "problem"]


class Chooser(Protocol):
    """Draws `size` members of `a`; `numpy.random.Generator` is one."""

    def choice(self, a: Any, size: int, replace: bool) -> Any: ...


def expand_count(num_correct: int, num_responses: int) -> int:
    """Initial responses to expand: ceil(n · exp(-c / n)) for c correct ones of n."""
    return math.ceil(num_responses * math.exp(-num_correct / num_responses))


def attention_level(
    fci: Float[np.ndarray, "*problem response step"],
    num_steps: Int[np.ndarray, "*problem response"],
) -> Float[np.ndarray, "*problem"]:
    """Mean over a problem's responses of the mean FCI over all steps of the response (float64).

    Args:
      fci: FCI by range as left by `mask_candidates` (zeros count); range 0, the prompt, does not.
      num_steps: steps of each response; a response without a step has level 0.
    """
    ranges = token_positions(fci)
    is_step = (ranges >= 1) & (ranges <= num_steps[..., None])
    total = np.sum(np.where(is_step, fci.astype(np.float64), 0.0), axis=-1)
    return np.mean(total / np.maximum(num_steps, 1), axis=-1)


def select_expanded(
    correct: Bool[np.ndarray, "problem response"],
    level: Float[np.ndarray, "problem"],
    easy_mean: CumulativeMean,
    rng: Chooser,
    config: AdaptiveExpansionConfig,
) -> tuple[Expansion, CumulativeMean]:
    """Chooses the initial responses to expand, up to `expand_count` of each problem.

    All correct (easy): kept only if the problem's attention level is strictly above the mean of
    the levels of all easy problems seen, those of this batch included; then the first responses.
    None correct: all. Mixed: the rarer kind first (the wrong ones at a tie), then a random subset
    of the other.

    Args:
      correct: whether each initial response is.
      level: from `attention_level`.
      easy_mean: of the levels of the easy problems seen so far.
      rng: draws the subsets, one for each mixed problem in order.
      config: what is on.

    Returns:
      The expansion, and the mean with this batch's easy problems taken in.
    """
    n = correct.shape[1]
    is_easy = np.all(correct, axis=1)
    easy_mean = easy_mean.update(level[is_easy])
    dropped = is_easy & (level <= easy_mean.mean) & config.filter_easy
    expanded = np.zeros(correct.shape, dtype=bool)
    for problem in np.flatnonzero(~dropped):
        num_correct = int(correct[problem].sum())
        if not config.expand_by_difficulty or num_correct == 0:
            expanded[problem] = True
        elif num_correct == n:
            expanded[problem, : expand_count(n, n)] = True
        else:
            all_of = ~correct[problem] if num_correct / n >= 0.5 else correct[problem]
            pool = np.flatnonzero(~all_of)
            size = min(expand_count(num_correct, n) - int(all_of.sum()), len(pool))
            expanded[problem] = all_of
            expanded[problem, rng.choice(pool, size, replace=False)] = True
    return Expansion(expanded, dropped), easy_mean


def problems_with_signal(
    problem: Int[ArrayLike, "row"],
    reward: Float[ArrayLike, "row"],
    row_mask: Bool[ArrayLike, "row"],
) -> Bool[ArrayLike, "row"]:
    """Zero-variance filter: the rows whose problem has rows of unequal reward.

    Args:
      problem: problem of each row.
      reward: outcome of each row.
      row_mask: rows that take part; the others are never returned.
    """
    xp = reward.__array_namespace__()
    group = group_of(problem)
    # One row of the problem that takes part, with which the others are compared.
    order = order_by(group, ~row_mask)
    example = order[xp.searchsorted(group[order], group)]
    differs = row_mask & (reward != reward[example])
    return row_mask & (sum_by_group(xp.astype(differs, xp.int32), group)[group] > 0)


@dataclass(frozen=True)
class BatchSizeConfig:
    """Settings of the adaptive number of problems of a batch.

    Attributes:
      adaptive: whether it adapts; off: always the nominal number.
      alpha: weight of the new target, in (0, 1].
      bounds: least and largest number as multiples of the nominal one; None as in the released
        program, which has none.

    Raises:
      ValueError: a setting outside of what it allows.
    """

    adaptive: bool = True
    alpha: float = 0.1
    bounds: tuple[float, float] | None = (0.25, 4.0)

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"batch size alpha={self.alpha!r}: above 0, at most 1")
        if self.bounds is not None and not 0.0 < self.bounds[0] <= 1.0 <= self.bounds[1]:
            raise ValueError(f"batch size bounds={self.bounds!r}: 0 < low <= 1 <= high, or None")


def next_batch_size(
    current: int, nominal: int, rows_per_problem: int, surviving_rows: int, config: BatchSizeConfig
) -> int:
    """Problems to draw next, so that about as many rows survive as were planned:

        target = floor(B · (B0 · rows_per_problem) / m)
        B <- ceil(alpha · target + (1 - alpha) · B),  at least 1, since 0 would stay 0

    Args:
      current: B, the number drawn last.
      nominal: B0.
      rows_per_problem: rows of a problem of which everything is expanded, n · (1 + N · C).
      surviving_rows: m, rows left by the filters in the last training step.
      config: settings.

    Raises:
      ValueError: no row survived; such a step leaves the batch size as it is.
    """
    if surviving_rows < 1:
        raise ValueError(f"surviving_rows={surviving_rows}: the batch size follows a trained step")
    if not config.adaptive:
        return nominal
    target = math.floor(current * (nominal * rows_per_problem) / surviving_rows)
    size = max(1, math.ceil(config.alpha * target + (1 - config.alpha) * current))
    if config.bounds is None:
        return size
    low, high = (bound * nominal for bound in config.bounds)
    # Rounded last: the upper bound may be infinite.
    return math.floor(min(max(size, math.ceil(low)), high))
