"""Training: AttnRL, one step off-policy. θ_t are the parameters after step t.

    draw b_1, b_2; sample the initial responses of b_1 with θ_0, score and judge them
    for t = 1, 2, ...:
        draw b_{t+2}
        choose the branch positions of b_t from its initial responses     (sampled with θ_{t-2})
        sample with θ_{t-1}: continuations of b_t, initial responses of b_{t+1}
        score what was sampled with θ_{t-1}; judge it
        build the trees of b_t: values, advantages; filter
        update θ_{t-1} -> θ_t on what is left

The on-policy schedule draws b_t, and samples its initial responses and then its continuations,
all with θ_{t-1}: two rounds of generation per step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from attnrl_jax.algorithms.adaptive import CumulativeMean, next_batch_size, problems_with_signal
from attnrl_jax.algorithms.advantages import (
    group_advantages,
    row_is_kept,
    segment_advantages,
    token_advantages,
)
from attnrl_jax.branching.tree import PathSegments, path_segments
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.sampling.sampler import Request, Response, sample
from attnrl_jax.scoring import score_rows
from attnrl_jax.sharding import batch_devices, batch_sharding
from attnrl_jax.tasks.judging import Judge, JudgeCounts
from attnrl_jax.tasks.problems import Problem, ProblemStream
from attnrl_jax.tasks.tokenizer import Tokenizer
from attnrl_jax.training import rollout
from attnrl_jax.training.state import TrainConfig, TrainState
from attnrl_jax.training.step import update
from attnrl_jax.types import Rollouts, TrainRows


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes:
      stream: training problems.
      held_out: problems that are only evaluated.
      tokenizer: of the policy.
      prompt: token ids of a problem's prompt.
      judge: (response text, golds) pairs to rewards.
    """

    stream: ProblemStream
    held_out: Sequence[Problem]
    tokenizer: Tokenizer
    prompt: Callable[[Problem], np.ndarray]
    judge: Judge


@dataclass(frozen=True)
class Setup:
    """What stays the same over a run: the task, the model, the settings, the devices.

    Attributes:
      task: problems and judge.
      model: shape of the policy, in the dtype of scoring, sampling and updates.
      config: of training.
      mesh: devices; None for the default device.
      reference: parameters of the reference policy; None where the loss has no KL penalty.
      on_stage: called with the name of each stage as it begins.
    """

    task: Task
    model: ModelConfig
    config: TrainConfig
    mesh: Mesh | None = None
    reference: Any = None
    on_stage: Callable[[str], None] = lambda stage: None


@struct.dataclass
class LoopState:
    """All that a run is made of between two steps; what a checkpoint holds.

    Attributes:
      train: parameters and optimizer.
      step: training steps done.
      batch: initial responses of the next step's problems, scored and judged (None until the
        first step of the on-policy schedule).
      batch_start, batch_count: where in the stream these problems begin, and how many they are.
      next_start, next_count: the same of the batch after it.
      cursor: where the next draw begins.
      batch_size: problems of the next draw.
      surviving_rows: rows that the last step trained on; 0 leaves the batch size as it is.
      easy_mean, easy_count: cumulative mean of the attention level of easy problems.
      sampled_tokens, trained_tokens, skipped_steps, skipped_prompts: totals.
    """

    train: TrainState
    step: int
    batch: Rollouts | None
    batch_start: int
    batch_count: int
    next_start: int
    next_count: int
    cursor: int
    batch_size: int
    surviving_rows: int
    easy_mean: float
    easy_count: int
    sampled_tokens: int
    trained_tokens: int
    skipped_steps: int
    skipped_prompts: int


@dataclass(frozen=True)
class StepReport:
    """What a training step did.

    Attributes:
      metrics: name to number; names and units are listed in the README.
      rows: every leaf of the step's trees, with rewards.
      segments: their paths and values.
      advantages: of every token of `rows`, before filtering.
      problems: of the step's batch.
      trained: which rows were trained on.
    """

    metrics: dict[str, float]
    rows: Rollouts
    segments: PathSegments
    advantages: np.ndarray
    problems: list[Problem]
    trained: np.ndarray


