"""From problems to requests, and from sampled responses to rows. Host code on numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool

from attnrl_jax.algorithms.adaptive import CumulativeMean, attention_level, select_expanded
from attnrl_jax.branching.importance import mask_candidates
from attnrl_jax.branching.selection import BranchPositions, branch_positions
from attnrl_jax.branching.steps import Separators, count_steps, end_of_thinking, segment_steps
from attnrl_jax.sampling.sampler import Request, Response
from attnrl_jax.training.state import TrainConfig
from attnrl_jax.types import Rollouts

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


def empty_rollouts(rows: int, time: int) -> Rollouts:
    """Rows with nothing in them: 0 everywhere, -1 where a number would name something."""
    whole = (rows, time)
    return Rollouts(
        tokens=np.zeros(whole, np.int32),
        prompt_length=np.zeros(rows, np.int32),
        length=np.zeros(rows, np.int32),
        problem=np.zeros(rows, np.int32),
        root=np.arange(rows, dtype=np.int32),
        split=np.zeros(rows, np.int32),
        ended=np.zeros(rows, bool),
        logprobs=np.zeros(whole, np.float32),
        version=np.full(whole, -1, np.int32),
        entropy=np.zeros(whole, np.float32),
        step_ids=np.full(whole, -1, np.int32),
        fci=np.zeros(whole, np.float32),
        reward=np.zeros(rows, np.float32),
    )


def _write_response(rows: Rollouts, row: int, start: int, response: Response, version: int) -> None:
    end = start + len(response.tokens)
    rows.tokens[row, start:end] = response.tokens
    rows.logprobs[row, start:end] = response.logprobs
    rows.version[row, start:end] = version
    rows.length[row] = end
    rows.ended[row] = response.ended


def initial_rows(
    prompts: Sequence[np.ndarray],
    samples: Sequence[Sequence[Response]],
    separators: Separators,
    time: int,
    version: int,
) -> Rollouts:
    """Rows of initial responses, problem by problem.

    Args:
      prompts: ids of each problem's prompt.
      samples: the responses of each problem.
      separators: ids that end a step.
      time: width of the rows.
      version: number of the parameters that sampled.
    """
    rows = empty_rollouts(sum(map(len, samples)), time)
    row = 0
    for problem, (prompt, responses) in enumerate(zip(prompts, samples, strict=True)):
        for response in responses:
            rows.tokens[row, : len(prompt)] = prompt
            rows.prompt_length[row] = len(prompt)
            rows.problem[row] = problem
            _write_response(rows, row, len(prompt), response, version)
            row += 1
    rows.step_ids[:] = segment_steps(rows.tokens, rows.prompt_length, rows.length, separators)
    return rows


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

    def list(self) -> list[tuple[int, int]]:
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
    initial: Rollouts,
    config: TrainConfig,
    separators: Separators,
    easy_mean: CumulativeMean,
    rng: np.random.Generator,
) -> tuple[BranchPlan, CumulativeMean]:
    """Chooses which initial responses branch, and where.

    Args:
      initial: scored and judged initial responses, the same number for every problem.
      config: of training.
      separators: ids that end a step.
      easy_mean: state of the easy filter.
      rng: for random subsets and random positions.
    """
    after_think = np.asarray(end_of_thinking(initial.tokens, initial.step_ids, separators))
    refused = None if config.branching.after_think else after_think
    fci = np.asarray(mask_candidates(initial.fci, config.branching.zero_first, refused))
    positions = branch_positions(
        config.branching,
        fci=fci,
        entropy=initial.entropy,
        step_ids=initial.step_ids,
        prompt_length=initial.prompt_length,
        length=initial.length,
        first_after_think=after_think,
        rng=rng,
    )
    num_problems = int(initial.problem.max()) + 1
    grid = (num_problems, -1)
    if config.branching.rule == "none":
        # Nothing branches, so nothing is expanded or judged too easy to branch.
        plan = BranchPlan(
            positions, np.zeros(len(initial.problem), bool), np.zeros(num_problems, bool)
        )
        return plan, easy_mean
    num_steps = np.asarray(count_steps(initial.step_ids))
    level = attention_level(fci.reshape(*grid, fci.shape[-1]), num_steps.reshape(grid))
    expansion, easy_mean = select_expanded(
        initial.reward.reshape(grid) > 0, level, easy_mean, rng, config.expansion
    )
    return BranchPlan(positions, expansion.expanded.reshape(-1), expansion.dropped), easy_mean


def continuation_requests(
    initial: Rollouts, branches: Sequence[tuple[int, int]], config: TrainConfig, version: int
) -> list[Request]:
    """One request per branch position: C continuations of prompt + response[:offset].

    Args:
      initial: the initial responses.
      branches: `(row, offset)` of each position.
      config: of training.
      version: number of the parameters that will sample; part of the seed.
    """
    requests = []
    for row, offset in branches:
        end = int(initial.prompt_length[row]) + offset
        requests.append(
            Request(
                prefix=initial.tokens[row, :end],
                num_samples=config.branching.num_continuations,
                budget=config.response_budget - offset,
                seed=(config.seed, CONTINUATION, version, row, offset),
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
            )
        )
    return requests


def judged_from(
    initial: Rollouts, branches: Sequence[tuple[int, int]], config: TrainConfig
) -> list[int]:
    """Where in a continuation's prefix begins what is judged: at the response, or at the end where
    a continuation is judged on its own text (the released program)."""
    own = config.judge == "continuation"
    return [int(initial.prompt_length[row]) + own * offset for row, offset in branches]


def continuation_rows(
    initial: Rollouts,
    branches: Sequence[tuple[int, int]],
    samples: Sequence[Sequence[Response]],
    separators: Separators,
    version: int,
) -> Rollouts:
    """Rows of whole paths (prompt, shared prefix, continuation); `root` is a row of `initial`.

    Shared tokens keep the log-probabilities, entropies and versions of the initial response.
    """
    rows = empty_rollouts(sum(map(len, samples)), initial.tokens.shape[1])
    row = 0
    for (root, offset), responses in zip(branches, samples, strict=True):
        start = int(initial.prompt_length[root]) + offset
        for response in responses:
            for shared, source in (
                (rows.tokens, initial.tokens),
                (rows.logprobs, initial.logprobs),
                (rows.version, initial.version),
                (rows.entropy, initial.entropy),
            ):
                shared[row, :start] = source[root, :start]
            rows.prompt_length[row] = initial.prompt_length[root]
            rows.problem[row] = initial.problem[root]
            rows.root[row] = root
            rows.split[row] = offset
            _write_response(rows, row, start, response, version)
            row += 1
    rows.step_ids[:] = segment_steps(rows.tokens, rows.prompt_length, rows.length, separators)
    return rows


def join_rows(initial: Rollouts, continuations: Rollouts) -> Rollouts:
    """Initial responses first, so that `root` keeps its meaning."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), initial, continuations)


