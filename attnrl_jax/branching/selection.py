"""Where an expanded response branches.

A branch at step s continues from the start of step s: from the prompt and the response's first
`offset` tokens. Rules: by attention ("fci", paper, section on attention-based branching), by
entropy (TreeRL: the most uncertain tokens), at random steps, or not at all.

The functions take all responses at once; on jax arrays they can be jitted (`config` static).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from attnrl_jax.branching.positions import BranchingConfig, BranchPositions
from attnrl_jax.branching.steps import count_steps, step_bounds, token_positions
from attnrl_jax.types import ArrayLike


def fci_branch_positions(
    fci: Float[ArrayLike, "response step"],
    starts: Int[ArrayLike, "response step"],
    ends: Int[ArrayLike, "response step"],
    num_steps: Int[ArrayLike, "response"],
    config: BranchingConfig,
    first_after_think: Int[ArrayLike, "response"] | None = None,
) -> BranchPositions:
    """Branch positions by forward context influence.

    A step, other than the first, is a candidate if its FCI reaches the threshold: the `quantile`
    of the FCI over the response's steps (linear interpolation, zeros included), or the smallest
    positive FCI if that is 0. Candidates are taken in `config.order` (ties: the earlier one) if
    they start at `min_distance` or later in the sequence and, for each one taken before, the start
    of the later minus the end of the earlier is at least `min_distance`. A response of one step
    has no position (the released program never ends there).

    Args:
      fci: FCI by range as left by `mask_candidates`; range 0 is the prompt.
      starts, ends: tokens from the sequence's start, from `step_bounds`.
      num_steps: steps of the response.
      config: settings; static under jit.
      first_after_think: first after-think range; steps from there on are refused unless
        `config.after_think`, or `config.fill` is "first_steps".
    """
    xp = fci.__array_namespace__()
    ranges = token_positions(fci)
    if config.fill == "first_steps":
        first_after_think = None
    last = _last_allowed(num_steps, config, first_after_think)
    is_step = (ranges >= 1) & (ranges <= num_steps[..., None])
    candidate = (ranges >= 2) & (ranges <= last[..., None])
    candidate = candidate & (fci >= _threshold(fci, is_step, num_steps, config.quantile))
    if config.fill == "none":
        candidate = candidate & (fci > 0)
    scores = fci if config.order == "score" else xp.astype(-ranges, fci.dtype)
    steps, valid = _take_apart(scores, candidate, starts, ends, config)
    by_importance = valid & (xp.take_along_axis(fci, steps, axis=-1) > 0)
    if config.fill == "first_steps":
        steps, valid = _fill_with_first_steps(steps, valid, ranges, last)
    return _collect(starts, ends, steps, valid, by_importance)


def entropy_branch_positions(
    entropy: Float[ArrayLike, "response time"],
    step_ids: Int[ArrayLike, "response time"],
    prompt_length: Int[ArrayLike, "response"],
    length: Int[ArrayLike, "response"],
    config: BranchingConfig,
    first_after_think: Int[ArrayLike, "response"] | None = None,
) -> BranchPositions:
    """Branch positions at the tokens of highest entropy (TreeRL); ties: the earlier token.

    The response's first token (nothing would be shared) and its last are left out, and with
    `first_after_think`, unless `config.after_think`, the tokens of after-think steps. There is no
    least distance.

    Args:
      entropy: entropy of the distribution each token was drawn from, nats.
      step_ids: range of each token.
      prompt_length, length: tokens of the prompt, of prompt and response.
      config: settings; static under jit.
      first_after_think: first after-think range of each response.
    """
    xp = entropy.__array_namespace__()
    position = token_positions(entropy)
    eligible = (position > prompt_length[..., None]) & (position < length[..., None] - 1)
    if first_after_think is not None and not config.after_think:
        eligible = eligible & (step_ids < first_after_think[..., None])
    taken = []
    for _ in range(config.num_positions):
        best, found = _best(entropy, eligible)
        eligible = eligible & (position != best)
        taken.append((best, found))
    tokens = xp.concat([best for best, _ in taken], axis=-1)
    valid = xp.concat([found for _, found in taken], axis=-1)
    return _ascending(
        offsets=tokens - prompt_length[..., None],
        steps=xp.take_along_axis(step_ids, tokens, axis=-1),
        by_importance=xp.zeros_like(valid),
        valid=valid,
    )


def random_branch_positions(
    rng: np.random.Generator,
    starts: Int[ArrayLike, "response step"],
    ends: Int[ArrayLike, "response step"],
    num_steps: Int[ArrayLike, "response"],
    config: BranchingConfig,
    first_after_think: Int[ArrayLike, "response"] | None = None,
) -> BranchPositions:
    """Branch positions at uniformly random steps, other than the first, on the host.

    Steps are taken in random order under the distances of `fci_branch_positions`; arguments as
    there. A shortfall is never filled.
    """
    last = _last_allowed(num_steps, config, first_after_think)
    ranges = token_positions(starts)
    candidate = (ranges >= 2) & (ranges <= last[..., None])
    steps, valid = _take_apart(rng.random(starts.shape), candidate, starts, ends, config)
    return _collect(starts, ends, steps, valid, np.zeros_like(valid))


def best_step_positions(
    scores: Float[np.ndarray, "response step"],
    step_ids: Int[np.ndarray, "response time"],
    config: BranchingConfig,
    first_after_think: Int[np.ndarray, "response"] | None = None,
) -> BranchPositions:
    """Branch positions at the steps of the highest scores, for rules of the user's, on the host.

    Steps other than the first are taken by falling score (ties: the earlier one) under the
    distances of `fci_branch_positions`; those of -inf never.

    Args:
      scores: by range; that of the prompt is not read.
      step_ids: range of each token.
      config: settings.
      first_after_think: as in `fci_branch_positions`.
    """
    scores = np.asarray(scores, np.float32)
    starts, ends = step_bounds(step_ids, scores.shape[-1])
    last = _last_allowed(count_steps(step_ids), config, first_after_think)
    ranges = token_positions(scores)
    candidate = (ranges >= 2) & (ranges <= last[..., None]) & (scores > -np.inf)
    steps, valid = _take_apart(scores, candidate, starts, ends, config)
    return _collect(starts, ends, steps, valid, np.zeros_like(valid))


def branch_positions(
    config: BranchingConfig,
    *,
    fci: Float[np.ndarray, "response step"],
    entropy: Float[np.ndarray, "response time"],
    step_ids: Int[np.ndarray, "response time"],
    prompt_length: Int[np.ndarray, "response"],
    length: Int[np.ndarray, "response"],
    first_after_think: Int[np.ndarray, "response"] | None,
    rng: np.random.Generator,
) -> BranchPositions:
    """Branch positions by `config.rule`, on the host; arguments as in the rules' functions.

    `fci` is the FCI as left by `mask_candidates`; only the rule's own inputs are read.
    """
    starts, ends = step_bounds(step_ids, fci.shape[-1])
    num_steps = count_steps(step_ids)
    if config.rule == "fci":
        return fci_branch_positions(fci, starts, ends, num_steps, config, first_after_think)
    if config.rule == "entropy":
        return entropy_branch_positions(
            entropy, step_ids, prompt_length, length, config, first_after_think
        )
    if config.rule == "random":
        return random_branch_positions(rng, starts, ends, num_steps, config, first_after_think)
    if config.rule == "custom":
        raise ValueError("branching rule 'custom' needs a rule of the user's (Parts.branch_rule)")
    none = np.zeros((len(fci), config.num_positions), dtype=np.int32)
    return BranchPositions(none, none, none.astype(bool), none.astype(bool))


def _last_allowed(
    num_steps: Int[ArrayLike, "response"],
    config: BranchingConfig,
    first_after_think: Int[ArrayLike, "response"] | None,
) -> Int[ArrayLike, "response"]:
    """Last range at which a branch may start."""
    if first_after_think is None or config.after_think:
        return num_steps
    xp = num_steps.__array_namespace__()
    return xp.minimum(num_steps, first_after_think - 1)


def _threshold(
    fci: Float[ArrayLike, "response step"],
    is_step: Bool[ArrayLike, "response step"],
    num_steps: Int[ArrayLike, "response"],
    quantile: float,
) -> Float[ArrayLike, "response 1"]:
    """Linearly interpolated quantile over the steps; the smallest positive FCI if that is 0."""
    xp = fci.__array_namespace__()
    # Finite, since a response without steps would otherwise subtract infinities.
    largest = float(xp.finfo(fci.dtype).max)
    ascending = xp.sort(xp.where(is_step, fci, largest), axis=-1)
    highest = xp.maximum(num_steps[..., None] - 1, 0)
    rank = xp.astype(highest, fci.dtype) * quantile
    below = xp.astype(xp.floor(rank), xp.int32)
    above = xp.minimum(below + 1, highest)
    low = xp.take_along_axis(ascending, below, axis=-1)
    high = xp.take_along_axis(ascending, above, axis=-1)
    weight = rank - xp.astype(below, fci.dtype)
    threshold = low + (high - low) * weight
    smallest = xp.min(xp.where(is_step & (fci > 0), fci, largest), axis=-1, keepdims=True)
    return xp.where((threshold == 0) & (smallest < largest), smallest, threshold)


def _best(
    scores: Float[ArrayLike, "response item"], allowed: Bool[ArrayLike, "response item"]
) -> tuple[Int[ArrayLike, "response 1"], Bool[ArrayLike, "response 1"]]:
    """Index of the first highest score among the allowed items, and whether there is one."""
    xp = scores.__array_namespace__()
    masked = xp.where(allowed, scores, xp.full_like(scores, -np.inf))
    return xp.argmax(masked, axis=-1, keepdims=True), xp.any(allowed, axis=-1, keepdims=True)


def _take_apart(
    scores: Float[ArrayLike, "response step"],
    candidate: Bool[ArrayLike, "response step"],
    starts: Int[ArrayLike, "response step"],
    ends: Int[ArrayLike, "response step"],
    config: BranchingConfig,
) -> tuple[Int[ArrayLike, "response position"], Bool[ArrayLike, "response position"]]:
    """Takes the best candidates that keep their distance, one in each of N rounds.

    What is taken only ever removes candidates, so "the best that is left" in every round equals
    one walk over the candidates in the order of their scores.
    """
    xp = scores.__array_namespace__()
    ranges = token_positions(scores)
    allowed = candidate & (starts >= config.min_distance)
    taken = []
    for _ in range(config.num_positions):
        best, found = _best(scores, allowed)
        start = xp.take_along_axis(starts, best, axis=-1)
        end = xp.take_along_axis(ends, best, axis=-1)
        distance = xp.where(starts >= start, starts - end, start - ends)
        allowed = allowed & (ranges != best) & (distance >= config.min_distance)
        taken.append((xp.where(found, best, 0), found))
    steps = xp.concat([best for best, _ in taken], axis=-1)
    return steps, xp.concat([found for _, found in taken], axis=-1)


def _fill_with_first_steps(
    steps: Int[ArrayLike, "response position"],
    valid: Bool[ArrayLike, "response position"],
    ranges: Int[ArrayLike, "response step"],
    last: Int[ArrayLike, "response"],
) -> tuple[Int[ArrayLike, "response position"], Bool[ArrayLike, "response position"]]:
    """Fills invalid positions with steps 2, 3, ... not yet taken, then with 2, 3, ... again."""
    xp = steps.__array_namespace__()
    last = last[..., None]
    is_free = (ranges >= 2) & (ranges <= last)
    columns = range(steps.shape[-1])
    for column in columns:
        is_free = is_free & (ranges != steps[..., column : column + 1])
    cycle = xp.zeros_like(last)
    filled = []
    for column in columns:
        step, found = steps[..., column : column + 1], valid[..., column : column + 1]
        any_free = xp.any(is_free, axis=-1, keepdims=True)
        again = 2 + cycle % xp.maximum(last - 1, 1)
        first_free = xp.argmax(is_free, axis=-1, keepdims=True)
        step = xp.where(found, step, xp.where(any_free, first_free, again))
        cycle = cycle + xp.astype(~found & ~any_free, cycle.dtype)
        is_free = is_free & (ranges != step)
        filled.append(xp.where(last >= 2, step, 0))
    steps = xp.concat(filled, axis=-1)
    return steps, xp.broadcast_to(last >= 2, steps.shape)


def _collect(
    starts: Int[ArrayLike, "response step"],
    ends: Int[ArrayLike, "response step"],
    steps: Int[ArrayLike, "response position"],
    valid: Bool[ArrayLike, "response position"],
    by_importance: Bool[ArrayLike, "response position"],
) -> BranchPositions:
    """Positions at the starts of steps; the prompt's end is where the response begins."""
    xp = starts.__array_namespace__()
    offsets = xp.take_along_axis(starts, steps, axis=-1) - ends[..., :1]
    return _ascending(offsets, steps, by_importance, valid)


def _ascending(
    offsets: Int[ArrayLike, "response position"],
    steps: Int[ArrayLike, "response position"],
    by_importance: Bool[ArrayLike, "response position"],
    valid: Bool[ArrayLike, "response position"],
) -> BranchPositions:
    """Sorts positions by offset, the invalid ones (zeroed) last."""
    xp = offsets.__array_namespace__()
    largest = np.iinfo(np.int32).max
    order = xp.argsort(xp.where(valid, offsets, largest), axis=-1, stable=True)
    offsets = xp.astype(xp.where(valid, offsets, 0), xp.int32)
    steps = xp.astype(xp.where(valid, steps, 0), xp.int32)
    return BranchPositions(
        *(
            xp.take_along_axis(values, order, axis=-1)
            for values in (offsets, steps, by_importance & valid, valid)
        )
    )
