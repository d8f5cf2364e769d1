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

Some of that generation can go on beside the update, on devices of its own (`overlap`):

    initial   the initial responses of b_{t+1}. No token is older than above.
    all       the continuations of b_{t+1} and the initial responses of b_{t+2}: those of b_t were
              sampled in the step before. Everything is one step older than above.

The on-policy schedule draws b_t, and samples its initial responses and then its continuations,
all with θ_{t-1}: two rounds of generation per step.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from attnrl_jax import processes
from attnrl_jax.algorithms.adaptive import CumulativeMean, next_batch_size
from attnrl_jax.branching.tree import PathSegments
from attnrl_jax.evaluation import evaluation_request
from attnrl_jax.tasks.problems import Problem
from attnrl_jax.training import rollout
from attnrl_jax.training.beside import PartByPart
from attnrl_jax.training.leaves import join_leaves, lay_out
from attnrl_jax.training.metrics import sampling_metrics
from attnrl_jax.training.rollout import Advantages, train_rows, tree_advantages
from attnrl_jax.training.rounds import Branching, Group, generate, policy_of, start_round
from attnrl_jax.training.setup import Setup, Stopwatch, layout
from attnrl_jax.training.state import LoopState, TrainConfig, TrainState
from attnrl_jax.training.step import UpdateReport, launch_update
from attnrl_jax.types import Leaves, Rollouts

# What processes must have in common to build the same trees and to pack the same sequences.
AGREED = ("prompt_length", "length", "problem", "root", "split", "ended", "reward", "num_ranges")


@dataclass(frozen=True)
class StepReport:
    """What a training step did.

    Attributes:
      metrics: name to number; names and units are in `docs/metrics.md`.
      leaves: of the step's trees, with rewards.
      segments: their paths and values.
      leaf_advantages: of `leaves`, before filtering.
      problems: of the step's batch.
      trained: which rows were trained on.
      not_finite: rows of each optimizer update that was skipped, because loss or gradient
        was not finite.
      spans: name, begin and end of every stage, in seconds of one clock.
      lay_out: makes `[row, time]` arrays of some rows.
    """

    metrics: dict[str, float]
    leaves: Leaves
    segments: PathSegments
    leaf_advantages: Advantages
    problems: list[Problem]
    trained: np.ndarray
    not_finite: list[np.ndarray]
    spans: list[tuple[str, float, float]]
    lay_out: Callable[[np.ndarray], Rollouts]

    @functools.cached_property
    def rows(self) -> Rollouts:
        """All leaves, laid out; as large as they are many."""
        return self.lay_out(np.arange(len(self.leaves.length)))

    @functools.cached_property
    def advantages(self) -> np.ndarray:
        """Of every token of `rows`."""
        every = np.arange(len(self.leaves.length))
        return self.leaf_advantages.lay_out(self.leaves, every, self.rows.tokens.shape[1])


class NotFiniteError(RuntimeError):
    """So many updates in a row were skipped, as something was not finite, that a run must end."""


def start(setup: Setup, train: TrainState) -> LoopState:
    """State before the first step: warm-up of the pipeline with θ_0."""
    state = LoopState(
        train=train, step=0, batch=None, continued=None, following=None, batch_start=0,
        batch_count=0, next_start=0, next_count=0, cursor=0,
        batch_size=setup.config.num_problems, surviving_rows=0, easy_mean=0.0, easy_count=0,
        sampled_tokens=0, trained_tokens=0, skipped_steps=0, skipped_prompts=0, lost_answers=0,
    )  # fmt: skip
    if setup.config.schedule == "on_policy":
        return state
    watch = Stopwatch(setup.on_stage)
    state = _advance(_advance(state, setup), setup)
    policy = policy_of(state.train.params, setup, 0)
    first = _problems_at(state.batch_start, state.batch_count, setup)
    initial = _initial_group(first, setup, 1)
    warm_up = start_round(policy, setup, None, initial, watch, setup.interrupt)
    batch, tokens = warm_up.initial(), warm_up.tokens
    # A signal to all processes of a job may have cost verdicts of other judges' workers.
    setup.interrupt()
    continued = following = None
    if setup.config.overlap == "all":
        assert batch is not None
        plan, _ = _plan(batch, setup, state.easy, _branch_noise(setup.config, 1))
        second = _initial_group(_problems_at(state.next_start, state.next_count, setup), setup, 2)
        branching = Branching(batch, plan, first, 1)
        ahead = start_round(policy, setup, branching, second, watch, setup.interrupt)
        continued, following = ahead.continuations(), ahead.initial()
        tokens += ahead.tokens
        setup.interrupt()
    return dataclasses.replace(
        state, batch=batch, continued=continued, following=following, sampled_tokens=tokens,
        lost_answers=watch.lost_answers,
    )  # fmt: skip


