"""Advantages of tree segments and of whole responses."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float, Int

from attnrl_jax.branching.steps import token_positions
from attnrl_jax.branching.tree import PathSegments, group_moments
from attnrl_jax.types import ArrayLike

STD_EPSILON = 1e-6

AdvantageNorm = Literal["none", "problem_std"]


def segment_advantages(
    segments: PathSegments, norm: AdvantageNorm = "none"
) -> Float[ArrayLike, "row segment"]:
    """Advantage of each segment of each path (paper, section on process supervision):

        adv(s) = [(V(s) - V_root) + (V(s) - V(parent s))] / sqrt(L(s))

    Args:
      segments: paths with their values.
      norm: "none" as in the paper and the released program; "problem_std" divides by the sample
        standard deviation of the rewards of the problem's leaves + 1e-6, as `group_advantages`
        does, for comparison.

    Returns:
      Advantages, 0 where a path has no such segment.

    Raises:
      ValueError: `norm` is neither.
    """
    if norm not in ("none", "problem_std"):
        raise ValueError(f"advantage norm {norm!r}: allowed are 'none' and 'problem_std'")
    value = segments.value
    xp = value.__array_namespace__()
    gain = (value - segments.root_value[:, None]) + (value - segments.parent_value)
    advantage = gain / xp.sqrt(xp.astype(segments.num_leaves, value.dtype))
    if norm == "problem_std":
        advantage = advantage / (segments.reward_std[:, None] + STD_EPSILON)
    return xp.where(segments.valid, advantage, xp.zeros_like(advantage))


def group_advantages(
    reward: Float[ArrayLike, "row"],
    problem: Int[ArrayLike, "row"],
    row_mask: Bool[ArrayLike, "row"] | None = None,
) -> Float[ArrayLike, "row"]:
    """Outcome-based advantage of whole responses (GRPO, Shao et al. 2024):

        adv = (reward - mean) / (sample standard deviation + 1e-6), over the problem's rows

    A problem of a single row gets 0. `row_mask` is False for rows that do not exist.
    """
    xp = reward.__array_namespace__()
    if row_mask is None:
        row_mask = xp.ones(reward.shape, dtype=bool)
    mean, std = group_moments(reward, problem, row_mask)
    advantage = (reward - mean) / (std + STD_EPSILON)
    return xp.where(row_mask, advantage, xp.zeros_like(advantage))


def token_advantages(
    segments: PathSegments,
    advantages: Float[ArrayLike, "row segment"],
    prompt_length: Int[ArrayLike, "row"],
    time: int,
) -> Float[ArrayLike, "row time"]:
    """Every response token carries the advantage of its segment; 0 in prompt and padding.

    Args:
      segments: the paths.
      advantages: one per segment (`group_advantages(...)[:, None]` where no row has branches).
      prompt_length: tokens of the row's prompt.
      time: length of the time axis.
    """
    xp = advantages.__array_namespace__()
    result = xp.zeros((advantages.shape[0], time), dtype=advantages.dtype)
    offset = token_positions(result) - prompt_length[:, None]
    for k in range(advantages.shape[1]):
        inside = (offset >= segments.start[:, k : k + 1]) & (offset < segments.end[:, k : k + 1])
        inside = inside & segments.valid[:, k : k + 1]
        result = xp.where(inside, advantages[:, k : k + 1], result)
    return result


def row_is_kept(segments: PathSegments, keep_unbranched: bool) -> Bool[ArrayLike, "row"]:
    """Which paths become training rows.

    With `keep_unbranched` all of them, so that nothing that was sampled is wasted. Without it
    paths of one segment (initial responses that were not branched) are left out, though they
    count in the problem's root value (released program).
    """
    xp = segments.valid.__array_namespace__()
    branched = xp.sum(xp.astype(segments.valid, xp.int32), axis=-1) > 1
    return xp.ones_like(branched) if keep_unbranched else branched
