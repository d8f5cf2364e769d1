"""Where attention points: three questions about the responses of a policy (docs/study.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from attnrl_jax.evaluation import Estimate
from attnrl_jax.sampling.sampler import Request
from attnrl_jax.tasks.graph import MODULUS, GraphProblem, GraphSource
from attnrl_jax.tasks.judging import exact_match
from experiments.folders import write_atomically
from experiments.study import bootstrap
from experiments.study.policies import BUDGET, TEST, ask
from experiments.study.reading import RULES, Read, read_responses
from experiments.tasks import Policy
from experiments.terminal import working

CONTINUATIONS = 16
# What random numbers are for; part of every seed.
_VALUES, _CORRUPTION, _PAIRS = 11, 13, 14


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
