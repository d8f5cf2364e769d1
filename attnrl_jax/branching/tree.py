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


def order_by(
    major: Int[ArrayLike, "row"], minor: Int[ArrayLike, "row"] | Bool[ArrayLike, "row"]
) -> Int[ArrayLike, "row"]:
    """Rows in ascending order of `major`, ties by `minor`, then as they come."""
    xp = major.__array_namespace__()
    order = xp.argsort(minor, stable=True)
    return order[xp.argsort(major[order], stable=True)]


def sum_by_group(
    x: Float[ArrayLike, "row"] | Int[ArrayLike, "row"], group: Int[ArrayLike, "row"]
) -> ArrayLike:
    """Sum of `x` over the rows of each group, `[row]`; groups are numbers below that of rows.

    A running sum over all rows would carry its rounding errors from one group into the next.
    """
    if isinstance(x, np.ndarray):
        return np.bincount(group, weights=x, minlength=len(x)).astype(x.dtype)
    return jax.ops.segment_sum(x, group, num_segments=len(x))


def group_of(problem: Int[ArrayLike, "row"]) -> Int[ArrayLike, "row"]:
    """A number below that of rows, the same for the rows of one problem and for no others."""
    xp = problem.__array_namespace__()
    return xp.searchsorted(xp.sort(problem), problem)


def group_moments(
    reward: Float[ArrayLike, "row"],
    problem: Int[ArrayLike, "row"],
    row_mask: Bool[ArrayLike, "row"],
) -> tuple[Float[ArrayLike, "row"], Float[ArrayLike, "row"]]:
    """Mean and sample standard deviation (0 for one row) of the rewards of each row's problem."""
    xp = reward.__array_namespace__()
    group = group_of(problem)

    def total(x: ArrayLike) -> ArrayLike:
        return sum_by_group(xp.where(row_mask, x, xp.zeros_like(x)), group)[group]

    count = total(xp.ones_like(reward))
    mean = total(reward) / xp.maximum(count, 1)
    return mean, xp.sqrt(total((reward - mean) ** 2) / xp.maximum(count - 1, 1))


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
    # The continuations of one root side by side, by offset; rows that are none come last. A node
    # is an offset at which a root was branched: a run of equal offsets.
    continued = xp.where(row_mask & ~initial, root, num_rows)
    order = order_by(continued, split)
    continued, offset = continued[order], split[order]
    is_new = (continued[1:] != continued[:-1]) | (offset[1:] != offset[:-1])
    is_new = xp.concat([xp.zeros_like(initial[:1]), is_new])
    node = xp.cumulative_sum(xp.astype(is_new, xp.int32))
    first = xp.searchsorted(continued, root, side="left")
    last = xp.searchsorted(continued, root, side="right") - 1
    first_node = node[xp.minimum(first, num_rows - 1)]
    num_nodes = xp.where(last >= first, node[last] - first_node + 1, 0)
    if isinstance(num_nodes, np.ndarray) and num_nodes.size and num_nodes.max() >= max_segments:
        raise ValueError(
            f"a path has {num_nodes.max() + 1} segments, more than max_segments={max_segments}"
        )

    # A shared segment ends at a node of the root, up to the one at which the row itself branches.
    segment = xp.broadcast_to(xp.arange(max_segments), (num_rows, max_segments))
    is_node = segment < num_nodes[:, None]
    nodes = xp.where(is_node, first_node[:, None] + segment, 0)
    offsets = offset[xp.searchsorted(node, nodes)]
    is_shared = is_node & (initial[:, None] | (offsets <= split[:, None]))
    num_shared = xp.sum(xp.astype(is_shared, xp.int32), axis=-1)
    end = xp.where(
        is_shared, xp.minimum(offsets, response_length[:, None]), response_length[:, None]
    )
    start = xp.concat([xp.zeros_like(end[:, :1]), end[:, :-1]], axis=-1)
    valid = segment <= num_shared[:, None]

    def below(x: ArrayLike) -> ArrayLike:
        """Sum of `x` over the leaves at or below each node: the root and all later offsets."""
        at_node = xp.where(is_node, sum_by_group(x[order], node)[nodes], xp.zeros_like(x[:1, None]))
        at_root = xp.where(row_mask & initial, x, xp.zeros_like(x))[root]
        return at_root[:, None] + xp.flip(
            xp.cumulative_sum(xp.flip(at_node, axis=-1), axis=-1), axis=-1
        )

    num_leaves = xp.where(is_shared, below(xp.ones_like(root)), 1)
    value = xp.where(is_shared, below(reward) / xp.maximum(num_leaves, 1), reward[:, None])
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
