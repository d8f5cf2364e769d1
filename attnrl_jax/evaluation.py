"""Evaluation: what the sampler is asked for, and the numbers made of what it answers.

With n samples of each problem: avg@n is the mean accuracy of a sample, pass@k the chance that at
least one of k samples is right, maj@n the verdict on the answer that most of the n samples give.
Each is a mean over problems, with a bootstrap interval over problems: another set of problems of
the same kind is what the interval allows for, not other samples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from attnrl_jax.sampling.sampler import Request
from attnrl_jax.tasks.answers import equality_keys
from attnrl_jax.tasks.prompts import opened_reasoning
from attnrl_jax.tasks.tokenizer import Tokenizer

# What evaluation's random numbers are for; part of every seed, as the others are that
# `attnrl_jax.training.rollout` numbers from 0.
EVALUATION = 4

RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 500


def evaluation_request(
    prompt: np.ndarray,
    problem: int,
    sample: int,
    *,
    budget: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Request:
    """One sample of one problem, on its own: its noise depends on (seed, problem, sample) alone.

    Args:
      prompt: ids of the problem's prompt; `[time]`.
      problem: its number in the benchmark.
      sample: its number among the problem's samples.
      budget: most tokens of the response, end token included.
      temperature, top_p, top_k: of sampling; temperature 0 is greedy.
      seed: 0 draws what the training loop draws for its held-out problems.
    """
    return Request(
        prefix=prompt,
        num_samples=1,
        first_sample=sample,
        budget=budget,
        seed=(EVALUATION, problem) if seed == 0 else (EVALUATION, problem, seed),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )


def judged_text(prompt: np.ndarray, response: Iterable[int], tokenizer: Tokenizer) -> str:
    """What the judge reads of a response: its text, after the `<think>` that its prompt opens."""
    return opened_reasoning(prompt, tokenizer) + tokenizer.decode(response)


@dataclass(frozen=True)
class Answered:
    """A judged response.

    Attributes:
      benchmark: it belongs to.
      problem: number of the problem in the benchmark, from 0.
      id: the problem's own name.
      sample: number of the sample.
      text: of the response.
      tokens: of the response, end token included.
      ended: whether it closed with an end token (False: cut at its budget).
      answer: final answer, None without one.
      right: verdict; False where the judge lost the answer.
      lost: whether the judge lost it to a time limit or a crash.
      elapsed: wall seconds since the response finished before it, or since generation began.
    """

    benchmark: str
    problem: int
    id: str
    sample: int
    text: str
    tokens: int
    ended: bool
    answer: str | None
    right: bool
    lost: bool
    elapsed: float


def pass_at_k(right: Int[np.ndarray, "problem"], samples: int, k: int) -> np.ndarray:
    """Unbiased estimate of the chance that one of k samples is right: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), equation 1, as the product of 1 - k / i over
    i = n-c+1 .. n, which neither overflows nor cancels.

    Args:
      right: right samples c of each problem.
      samples: samples n of each problem.
      k: 1 .. n.

    Returns:
      the estimate for each problem, `float64[problem]`.

    Raises:
      ValueError: k or a count out of range.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be within 1 .. {samples} samples; got {k}")
    if np.any((right < 0) | (right > samples)):
        raise ValueError(f"counts of right samples must be within 0 .. {samples}; got {right}")
    i = np.arange(1, samples + 1)
    # With fewer than k wrong samples the factor of i = k, 0, is among them; those below it would
    # be negative.
    factors = np.maximum(1.0 - k / i, 0.0)
    chosen = i[None, :] > samples - np.asarray(right)[:, None]
    return 1.0 - np.where(chosen, factors[None, :], 1.0).prod(axis=1)


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Verdict on the answer that most samples of one problem give, within 0 .. 1.

    Samples vote for one answer where `equality_keys` finds them equal, directly or through a third:
    what the judge holds equal by exact reading is not split over its ways to write it. What only
    math-verify can tell equal is split, and so are a percentage and a plain number: 75 % would
    join both 75 and 3/4.

    A sample without an answer does not vote; where none votes the verdict is 0. Where several
    answers have most votes it is the mean of their verdicts, the expectation of a draw between
    them. The verdict on an answer is the mean of those on its samples: they differ where the judge
    lost one of them, read several boxes as a list, or tells units or bases apart.

    Args:
      answers: final answer of each sample, None without one.
      right: verdict on each sample.
    """
    groups: list[tuple[set[tuple[Any, ...]], list[bool]]] = []
    for answer, verdict in zip(answers, right, strict=True):
        if answer is None:
            continue
        keys, votes = set(equality_keys(answer)), [verdict]
        apart = []
        for group in groups:
            if keys.isdisjoint(group[0]):
                apart.append(group)
            else:
                votes += group[1]
                keys |= group[0]
        groups = [*apart, (keys, votes)]
    most = max((len(votes) for _, votes in groups), default=0)
    winners = [np.mean(votes) for _, votes in groups if len(votes) == most]
    return float(np.mean(winners)) if winners else 0.0


def bootstrap_means(
    values: Float[np.ndarray, "problem metric"],
    seed: int | Sequence[int],
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Means over problems that are drawn anew, with replacement, for each resample.

    Args:
      values: of each problem.
      seed: of the draws.
      resamples: number of draws.

    Returns:
      `float64[resample, metric]`: all metrics of a resample are of the same problems.
    """
    count = len(values)
    if count == 0:
        raise ValueError("there are no problems to draw from")
    rng = np.random.default_rng(seed)
    means = []
    for begin in range(0, resamples, _RESAMPLES_AT_ONCE):  # bounds the memory of large benchmarks
        rows = min(_RESAMPLES_AT_ONCE, resamples - begin)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        means.append(times @ values / count)
    return np.concatenate(means)


