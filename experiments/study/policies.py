"""Policies of the study's runs, asked the problems that no run has seen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from attnrl_jax.evaluation import evaluation_request
from attnrl_jax.sampling.sampler import Request, Response, SamplerConfig, sample
from attnrl_jax.tasks.graph import GraphSource, GraphTaskConfig
from attnrl_jax.tasks.judging import exact_match
from attnrl_jax.tasks.prompts import PromptConfig, build_prompt
from attnrl_jax.training.checkpoint import Checkpointer
from experiments.compass import open_policy
from experiments.export import parameter_shapes
from experiments.tasks import Policy

# Of every response, as in training.
BUDGET = 160
SAMPLER = SamplerConfig(slots=96, cache_length=256)
# Held-out problems that no run evaluates while it trains (those have seed 0): 48 of each of 11
# difficulties.
TEST = GraphSource(GraphTaskConfig(), "held_out", seed=1, size=528)
SAMPLES = 8


@dataclass(frozen=True)
class Answers:
    """What a policy answers right.

    Attributes:
      greedy: whether the greedy response to each problem is right.
      sampled: how many of `SAMPLES` responses at temperature 1 are.
      response_length: mean tokens of these.
    """

    greedy: Int[np.ndarray, "problem"]
    sampled: Int[np.ndarray, "problem"]
    response_length: float


def policy_of(folder: Path) -> Policy:
    """The newest policy of a run that started from the shipped one.

    Raises:
      ValueError: there is no checkpoint.
    """
    policy = open_policy()
    with closing(Checkpointer(folder / "checkpoints", read_only=True)) as checkpointer:
        step = checkpointer.latest_step()
        if step is None:
            raise ValueError(f"{folder} has no checkpoint")
        params = checkpointer.restore_params(step, parameter_shapes(policy.model))
    return policy._replace(params=params)


def prompt_of(policy: Policy, text: str) -> np.ndarray:
    """Ids of a problem's prompt, as the default run builds it."""
    return build_prompt(text, policy.tokenizer, PromptConfig(instruction=""))


def ask(policy: Policy, requests: Sequence[Request]) -> list[list[Response]]:
    """The responses of each request."""
    responses, _ = sample(policy.params, policy.model, requests, policy.tokenizer.end_ids, SAMPLER)
    return responses


def answers_of(policy: Policy, problems: GraphSource = TEST, samples: int = SAMPLES) -> Answers:
    """Asks all problems. Every policy is given the same noise.

    Args:
      policy: that is asked.
      problems: the test.
      samples: responses to each besides the greedy one.
    """
    prompts = [prompt_of(policy, problems[k].text) for k in range(len(problems))]
    places = [(k, number) for k in range(len(problems)) for number in range(-1, samples)]
    requests = [
        evaluation_request(
            prompts[k], k, max(number, 0), budget=BUDGET, temperature=float(number >= 0), seed=1
        )
        for k, number in places
    ]
    greedy = np.zeros(len(problems), np.int32)
    sampled = np.zeros(len(problems), np.int32)
    tokens = 0
    for (k, number), [response] in zip(places, ask(policy, requests), strict=True):
        right = exact_match(policy.tokenizer.decode(response.tokens), problems[k].answers)
        if number < 0:
            greedy[k] = right
        else:
            sampled[k] += right
            tokens += len(response.tokens)
    return Answers(greedy, sampled, tokens / (samples * len(problems)))
