"""A task small enough for tests: a golden model, bytes as tokens, a reward that varies."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from attnrl_jax.algorithms.losses import LossConfig
from attnrl_jax.branching.positions import BranchingConfig
from attnrl_jax.datasets.stream import ProblemStream
from attnrl_jax.sampling.sampler import SamplerConfig
from attnrl_jax.tasks.judging import JudgeCounts, Verdicts
from attnrl_jax.tasks.problems import Problem
from attnrl_jax.tasks.tokenizer import Tokenizer
from attnrl_jax.training.loop import StepReport, start, train_steps
from attnrl_jax.training.setup import Setup, Task
from attnrl_jax.training.state import LoopState, OptimizerConfig, TrainConfig, init_state
from tests.conftest import GoldenModel


class _Decided(NamedTuple):
    verdicts: Verdicts

    def result(self) -> Verdicts:
        return self.verdicts


class ChecksumJudge:
    """Rewards responses whose checksum is even: about half of what a random model writes."""

    def judge_many(self, items) -> Verdicts:
        rewards = [1.0 - zlib.crc32(text.encode()) % 2 for text, _ in items]
        return Verdicts(np.array(rewards, np.float32), JudgeCounts(exact=len(items)))

    def submit(self, items):
        return _Decided(self.judge_many(items))

    def close(self) -> None:
        pass


class ConstantJudge(ChecksumJudge):
    """Every response is wrong, so that no problem tells one from another."""

    def judge_many(self, items) -> Verdicts:
        return Verdicts(np.zeros(len(items), np.float32), JudgeCounts(exact=len(items)))


def tiny_config(**changes: Any) -> TrainConfig:
    """Settings that share all compiled shapes."""
    values: dict[str, Any] = {
        "steps": 4,
        "num_problems": 4,
        "num_responses": 3,
        "prompt_budget": 8,
        "response_budget": 24,
        "mini_batch_rows": 20,
        # One sequence a batch: one shape of each program.
        "pack_length": 128,
        "micro_batch_tokens": 128,
        "score_batch_tokens": 128,
        "length_multiple": 32,
        "branching": BranchingConfig(delta=1, min_distance=0),
        "loss": LossConfig(kl_beta=0.0),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "sampler": SamplerConfig(slots=16, chunk=16, prefill_rows=8, length_bucket=32),
    }
    return TrainConfig(**(values | changes))


def tiny_setup(
    golden: GoldenModel, reward: Any = None, reference: Any = None, **changes: Any
) -> Setup:
    tokenizer = Tokenizer(None, golden.config.vocab_size, (2,))
    problems = [Problem(f"p{i}", f"q{i:03d}", ("1",)) for i in range(50)]
    task = Task(
        stream=ProblemStream(problems, seed=1),
        held_out=problems[:6],
        tokenizer=tokenizer,
        prompt=lambda problem: tokenizer.encode(problem.text),
        judge=reward or ChecksumJudge(),
    )
    return Setup(task, golden.config, tiny_config(**changes), reference=reference)


def fresh_state(golden: GoldenModel, setup: Setup) -> LoopState:
    params = jax.tree.map(lambda x: x.copy(), golden.params)
    return start(setup, init_state(params, setup.config.optimizer, setup.mesh))


def run_steps(state: LoopState, setup: Setup) -> tuple[LoopState, list[StepReport], list[Any]]:
    """Runs to the end; returns the last state, every report and the parameters after each step."""
    reports, params = [], []
    for next_state, report in train_steps(state, setup):
        state = next_state
        reports.append(report)
        params.append(jax.tree.map(np.array, state.train.params))
    return state, reports, params