class Stopwatch:
    """Seconds per stage of one step, and how its answers were judged."""

    def __init__(self, on_stage: Callable[[str], None]):
        self.seconds: dict[str, float] = {}
        self.judged = JudgeCounts()
        self._on_stage = on_stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._on_stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def start(setup: Setup, train: TrainState) -> LoopState:
    """State before the first step: warm-up of the pipeline with θ_0."""
    state = LoopState(
        train=train, step=0, batch=None, batch_start=0, batch_count=0, next_start=0, next_count=0,
        cursor=0, batch_size=setup.config.num_problems, surviving_rows=0, easy_mean=0.0,
        easy_count=0, sampled_tokens=0, trained_tokens=0, skipped_steps=0, skipped_prompts=0,
    )  # fmt: skip
    if setup.config.schedule == "on_policy":
        return state
    watch = Stopwatch(setup.on_stage)
    state, problems = _advance(state, setup)
    state, problems = _advance(state, setup)
    prompts = [setup.task.prompt(problem) for problem in problems]
    requests = rollout.initial_requests(prompts, setup.config, version=0)
    [samples], tokens = _generate(state, setup, [requests], watch)
    initial = _initial_rows(state, setup, problems, prompts, samples, 0, watch)
    return state.replace(batch=initial, sampled_tokens=tokens)


def train_steps(state: LoopState, setup: Setup) -> Iterator[tuple[LoopState, StepReport]]:
    """Runs until `config.steps`; yields after every step.

    The state that was passed in, or yielded before, must not be used any more: its buffers are
    given to the next step.
    """
    while state.step < setup.config.steps:
        state, report = train_step(state, setup)
        yield state, report


