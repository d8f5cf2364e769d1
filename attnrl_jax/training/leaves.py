"""The rows of a step as every process holds them: each token once, and laid out where asked for.

Several processes all decide over all rows, for which lengths, rewards and the shape of the trees
suffice. `[row, time]` arrays are as large as the rows are long and many; each process makes them
only of the rows that it works on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Num

from attnrl_jax.branching.steps import StepRule
from attnrl_jax.sampling.sampler import Response
from attnrl_jax.types import Leaves, Rollouts

# Fields of `Leaves` that have an array for each row (or problem).
PIECES = ("prompts", "tokens", "logprobs", "entropy", "importance", "fci")


def empty_rollouts(rows: int, time: int) -> Rollouts:
    """Rows with nothing in them: 0 everywhere, -1 where a number would name something."""
    whole = (rows, time)
    return Rollouts(
        tokens=np.zeros(whole, np.int32),
        prompt_length=np.zeros(rows, np.int32),
        length=np.zeros(rows, np.int32),
        problem=np.zeros(rows, np.int32),
        root=np.arange(rows, dtype=np.int32),
        split=np.zeros(rows, np.int32),
        ended=np.zeros(rows, bool),
        logprobs=np.zeros(whole, np.float32),
        version=np.full(whole, -1, np.int32),
        entropy=np.zeros(whole, np.float32),
        step_ids=np.full(whole, -1, np.int32),
        fci=np.zeros(whole, np.float32),
        reward=np.zeros(rows, np.float32),
    )


def _leaves(
    responses: Sequence[Response],
    prompts: Sequence[np.ndarray],
    version: int,
    **shape: Int[np.ndarray, "row"],
) -> Leaves:
    own = np.array([len(response.tokens) for response in responses], np.int32)
    shape = {name: np.asarray(x, np.int32) for name, x in shape.items()}
    nothing = np.zeros(0, np.float32)
    return Leaves(
        **shape,
        length=shape["prompt_length"] + shape["split"] + own,
        ended=np.array([response.ended for response in responses], bool),
        reward=np.zeros(len(own), np.float32),
        version=np.full(len(own), version, np.int32),
        num_ranges=np.zeros(len(own), np.int32),
        prompts=list(prompts),
        tokens=[response.tokens for response in responses],
        logprobs=[response.logprobs for response in responses],
        entropy=[nothing] * len(own),
        importance=[nothing] * len(own),
        fci=[nothing] * len(own),
    )


def initial_leaves(
    prompts: Sequence[np.ndarray], samples: Sequence[Sequence[Response]], version: int
) -> Leaves:
    """Initial responses, problem by problem.

    Args:
      prompts: ids of each problem's prompt.
      samples: the responses of each problem.
      version: number of the parameters that sampled.
    """
    problem = np.repeat(np.arange(len(prompts)), [len(responses) for responses in samples])
    return _leaves(
        [response for responses in samples for response in responses],
        prompts,
        version,
        prompt_length=np.array([len(prompt) for prompt in prompts])[problem],
        problem=problem,
        root=np.arange(len(problem)),
        split=np.zeros(len(problem)),
    )


def continuation_leaves(
    initial: Leaves,
    branches: Sequence[tuple[int, int]],
    samples: Sequence[Sequence[Response]],
    version: int,
) -> Leaves:
    """Continuations alone; `root` is a row of `initial`, which has the tokens before theirs.

    Args:
      initial: the initial responses.
      branches: `(row, offset)` of each branch position.
      samples: the responses of each.
      version: number of the parameters that sampled.
    """
    times = [len(responses) for responses in samples]
    root, split = np.repeat(np.array(branches, np.int32).reshape(-1, 2), times, axis=0).T
    return _leaves(
        [response for responses in samples for response in responses],
        [],
        version,
        prompt_length=initial.prompt_length[root],
        problem=initial.problem[root],
        root=root,
        split=split,
    )


def join_leaves(initial: Leaves, continuations: Leaves) -> Leaves:
    """Initial responses first, so that `root` keeps its meaning."""

    def both(one: Any, other: Any) -> Any:
        return one + other if isinstance(one, list) else np.concatenate([one, other])

    parts = vars(continuations)
    return Leaves(**{name: both(x, parts[name]) for name, x in vars(initial).items()})


def to_arrays(leaves: Leaves) -> dict[str, np.ndarray]:
    """One array of every field: pieces lie one after the other."""
    return {
        name: np.concatenate([np.zeros(0, _dtype(name)), *x], dtype=_dtype(name))
        if isinstance(x, list)
        else x
        for name, x in vars(leaves).items()
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> Leaves:
    """The inverse; an array that is missing is empty."""
    row: dict[str, Any] = {name: x for name, x in arrays.items() if name not in PIECES}
    own = row["length"] - row["prompt_length"] - row["split"]
    prompts = np.zeros(0, np.int32)
    if "prompts" in arrays:
        prompts = np.zeros(int(row["problem"].max()) + 1, np.int32)
        prompts[row["problem"]] = row["prompt_length"]
    lengths = {"prompts": prompts, "fci": row["num_ranges"]}
    pieces: dict[str, Any] = {}
    for name in PIECES:
        ends = np.cumsum(lengths.get(name, own), dtype=np.int64).tolist()
        x = arrays.get(name, np.zeros(0, _dtype(name)))
        pieces[name] = [x[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    return Leaves(**row, **pieces)


def _dtype(name: str) -> type:
    return np.int32 if name in ("prompts", "tokens") else np.float32


def lay_out_column(
    leaves: Leaves,
    name: str,
    rows: Int[np.ndarray, "chosen"],
    time: int,
    roots: Leaves | None = None,
) -> Num[np.ndarray, "chosen time"]:
    """One field by token, of some rows.

    Args:
      leaves: all rows.
      name: `tokens`, `logprobs`, `entropy` or `importance`.
      rows: which of them.
      time: width of the rows.
      roots: what `root` is a row of; by default `leaves`.

    Returns:
      the field of prompt (0 but for `tokens`) and response, the prefix shared with the root
      included; 0 for padding.
    """
    roots = leaves if roots is None else roots
    own, shared = getattr(leaves, name), getattr(roots, name)
    result: np.ndarray = np.zeros((len(rows), time), _dtype(name))
    for to, row in zip(result, rows.tolist(), strict=True):
        prompt, length, split = leaves.prompt_length[row], leaves.length[row], leaves.split[row]
        if name == "tokens":
            to[:prompt] = roots.prompts[leaves.problem[row]]
        if split:
            to[prompt : prompt + split] = shared[leaves.root[row]][:split]
        to[prompt + split : length] = own[row]
    return result


def lay_out(leaves: Leaves, rows: Int[np.ndarray, "chosen"], time: int, rule: StepRule) -> Rollouts:
    """`Rollouts` of some rows; `problem` and `root` keep the numbers they have among all rows.

    Args:
      leaves: all rows, initial responses first.
      rows: which of them.
      time: width of the rows.
      rule: where steps end.
    """
    result = empty_rollouts(len(rows), time)
    for name in ("prompt_length", "length", "problem", "root", "split", "ended", "reward"):
        getattr(result, name)[:] = getattr(leaves, name)[rows]
    for name in ("tokens", "logprobs", "entropy"):
        getattr(result, name)[:] = lay_out_column(leaves, name, rows, time)
    for k, row in enumerate(rows.tolist()):
        prompt, start = result.prompt_length[k], result.prompt_length[k] + result.split[k]
        result.version[k, prompt:start] = leaves.version[leaves.root[row]]
        result.version[k, start : result.length[k]] = leaves.version[row]
        result.fci[k, : leaves.num_ranges[row]] = leaves.fci[row]
    result.step_ids[:] = rule.step_ids(result.tokens, result.prompt_length, result.length)
    return result


def count_ranges(leaves: Leaves, rule: StepRule) -> Int[np.ndarray, "row"]:
    """Ranges of each initial response, the prompt's included: 1 + the largest of
    `StepRule.step_ids`, of all rows and without laying them out."""
    return np.array([1 + rule.count(tokens) for tokens in leaves.tokens], np.int32)
