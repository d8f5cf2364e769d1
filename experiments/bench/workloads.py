"""What is sampled: prompts and the length of every response, the same for every contender.

Tokens are random, of the common model's vocabulary, without id 0, which contenders pad with. No
token ends a response; each is cut at its own length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VOCAB = 8192
PROMPT = 64
SLOTS = 32


@dataclass(frozen=True)
class Rollouts:
    """Responses to sample, in the order given.

    Attributes:
      prefixes: token ids before each response, `[time]` each; equal prefixes are equal arrays.
      lengths: tokens of each response, at least 1; `[row]`.
      problem: number of the problem of each row.
      total: most tokens of prefix and response of any row, known to every contender.
    """

    prefixes: list[np.ndarray]
    lengths: np.ndarray
    problem: np.ndarray
    total: int


def lognormal_lengths(
    rng: np.random.Generator, count: int, median: float, sigma: float, cut: int
) -> np.ndarray:
    """Lengths `exp(log median + sigma N(0, 1))`, rounded, from 1 to `cut`; int64 `[count]`."""
    drawn = np.exp(np.log(median) + sigma * rng.standard_normal(count))
    return np.clip(np.rint(drawn), 1, cut).astype(np.int64)


def random_tokens(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Ids from 1 to `VOCAB` - 1, int32."""
    return rng.integers(1, VOCAB, shape, dtype=np.int32)


def workload_a(prompts: int = 24, samples: int = 8, cut: int = 256, seed: int = 0) -> Rollouts:
    """Groups of samples with a long tail: lengths lognormal, median 64, sigma 1."""
    rng = np.random.default_rng((seed, 0))
    tokens = random_tokens(rng, prompts, PROMPT)
    return Rollouts(
        prefixes=[row for row in tokens for _ in range(samples)],
        lengths=lognormal_lengths(rng, prompts * samples, 64, 1.0, cut),
        problem=np.repeat(np.arange(prompts), samples),
        total=PROMPT + cut,
    )


def workload_b(prompts: int = 32, length: int = 256, seed: int = 0) -> Rollouts:
    """One response a prompt, all of one length: nothing to gain but the speed of a step."""
    rng = np.random.default_rng((seed, 1))
    return Rollouts(
        prefixes=list(random_tokens(rng, prompts, PROMPT)),
        lengths=np.full(prompts, length, np.int64),
        problem=np.arange(prompts),
        total=PROMPT + length,
    )


def workload_c(
    problems: int = 16,
    responses: int = 6,
    expanded: int = 48,
    continuations: int = 2,
    cut: int = 512,
    seed: int = 0,
) -> Rollouts:
    """AttnRL's joint round: initial responses of new problems, branches of earlier responses.

    Lengths are lognormal, median 128, sigma 0.7. An initial response is cut at `cut` tokens. An
    earlier response is given: its length is drawn the same way, and branches leave it after a third
    and two thirds of it, `continuations` at each. A branch is as long as a response, cut where
    the whole path has `cut` response tokens.

    Args:
      problems, responses: new ones, and initial responses of each.
      expanded: earlier responses; as many to a problem as there are initial responses.
      continuations: of each of the two positions.
      cut: most response tokens on a path.
      seed: of everything random.
    """
    rng = np.random.default_rng((seed, 2))

    def lengths(count: int) -> np.ndarray:
        return lognormal_lengths(rng, count, 128, 0.7, cut)

    tokens = random_tokens(rng, problems, PROMPT)
    prefixes = [row for row in tokens for _ in range(responses)]
    taken = [lengths(problems * responses)]
    problem = [np.repeat(np.arange(problems), responses)]
    earlier_prompts = random_tokens(rng, -(-expanded // responses), PROMPT)
    for number, length in enumerate(lengths(expanded)):
        whole = np.concatenate(
            [earlier_prompts[number // responses], random_tokens(rng, int(length))]
        )
        for split in (int(length) // 3, 2 * int(length) // 3):
            prefix = whole[: PROMPT + split]
            prefixes += [prefix] * continuations
            taken.append(np.minimum(lengths(continuations), cut - split))
            problem.append(np.full(continuations, problems + number // responses))
    return Rollouts(prefixes, np.concatenate(taken), np.concatenate(problem), PROMPT + cut)


def batches_of(count: int, size: int) -> list[slice]:
    """The rows of each static batch, in order; the last may be smaller."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def static_slot_steps(lengths: np.ndarray, size: int) -> int:
    """Tokens that static batches have room for: each runs until its longest row is done."""
    return sum(
        len(lengths[rows]) * int(lengths[rows].max()) for rows in batches_of(len(lengths), size)
    )