def train_step(state: LoopState, setup: Setup) -> tuple[LoopState, StepReport]:
    """One step of the loop above."""
    config, task = setup.config, setup.task
    step = state.step + 1
    version = state.step
    off_policy = config.schedule == "off_policy"
    watch = Stopwatch(setup.on_stage)
    begin = time.perf_counter()
    rng = np.random.default_rng([config.seed, rollout.BRANCHES, step])
    sampled = 0

    # Draw, and on-policy sample the initial responses at once.
    if state.step > 0 and state.surviving_rows > 0:
        state = state.replace(
            batch_size=next_batch_size(
                state.batch_size, config.num_problems, config.rows_per_problem,
                state.surviving_rows, config.batch_size,
            )
        )  # fmt: skip
    if off_policy:
        problems = _problems_at(state.batch_start, state.batch_count, setup)
        initial = state.batch
        next_problems = _problems_at(state.next_start, state.next_count, setup)
        state, _ = _advance(state, setup)
        next_prompts = [task.prompt(problem) for problem in next_problems]
        next_requests = rollout.initial_requests(next_prompts, config, version)
    else:
        state, _ = _advance(state, setup)
        problems = _problems_at(state.next_start, state.next_count, setup)
        prompts = [task.prompt(problem) for problem in problems]
        requests = rollout.initial_requests(prompts, config, version)
        [samples], sampled = _generate(state, setup, [requests], watch)
        initial = _initial_rows(state, setup, problems, prompts, samples, version, watch)
        next_requests = []
    assert initial is not None

    # Choose branch positions, then one joint round of generation.
    with watch.stage("branch"):
        plan, easy_mean = rollout.plan_branches(
            initial, config, task.tokenizer.separators(),
            CumulativeMean(state.easy_mean, state.easy_count), rng,
        )  # fmt: skip
        branches = plan.list()
        branch_requests = rollout.continuation_requests(initial, branches, config, version)
    (continued, next_samples), tokens = _generate(
        state, setup, [branch_requests, next_requests], watch
    )
    sampled += tokens

    # Score and judge what was sampled.
    rows = initial
    if branches:
        continuations = rollout.continuation_rows(
            initial, branches, continued, task.tokenizer.separators(), version
        )
        continuations = _score(state, setup, continuations, with_fci=False, watch=watch)
        continuations = _judge(setup, continuations, problems, watch)
        rows = rollout.join_rows(initial, continuations)
    next_batch = None
    if off_policy:
        next_batch = _initial_rows(
            state, setup, next_problems, next_prompts, next_samples, version, watch
        )

    # Trees, advantages, filters.
    with watch.stage("tree"):
        segments, advantages, trained = tree_advantages(rows, plan.dropped, config)
        if config.permute_advantages and trained.any():
            kept = jax.tree.map(lambda x: x[trained], rows)
            advantages = advantages.copy()
            advantages[trained] = rollout.permute_across_problems(advantages[trained], kept, rng)

    # Update.
    metrics = _sampling_metrics(rows, plan, trained, advantages, state, setup)
    train = state.train
    trained_tokens = 0
    if trained.any():
        with watch.stage("update"):
            batch = _train_rows(state, setup, rows, advantages, trained)
            trained_tokens = int(batch.mask.sum())
            train, losses = update(
                state.train, setup.model, config, batch, rows.problem[trained],
                np.random.default_rng([config.seed, rollout.UPDATE, step]),
                *_layout(setup.mesh),
            )  # fmt: skip
            metrics |= {f"update/{name}": value for name, value in losses.items()}
    survivors = int(trained.sum())
    state = state.replace(
        train=train,
        step=step,
        batch=next_batch,
        surviving_rows=survivors,
        easy_mean=easy_mean.mean,
        easy_count=easy_mean.count,
        sampled_tokens=state.sampled_tokens + sampled,
        trained_tokens=state.trained_tokens + trained_tokens,
        skipped_steps=state.skipped_steps + (survivors == 0),
    )
    seconds = watch.seconds
    total = time.perf_counter() - begin
    seconds["other"] = total - sum(seconds.values())
    metrics |= {
        "step": step,
        "tokens/sampled": sampled,
        "tokens/trained": trained_tokens,
        "tokens/sampled_total": state.sampled_tokens,
        "tokens/trained_total": state.trained_tokens,
        "step/skipped": float(survivors == 0),
        "step/skipped_total": state.skipped_steps,
        "update/not_finite_total": int(train.skipped),
        "judge/unanswered": watch.judged.unanswered,
        "judge/lost": watch.judged.timeouts + watch.judged.failures,
        "seconds/step": total,
    } | {f"seconds/{name}": value for name, value in seconds.items()}
    return state, StepReport(metrics, rows, segments, advantages, problems, trained)


def tree_advantages(
    rows: Rollouts, dropped: np.ndarray, config: TrainConfig
) -> tuple[PathSegments, np.ndarray, np.ndarray]:
    """Values and advantages of the step's trees, and which rows are trained on.

    Args:
      rows: all leaves, initial responses first.
      dropped: problems left out as easy.
      config: of training.

    Returns:
      paths with values; advantages `[row, time]`; whether each row is trained on: its problem was
      not dropped, the row is kept, and the kept rows of its problem differ in reward.
    """
    segments = path_segments(
        rows.problem, rows.root, rows.split, rows.length - rows.prompt_length, rows.reward,
        max_segments=config.branching.num_positions + 1,
    )  # fmt: skip
    if config.branching.rule == "none":
        by_segment = group_advantages(rows.reward, rows.problem)[:, None]
    else:
        by_segment = segment_advantages(segments, config.advantage_norm)
    advantages = token_advantages(
        segments, by_segment, rows.prompt_length, rows.tokens.shape[1]
    ).astype(np.float32)
    kept = row_is_kept(segments, config.keep_unbranched or config.branching.rule == "none")
    trained = problems_with_signal(rows.problem, rows.reward, kept & ~dropped[rows.problem])
    return segments, advantages, trained


