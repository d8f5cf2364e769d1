"""The stages of a training step: generate and judge, score, and the rows of the update."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from attnrl_jax.datasets.stream import ProblemStream
from attnrl_jax.evaluation import judged_text
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.sampling.sampler import Request, Response, sample
from attnrl_jax.scoring import score_rows
from attnrl_jax.sharding import batch_devices, batch_sharding
from attnrl_jax.tasks.judging import Judge, JudgeCounts, Pending
from attnrl_jax.tasks.problems import Problem
from attnrl_jax.tasks.tokenizer import Tokenizer
from attnrl_jax.training import rollout
from attnrl_jax.training.state import TrainConfig
from attnrl_jax.types import Rollouts, Scores, TrainRows


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
            params, setup.model, requests, task.tokenizer.end_ids, setup.config.sampler,
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
) -> Rollouts:
    """Initial responses as rows, scored, with their rewards."""
    config = setup.config
    width = config.prompt_budget + config.response_budget
    separators = setup.task.tokenizer.separators()
    prompts = [request.prefix for request in sampled.requests]
    rows = rollout.initial_rows(prompts, sampled.responses, separators, width, version)
    with_fci = config.branching.rule == "fci" or config.expansion.filter_easy
    rows = score(params, setup, rows, with_fci=with_fci, watch=watch)
    return dataclasses.replace(rows, reward=sampled.rewards)


def _scores(params: Any, setup: Setup, rows: Rollouts, with_fci: bool) -> Scores:
    config = setup.config
    return score_rows(
        params,
        setup.model,
        rows.tokens,
        rows.length,
        rows.step_ids,
        config.temperature,
        delta=config.branching.delta,
        with_fci=with_fci,
        batch_rows=config.score_batch_rows,
        length_multiple=config.length_multiple,
        **layout(setup.mesh),
    )


def score(
    params: Any, setup: Setup, rows: Rollouts, *, with_fci: bool, watch: Stopwatch
) -> Rollouts:
    """Fills in what one forward pass says of the tokens that the rows sampled themselves."""
    with watch.stage("score"):
        scores = _scores(params, setup, rows, with_fci)
        own = rollout.own_tokens(rows)
        logprobs = scores.logprobs if setup.config.behaviour == "scorer" else rows.logprobs
        return dataclasses.replace(
            rows,
            logprobs=np.where(own, logprobs, rows.logprobs),
            entropy=np.where(own, scores.entropy, rows.entropy),
            fci=np.asarray(scores.fci),
        )


def train_rows(
    setup: Setup, rows: Rollouts, advantages: np.ndarray, trained: np.ndarray
) -> TrainRows:
    """The rows of the update, with the reference policy's log-probabilities if they count."""
    kept = jax.tree.map(lambda x: x[trained], rows)
    mask = rollout.response_tokens(kept)
    reference = np.zeros_like(kept.logprobs)
    if setup.config.loss.kl_beta > 0:
        reference = np.asarray(_scores(setup.reference, setup, kept, with_fci=False).logprobs)
    return TrainRows(
        tokens=kept.tokens,
        length=kept.length,
        mask=mask.astype(np.float32),
        advantages=np.where(mask, advantages[trained], 0.0).astype(np.float32),
        behaviour_logprobs=np.where(mask, kept.logprobs, 0.0).astype(np.float32),
        reference_logprobs=np.where(mask, reference, 0.0).astype(np.float32),
    )
