"""From problems to requests, from responses to rows, from rows to advantages. Host code (numpy)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from attnrl_jax import processes
from attnrl_jax.algorithms.adaptive import (
    CumulativeMean,
    attention_level,
    problems_with_signal,
    select_expanded,
)
from attnrl_jax.algorithms.advantages import (
    group_advantages,
    row_is_kept,
    segment_advantages,
    token_advantages,
)
from attnrl_jax.branching.importance import mask_candidates
from attnrl_jax.branching.positions import BranchPositions, BranchRule, check_positions
from attnrl_jax.branching.selection import branch_positions
from attnrl_jax.branching.steps import StepRule, count_steps, end_of_thinking
from attnrl_jax.branching.tree import PathSegments, path_segments
from attnrl_jax.packing import row_paths, take_rows
from attnrl_jax.sampling.sampler import Request
from attnrl_jax.training.leaves import lay_out, lay_out_column
from attnrl_jax.training.state import TrainConfig
from attnrl_jax.types import LazyRows, Leaves, TrainRows

# What a stream of random numbers is for; part of every seed. Number 4 is evaluation's
# (`attnrl_jax.evaluation.EVALUATION`).
INITIAL, CONTINUATION, BRANCHES, UPDATE = range(4)


def initial_requests(
    prompts: Sequence[np.ndarray], config: TrainConfig, batch: int
) -> list[Request]:
    """One request per problem: n initial responses, or n (1 + N C) where nothing branches.

    Args:
      prompts: ids of each problem's prompt.
      config: of training.
      batch: number t of the batch b_t these problems are; part of the seed. (The version of the
        parameters would not do: θ_0 samples both b_1 and b_2.)
    """
    branches = config.branching.rule != "none"
    count = config.num_responses if branches else config.rows_per_problem
    return [
        Request(
            prefix=prompt,
            num_samples=count,
            budget=config.response_budget,
            seed=(config.seed, INITIAL, batch, index),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        for index, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True)
class BranchPlan:
    """Where the initial responses of a batch branch.

    Attributes:
      positions: of every initial response; invalid where it is not expanded.
      expanded: whether the response branches.
      dropped: problems left out as easy.
    """

    positions: BranchPositions
    expanded: Bool[np.ndarray, "row"]
    dropped: Bool[np.ndarray, "problem"]

    def list(self) -> Sequence[tuple[int, int]]:
        """`(row, offset)` of every branch position, row by row."""
        rows, columns = np.nonzero(self.positions.valid & self.expanded[:, None])
        offsets = self.positions.offsets[rows, columns]
        return list(zip(rows.tolist(), offsets.tolist(), strict=True))

    def branched(self) -> Bool[np.ndarray, "row"]:
        """Responses with at least one branch position."""
        return self.expanded & self.positions.valid.any(axis=1)

    def share_by_importance(self) -> float:
        """Share of branch positions that a positive FCI chose; 0 where there is none."""
        used = self.positions.valid & self.expanded[:, None]
        return float(self.positions.by_importance[used].mean()) if used.any() else 0.0


def plan_branches(
    initial: Leaves,
    config: TrainConfig,
    step_rule: StepRule,
    easy_mean: CumulativeMean,
    rng: np.random.Generator,
    branch_rule: BranchRule = branch_positions,
) -> tuple[BranchPlan, CumulativeMean]:
    """Chooses which initial responses branch, and where.

    Of several processes each looks at the responses of its share of the problems.

    Args:
      initial: scored and judged initial responses, the same number for every problem.
      config: of training.
      step_rule: where steps end.
      easy_mean: state of the easy filter.
      rng: for random subsets and random positions.
      branch_rule: chooses the positions.

    Raises:
      ValueError: the branch rule chose what is no position inside its response.
    """
    num_problems = int(initial.problem.max()) + 1
    grid = (num_problems, -1)
    # Random positions are drawn for all responses at once; so may be those of a rule of the user's.
    shared_out = config.branching.rule not in ("random", "custom")
    share = processes.share(num_problems) | (not shared_out)
    own = np.arange(len(initial.problem)).reshape(grid)[share].reshape(-1)
    rows = lay_out(initial, own, config.width, step_rule)
    after_think = np.asarray(end_of_thinking(rows.tokens, rows.step_ids, step_rule.separators))
    refused = None if config.branching.after_think else after_think
    fci = np.asarray(mask_candidates(rows.fci, config.branching.zero_first, refused))
    found = branch_rule(
        config.branching,
        fci=fci,
        entropy=rows.entropy,
        step_ids=rows.step_ids,
        prompt_length=rows.prompt_length,
        length=rows.length,
        first_after_think=after_think,
        rng=rng,
    )
    if config.branching.rule == "custom":
        check_positions(found, rows.length - rows.prompt_length, config.branching.num_positions)
    num_steps = np.asarray(count_steps(rows.step_ids))
    responses = (int(share.sum()), len(initial.problem) // num_problems)
    level = attention_level(fci.reshape(*responses, fci.shape[-1]), num_steps.reshape(responses))
    found = jax.tree.map(lambda x: x.reshape(*responses, x.shape[-1]), found)
    if shared_out:
        found, level = processes.from_shares((found, level), num_problems)
    positions = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), found)
    if config.branching.rule == "none":
        # Nothing branches, so nothing is expanded or judged too easy to branch.
        plan = BranchPlan(
            positions, np.zeros(len(initial.problem), bool), np.zeros(num_problems, bool)
        )
        return plan, easy_mean
    expansion, easy_mean = select_expanded(
        initial.reward.reshape(grid) >= 0.5, level, easy_mean, rng, config.expansion
    )
    return BranchPlan(positions, expansion.expanded.reshape(-1), expansion.dropped), easy_mean


def continuation_requests(
    initial: Leaves, branches: Sequence[tuple[int, int]], config: TrainConfig, version: int
) -> list[Request]:
    """One request per branch position: C continuations of prompt + response[:offset].

    Args:
      initial: the initial responses.
      branches: `(row, offset)` of each position.
      config: of training.
      version: number of the parameters that will sample; part of the seed.
    """
    whole = {
        row: np.concatenate([initial.prompts[initial.problem[row]], initial.tokens[row]])
        for row in {row for row, _ in branches}
    }
    return [
        Request(
            prefix=whole[row][: initial.prompt_length[row] + offset],
            num_samples=config.branching.num_continuations,
            budget=config.response_budget - offset,
            seed=(config.seed, CONTINUATION, version, row, offset),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        for row, offset in branches
    ]


def judged_from(
    initial: Leaves, branches: Sequence[tuple[int, int]], config: TrainConfig
) -> list[int]:
    """Where in a continuation's prefix begins what is judged: at the response, or at the end where
    a continuation is judged on its own text (the released program)."""
    own = config.judge == "continuation"
    return [int(initial.prompt_length[row]) + own * offset for row, offset in branches]


@struct.dataclass
class Advantages:
    """Advantages of every row's response, segment by segment.

    Attributes:
      segments: of the rows; the last of a row may end behind it.
      value: advantage of each token of a segment.
    """

    segments: PathSegments
    value: Float[np.ndarray, "row segment"]

    def lay_out(
        self, leaves: Leaves, rows: Int[np.ndarray, "chosen"], time: int
    ) -> Float[np.ndarray, "chosen time"]:
        """Of every token of some rows; 0 in prompt and padding."""
        here, prompt_length = take_rows(self, rows), leaves.prompt_length[rows]
        response = (leaves.length[rows] - prompt_length)[:, None]
        segments = dataclasses.replace(here.segments, end=np.minimum(here.segments.end, response))
        laid_out = token_advantages(segments, here.value, prompt_length, time)
        return np.asarray(laid_out, np.float32)


def permute_across_problems(
    advantages: Advantages,
    problem: Int[np.ndarray, "row"],
    trained: Bool[np.ndarray, "row"],
    rng: np.random.Generator,
) -> Advantages:
    """Gives each row the advantages of a random row of another problem, token by token.

    A control: the kind of advantages stays, what they say about the row's tokens is lost. A longer
    row repeats the last advantage of the row it got; where there is one problem only, nothing is
    left to give, and the advantages are 0.

    Args:
      advantages: of all rows.
      problem: of each row.
      trained: rows that give and are given; the others keep theirs.
      rng: draws the rows.
    """
    rows = np.flatnonzero(trained)
    problem = problem[rows]
    if len(np.unique(problem)) == 1:
        value = np.where(trained[:, None], 0, advantages.value)
        return dataclasses.replace(advantages, value=value)
    donors = np.arange(len(trained))
    donors[rows] = [rows[rng.choice(np.flatnonzero(problem != own))] for own in problem]
    given = take_rows(advantages, donors)
    number = np.arange(given.segments.valid.shape[1])
    last = number == given.segments.valid.sum(axis=1, keepdims=True) - 1
    end = np.where(last, np.iinfo(np.int32).max, given.segments.end)
    return dataclasses.replace(given, segments=dataclasses.replace(given.segments, end=end))


def tree_advantages(
    leaves: Leaves, dropped: np.ndarray, config: TrainConfig
) -> tuple[PathSegments, Advantages, np.ndarray]:
    """Values and advantages of the step's trees, and which rows are trained on.

    Args:
      leaves: initial responses first.
      dropped: problems left out as easy.
      config: of training.

    Returns:
      paths with values; advantages; whether each row is trained on: its problem was not dropped,
      the row is kept, and the kept rows of its problem differ in reward.
    """
    segments = path_segments(
        leaves.problem, leaves.root, leaves.split, leaves.length - leaves.prompt_length,
        leaves.reward, max_segments=config.branching.num_positions + 1,
    )  # fmt: skip
    if config.branching.rule == "none":
        by_segment = np.asarray(group_advantages(leaves.reward, leaves.problem))[:, None]
    else:
        by_segment = np.asarray(segment_advantages(segments, config.advantage_norm))
    kept = row_is_kept(segments, config.keep_unbranched or config.branching.rule == "none")
    trained = problems_with_signal(leaves.problem, leaves.reward, kept & ~dropped[leaves.problem])
    return segments, Advantages(segments, by_segment), np.asarray(trained)


def importance_weights(
    scorer: Sequence[np.ndarray], sampler: Sequence[np.ndarray], cap: float
) -> list[Float[np.ndarray, "time"]]:
    """min(p_scorer / p_sampler, cap) of every token: truncated importance sampling.

    Corrects for a sampler that computes the policy's probabilities with another precision than the
    scorer, whose ratio the loss clips (Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"; the truncation is that of Ionides 2008).

    Args:
      scorer, sampler: log-probabilities of each row's own tokens, nats.
      cap: largest weight.
    """
    bound = np.float32(np.log(cap))
    return [
        np.exp(np.minimum(ours - theirs, bound))
        for ours, theirs in zip(scorer, sampler, strict=True)
    ]


def train_rows(
    leaves: Leaves, advantages: Advantages, trained: np.ndarray, time: int, corrected: bool = False
) -> TrainRows:
    """The rows of the update.

    Args:
      leaves: of the step, initial responses first.
      advantages: of these.
      trained: which rows are trained on.
      time: width of the rows.
      corrected: whether tokens have an importance weight. It is multiplied into their advantages:
        every part of a token's policy loss, its bounds included, is proportional to |A|.
    """
    kept = np.flatnonzero(trained)
    paths = row_paths(leaves, leaves.root == np.arange(len(leaves.root)))

    def weighted(rows: np.ndarray) -> np.ndarray:
        laid_out = advantages.lay_out(leaves, rows, time)
        return (
            laid_out * lay_out_column(leaves, "importance", rows, time) if corrected else laid_out
        )

    return TrainRows(
        tokens=LazyRows(lambda rows: lay_out_column(leaves, "tokens", kept[rows], time)),
        paths=take_rows(paths, kept),
        advantages=LazyRows(lambda rows: weighted(kept[rows])),
        behaviour_logprobs=LazyRows(
            lambda rows: lay_out_column(leaves, "logprobs", kept[rows], time)
        ),
    )
