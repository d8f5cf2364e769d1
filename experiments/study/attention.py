"""Where attention points: three questions about the responses of a policy (docs/study.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from attnrl_jax.branching.importance import mask_candidates
from attnrl_jax.branching.positions import BranchingConfig
from attnrl_jax.branching.selection import branch_positions
from attnrl_jax.branching.steps import StepRule, step_bounds
from attnrl_jax.evaluation import Estimate, evaluation_request
from attnrl_jax.sampling.sampler import Request, Response
from attnrl_jax.scoring import score
from attnrl_jax.tasks.graph import MODULUS, GraphProblem, GraphSource
from attnrl_jax.tasks.judging import exact_match
from experiments.folders import write_atomically
from experiments.study import bootstrap
from experiments.study.graph_steps import GraphStep, graph_steps
from experiments.study.policies import BUDGET, TEST, ask, prompt_of
from experiments.tasks import Policy
from experiments.terminal import working

# As in the default configuration.
BRANCHING = BranchingConfig(delta=1, min_distance=0)
RULES = ("fci", "entropy", "random")
# Prompt and response of the longest problem.
WIDTH = 256
SCORED_AT_ONCE = 64
CONTINUATIONS = 16
# What random numbers are for; part of every seed.
_VALUES, _RANDOM_STEPS, _CORRUPTION, _PAIRS = 11, 12, 13, 14


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


def what_is_picked(reads: Sequence[Read]) -> dict[str, dict[str, Estimate]]:
    """How often the step at which a rule branches is one of a kind.

    Args:
      reads: responses.

    Returns:
      by rule, and for `any` step but the first, the share of steps that a later step `used`, that
      the answer `decides` on, and that are `hasty`; intervals over responses.
    """
    kinds = ("used", "decides", "hasty")
    found: dict[str, dict[str, Estimate]] = {}
    for rule in (*RULES, "any"):
        picked = [
            range(1, len(read.steps)) if rule == "any" else read.chosen[rule] for read in reads
        ]
        counts = np.array([len(steps) for steps in picked], float)
        found[rule] = {
            kind: bootstrap.ratio(
                np.array(
                    [
                        sum(getattr(read.steps[k], kind) for k in steps)
                        for read, steps in zip(reads, picked, strict=True)
                    ],
                    float,
                ),
                counts,
            )
            for kind in kinds
        }
    return found


@dataclass(frozen=True)
class Asked:
    """A prefix of which the value is asked.

    Attributes:
      graph: the problem.
      prefix: ids of prompt and the begin of a response.
      prompt_length: ids of the prompt.
      seed: of the noise.
    """

    graph: GraphProblem
    prefix: Int[np.ndarray, "time"]
    prompt_length: int
    seed: tuple[int, ...]


def values(policy: Policy, asked: Sequence[Asked], samples: int) -> Float[np.ndarray, "prefix"]:
    """The share of a prefix's continuations that end right. A whole response is its own verdict.

    Args:
      policy: that continues.
      asked: the prefixes.
      samples: continuations of each.
    """
    found = np.zeros(len(asked))
    requests, places = [], []
    for place, one in enumerate(asked):
        left = BUDGET - (len(one.prefix) - one.prompt_length)
        if left < 1 or np.isin(one.prefix[-1], policy.tokenizer.end_ids):
            found[place] = _is_right(policy, one, np.zeros(0, np.int32))
        else:
            places.append(place)
            requests.append(Request(one.prefix, samples, left, one.seed, temperature=1.0))
    for place, responses in zip(places, ask(policy, requests), strict=True):
        found[place] = np.mean([_is_right(policy, asked[place], r.tokens) for r in responses])
    return found


def _is_right(policy: Policy, asked: Asked, continuation: np.ndarray) -> bool:
    whole = np.concatenate([asked.prefix[asked.prompt_length :], continuation])
    return exact_match(policy.tokenizer.decode(whole), (asked.graph.answer,))


def _prefix(read: Read, cut: int, seed: tuple[int, ...]) -> Asked:
    """Of a response, the steps before number `cut`."""
    prefix = np.concatenate([read.prompt, read.response[: read.starts[cut]]])
    return Asked(read.graph, prefix, len(read.prompt), seed)


@dataclass(frozen=True)
class Decided:
    """How much the value changes over each step but the first.

    Attributes:
      change: squared change of the value over step k + 1, less what sampling adds to it on
        average; may be below 0.
      fci: of the step, 0 where it is no candidate.
      chosen: as in `Read`.
    """

    change: Float[np.ndarray, "step"]
    fci: Float[np.ndarray, "step"]
    chosen: Mapping[str, Sequence[int]]


def where_it_is_decided(
    policy: Policy, reads: Sequence[Read], samples: int = CONTINUATIONS
) -> list[Decided]:
    """Values before and after every step of responses.

    The value before a step is the mean, over what may be sampled there, of the value after it. So
    the squared change is, on average, the variance of the value between siblings that branch at
    this step.

    Args:
      policy: that continues.
      reads: responses.
      samples: continuations of each prefix.
    """
    asked = [
        _prefix(read, cut, (_VALUES, read.problem, cut))
        for read in reads
        for cut in range(1, len(read.steps) + 1)
    ]
    found = values(policy, asked, samples)
    ends = np.cumsum([len(read.steps) for read in reads])
    decided = []
    for read, own in zip(reads, np.split(found, ends[:-1]), strict=True):
        # The last value is a verdict, without noise.
        noise = own * (1 - own) / (samples - 1)
        noise[-1] = 0.0
        change = np.diff(own) ** 2 - noise[1:] - noise[:-1]
        decided.append(Decided(change, read.fci[1:], read.chosen))
    return decided


def change_by_rule(decided: Sequence[Decided]) -> dict[str, dict[str, Estimate]]:
    """How far the steps that a rule picks are those where the outcome is decided.

    Args:
      decided: of responses.

    Returns:
      by rule: `change`, the mean squared change of the value over the steps it picks, over that of
      all steps of the same responses; `hits`, the share of responses in which it picks the step of
      the largest change, and `hits_expected`, the share if it had picked as many steps at random.
      Intervals over responses; those in which it picks none are left out.
    """
    found = {}
    for rule in RULES:
        own, base, hits, expected = [], [], [], []
        for one in decided:
            # Numbers of `change` begin with the second step.
            picked = [k - 1 for k in one.chosen[rule] if k > 0]
            if picked:
                own.append(one.change[picked].mean())
                base.append(one.change.mean())
                hits.append(float(one.change.argmax() in picked))
                expected.append(len(picked) / len(one.change))
        count = np.ones(len(own))
        found[rule] = {
            "change": bootstrap.ratio(np.array(own), np.array(base)),
            "hits": bootstrap.ratio(np.array(hits), count),
            "hits_expected": bootstrap.ratio(np.array(expected), count),
        }
    return found


@dataclass(frozen=True)
class Pair:
    """A step of highest FCI, and one at the same place of another response.

    Attributes:
      treated, control: the responses; both right, of the same number of steps.
      step: number of the step in both.
    """

    treated: Read
    control: Read
    step: int


def matched_pairs(reads: Sequence[Read], rng: np.random.Generator) -> list[Pair]:
    """Right responses whose step of highest FCI solves a variable, each with another right
    response of the same length whose step at that place does so too and is not its highest.

    Args:
      reads: responses.
      rng: chooses among the others.
    """
    right = [read for read in reads if read.right]
    pairs = []
    for read in right:
        step = _highest(read)
        if step is None or read.steps[step].name is None:
            continue
        others = [
            other
            for other in right
            if len(other.steps) == len(read.steps)
            and other is not read
            and other.steps[step].name is not None
            and _highest(other) != step
        ]
        if others:
            pairs.append(Pair(read, others[int(rng.integers(len(others)))], step))
    return pairs


def _highest(read: Read) -> int | None:
    """The step of highest FCI but the first; None where no step is looked at."""
    fci = read.fci[1:]
    return int(fci.argmax()) + 1 if fci.size and fci.max() > 0 else None


def corrupted(policy: Policy, read: Read, step: int, rng: np.random.Generator) -> np.ndarray | None:
    """Ids of the response up to the end of a step, with another digit as the value it finds; None
    where the step does not end in a digit.

    Args:
      policy: whose tokenizer it is.
      read: the response.
      step: number of the step.
      rng: chooses the digit.
    """
    begin, end = int(read.starts[step]), int(read.starts[step + 1])
    response = np.array(read.response[:end])
    words = [policy.tokenizer.decode(response[k : k + 1]).strip() for k in range(begin, end)]
    places = [k for k, word in enumerate(words) if word.isdigit()]
    if not places or any(words[places[-1] + 1 :]):
        return None
    old = int(words[places[-1]])
    new = (old + int(rng.integers(1, MODULUS))) % MODULUS
    [token] = policy.tokenizer.encode(str(new))
    response[begin + places[-1]] = token
    return response


def what_a_step_is_worth(
    policy: Policy, pairs: Sequence[Pair], samples: int = CONTINUATIONS
) -> dict[str, dict[str, Estimate]]:
    """How much accuracy falls when a step is corrupted, or sampled anew.

    Args:
      policy: that continues.
      pairs: of steps.
      samples: continuations of each prefix.

    Returns:
      for a step with another digit as its value, and for one that is sampled anew, the fall of
      accuracy from that of the prefix with the right step: of steps of highest FCI, of the others
      at the same place, and the difference; intervals over pairs.
    """
    asked: list[Asked] = []
    kept = 0
    for number, pair in enumerate(pairs):
        rng = np.random.default_rng((_CORRUPTION, number))
        wrong = [corrupted(policy, r, pair.step, rng) for r in (pair.treated, pair.control)]
        if any(ids is None for ids in wrong):
            continue
        kept += 1
        for read, ids in zip((pair.treated, pair.control), wrong, strict=True):
            seed = (_CORRUPTION, number, read.problem)
            asked.append(_prefix(read, pair.step + 1, (*seed, 0)))
            prefix = np.concatenate([read.prompt, ids])
            asked.append(Asked(read.graph, prefix, len(read.prompt), (*seed, 1)))
            asked.append(_prefix(read, pair.step, (*seed, 2)))
    intact, wrong_value, anew = np.moveaxis(
        values(policy, asked, samples).reshape(kept, 2, 3), 2, 0
    )
    found = {}
    for name, value in (("another digit", wrong_value), ("sampled anew", anew)):
        fall = intact - value
        found[name] = {
            "highest FCI": bootstrap.interval(fall[None, :, 0]),
            "same place": bootstrap.interval(fall[None, :, 1]),
            "difference": bootstrap.difference(fall[None, :, 0], fall[None, :, 1]),
        }
    return found


def ask_all(policy: Policy, problems: GraphSource = TEST, decided_of: int = 176) -> dict[str, Any]:
    """The three questions to one policy.

    Args:
      policy: that is asked.
      problems: whose responses are looked at.
      decided_of: responses whose every step is valued, the costly part.
    """
    reads = read_responses(policy, problems)
    pairs = matched_pairs(reads, np.random.default_rng(_PAIRS))
    return {
        "responses": len(reads),
        "right": float(np.mean([read.right for read in reads])),
        "picked": what_is_picked(reads),
        "valued": min(decided_of, len(reads)),
        "decided": change_by_rule(where_it_is_decided(policy, reads[:decided_of])),
        "pairs": len(pairs),
        "causal": what_a_step_is_worth(policy, pairs),
    }


def write(results: Path, policies: Mapping[str, Callable[[], Policy]], console: Console) -> None:
    """Asks policies that have not been asked yet, and writes `attention.json`.

    Args:
      results: folder of the outcomes.
      policies: what opens each, by name.
      console: shows which is asked.
    """
    path = results / "attention.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, opened in policies.items():
        if name not in found:
            with working(console, f"asking the policy {name}"):
                found[name] = ask_all(opened())
            results.mkdir(parents=True, exist_ok=True)
            # Estimates are written as [value, low, high].
            write_atomically(path, json.dumps(found, indent=1) + "\n")
