"""Rounds of generation: requests are sampled, judged meanwhile, and scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from attnrl_jax import processes
from attnrl_jax.evaluation import judged_text
from attnrl_jax.packing import row_paths
from attnrl_jax.sampling.sampler import Request, Response, sample
from attnrl_jax.scoring import start_scoring
from attnrl_jax.sharding import cast_to_mesh, under
from attnrl_jax.tasks.judging import JudgeCounts, Pending
from attnrl_jax.tasks.problems import Problem
from attnrl_jax.training import rollout
from attnrl_jax.training.leaves import (
    continuation_leaves,
    count_ranges,
    initial_leaves,
    lay_out_column,
)
from attnrl_jax.training.setup import Mismatch, Setup, Stopwatch, layout
from attnrl_jax.types import LazyRows, Leaves


@dataclass(frozen=True)
class Group:
    """Requests of one kind, and what their responses are judged by.

    Attributes:
      requests: to the sampler.
      answers: golds of each request's problem.
      judged_from: where in each prefix begins what is judged, together with the response.
    """

    requests: list[Request]
    answers: list[tuple[str, ...]]
    judged_from: list[int]


@dataclass(frozen=True)
class Sampled:
    """A group with its responses, request by request.

    Attributes:
      requests: of the group.
      responses: of each request.
      rewards: waits for the judge, in all processes; the reward of every response, in one row.
    """

    requests: list[Request]
    responses: list[list[Response]]
    rewards: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Policy:
    """Parameters of one version, as the stages before the update need them.

    Attributes:
      params: as scoring takes them.
      sampling: the same, as sampling takes them.
      mesh: where `params` lie.
      sampling_mesh: where `sampling` lies.
      version: number t of the parameters θ_t.
    """

    params: Any
    sampling: Any
    mesh: Mesh | None
    sampling_mesh: Mesh | None
    version: int

    def on_sampling_devices(self) -> Policy:
        """The same policy, scoring where it samples."""
        return dataclasses.replace(self, params=self.sampling, mesh=self.sampling_mesh)


def policy_of(params: Any, setup: Setup, version: int) -> Policy:
    """The policy with these parameters: one jitted change of layout, where there are two."""
    if setup.sampling_mesh is None:
        return Policy(params, params, setup.mesh, setup.mesh, version)
    sampling = cast_to_mesh(params, setup.sampling_model.dtype, setup.sampling_mesh)
    return Policy(params, sampling, setup.mesh, setup.sampling_mesh, version)


def generate(
    policy: Policy,
    setup: Setup,
    groups: Sequence[Group],
    watch: Stopwatch,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[list[Sampled], int]:
    """One round of generation for all groups, judged while it goes on; and its tokens.

    What the stage `judge` takes is what is left to wait for when rewards are asked for. Of several
    processes each judges the answers to its share of the requests. `meanwhile` as in `sample`.
    """
    task = setup.task
    requests = [request for group in groups for request in group.requests]
    answers = [golds for group in groups for golds in group.answers]
    judged_from = [begin for group in groups for begin in group.judged_from]
    asked: list[list[Pending | None]] = [[None] * request.num_samples for request in requests]
    own = processes.share(len(requests))

    def ask(request: int, k: int, response: Response) -> None:
        if not own[request]:
            return
        prefix, begin = requests[request].prefix, judged_from[request]
        judged = np.concatenate([prefix[begin:], response.tokens])
        text = judged_text(prefix[:begin], judged, task.tokenizer)
        asked[request][k] = task.judge.submit([(text, answers[request])])

    with watch.stage("generate"), under(policy.sampling_mesh):
        samples, stats = sample(
            policy.sampling, setup.sampling_model, requests, task.tokenizer.end_ids,
            setup.config.sampler_shapes, on_response=ask, meanwhile=meanwhile,
        )  # fmt: skip

    @functools.cache
    def rewards() -> np.ndarray:
        with watch.stage("judge"):
            return _rewards([pending for responses in asked for pending in responses], watch)

    def rewards_of(part: slice) -> Callable[[], np.ndarray]:
        return lambda: rewards()[part]

    sampled, request, answer = [], 0, 0
    for group in groups:
        responses = samples[request : request + len(group.requests)]
        part = slice(answer, answer + sum(map(len, responses)))
        sampled.append(Sampled(group.requests, responses, rewards_of(part)))
        request, answer = request + len(group.requests), part.stop
    return sampled, stats.useful_tokens


def _rewards(asked: Sequence[Pending | None], watch: Stopwatch) -> np.ndarray:
    """Verdicts of all processes; None stands for an answer that another process judges."""
    rewards = np.zeros(len(asked), np.float32)
    counts = JudgeCounts()
    for k, pending in enumerate(asked):
        if pending is not None:
            verdicts = pending.result()
            counts = JudgeCounts(*map(sum, zip(counts, verdicts.counts, strict=True)))
            rewards[k] = verdicts.rewards[0]
    rewards, summed = processes.total((rewards, np.array(counts)))
    watch.judged = JudgeCounts(
        *(before + int(n) for before, n in zip(watch.judged, summed, strict=True))
    )
    return rewards


@dataclass(frozen=True)
class Branching:
    """What is branched.

    Attributes:
      initial: initial responses of a batch, scored and judged.
      plan: where they branch.
      problems: of the batch.
      batch: number t of the batch b_t.
    """

    initial: Leaves
    plan: rollout.BranchPlan
    problems: list[Problem]
    batch: int


@dataclass(frozen=True)
class Round:
    """One round of generation whose rows are being scored and judged.

    Attributes:
      continuations: waits for the rows of what was branched; None where nothing was.
      initial: waits for the rows of initial responses; None where none were asked for.
      tokens: that were sampled.
    """

    continuations: Callable[[], Leaves | None]
    initial: Callable[[], Leaves | None]
    tokens: int


def start_round(
    policy: Policy,
    setup: Setup,
    branching: Branching | None,
    group: Group | None,
    watch: Stopwatch,
    meanwhile: Callable[[], None] | None = None,
) -> Round:
    """One round of generation, for the continuations of one batch and the responses of another.

    Scoring of both is started before anything is waited for, so that the devices go on while the
    host sees to the first.

    Args:
      policy: that samples and scores.
      setup: of the run.
      branching: what is continued, if anything.
      group: requests of initial responses, if any.
      watch: of the step.
      meanwhile: as in `sample`.
    """
    config = setup.config
    branches = branching.plan.list() if branching is not None else []
    groups = [] if group is None else [group]
    if branching is not None and branches:
        initial = branching.initial
        groups.insert(
            0,
            Group(
                rollout.continuation_requests(initial, branches, config, branching.batch - 1),
                [branching.problems[initial.problem[row]].answers for row, _ in branches],
                rollout.judged_from(initial, branches, config),
            ),
        )
    sampled, tokens = generate(policy, setup, groups, watch, meanwhile)
    continuations: Callable[[], Leaves | None] = _nothing
    initials: Callable[[], Leaves | None] = _nothing
    if branching is not None and branches:
        leaves = continuation_leaves(
            branching.initial, branches, sampled[0].responses, policy.version
        )
        continuations = score(policy, setup, leaves, sampled[0].rewards, branching.initial, watch)
    if group is not None:
        prompts = [request.prefix for request in group.requests]
        leaves = initial_leaves(prompts, sampled[-1].responses, policy.version)
        initials = score(policy, setup, leaves, sampled[-1].rewards, None, watch)
    return Round(continuations, initials, tokens)


def _nothing() -> None:
    return None


def score(
    policy: Policy,
    setup: Setup,
    leaves: Leaves,
    rewards: Callable[[], np.ndarray],
    roots: Leaves | None,
    watch: Stopwatch,
) -> Callable[[], Leaves]:
    """Starts one forward pass over the tokens that the rows sampled themselves.

    Args:
      policy: that sampled them.
      setup: of the run.
      leaves: initial responses, or continuations.
      rewards: of `Sampled`.
      roots: of continuations; None: these are initial responses, which get forward context
        influence where it is used.
      watch: of the step.

    Returns:
      a function that waits for it, and for the judge, and returns the rows with what both say.
    """
    config, rule = setup.config, setup.task.step_rule
    with_fci = roots is None and config.needs_fci
    devices = layout(policy.mesh)

    def tokens(rows: np.ndarray) -> np.ndarray:
        return lay_out_column(leaves, "tokens", rows, config.width, roots)

    def step_ids(rows: np.ndarray) -> np.ndarray:
        lengths = leaves.prompt_length[rows], leaves.length[rows]
        return rule.step_ids(tokens(rows), *lengths)

    with watch.stage("score"), under(policy.mesh):
        if with_fci:
            leaves = dataclasses.replace(leaves, num_ranges=count_ranges(leaves, rule))
        scored = start_scoring(
            policy.params,
            setup.model,
            LazyRows(tokens),
            row_paths(leaves, np.full(len(leaves.length), roots is None)),
            leaves.prompt_length + leaves.split,
            LazyRows(step_ids) if with_fci else None,
            leaves.num_ranges,
            config.temperature,
            delta=config.branching.delta,
            batch_tokens=config.score_batch_tokens,
            pack_length=config.packed_length(devices.get("row_multiple", 1)),
            **devices,
        )

    @functools.cache
    def finish() -> Leaves:
        judged = rewards()
        with watch.stage("score"):
            scores = scored()
            watch.mismatch = watch.mismatch.plus(compare_logprobs(scores.logprobs, leaves.logprobs))
            importance = leaves.importance
            if config.importance_cap:
                importance = rollout.importance_weights(
                    scores.logprobs, leaves.logprobs, config.importance_cap
                )
            return dataclasses.replace(
                leaves,
                reward=judged,
                logprobs=scores.logprobs if config.behaviour == "scorer" else leaves.logprobs,
                entropy=scores.entropy,
                importance=importance,
                fci=scores.fci,
            )

    return finish


def compare_logprobs(scorer: list[np.ndarray], sampler: list[np.ndarray]) -> Mismatch:
    """How far the log-probabilities of two programs are apart, row by row.

    Both are of the same parameters and tokens; what differs is the order of sums, and the
    precision. What is not finite is left out. Of several processes each compares its share of the
    rows.
    """
    own = processes.share(len(scorer))
    found = Mismatch()
    for ours, theirs, is_own in zip(scorer, sampler, own, strict=True):
        if is_own:
            apart = np.abs(ours - theirs)
            apart = apart[np.isfinite(apart)]
            largest = float(apart.max(initial=0.0))
            found = found.plus(Mismatch(len(apart), float(apart.sum()), largest))
    if processes.count() == 1:
        return found
    tokens, total, largest = processes.of_all(
        np.array([found.tokens, found.total, found.largest], np.float32)
    ).T
    return Mismatch(int(tokens.sum()), float(total.sum()), float(largest.max()))
