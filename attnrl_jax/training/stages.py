"""The stages of a training step: generate and judge, score, and the rows of the update."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from attnrl_jax.datasets.stream import ProblemStream
from attnrl_jax.evaluation import judged_text
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.packing import row_paths, take_rows
from attnrl_jax.sampling.sampler import Request, Response, sample
from attnrl_jax.scoring import start_scoring
from attnrl_jax.sharding import batch_devices, batch_sharding
from attnrl_jax.tasks.judging import Judge, JudgeCounts, Pending
from attnrl_jax.tasks.problems import Problem
from attnrl_jax.tasks.tokenizer import Tokenizer
from attnrl_jax.training import rollout
from attnrl_jax.training.state import TrainConfig
from attnrl_jax.types import Rollouts, TrainRows


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes:
      stream: training problems.
      held_out: problems that are only evaluated; their prompts fit the budget.
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

    def __post_init__(self) -> None:
        if self.reference is None and self.config.loss.kl_beta > 0:
            raise ValueError(
                f"loss.kl_beta is {self.config.loss.kl_beta}, but there is no reference policy"
            )


class Stopwatch:
    """Seconds per stage of one step, and how its answers were judged."""

    def __init__(self, on_stage: Callable[[str], None]):
        self.seconds: dict[str, float] = {}
        self.judged = JudgeCounts()
        self._on_stage = on_stage

    @property
    def lost_answers(self) -> int:
        """Answers that cost their time limit, or a worker; judged wrong."""
        return self.judged.timeouts + self.judged.failures

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._on_stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def layout(mesh: Mesh | None) -> dict[str, Any]:
    """Sharding of a batch's rows over devices, and what their number is a multiple of."""
    if mesh is None:
        return {}
    return {"sharding": batch_sharding(mesh), "row_multiple": batch_devices(mesh)}


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
    """A group with its responses, request by request, and the reward of each, in one row."""

    requests: list[Request]
    responses: list[list[Response]]
    rewards: np.ndarray


def generate(
    params: Any, setup: Setup, groups: Sequence[Group], watch: Stopwatch
) -> tuple[list[Sampled], int]:
    """One round of generation for all groups, judged while it goes on; and its tokens.

    What the stage `judge` takes is what is left to wait for when generation has ended.
    """
    task = setup.task
    requests = [request for group in groups for request in group.requests]
    answers = [golds for group in groups for golds in group.answers]
    judged_from = [begin for group in groups for begin in group.judged_from]
    asked: list[list[Pending | None]] = [[None] * request.num_samples for request in requests]

    def ask(request: int, k: int, response: Response) -> None:
        prefix, begin = requests[request].prefix, judged_from[request]
        text = judged_text(prefix[:begin], [*prefix[begin:], *response.tokens], task.tokenizer)
        asked[request][k] = task.judge.submit([(text, answers[request])])

    with watch.stage("generate"):
        samples, stats = sample(
            params, setup.model, requests, task.tokenizer.end_ids, setup.config.sampler_shapes,
            on_response=ask,
        )  # fmt: skip
    with watch.stage("judge"):
        rewards = [[_reward(pending, watch) for pending in responses] for responses in asked]
    parts, begin = [], 0
    for group in groups:
        part = slice(begin, begin + len(group.requests))
        flat = [reward for responses in rewards[part] for reward in responses]
        parts.append(Sampled(group.requests, samples[part], np.array(flat, np.float32)))
        begin = part.stop
    return parts, stats.useful_tokens


def _reward(pending: Pending | None, watch: Stopwatch) -> float:
    assert pending is not None
    verdicts = pending.result()
    watch.judged = JudgeCounts(*map(sum, zip(watch.judged, verdicts.counts, strict=True)))
    return float(verdicts.rewards[0])


def initial_batch(
    params: Any,
    setup: Setup,
    sampled: Sampled,
    version: int,
    watch: Stopwatch,
) -> Callable[[], Rollouts]:
    """Initial responses as rows, with their rewards; scored when what is returned is called."""
    config = setup.config
    width = config.prompt_budget + config.response_budget
    separators = setup.task.tokenizer.separators()
    prompts = [request.prefix for request in sampled.requests]
    rows = rollout.initial_rows(prompts, sampled.responses, separators, width, version)
    with_fci = config.branching.rule == "fci" or config.expansion.filter_easy
    rows = dataclasses.replace(rows, reward=sampled.rewards)
    return score(params, setup, rows, initial=True, with_fci=with_fci, watch=watch)


def score(
    params: Any, setup: Setup, rows: Rollouts, *, initial: bool, with_fci: bool, watch: Stopwatch
) -> Callable[[], Rollouts]:
    """Starts one forward pass over the tokens that the rows sampled themselves.

    Args:
      params: of the policy that sampled them.
      setup: of the run.
      rows: initial responses, or continuations.
      initial: which of these.
      with_fci: ask for forward context influence.
      watch: of the step.

    Returns:
      a function that waits for it and returns the rows with what it says of them.
    """
    config = setup.config
    devices = layout(setup.mesh)
    with watch.stage("score"):
        own = rollout.own_tokens(rows)
        scored = start_scoring(
            params,
            setup.model,
            rows.tokens,
            row_paths(rows, np.full(len(rows.length), initial)),
            own,
            rows.step_ids if with_fci else None,
            config.temperature,
            delta=config.branching.delta,
            batch_tokens=config.score_batch_tokens,
            pack_length=config.packed_length(devices.get("row_multiple", 1)),
            **devices,
        )

    def finish() -> Rollouts:
        with watch.stage("score"):
            scores = scored()
            logprobs = scores.logprobs if config.behaviour == "scorer" else rows.logprobs
            return dataclasses.replace(
                rows,
                logprobs=np.where(own, logprobs, rows.logprobs),
                entropy=np.where(own, scores.entropy, rows.entropy),
                fci=np.asarray(scores.fci),
            )

    return finish


def train_rows(rows: Rollouts, advantages: np.ndarray, trained: np.ndarray) -> TrainRows:
    """The rows of the update.

    Args:
      rows: all leaves of the step, initial responses first.
      advantages: `[row, time]`.
      trained: which rows are trained on.
    """
    paths = row_paths(rows, rows.root == np.arange(len(rows.root)))
    mask = rollout.response_tokens(rows)
    whole = TrainRows(
        tokens=rows.tokens,
        paths=paths,
        advantages=np.where(mask, advantages, 0.0).astype(np.float32),
        behaviour_logprobs=np.where(mask, rows.logprobs, 0.0).astype(np.float32),
    )
    return take_rows(whole, trained)
