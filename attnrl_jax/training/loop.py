"""Training: AttnRL, one step off-policy. θ_t are the parameters after step t.

    draw b_1, b_2; sample the initial responses of b_1 with θ_0, score and judge them
    for t = 1, 2, ...:
        draw b_{t+2}
        choose the branch positions of b_t from its initial responses     (sampled with θ_{t-2})
        sample with θ_{t-1}: continuations of b_t, initial responses of b_{t+1}
            (judged while generation goes on)
        score what was sampled with θ_{t-1}
        build the trees of b_t: values, advantages; filter
        update θ_{t-1} -> θ_t on what is left

The on-policy schedule draws b_t, and samples its initial responses and then its continuations,
all with θ_{t-1}: two rounds of generation per step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from flax import struct

from attnrl_jax.algorithms.adaptive import CumulativeMean, next_batch_size, problems_with_signal
from attnrl_jax.algorithms.advantages import (
    group_advantages,
    row_is_kept,
    segment_advantages,
    token_advantages,
)
from attnrl_jax.branching.tree import PathSegments, path_segments
from attnrl_jax.evaluation import evaluation_request
from attnrl_jax.packing import take_rows
from attnrl_jax.tasks.problems import Problem
from attnrl_jax.training import rollout
from attnrl_jax.training.metrics import sampling_metrics
from attnrl_jax.training.stages import (
    Group,
    Setup,
    Stopwatch,
    generate,
    initial_batch,
    layout,
    score,
    train_rows,
)
from attnrl_jax.training.state import TrainConfig, TrainState
from attnrl_jax.training.step import update
from attnrl_jax.types import Rollouts


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
      batch_size: problems of the last draw.
      surviving_rows: rows that the last step trained on; 0 leaves the batch size as it is.
      easy_mean, easy_count: cumulative mean of the attention level of easy problems.
      sampled_tokens, trained_tokens, skipped_steps, skipped_prompts, lost_answers: totals.
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
    lost_answers: int


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


def start(setup: Setup, train: TrainState) -> LoopState:
    """State before the first step: warm-up of the pipeline with θ_0."""
    state = LoopState(
        train=train, step=0, batch=None, batch_start=0, batch_count=0, next_start=0, next_count=0,
        cursor=0, batch_size=setup.config.num_problems, surviving_rows=0, easy_mean=0.0,
        easy_count=0, sampled_tokens=0, trained_tokens=0, skipped_steps=0, skipped_prompts=0,
        lost_answers=0,
    )  # fmt: skip
    if setup.config.schedule == "on_policy":
        return state
    watch = Stopwatch(setup.on_stage)
    state = _advance(_advance(state, setup), setup)
    problems = _problems_at(state.batch_start, state.batch_count, setup)
    params = state.train.params
    [sampled], tokens = generate(params, setup, [_initial_group(problems, setup, 1)], watch)
    initial = initial_batch(params, setup, sampled, 0, watch)()
    return dataclasses.replace(
        state, batch=initial, sampled_tokens=tokens, lost_answers=watch.lost_answers
    )


def finished(state: LoopState, config: TrainConfig) -> bool:
    """Whether the run has its steps, or has sampled its tokens."""
    spent = 0 < config.max_sampled_tokens <= state.sampled_tokens
    return state.step >= config.steps or spent


def train_steps(state: LoopState, setup: Setup) -> Iterator[tuple[LoopState, StepReport]]:
    """Runs until the run is `finished`; yields after every step.

    The state that was passed in, or yielded before, must not be used any more: its buffers are
    given to the next step.
    """
    while not finished(state, setup.config):
        state, report = train_step(state, setup)
        yield state, report


def train_step(state: LoopState, setup: Setup) -> tuple[LoopState, StepReport]:
    """One step of the loop above."""
    config, task = setup.config, setup.task
    step = state.step + 1
    version = state.step
    params = state.train.params
    off_policy = config.schedule == "off_policy"
    watch = Stopwatch(setup.on_stage)
    begin = time.perf_counter()
    rng = np.random.default_rng([config.seed, rollout.BRANCHES, step])
    sampled_tokens = 0

    # Draw, and on-policy sample the initial responses at once.
    if state.step > 0 and state.surviving_rows > 0:
        size = next_batch_size(
            state.batch_size,
            config.num_problems,
            config.rows_per_problem,
            state.surviving_rows,
            config.batch_size,
        )
        state = dataclasses.replace(state, batch_size=size)
    if off_policy:
        problems = _problems_at(state.batch_start, state.batch_count, setup)
        initial = state.batch
        next_problems = _problems_at(state.next_start, state.next_count, setup)
        state = _advance(state, setup)
        next_group = _initial_group(next_problems, setup, step + 1)
    else:
        state = _advance(state, setup)
        problems = _problems_at(state.next_start, state.next_count, setup)
        group = _initial_group(problems, setup, step)
        [first], sampled_tokens = generate(params, setup, [group], watch)
        initial = initial_batch(params, setup, first, version, watch)()
        next_group = Group([], [], [])
    assert initial is not None

    # Choose branch positions, then one joint round of generation.
    with watch.stage("branch"):
        plan, easy_mean = rollout.plan_branches(
            initial, config, task.tokenizer.separators(),
            CumulativeMean(state.easy_mean, state.easy_count), rng,
        )  # fmt: skip
        branches = plan.list()
        branch_group = Group(
            rollout.continuation_requests(initial, branches, config, version),
            [problems[initial.problem[row]].answers for row, _ in branches],
            rollout.judged_from(initial, branches, config),
        )
    (continued, next_sampled), tokens = generate(params, setup, [branch_group, next_group], watch)
    sampled_tokens += tokens

    # Score what was sampled. Everything is started before anything is waited for, so that the
    # devices score the initial responses while the host builds the trees.
    rows = initial
    next_batch = None
    if branches:
        continuations = rollout.continuation_rows(
            initial, branches, continued.responses, task.tokenizer.separators(), version
        )
        continuations = dataclasses.replace(continuations, reward=continued.rewards)
        scored = score(params, setup, continuations, initial=False, with_fci=False, watch=watch)
    if off_policy:
        scored_next = initial_batch(params, setup, next_sampled, version, watch)
    if branches:
        rows = rollout.join_rows(initial, scored())

    # Trees, advantages, filters.
    with watch.stage("tree"):
        segments, advantages, trained = tree_advantages(rows, plan.dropped, config)
        if config.permute_advantages and trained.any():
            kept = take_rows(rows, trained)
            advantages = advantages.copy()
            advantages[trained] = rollout.permute_across_problems(advantages[trained], kept, rng)
    if off_policy:
        next_batch = scored_next()

    # Update.
    metrics = sampling_metrics(rows, plan, trained, advantages)
    train = state.train
    trained_tokens = 0
    if trained.any():
        with watch.stage("update"):
            trained_tokens = int((rows.length - rows.prompt_length)[trained].sum())
            train, losses = update(
                state.train, setup.model, config, train_rows(rows, advantages, trained),
                np.random.default_rng([config.seed, rollout.UPDATE, step]), setup.reference,
                **layout(setup.mesh),
            )  # fmt: skip
            metrics |= {f"update/{name}": value for name, value in losses.items()}
    survivors = int(trained.sum())
    state = dataclasses.replace(
        state,
        train=train,
        step=step,
        batch=next_batch,
        surviving_rows=survivors,
        easy_mean=easy_mean.mean,
        easy_count=easy_mean.count,
        sampled_tokens=state.sampled_tokens + sampled_tokens,
        trained_tokens=state.trained_tokens + trained_tokens,
        skipped_steps=state.skipped_steps + (survivors == 0),
        lost_answers=state.lost_answers + watch.lost_answers,
    )
    metrics |= _closing_metrics(state, watch, sampled_tokens, trained_tokens, survivors)
    total = time.perf_counter() - begin
    seconds = watch.seconds | {"other": total - sum(watch.seconds.values()), "step": total}
    metrics |= {f"seconds/{name}": value for name, value in seconds.items()}
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
    advantages = token_advantages(segments, by_segment, rows.prompt_length, rows.tokens.shape[1])
    kept = row_is_kept(segments, config.keep_unbranched or config.branching.rule == "none")
    trained = problems_with_signal(rows.problem, rows.reward, kept & ~dropped[rows.problem])
    return segments, np.asarray(advantages, np.float32), np.asarray(trained)


def evaluate(state: LoopState, setup: Setup) -> dict[str, float]:
    """Accuracy of one response per held-out problem, with the same noise at every call.

    Args:
      state: of the run; only its parameters are read.
      setup: of the run.

    Returns:
      metrics `held_out/...`: accuracy, its number of problems, mean response length, answers that
      the judge lost.
    """
    config, task = setup.config, setup.task
    problems = task.held_out[: config.eval_problems or None]
    requests = [
        evaluation_request(
            task.prompt(problem),
            problem=index,
            sample=0,
            budget=config.response_budget,
            temperature=config.eval_temperature,
        )
        for index, problem in enumerate(problems)
    ]
    group = Group(
        requests,
        [problem.answers for problem in problems],
        [len(request.prefix) for request in requests],
    )
    watch = Stopwatch(lambda stage: setup.on_stage("evaluate"))
    [sampled], tokens = generate(state.train.params, setup, [group], watch)
    return {
        "held_out/accuracy": float(np.mean(sampled.rewards)),
        "held_out/problems": len(problems),
        "held_out/response_length": tokens / len(problems),
        "held_out/judge_lost": watch.lost_answers,
        "seconds/evaluate": sum(watch.seconds.values()),
    }


def _advance(state: LoopState, setup: Setup) -> LoopState:
    """Draws a batch: the one drawn before it moves up."""
    draw = setup.task.stream.take(state.cursor, state.batch_size)
    return dataclasses.replace(
        state,
        batch_start=state.next_start,
        batch_count=state.next_count,
        next_start=state.cursor,
        next_count=state.batch_size,
        cursor=draw.cursor,
        skipped_prompts=state.skipped_prompts + sum(draw.skipped.values()),
    )


def _problems_at(start: int, count: int, setup: Setup) -> list[Problem]:
    return setup.task.stream.take(start, count).problems


def _initial_group(problems: list[Problem], setup: Setup, batch: int) -> Group:
    prompts = [setup.task.prompt(problem) for problem in problems]
    requests = rollout.initial_requests(prompts, setup.config, batch)
    return Group(requests, [problem.answers for problem in problems], [*map(len, prompts)])


def _closing_metrics(
    state: LoopState, watch: Stopwatch, sampled_tokens: int, trained_tokens: int, survivors: int
) -> dict[str, float]:
    """Counters of the step that has just ended, and of the run so far."""
    return {
        "step": state.step,
        "tokens/sampled": sampled_tokens,
        "tokens/trained": trained_tokens,
        "tokens/sampled_total": state.sampled_tokens,
        "tokens/trained_total": state.trained_tokens,
        "problems/skipped_prompts_total": state.skipped_prompts,
        "batch/size": state.batch_size,
        "step/skipped": float(survivors == 0),
        "step/skipped_total": state.skipped_steps,
        "update/not_finite_total": int(state.train.skipped),
        "judge/unanswered": watch.judged.unanswered,
        "judge/lost": watch.lost_answers,
        "judge/lost_total": state.lost_answers,
    }
