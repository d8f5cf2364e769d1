"""Random trees of responses, with every shape that a branched batch can take."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Bool

from attnrl_jax.packing import Layout, place_paths, row_paths
from attnrl_jax.training.leaves import empty_rollouts
from attnrl_jax.types import Paths, Rollouts, TrainRows

PROMPT = 6


def own_tokens(rows: Rollouts) -> Bool[np.ndarray, "row time"]:
    """Tokens a row sampled itself: the response, without what it shares with its root."""
    index = np.arange(rows.tokens.shape[1])[None, :]
    start = (rows.prompt_length + rows.split)[:, None]
    return (index >= start) & (index < rows.length[:, None])


def response_tokens(rows: Rollouts) -> Bool[np.ndarray, "row time"]:
    """Tokens of the response, shared prefixes included."""
    index = np.arange(rows.tokens.shape[1])[None, :]
    return (index >= rows.prompt_length[:, None]) & (index < rows.length[:, None])


def pack_paths(paths: Paths, capacity: int, share: bool) -> Layout:
    """All tokens of `place_paths`; arguments and errors as there."""
    placement = place_paths(paths, capacity, share)
    return placement.lay_out(np.arange(len(placement.used)))[1]


def random_rollouts(
    rng: np.random.Generator,
    problems: int = 3,
    responses: int = 3,
    time: int = 32,
    vocab: int = 256,
) -> Rollouts:
    """Initial responses, then continuations: at repeated offsets, at 0, at the response's end, of
    no tokens of their own, of only some of the responses. A small `vocab` makes ids of different
    nodes equal."""
    rows = empty_rollouts(problems * responses * 5, time)
    initial = problems * responses
    used = initial

    def write(row: int, start: int, end: int) -> None:
        rows.tokens[row, start:end] = rng.integers(0, vocab, end - start)
        rows.logprobs[row, start:end] = rng.uniform(-8, -4, end - start)
        rows.length[row] = end

    for row in range(initial):
        problem = row // responses
        first = problem * responses
        rows.prompt_length[row] = prompt = 1 + (problem * 3) % PROMPT
        rows.problem[row] = problem
        write(row, 0, int(rng.integers(prompt + 1, time + 1)))
        rows.tokens[row, :prompt] = rows.tokens[first, :prompt]
        rows.logprobs[row, :prompt] = 0
    for root in range(initial):
        if rng.random() < 0.3:
            continue
        prompt, length = int(rows.prompt_length[root]), int(rows.length[root])
        offsets = rng.choice([0, 1, length - prompt, *rng.integers(0, length - prompt + 1, 3)], 2)
        for offset in np.repeat(offsets, 2):
            start = prompt + int(offset)
            rows.prompt_length[used], rows.problem[used] = prompt, rows.problem[root]
            rows.root[used], rows.split[used] = root, offset
            write(used, start, int(rng.integers(start, time + 1)))
            for shared in (rows.tokens, rows.logprobs):
                shared[used, :start] = shared[root, :start]
            used += 1
    return jax.tree.map(lambda x: x[:used], rows)


def train_rows_of(rows: Rollouts, rng: np.random.Generator, drop: float = 0.2) -> TrainRows:
    """Rows of an update: random advantages that shared tokens agree on; some rows filtered, roots
    among them."""
    advantages = np.where(response_tokens(rows), rng.normal(size=rows.tokens.shape), 0)
    for row in np.flatnonzero(rows.root != np.arange(len(rows.root))):
        start = rows.prompt_length[row] + rows.split[row]
        advantages[row, :start] = advantages[rows.root[row], :start]
    paths = row_paths(rows, rows.root == np.arange(len(rows.root)))
    whole = TrainRows(rows.tokens, paths, advantages.astype(np.float32), rows.logprobs)
    kept = rng.random(len(rows.length)) >= drop
    return jax.tree.map(lambda x: x[kept], whole)