class Estimate(NamedTuple):
    """A mean over problems and its 95 % bootstrap interval (percentiles 2.5 and 97.5)."""

    value: float
    low: float
    high: float


def estimate(value: float, means: Float[np.ndarray, "resample"]) -> Estimate:
    """A mean with the percentile interval of its resampled means."""
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def pass_counts(samples: int) -> list[int]:
    """The k of pass@k: powers of two up to the number of samples, and that number."""
    return sorted({2**e for e in range(samples.bit_length())} | {samples})


def accuracies(responses: Sequence[Answered], samples: int) -> dict[str, np.ndarray]:
    """avg@n, pass@k and maj@n of each problem that was answered.

    Args:
      responses: `samples` of each problem, in any order.
      samples: of each problem (n).

    Returns:
      metric to `float64[problem]`, problems by number.

    Raises:
      ValueError: a problem with another number of samples.
    """
    of_problem: dict[int, list[Answered]] = defaultdict(list)
    for response in sorted(responses, key=lambda r: (r.problem, r.sample)):
        of_problem[response.problem].append(response)
    for number, given in of_problem.items():
        if [response.sample for response in given] != list(range(samples)):
            raise ValueError(f"problem {number} has {len(given)} samples, not 0 .. {samples - 1}")
    right = np.array([sum(r.right for r in given) for given in of_problem.values()], np.int64)
    votes = [majority([r.answer for r in g], [r.right for r in g]) for g in of_problem.values()]
    return {
        f"avg@{samples}": right / samples,
        **{f"pass@{k}": pass_at_k(right, samples, k) for k in pass_counts(samples)},
        f"maj@{samples}": np.array(votes, np.float64),
    }


@dataclass(frozen=True)
class Summary:
    """The numbers of one benchmark.

    Attributes:
      problems: answered.
      samples: of each.
      accuracy: metric to its estimate, shares within 0 .. 1.
      resampled: metric to its means over resampled problems, `float64[resample]`.
      response_length: mean tokens of a response.
      truncated: share of the responses that were cut at their budget.
      unanswered: share of the responses without a final answer.
      lost: answers that the judge lost to a time limit or a crash; they count as wrong.
      tokens: of all responses.
      seconds: of generation, compilation included.
    """

    problems: int
    samples: int
    accuracy: dict[str, Estimate]
    resampled: dict[str, np.ndarray]
    response_length: float
    truncated: float
    unanswered: float
    lost: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def summarise(responses: Sequence[Answered], samples: int, seed: int | Sequence[int]) -> Summary:
    """The numbers of one benchmark; the order of the responses does not matter.

    Args:
      responses: `samples` of each problem, at least one problem.
      samples: of each problem.
      seed: of the bootstrap.

    Raises:
      ValueError: no responses, or a problem with another number of samples.
    """
    by_problem = accuracies(responses, samples)
    values = np.stack(list(by_problem.values()), axis=1)
    means = bootstrap_means(values, seed)
    resampled = {name: means[:, column] for column, name in enumerate(by_problem)}
    tokens = sum(response.tokens for response in responses)
    return Summary(
        problems=len(values),
        samples=samples,
        accuracy={
            name: estimate(float(by_problem[name].mean()), resampled[name]) for name in by_problem
        },
        resampled=resampled,
        response_length=tokens / len(responses),
        truncated=sum(not response.ended for response in responses) / len(responses),
        unanswered=sum(response.answer is None for response in responses) / len(responses),
        lost=sum(response.lost for response in responses),
        tokens=tokens,
        seconds=math.fsum(response.elapsed for response in responses),
    )


def average(summaries: Sequence[Summary]) -> dict[str, Estimate]:
    """Mean of each metric over benchmarks of equal weight; their intervals are independent.

    Args:
      summaries: of the benchmarks, bootstrapped with different seeds.

    Returns:
      `avg@n`; and `pass@n` and `maj@n`, unless the benchmarks differ in n, on which these depend.
    """
    same = len({summary.samples for summary in summaries}) == 1
    found = {}
    for metric in ("avg", "pass", "maj") if same else ("avg",):
        names = [f"{metric}@{summary.samples}" for summary in summaries]
        pairs = list(zip(summaries, names, strict=True))
        found[f"{metric}@n"] = estimate(
            float(np.mean([summary.accuracy[name].value for summary, name in pairs])),
            np.mean([summary.resampled[name] for summary, name in pairs], axis=0),
        )
    return found