def evaluate(
    state: LoopState, setup: Setup, problems: Sequence[Problem] | None = None
) -> dict[str, float]:
    """Accuracy of one response per held-out problem, with the same noise at every call.

    Args:
      state: of the run; only its parameters are read.
      setup: of the run.
      problems: other problems than `config.eval_problems` of the task's held-out ones.

    Returns:
      metrics `held_out/...`: accuracy, its number of problems, mean response length.
    """
    config, task = setup.config, setup.task
    if problems is None:
        problems = task.held_out[: config.eval_problems or None]
    requests = [
        Request(
            prefix=task.prompt(problem),
            num_samples=1,
            budget=config.response_budget,
            seed=rollout.seed_of(rollout.EVALUATION, index),
            temperature=config.eval_temperature,
        )
        for index, problem in enumerate(problems)
    ]
    watch = Stopwatch(setup.on_stage)
    with watch.stage("evaluate"):
        samples, _ = sample(
            state.train.params, setup.model, requests, task.tokenizer.end_ids, config.sampler
        )
        responses = [responses[0] for responses in samples]
        rewards, _ = task.judge.judge_many(
            [
                (task.tokenizer.decode(response.tokens), problem.answers)
                for response, problem in zip(responses, problems, strict=True)
            ]
        )
    return {
        "held_out/accuracy": float(np.mean(rewards)),
        "held_out/problems": len(problems),
        "held_out/response_length": float(np.mean([len(r.tokens) for r in responses])),
        "seconds/evaluate": watch.seconds["evaluate"],
    }


def _advance(state: LoopState, setup: Setup) -> tuple[LoopState, list[Problem]]:
    """Draws a batch: the one drawn before it moves up. Returns the one that moved up's problems."""
    draw = setup.task.stream.take(state.cursor, state.batch_size)
    state = state.replace(
        batch_start=state.next_start,
        batch_count=state.next_count,
        next_start=state.cursor,
        next_count=state.batch_size,
        cursor=draw.cursor,
        skipped_prompts=state.skipped_prompts + sum(draw.skipped.values()),
    )
    return state, _problems_at(state.batch_start, state.batch_count, setup)


def _problems_at(start: int, count: int, setup: Setup) -> list[Problem]:
    return setup.task.stream.take(start, count).problems


def _layout(mesh: Mesh | None) -> tuple[jax.sharding.Sharding | None, int]:
    return (None, 1) if mesh is None else (batch_sharding(mesh), batch_devices(mesh))


def _generate(
    state: LoopState, setup: Setup, groups: Sequence[list[Request]], watch: Stopwatch
) -> tuple[list[list[list[Response]]], int]:
    """One round of generation for several lists of requests, and the tokens it sampled."""
    with watch.stage("generate"):
        requests = [request for group in groups for request in group]
        samples, _ = sample(
            state.train.params, setup.model, requests, setup.task.tokenizer.end_ids,
            setup.config.sampler,
        )  # fmt: skip
    parts, begin = [], 0
    for group in groups:
        parts.append(samples[begin : begin + len(group)])
        begin += len(group)
    tokens = sum(len(response.tokens) for responses in samples for response in responses)
    return parts, tokens


def _initial_rows(
    state: LoopState,
    setup: Setup,
    problems: list[Problem],
    prompts: list[np.ndarray],
    samples: Sequence[Sequence[Response]],
    version: int,
    watch: Stopwatch,
) -> Rollouts:
    """Initial responses as rows, scored and judged."""
    config = setup.config
    width = config.prompt_budget + config.response_budget
    separators = setup.task.tokenizer.separators()
    rows = rollout.initial_rows(prompts, samples, separators, width, version)
    with_fci = config.branching.rule == "fci" or config.expansion.filter_easy
    rows = _score(state, setup, rows, with_fci=with_fci, watch=watch)
    return _judge(setup, rows, problems, watch)


def _score(
    state: LoopState, setup: Setup, rows: Rollouts, *, with_fci: bool, watch: Stopwatch
) -> Rollouts:
    """Fills in what one forward pass says of the tokens that the rows sampled themselves."""
    config = setup.config
    with watch.stage("score"):
        scores = score_rows(
            state.train.params, setup.model, rows.tokens, rows.length, rows.step_ids,
            config.temperature, delta=config.branching.delta, with_fci=with_fci,
            batch_rows=config.score_batch_rows, length_multiple=config.length_multiple,
            sharding=_layout(setup.mesh)[0],
        )  # fmt: skip
        own = rollout.own_tokens(rows)
        logprobs = scores.logprobs if config.behaviour == "scorer" else rows.logprobs
        return rows.replace(
            logprobs=np.where(own, logprobs, rows.logprobs),
            entropy=np.where(own, scores.entropy, rows.entropy),
            fci=scores.fci,
        )