def finished(state: LoopState, config: TrainConfig) -> bool:
    """Whether the run has its steps, or has sampled its tokens."""
    spent = 0 < config.max_sampled_tokens <= state.sampled_tokens
    return state.step >= config.steps or spent


def train_steps(state: LoopState, setup: Setup) -> Iterator[tuple[LoopState, StepReport]]:
    """Runs until the run is `finished`; yields after every step.

    The state that was passed in, or yielded before, must not be used any more once the next step's
    update has begun: its buffers are given to it.

    Raises:
      NotFiniteError: after a step that ended with `max_not_finite` skipped updates in a row, or of
        whose responses none has log-probabilities that are finite.
    """
    while not finished(state, setup.config):
        state, report = train_step(state, setup)
        yield state, report
        if setup.config.max_not_finite and report.metrics["train/not_finite"] == 1:
            raise NotFiniteError(
                f"no response of step {state.step} has log-probabilities that are finite: the "
                "parameters are of no use any more (a lower optimizer.learning_rate may keep them)"
            )
        in_a_row = int(state.train.skipped_in_a_row)
        if 0 < setup.config.max_not_finite <= in_a_row:
            raise NotFiniteError(
                f"the last {in_a_row} updates, up to step {state.step}, were skipped, since loss "
                "or gradient was not finite (max_not_finite is "
                f"{setup.config.max_not_finite})"
            )


def train_step(state: LoopState, setup: Setup) -> tuple[LoopState, StepReport]:
    """One step of the loop above. The state's buffers are intact until the update begins."""
    config, step = setup.config, state.step + 1
    watch = Stopwatch(setup.on_stage)
    begin = time.perf_counter()
    sampled_tokens = 0
    with watch.stage("reshard"):
        policy = policy_of(state.train.params, setup, state.step)
    if state.step > 0 and state.surviving_rows > 0:
        size = next_batch_size(
            state.batch_size,
            config.num_problems,
            config.rows_per_problem,
            state.surviving_rows,
            config.batch_size,
        )
        state = dataclasses.replace(state, batch_size=size)

    # The step's problems and their initial responses, which on-policy are sampled at once.
    if config.schedule == "on_policy":
        state = _advance(state, setup)
        problems = _problems_at(state.next_start, state.next_count, setup)
        responses = _initial_group(problems, setup, step)
        first = start_round(policy, setup, None, responses, watch, setup.interrupt)
        initial, sampled_tokens = first.initial(), first.tokens
        upcoming, next_group = [], None
    else:
        problems = _problems_at(state.batch_start, state.batch_count, setup)
        initial = state.batch
        state = _advance(state, setup)
        upcoming = _problems_at(state.batch_start, state.batch_count, setup)
        next_group = _initial_group(upcoming, setup, step + 1)
    assert initial is not None
    with watch.stage("branch"):
        rng = _branch_noise(config, step)
        plan, easy_mean = _plan(initial, setup, state.easy, rng)
    state = dataclasses.replace(state, easy_mean=easy_mean.mean, easy_count=easy_mean.count)

    # What the trees need; without an overlap the initial responses of the next step too, which
    # the devices score while the host builds the trees.
    continued, ahead = state.continued, None
    if config.overlap != "all":
        group = next_group if config.overlap == "none" else None
        branching = Branching(initial, plan, problems, step)
        ahead = start_round(policy, setup, branching, group, watch, setup.interrupt)
        continued = ahead.continuations()
        sampled_tokens += ahead.tokens
    leaves = initial if continued is None else join_leaves(initial, continued)
    with watch.stage("tree"):
        segments, advantages, trained = tree_advantages(leaves, plan.dropped, config)
        if config.permute_advantages and trained.any():
            advantages = rollout.permute_across_problems(advantages, leaves.problem, trained, rng)
    decided = [getattr(leaves, name) for name in AGREED]
    processes.check_agreement(f"the rows of step {step}", (decided, advantages.value, trained))
    if config.overlap == "none" and ahead is not None:
        ahead.initial()

    # What is sampled ahead is chosen before the update begins: processes that exchange something
    # must meet for it in one order.
    branched, group = None, next_group
    if config.overlap == "all":
        assert state.following is not None
        later, _ = _plan(state.following, setup, easy_mean, _branch_noise(config, step + 1))
        branched = Branching(state.following, later, upcoming, step + 1)
        after = _problems_at(state.next_start, state.next_count, setup)
        group = _initial_group(after, setup, step + 2)

    # Update; beside it, with an overlap, what is sampled ahead. There is no way back from here.
    setup.interrupt()
    metrics = sampling_metrics(leaves, plan, trained, advantages, state.step)
    parts = _update(state.train, setup, leaves, advantages, trained, step)
    pending = PartByPart(parts, setup.mesh, watch, "update")
    elsewhere = policy.on_sampling_devices() if setup.is_split else policy
    # Without an overlap the update has the memory of the copy that sampled.
    del policy
    if config.overlap == "none":
        del elsewhere
    else:
        meanwhile = pending.advance if setup.is_split else None
        ahead = start_round(elsewhere, setup, branched, group, watch, meanwhile)
        sampled_tokens += ahead.tokens
    train, update_report = pending.result()
    trained_tokens = int((leaves.length - leaves.prompt_length)[trained].sum())
    assert ahead is not None
    if config.overlap == "all":
        batch, continued, following = state.following, ahead.continuations(), ahead.initial()
    else:
        batch, continued, following = ahead.initial(), None, None

    survivors = int(trained.sum())
    state = dataclasses.replace(
        state,
        train=train,
        step=step,
        batch=batch,
        continued=continued,
        following=following,
        surviving_rows=survivors,
        sampled_tokens=state.sampled_tokens + sampled_tokens,
        trained_tokens=state.trained_tokens + trained_tokens,
        skipped_steps=state.skipped_steps + (survivors == 0),
        lost_answers=state.lost_answers + watch.lost_answers,
    )
    losses = update_report()
    metrics |= {f"update/{name}": value for name, value in losses.metrics.items()}
    metrics |= _closing_metrics(state, watch, sampled_tokens, trained_tokens, survivors)
    total = time.perf_counter() - begin
    overlapped = sum(watch.seconds.values()) - watch.busy()
    closing = {"overlapped": overlapped, "other": total - watch.busy(), "step": total}
    metrics |= {f"seconds/{k}": value for k, value in (watch.seconds | closing).items()}
    report = StepReport(
        metrics, leaves, segments, advantages, problems, trained,
        [np.flatnonzero(trained)[rows] for rows in losses.not_finite], watch.spans,
        lambda rows: lay_out(leaves, rows, config.width, setup.task.step_rule),
    )  # fmt: skip
    return state, report


