"""The attention compass by hand: look at a response, branch it, see the advantages.

What a training step does to thousands of responses, for one of them and step by step; notebooks are
made of it. Everything is computed by the functions that training uses.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from attnrl_jax.branching.importance import mask_candidates
from attnrl_jax.branching.positions import BranchingConfig, BranchPositions
from attnrl_jax.branching.selection import branch_positions
from attnrl_jax.branching.steps import StepRule, end_of_thinking, step_bounds
from attnrl_jax.models.config import read_config
from attnrl_jax.models.weights import load_params
from attnrl_jax.sampling.sampler import Request, Response, SamplerConfig, sample
from attnrl_jax.scoring import score
from attnrl_jax.shapes import bucket_length
from attnrl_jax.step_attention import StepAttention, step_attention
from attnrl_jax.tasks.judging import Judge
from attnrl_jax.tasks.problems import Problem
from attnrl_jax.tasks.tokenizer import load_tokenizer
from attnrl_jax.training.leaves import continuation_leaves, initial_leaves, join_leaves, lay_out
from attnrl_jax.training.loop import StepReport
from attnrl_jax.training.rollout import tree_advantages
from attnrl_jax.training.state import TrainConfig
from experiments.tasks import Policy, shipped_policy
from experiments.trees import is_right, recorded_problems

# Sequences are padded to multiples of it, so that few programs are compiled.
MULTIPLE = 128


@dataclass(frozen=True, repr=False)
class Look:
    """One response as the compass sees it. In a notebook it shows itself.

    Attributes:
      policy: that was asked.
      prompt, response: ids.
      step_ids: range of each token of both; 0 is the prompt, 1..S are the steps.
      texts: of every range.
      logprobs, entropy: of each token of both, nats; 0 for the first.
      attention: between the ranges.
      positions: where the response would branch.
    """

    policy: Policy
    prompt: Int[np.ndarray, "prompt_time"]
    response: Int[np.ndarray, "response_time"]
    step_ids: Int[np.ndarray, "time"]
    texts: list[str]
    logprobs: Float[np.ndarray, "time"]
    entropy: Float[np.ndarray, "time"]
    attention: StepAttention
    positions: BranchPositions

    @property
    def branch_steps(self) -> list[int]:
        """Ranges at whose start the response would branch."""
        return [int(step) for step in self.positions.steps[0][self.positions.valid[0]]]

    def offset(self, step: int) -> int:
        """Tokens of the response before a step.

        Raises:
          ValueError: there is no such step, or nothing before it.
        """
        if not 2 <= step < len(self.texts):
            raise ValueError(f"a branch starts at a step from 2 to {len(self.texts) - 1}: {step}")
        return int(np.searchsorted(self.step_ids, step)) - len(self.prompt)

    def __repr__(self) -> str:
        return f"Look: {len(self.texts) - 1} steps, branches at {self.branch_steps}"

    def _repr_html_(self) -> str:
        """The text, each step with its FCI as a bar; a mark where it would branch."""
        fci = self.attention.fci
        highest = max(float(fci[1:].max(initial=0.0)), 1e-9)
        rows = []
        for step, text in enumerate(self.texts):
            shown = html.escape(text.strip()).replace("\n", "<br>")
            mark = "&#9670; branch" if step in self.branch_steps else ""
            bar, value = "", ""
            if step > 0:
                value = f"{fci[step]:.3f}"
                bar = (
                    f'<div style="width:{100 * fci[step] / highest:.0f}px;height:0.8em;'
                    'background:#3b6ea5"></div>'
                )
            name = "prompt" if step == 0 else step
            cells = (f"{name}", shown, bar, value, mark)
            rows.append("<tr>" + "".join(f"<td style='text-align:left'>{c}</td>" for c in cells))
        head = "".join(f"<th>{name}</th>" for name in ("step", "text", "FCI", "", ""))
        return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def open_policy(folder: str | Path | None = None, dtype: str = "float32") -> Policy:
    """A Hugging Face folder, by default the small policy that comes with the project.

    Raises:
      ModelError, ValueError: the folder cannot be used.
    """
    folder = shipped_policy() if folder is None else Path(folder)
    model = read_config(folder, dtype)
    params = load_params(folder, model)
    return Policy(folder, model, params, load_tokenizer(folder, model.vocab_size))


def respond(
    policy: Policy,
    prompt: Int[np.ndarray, "prompt_time"],
    num_samples: int,
    *,
    budget: int = 160,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Response]:
    """Responses to a prompt, or continuations of a prompt with the begin of a response.

    Args:
      policy: that is asked.
      prompt: ids.
      num_samples: how many.
      budget: tokens of a response, at most.
      temperature: 0 is greedy.
      seed: the same seed gives the same responses.
    """
    request = Request(np.asarray(prompt), num_samples, budget, seed, temperature)
    room = bucket_length(len(prompt) + budget, MULTIPLE)
    config = SamplerConfig(slots=8, cache_length=room)
    [responses], _ = sample(
        policy.params, policy.model, [request], policy.tokenizer.end_ids, config
    )
    return responses


def look(
    policy: Policy,
    prompt: Int[np.ndarray, "prompt_time"],
    response: Int[np.ndarray, "response_time"],
    branching: BranchingConfig | None = None,
) -> Look:
    """Scores a response: log-probabilities, entropy, attention between its steps, FCI, and where it
    would branch.

    Args:
      policy: that is asked.
      prompt, response: ids.
      branching: settings; by default those of short responses (delta 1, no least distance).

    Raises:
      ValueError: the response is empty, or too long for the model.
    """
    branching = branching or BranchingConfig(delta=1, min_distance=0)
    if len(response) == 0:
        raise ValueError("there is no response to look at")
    tokens = np.concatenate([prompt, response]).astype(np.int32)
    if len(tokens) > policy.model.max_length:
        raise ValueError(
            f"{len(tokens)} tokens are more than the model's {policy.model.max_length} positions"
        )
    behind = bucket_length(len(tokens), MULTIPLE) - len(tokens)
    padded = np.pad(tokens, (0, behind))[None]
    lengths = np.array([len(prompt)]), np.array([len(tokens)])
    rule = StepRule(policy.tokenizer.separators())
    step_ids = rule.step_ids(padded, *lengths)
    scores = score(policy.params, policy.model, padded, lengths[1], step_ids, delta=branching.delta)
    kept = step_ids[0, : len(tokens)]
    attention = step_attention(
        policy.params, policy.model, tokens, kept, delta=branching.delta, length_multiple=MULTIPLE
    )
    after_think = np.asarray(end_of_thinking(padded, step_ids, rule.separators))
    refused = None if branching.after_think else after_think
    entropy = np.asarray(scores.entropy)
    positions = branch_positions(
        branching,
        fci=np.asarray(mask_candidates(np.asarray(scores.fci), branching.zero_first, refused)),
        entropy=entropy,
        step_ids=step_ids,
        prompt_length=lengths[0],
        length=lengths[1],
        first_after_think=after_think,
        rng=np.random.default_rng(0),
    )
    starts, ends = step_bounds(kept, int(kept.max()) + 1)
    texts = [policy.tokenizer.decode(tokens[a:b]) for a, b in zip(starts, ends, strict=True)]
    return Look(
        policy, np.asarray(prompt), np.asarray(response), kept, texts,
        np.asarray(scores.logprobs)[0, : len(tokens)], entropy[0, : len(tokens)], attention,
        positions,
    )  # fmt: skip


def continue_from(
    seen: Look, step: int, num_samples: int, *, budget: int = 160, seed: int = 0, **sampling: Any
) -> list[Response]:
    """Continuations of a response from the begin of a step.

    Args:
      seen: the response.
      step: range that is sampled anew, 2 or more.
      num_samples: how many.
      budget: tokens of the whole response, at most.
      seed: the same seed gives the same continuations.
      **sampling: as in `respond`.
    """
    offset = seen.offset(step)
    prefix = np.concatenate([seen.prompt, seen.response[:offset]])
    return respond(seen.policy, prefix, num_samples, budget=budget - offset, seed=seed, **sampling)


def tree_by_hand(
    problem: Problem,
    seen: Look,
    others: Sequence[Response],
    branches: Mapping[int, Sequence[Response]],
    judge: Judge,
) -> dict[str, Any]:
    """The tree of a problem with rewards, values and advantages, as a run records it.

    Args:
      problem: whose answers count.
      seen: an initial response.
      others: further initial responses, which do not branch.
      branches: continuations of `seen`, by the step at which they begin.
      judge: of the answers.

    Returns:
      as `experiments.trees.recorded_problems`; `experiments.reporting.draw_tree` draws it.
    """
    tokenizer = seen.policy.tokenizer
    own = Response(
        seen.response, seen.logprobs[len(seen.prompt) :],
        bool(np.isin(seen.response[-1], tokenizer.end_ids)),
    )  # fmt: skip
    leaves = initial_leaves([seen.prompt], [[own, *others]], 0)
    ranges = len(seen.attention.fci)
    nothing = np.zeros(0, np.float32)
    leaves = dataclasses.replace(
        leaves,
        fci=[seen.attention.fci, *[nothing] * len(others)],
        num_ranges=np.array([ranges, *[0] * len(others)], np.int32),
    )
    if branches:
        at = [(0, seen.offset(step)) for step in branches]
        leaves = join_leaves(leaves, continuation_leaves(leaves, at, [*branches.values()], 0))
    # Of which the tree knows nothing.
    unknown = [np.zeros(len(tokens), np.float32) for tokens in leaves.tokens]
    leaves = dataclasses.replace(leaves, entropy=unknown)
    longest = int(leaves.length.max())
    config = TrainConfig(
        prompt_budget=len(seen.prompt), response_budget=longest,
        branching=BranchingConfig(num_positions=max(len(branches), 1)),
    )  # fmt: skip
    rule = StepRule(tokenizer.separators())
    every = np.arange(len(leaves.length))
    rows = lay_out(leaves, every, longest, rule)
    texts = [
        tokenizer.decode(row[prompt:end])
        for row, prompt, end in zip(rows.tokens, rows.prompt_length, rows.length, strict=True)
    ]
    rewards = judge.judge_many([(text, problem.answers) for text in texts]).rewards
    leaves = dataclasses.replace(leaves, reward=rewards)
    segments, advantages, trained = tree_advantages(leaves, np.zeros(1, bool), config)
    report = StepReport(
        {"step": 0}, leaves, segments, advantages, [problem], trained, [], [],
        lambda chosen: lay_out(leaves, chosen, longest, rule),
    )  # fmt: skip
    return recorded_problems(report, tokenizer, 1)[0]


def advantage_table(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Segments of every path of a recorded tree, for a table: row, tokens, V, L, advantage."""
    return [
        {
            "leaf": leaf["row"],
            "right": is_right(leaf),
            "tokens": f"{segment['start']}-{segment['end']}",
            "V": round(segment["value"], 3),
            "L": segment["leaves"],
            "advantage": round(segment["advantage"], 3),
        }
        for leaf in tree["leaves"]
        for segment in leaf["segments"]
    ]