def _judge(setup: Setup, rows: Rollouts, problems: list[Problem], watch: Stopwatch) -> Rollouts:
    """Rewards of the rows, judged on the whole response or on the continuation's own text."""
    with watch.stage("judge"):
        skip = rows.split if setup.config.judge == "continuation" else np.zeros_like(rows.split)
        pairs = [
            (
                setup.task.tokenizer.decode(
                    rows.tokens[row, rows.prompt_length[row] + skip[row] : rows.length[row]]
                ),
                problems[rows.problem[row]].answers,
            )
            for row in range(len(rows.length))
        ]
        rewards, counts = setup.task.judge.judge_many(pairs)
        watch.judged = JudgeCounts(*map(sum, zip(watch.judged, counts, strict=True)))
        return rows.replace(reward=rewards)


def _train_rows(
    state: LoopState, setup: Setup, rows: Rollouts, advantages: np.ndarray, trained: np.ndarray
) -> TrainRows:
    """The rows of the update, with the reference policy's log-probabilities if they count."""
    config = setup.config
    kept = jax.tree.map(lambda x: x[trained], rows)
    mask = rollout.response_tokens(kept)
    reference = np.zeros_like(kept.logprobs)
    if setup.reference is not None and config.loss.kl_beta > 0:
        reference = score_rows(
            setup.reference, setup.model, kept.tokens, kept.length, kept.step_ids,
            config.temperature, delta=config.branching.delta, with_fci=False,
            batch_rows=config.score_batch_rows, length_multiple=config.length_multiple,
            sharding=_layout(setup.mesh)[0],
        ).logprobs  # fmt: skip
    return TrainRows(
        tokens=kept.tokens,
        length=kept.length,
        mask=mask.astype(np.float32),
        advantages=np.where(mask, advantages[trained], 0.0).astype(np.float32),
        behaviour_logprobs=np.where(mask, kept.logprobs, 0.0).astype(np.float32),
        reference_logprobs=np.where(mask, reference, 0.0).astype(np.float32),
    )


def _sampling_metrics(
    rows: Rollouts,
    plan: rollout.BranchPlan,
    trained: np.ndarray,
    advantages: np.ndarray,
    state: LoopState,
    setup: Setup,
) -> dict[str, float]:
    """What the step's rows look like before the update."""
    initial = rows.root == np.arange(len(rows.root))
    response = rollout.response_tokens(rows)
    own = rollout.own_tokens(rows)
    lengths = (rows.length - rows.prompt_length)[initial]
    signal = (np.abs(advantages) > 1e-9) & response
    return {
        "train/accuracy": float(rows.reward[initial].mean()),
        "train/leaf_accuracy": float(rows.reward.mean()),
        "train/entropy": float(rows.entropy[own].mean()) if own.any() else 0.0,
        "train/response_length": float(lengths.mean()),
        "train/truncated": float(1.0 - rows.ended[initial].mean()),
        "problems/drawn": int(rows.problem.max()) + 1,
        "problems/kept": len(np.unique(rows.problem[trained])),
        "problems/dropped_easy": int(plan.dropped.sum()),
        "problems/skipped_prompts_total": state.skipped_prompts,
        "rows/sampled": len(rows.length),
        "rows/trained": int(trained.sum()),
        "rows/with_advantage": float((signal.any(axis=1) & trained).mean()),
        "branching/responses_expanded": int(plan.expanded.sum()),
        "branching/positions": len(plan.list()),
        "branching/by_importance": plan.share_by_importance(),
        "branching/fci_max": float(rows.fci[initial].max()),
        "batch/size_next": state.batch_size,
    }