def _plan(
    initial: Leaves, setup: Setup, easy: CumulativeMean, rng: np.random.Generator
) -> tuple[rollout.BranchPlan, CumulativeMean]:
    rule = setup.task.step_rule
    return rollout.plan_branches(initial, setup.config, rule, easy, rng, setup.branch_rule)


def _branch_noise(config: TrainConfig, step: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, rollout.BRANCHES, step])


def _update(
    train: TrainState,
    setup: Setup,
    leaves: Leaves,
    advantages: Advantages,
    trained: np.ndarray,
    step: int,
) -> Generator[jax.Array, None, tuple[TrainState, Callable[[], UpdateReport]]]:
    """`launch_update` of the rows that are trained on."""
    if not trained.any():
        return train, UpdateReport
    noise = np.random.default_rng([setup.config.seed, rollout.UPDATE, step])
    corrected = setup.config.importance_cap > 0
    rows = train_rows(leaves, advantages, trained, setup.config.width, corrected)
    launched = yield from launch_update(
        train, setup.model, setup.config, rows, noise, setup.reference, **layout(setup.mesh)
    )
    return launched


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
    policy = policy_of(state.train.params, setup, state.step)
    [sampled], tokens = generate(policy, setup, [group], watch, setup.interrupt)
    rewards = sampled.rewards()
    setup.interrupt()
    return {
        "held_out/accuracy": float(np.mean(rewards)),
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
        "update/not_finite_in_a_row": int(state.train.skipped_in_a_row),
        "sampler/mismatch_mean": watch.mismatch.mean,
        "sampler/mismatch_max": watch.mismatch.largest,
        "judge/unanswered": watch.judged.unanswered,
        "judge/lost": watch.lost_answers,
        "judge/lost_total": state.lost_answers,
    }
