"""Responses of a policy as the study reads them: their steps, FCI, and where each rule branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from attnrl_jax.branching.importance import mask_candidates
from attnrl_jax.branching.positions import BranchingConfig
from attnrl_jax.branching.selection import branch_positions
from attnrl_jax.branching.steps import StepRule, step_bounds
from attnrl_jax.evaluation import evaluation_request
from attnrl_jax.sampling.sampler import Response
from attnrl_jax.scoring import score
from attnrl_jax.tasks.graph import GraphProblem, GraphSource
from attnrl_jax.tasks.judging import exact_match
from experiments.study.graph_steps import GraphStep, graph_steps
from experiments.study.policies import BUDGET, TEST, ask, prompt_of
from experiments.tasks import Policy

# As in the default configuration.
BRANCHING = BranchingConfig(delta=1, min_distance=0)
RULES = ("fci", "entropy", "random")
# Prompt and response of the longest problem.
WIDTH = 256
SCORED_AT_ONCE = 64
# What random numbers are for; part of every seed.
_RANDOM_STEPS = 12


@dataclass(frozen=True)
class Read:
    """A response, its steps, and where each rule would branch.

    Attributes:
      problem: number in the test.
      graph: the problem.
      prompt, response: ids.
      right: verdict.
      starts: tokens of the response before each step, and all of its tokens at the end.
      steps: of the response; number k here is range k + 1.
      fci: of each step.
      chosen: steps (from 0) that each rule would branch at.
    """

    problem: int
    graph: GraphProblem
    prompt: Int[np.ndarray, "prompt_time"]
    response: Int[np.ndarray, "response_time"]
    right: bool
    starts: Int[np.ndarray, "cut"]
    steps: list[GraphStep]
    fci: Float[np.ndarray, "step"]
    chosen: dict[str, list[int]]


def read_responses(policy: Policy, problems: GraphSource = TEST, seed: int = 2) -> list[Read]:
    """One response at temperature 1 to each problem, scored; those of one step are left out.

    Args:
      policy: that is asked, and whose attention it is.
      problems: the test.
      seed: of the noise.
    """
    graphs = [problems.graph(k) for k in range(len(problems))]
    prompts = [prompt_of(policy, graph.text) for graph in graphs]
    requests = [
        evaluation_request(prompt, k, 0, budget=BUDGET, temperature=1.0, seed=seed)
        for k, prompt in enumerate(prompts)
    ]
    responses = [response for [response] in ask(policy, requests)]
    found: list[Read] = []
    for begin in range(0, len(graphs), SCORED_AT_ONCE):
        chunk = slice(begin, begin + SCORED_AT_ONCE)
        found += _read(policy, begin, graphs[chunk], prompts[chunk], responses[chunk])
    return [read for read in found if len(read.steps) > 1]


def _read(
    policy: Policy,
    begin: int,
    graphs: Sequence[GraphProblem],
    prompts: Sequence[np.ndarray],
    responses: Sequence[Response],
) -> list[Read]:
    rows = SCORED_AT_ONCE
    tokens = np.zeros((rows, WIDTH), np.int32)
    prompt_length, length = np.ones(rows, np.int32), np.full(rows, 2, np.int32)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        prompt_length[row] = len(prompt)
        length[row] = len(prompt) + len(response.tokens)
        tokens[row, : length[row]] = np.concatenate([prompt, response.tokens])
    rule = StepRule(policy.tokenizer.separators())
    step_ids = rule.step_ids(tokens, prompt_length, length)
    scores = score(policy.params, policy.model, tokens, length, step_ids, delta=BRANCHING.delta)
    fci, entropy = np.asarray(scores.fci), np.asarray(scores.entropy)
    chosen = {}
    for name in RULES:
        positions = branch_positions(
            replace(BRANCHING, rule=name),
            fci=np.asarray(mask_candidates(fci, BRANCHING.zero_first)),
            entropy=entropy,
            step_ids=step_ids,
            prompt_length=prompt_length,
            length=length,
            first_after_think=None,
            rng=np.random.default_rng((_RANDOM_STEPS, begin)),
        )
        at = np.minimum(prompt_length[:, None] + positions.offsets, WIDTH - 1)
        # An offset of high entropy lies within a step.
        ranges = np.take_along_axis(step_ids, at, axis=1)
        chosen[name] = [
            sorted({int(r) - 1 for r in row[valid]})
            for row, valid in zip(ranges, positions.valid, strict=True)
        ]
    starts, _ = step_bounds(step_ids, int(step_ids.max()) + 1)
    found = []
    for row, graph in enumerate(graphs):
        prompt, response = prompts[row], responses[row].tokens
        last = int(step_ids[row].max())
        cuts = np.append(starts[row, 1 : last + 1] - len(prompt), len(response))
        texts = [policy.tokenizer.decode(response[a:b]) for a, b in pairwise(cuts)]
        text = policy.tokenizer.decode(response)
        found.append(
            Read(
                problem=begin + row,
                graph=graph,
                prompt=prompt,
                response=response,
                right=exact_match(text, (graph.answer,)),
                starts=cuts,
                steps=graph_steps(graph, texts),
                fci=fci[row, 1 : last + 1],
                chosen={name: steps[row] for name, steps in chosen.items()},
            )
        )
    return found
