"""The tree of a problem's responses, as arrays over all rows of a training step.

An initial response is cut at the distinct offsets at which it was branched; a continuation hangs
below the segment that ends at its offset. A row's path is the segments from the root to its own
end. Every row, initial or continuation, is one leaf (paper, section on process supervision).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from attnrl_jax.branching.steps import token_positions
from attnrl_jax.types import ArrayLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PathSegments:
    """Segments of every row's path, first to last.

    Attributes:
      start, end: response tokens the segment covers, half-open; equal where not valid.
      value: V(s), the mean reward of the leaves at or below the segment.
      parent_value: value of the segment before, of the problem's root for the first.
      num_leaves: L(s), leaves at or below the segment; 1 where not valid.
      valid: whether the path has that many segments.
      root_value: mean reward of all leaves of the row's problem.
      reward_std: sample standard deviation of their rewards; 0 for a single leaf.
    """

    start: Int[ArrayLike, "row segment"]
    end: Int[ArrayLike, "row segment"]
    value: Float[ArrayLike, "row segment"]
    parent_value: Float[ArrayLike, "row segment"]
    num_leaves: Int[ArrayLike, "row segment"]
    valid: Bool[ArrayLike, "row segment"]
    root_value: Float[ArrayLike, "row"]
    reward_std: Float[ArrayLike, "row"]


def outer_equal(x: ArrayLike, y: ArrayLike) -> Bool[ArrayLike, "row other"]:
    """x[i] == y[j] for all pairs."""
    return x[:, None] == y[None, :]


def group_moments(
    reward: Float[ArrayLike, "row"],
    problem: Int[ArrayLike, "row"],
    row_mask: Bool[ArrayLike, "row"],
) -> tuple[Float[ArrayLike, "row"], Float[ArrayLike, "row"]]:
    """Mean and sample standard deviation (0 for one row) of the rewards of each row's problem."""
    xp = reward.__array_namespace__()
    same = outer_equal(problem, problem) & row_mask[None, :]
    weight = xp.astype(same, reward.dtype)
    count = xp.sum(weight, axis=-1)
    mean = (weight @ reward) / xp.maximum(count, 1)
    squared = weight * (reward[None, :] - mean[:, None]) ** 2
    return mean, xp.sqrt(xp.sum(squared, axis=-1) / xp.maximum(count - 1, 1))


def path_segments(
    problem: Int[ArrayLike, "row"],
    root: Int[ArrayLike, "row"],
    split: Int[ArrayLike, "row"],
    response_length: Int[ArrayLike, "row"],
    reward: Float[ArrayLike, "row"],
    max_segments: int,
    row_mask: Bool[ArrayLike, "row"] | None = None,
) -> PathSegments:
    """Segments of every path with their values.

        V(s) = mean reward of the leaves at or below segment s,  L(s) = their number

    For a segment shared with the root these leaves are the initial response and all of its
    continuations that split at the segment's end or later; below a row's last segment there is
    only the row itself. Offsets may repeat and continuations of one root may come in any order.

    Args:
      problem: problem of the row.
      root: row of the initial response; its own row for an initial response.
      split: response tokens shared with the root; 0 for initial responses.
      response_length: response tokens of the whole path, shared ones included.
      reward: outcome of the path; its dtype is that of the values.
      max_segments: length of the segment axis, at least 1 + the distinct offsets of one root (so
        num_positions + 1).
      row_mask: False for rows that are no leaves (padding, problems left out); all by default.

    Raises:
      ValueError: on numpy arrays, if a path has more than `max_segments` segments.
    """
    xp = reward.__array_namespace__()
    num_rows = reward.shape[0]
    row = xp.arange(num_rows)
    row_mask = xp.ones((num_rows,), dtype=bool) if row_mask is None else row_mask
    initial = root == row
    same_root = outer_equal(root, root) & row_mask[None, :]
    # Column c cuts row r's path if it is the first continuation of r's root with that offset.
    repeats = same_root & outer_equal(split, split) & (row[None, :] < row[:, None])
    first_with_split = ~xp.any(repeats & ~initial[None, :], axis=-1)
    cuts = same_root & ~initial[None, :] & first_with_split[None, :]
    cuts = cuts & (initial[:, None] | (split[None, :] <= split[:, None]))
    num_cuts = xp.sum(xp.astype(cuts, xp.int32), axis=-1)
    if isinstance(num_cuts, np.ndarray) and num_cuts.size and num_cuts.max() >= max_segments:
        raise ValueError(
            f"a path has {num_cuts.max() + 1} segments, more than max_segments={max_segments}"
        )
    largest = np.iinfo(np.int32).max
    offsets = xp.sort(xp.where(cuts, split[None, :], largest), axis=-1)[:, :max_segments]
    if num_rows < max_segments:
        padding = xp.full((num_rows, max_segments - num_rows), largest, dtype=offsets.dtype)
        offsets = xp.concat([offsets, padding], axis=-1)
    segment = token_positions(offsets)
    end = xp.minimum(offsets, response_length[:, None])
    end = xp.where(segment < num_cuts[:, None], end, response_length[:, None])
    start = xp.concat([xp.zeros_like(end[:, :1]), end[:, :-1]], axis=-1)
    valid = segment <= num_cuts[:, None]

    is_shared = segment < num_cuts[:, None]
    reaches = initial[None, None, :] | (split[None, None, :] >= end[:, :, None])
    below = xp.where(
        is_shared[:, :, None], same_root[:, None, :] & reaches, outer_equal(row, row)[:, None, :]
    )
    num_leaves = xp.sum(xp.astype(below, xp.int32), axis=-1)
    value = (xp.astype(below, reward.dtype) @ reward) / xp.maximum(num_leaves, 1)
    value = xp.astype(value, reward.dtype)
    root_value, reward_std = group_moments(reward, problem, row_mask)
    return PathSegments(
        start=start,
        end=end,
        value=value,
        parent_value=xp.concat([root_value[:, None], value[:, :-1]], axis=-1),
        num_leaves=num_leaves,
        valid=valid,
        root_value=root_value,
        reward_std=reward_std,
    )
