"""Rows of AttnRL's update: responses, and continuations that share a prefix with them."""

from __future__ import annotations

import numpy as np

from attnrl_jax.types import Paths, TrainRows
from experiments.bench.workloads import PROMPT, lognormal_lengths, random_tokens

# Of a response's length, where it branches: as in most responses, and early.
THIRDS = (1 / 3, 2 / 3)
EARLY = (1 / 20, 3 / 20)


def distinct_tokens(paths: Paths) -> int:
    """Tokens of rows that all have their roots among them, each shared one counted once.

    Args:
      paths: of rows whose `root` is the number of a row.
    """
    _, first = np.unique(paths.problem, return_index=True)
    is_root = paths.root == np.arange(len(paths.root))
    own = paths.length - np.where(is_root, paths.prompt_length, paths.shared)
    return int(paths.prompt_length[first].sum() + own.sum())


def sharing(paths: Paths) -> float:
    """Tokens of the rows over distinct tokens."""
    return float(paths.length.sum()) / distinct_tokens(paths)


def branched_rows(
    problems: int,
    positions: tuple[float, ...],
    responses: int = 6,
    continuations: int = 2,
    longer: bool = False,
    cut: int = 512,
    seed: int = 0,
) -> TrainRows:
    """Every response branches at every position. Lengths are lognormal, median 128, sigma 0.7.

    Args:
      problems: number of trees.
      positions: where responses branch, as shares of their length.
      responses: initial responses of a problem.
      continuations: of each position.
      longer: continuations are as long as responses (workload C), so that their paths are longer;
        otherwise as long as what is left of another response after the same share of it.
      cut: most response tokens of a path.
      seed: of everything random.
    """
    rng = np.random.default_rng((seed, 4))
    rows: list[tuple[int, ...]] = []
    for problem in range(problems):
        for length in lognormal_lengths(rng, responses, 128, 0.7, cut):
            root = len(rows)
            rows.append((PROMPT, PROMPT + int(length), problem, root, PROMPT + int(length)))
            for share in positions:
                split = int(length * share)
                for other in lognormal_lengths(rng, continuations, 128, 0.7, cut):
                    own = int(other) if longer else int(other) - int(other * share)
                    end = PROMPT + min(split + own, cut)
                    rows.append((PROMPT, end, problem, root, PROMPT + split))
    paths = Paths(*np.array(rows, np.int32).T)
    shape = (len(rows), PROMPT + cut)
    tokens = random_tokens(rng, *shape)
    advantages = rng.standard_normal(shape, dtype=np.float32)
    behaviour = rng.uniform(-11, -8, shape).astype(np.float32)
    index = np.arange(shape[1])
    for row in range(len(rows)):
        first = int(np.argmax(paths.problem == paths.problem[row]))
        tokens[row, :PROMPT] = tokens[first, :PROMPT]
        for x in (tokens, advantages, behaviour):
            shared = index < (paths.shared[row] if paths.root[row] != row else 0)
            x[row] = np.where(shared, x[paths.root[row]], x[row])
    response = (index >= PROMPT) & (index < paths.length[:, None])
    return TrainRows(tokens, paths, advantages * response, behaviour * response)