def own_tokens(rows: Rollouts) -> Bool[np.ndarray, "row time"]:
    """Tokens a row sampled itself: the response, without what it shares with its root."""
    index = np.arange(rows.tokens.shape[1])[None, :]
    start = (rows.prompt_length + rows.split)[:, None]
    return (index >= start) & (index < rows.length[:, None])


def response_tokens(rows: Rollouts) -> Bool[np.ndarray, "row time"]:
    """Tokens of the response, shared prefixes included."""
    index = np.arange(rows.tokens.shape[1])[None, :]
    return (index >= rows.prompt_length[:, None]) & (index < rows.length[:, None])


def permute_across_problems(
    advantages: np.ndarray, rows: Rollouts, rng: np.random.Generator
) -> np.ndarray:
    """Gives each row the advantages of a random row of another problem, token by token.

    A control: the kind of advantages stays, what they say about the row's tokens is lost. A longer
    row repeats the last advantage of the row it got; where there is one problem only, nothing is
    left to give, and the advantages are 0.

    Args:
      advantages: `[row, time]`, of response tokens.
      rows: the rows they belong to.
      rng: draws the rows.
    """
    result = np.zeros_like(advantages)
    for row in range(len(rows.problem)):
        others = np.flatnonzero(rows.problem != rows.problem[row])
        if not len(others):
            break
        donor = rng.choice(others)
        start, end = int(rows.prompt_length[row]), int(rows.length[row])
        given = advantages[donor, rows.prompt_length[donor] : rows.length[donor]]
        result[row, start:end] = given[np.minimum(np.arange(end - start), len(given) - 1)]
    return result
