"""What a run consists of, and the watch over the stages of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from attnrl_jax.branching.positions import BranchRule
from attnrl_jax.branching.selection import branch_positions
from attnrl_jax.branching.steps import Segmenter, StepRule
from attnrl_jax.datasets.stream import ProblemStream
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.sharding import batch_devices, batch_sharding
from attnrl_jax.tasks.judging import Judge, JudgeCounts
from attnrl_jax.tasks.problems import Problem
from attnrl_jax.tasks.tokenizer import Tokenizer
from attnrl_jax.training.state import TrainConfig


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes:
      stream: training problems.
      held_out: problems that are only evaluated; their prompts fit the budget.
      tokenizer: of the policy.
      prompt: token ids of a problem's prompt.
      judge: (response text, golds) pairs to rewards.
      segmenter: where steps end, if not at blank lines.
    """

    stream: ProblemStream
    held_out: Sequence[Problem]
    tokenizer: Tokenizer
    prompt: Callable[[Problem], np.ndarray]
    judge: Judge
    segmenter: Segmenter | None = None

    @property
    def step_rule(self) -> StepRule:
        """How responses are cut into steps."""
        return StepRule(self.tokenizer.separators(), self.segmenter)


@dataclass(frozen=True)
class Setup:
    """What stays the same over a run: the task, the model, the settings, the devices.

    Attributes:
      task: problems and judge.
      model: shape of the policy, in the dtype of scoring, sampling and updates.
      config: of training.
      mesh: devices of scoring and updates; None for the default device.
      sampling_mesh: devices of sampling, those of `mesh` or others; None: `mesh`.
      reference: parameters of the reference policy; None where the loss has no KL penalty.
      sampling_dtype: of sampling, where it is not the model's.
      branch_rule: chooses the branch positions.
      on_stage: called with the name of each stage as it begins.
      interrupt: called again and again while a step can still be given up without loss (until its
        update begins), in the same order by all processes; it raises to end the run.
    """

    task: Task
    model: ModelConfig
    config: TrainConfig
    mesh: Mesh | None = None
    sampling_mesh: Mesh | None = None
    reference: Any = None
    sampling_dtype: str = ""
    branch_rule: BranchRule = branch_positions
    on_stage: Callable[[str], None] = lambda stage: None
    interrupt: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        if self.reference is None and self.config.loss.kl_beta > 0:
            raise ValueError(
                f"loss.kl_beta is {self.config.loss.kl_beta}, but there is no reference policy"
            )
        if self.is_split and self.config.overlap == "none":
            raise ValueError("devices that only sample (mesh.sampling_devices) need an overlap")
        if self.is_split and self.sampling_model != self.model:
            # What these devices sample they also score, with their own copy of the parameters.
            raise ValueError(
                f"devices that only sample compute in model.dtype {self.model.dtype}; "
                f"model.sampling_dtype is {self.sampling_dtype}"
            )

    @property
    def sampling_model(self) -> ModelConfig:
        """The model as sampling computes it."""
        return self.model.with_dtype(self.sampling_dtype or self.model.dtype)

    @property
    def is_split(self) -> bool:
        """Whether some devices sample while others update."""
        if self.mesh is None or self.sampling_mesh is None:
            return False
        return set(self.mesh.devices.flat).isdisjoint(self.sampling_mesh.devices.flat)


@dataclass(frozen=True)
class Mismatch:
    """How far log-probabilities of the scorer are from those of the sampler, over some tokens.

    Attributes:
      tokens: how many were compared.
      total, largest: sum and maximum of the absolute differences, nats.
    """

    tokens: int = 0
    total: float = 0.0
    largest: float = 0.0

    def plus(self, other: Mismatch) -> Mismatch:
        largest = max(self.largest, other.largest)
        return Mismatch(self.tokens + other.tokens, self.total + other.total, largest)

    @property
    def mean(self) -> float:
        return self.total / max(self.tokens, 1)


class Stopwatch:
    """When the stages of one step ran, and what was seen meanwhile.

    Attributes:
      spans: name, begin and end of every stage, seconds of `time.perf_counter`.
      judged: of all answers of the step.
      mismatch: of all tokens that were sampled and scored in it.
    """

    def __init__(self, on_stage: Callable[[str], None]):
        self.spans: list[tuple[str, float, float]] = []
        self.judged = JudgeCounts()
        self.mismatch = Mismatch()
        self._on_stage = on_stage

    @property
    def lost_answers(self) -> int:
        """Answers that cost their time limit, or a worker; judged wrong."""
        return self.judged.timeouts + self.judged.failures

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage; of two that ran at the same time both count."""
        seconds: dict[str, float] = {}
        for name, begin, end in self.spans:
            seconds[name] = seconds.get(name, 0.0) + end - begin
        return seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        end = self.begin(name, time.perf_counter())
        yield
        end(time.perf_counter())

    def begin(self, name: str, begin: float) -> Callable[[float], None]:
        """Begins a stage at a time of `time.perf_counter`; what is returned takes that of its
        end."""
        self._on_stage(name)
        return lambda end: self.spans.append((name, begin, end))

    def busy(self) -> float:
        """Seconds in which some stage ran."""
        total, until = 0.0, -math.inf
        for _, begin, end in sorted(self.spans, key=lambda span: span[1]):
            total += max(end - max(begin, until), 0.0)
            until = max(until, end)
        return total


def layout(mesh: Mesh | None) -> dict[str, Any]:
    """Sharding of a batch's rows over devices, and what their number is a multiple of."""
    if mesh is None:
        return {}
    return {"sharding": batch_sharding(mesh), "row_multiple": batch_devices(mesh)}
