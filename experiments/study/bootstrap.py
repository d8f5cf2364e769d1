"""Bootstrap intervals over seeds and problems at once."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float, Int

from attnrl_jax.evaluation import RESAMPLES, Estimate, estimate


@functools.cache
def draws(count: int, seed: int, resamples: int = RESAMPLES) -> Int[np.ndarray, "resample item"]:
    """How often each of `count` items is drawn in each resample, with replacement."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    # The same array is given to all.
    drawn.setflags(write=False)
    return drawn


def means(
    values: Float[np.ndarray, "seed problem"], seed: int = 0, resamples: int = RESAMPLES
) -> Float[np.ndarray, "resample"]:
    """Means over seeds and problems that are both drawn anew.

    The draws depend on the shape alone: of two arrays of the same shape, the same seeds and
    problems are drawn, so that the difference of their means is paired.

    Args:
      values: of each seed and problem.
      seed: of the draws.
      resamples: how many.
    """
    seeds, problems = values.shape
    drawn_seeds = draws(seeds, seed, resamples) / seeds
    drawn_problems = draws(problems, seed + 1, resamples) / problems
    return np.einsum("rp,rp->r", drawn_seeds @ values, drawn_problems)


def interval(values: Float[np.ndarray, "seed problem"]) -> Estimate:
    """The mean with its 95 % interval."""
    return estimate(float(values.mean()), means(values))


def difference(
    one: Float[np.ndarray, "seed problem"], other: Float[np.ndarray, "seed problem"]
) -> Estimate:
    """The mean of `one` less that of `other`, paired by seed and problem, with its interval."""
    return interval(one - other)


def ratio(
    over: Float[np.ndarray, "item"], under: Float[np.ndarray, "item"], seed: int = 0
) -> Estimate:
    """Sum of `over` by sum of `under`, with the 95 % interval over the items that both are of."""
    drawn = draws(len(over), seed).astype(np.float64)
    return estimate(float(over.sum() / under.sum()), (drawn @ over) / (drawn @ under))
