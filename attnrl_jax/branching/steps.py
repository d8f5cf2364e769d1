"""Steps of a response: half-open token ranges that end with a separator token.

Range 0 is the prompt, ranges 1..S are the response's steps, and `step_ids[t]` names the range of
token t (-1 for padding). Paper, section on attention-based branching: steps are split at blank
lines. What happens in a response without a blank line follows the released program.

Everything but `Separators.from_texts` runs on numpy arrays and, under jit, on jax arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Bool, Int

from attnrl_jax.types import ArrayLike

# From the ids of one response to which of them end a step, on the host.
Segmenter = Callable[[Int[np.ndarray, "time"]], Bool[np.ndarray, "time"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Separators:
    """The vocabulary ids that end a step.

    Attributes:
      blank_line: ids whose own decoded text holds two newlines in a row.
      newline: ids whose own decoded text holds a newline (a superset of `blank_line`).
      end_think: the id of `</think>` where that is one id; None where it is not, and then no step
        counts as after-think.
    """

    blank_line: Bool[ArrayLike, "vocab"]
    newline: Bool[ArrayLike, "vocab"]
    end_think: int | None = field(default=None, metadata={"static": True})

    @classmethod
    def from_texts(cls, texts: Sequence[str], end_think: int | None = None) -> Separators:
        """Separators of the vocabulary whose id `i`, decoded alone, reads `texts[i]`.

        Raises:
          ValueError: `end_think` is not an id of this vocabulary.
        """
        if end_think is not None and not 0 <= end_think < len(texts):
            raise ValueError(f"end_think={end_think} is not an id of a vocabulary of {len(texts)}")
        blank_line = np.array(["\n\n" in text for text in texts], dtype=bool)
        newline = np.array(["\n" in text for text in texts], dtype=bool)
        return cls(blank_line, newline, end_think)


@dataclass(frozen=True)
class StepRule:
    """How responses are cut into steps.

    Attributes:
      separators: ids that end a step, and that of `</think>`.
      segmenter: another way to cut, which takes the place of `step_ends`. What is behind the last
        end is a step of its own.
    """

    separators: Separators
    segmenter: Segmenter | None = None

    def ends(self, response: Int[np.ndarray, "time"]) -> Bool[np.ndarray, "time"]:
        """Which tokens of a response end a step.

        Raises:
          ValueError: the segmenter returned something else than a truth value for every token.
        """
        if self.segmenter is None:
            return np.asarray(step_ends(response, np.ones(len(response), bool), self.separators))
        ends = np.asarray(self.segmenter(response))
        if ends.shape != response.shape or ends.dtype != bool:
            raise ValueError(
                f"the step segmenter returned {ends.dtype}{list(ends.shape)} for a response of "
                f"{len(response)} tokens; it must return bool[{len(response)}]"
            )
        return ends

    def count(self, response: Int[np.ndarray, "time"]) -> int:
        """Steps of a response."""
        if not len(response):
            return 0
        ends = self.ends(response)
        # A step is open behind the last end, unless that is the last token.
        return int(np.count_nonzero(ends)) + (not ends[-1])

    def step_ids(
        self,
        tokens: Int[np.ndarray, "row time"],
        prompt_length: Int[np.ndarray, "row"],
        length: Int[np.ndarray, "row"],
    ) -> Int[np.ndarray, "row time"]:
        """Range of every token, as `segment_steps` numbers them."""
        if self.segmenter is None:
            return np.asarray(segment_steps(tokens, prompt_length, length, self.separators))
        result = np.full(tokens.shape, -1, np.int32)
        for to, row, begin, end in zip(result, tokens, prompt_length, length, strict=True):
            to[:begin] = 0
            ends = self.ends(row[begin:end])
            to[begin:end] = 1 + np.cumsum(ends) - ends
        return result


def token_positions(x: ArrayLike) -> Int[ArrayLike, "*batch time"]:
    """0, 1, 2, ... along the last axis, in the shape of `x`."""
    xp = x.__array_namespace__()
    return xp.broadcast_to(xp.arange(x.shape[-1]), x.shape)


def step_ends(
    tokens: Int[ArrayLike, "*batch time"],
    in_response: Bool[ArrayLike, "*batch time"],
    separators: Separators,
) -> Bool[ArrayLike, "*batch time"]:
    """Which tokens end a step: the separators of the response.

    Separators are the ids that hold a blank line; in a response that has none of them, the ids that
    hold a newline; in one that has none of these either, every token (released program).

    Args:
      tokens: ids.
      in_response: which of them are the response's.
      separators: ids that end a step.
    """
    xp = tokens.__array_namespace__()
    ids = xp.where(in_response, tokens, 0)
    blank_line = xp.asarray(separators.blank_line)[ids] & in_response
    newline = xp.asarray(separators.newline)[ids] & in_response
    return xp.where(
        xp.any(blank_line, axis=-1, keepdims=True),
        blank_line,
        xp.where(xp.any(newline, axis=-1, keepdims=True), newline, in_response),
    )


def segment_steps(
    tokens: Int[ArrayLike, "*batch time"],
    prompt_length: Int[ArrayLike, "*batch"],
    length: Int[ArrayLike, "*batch"],
    separators: Separators,
) -> Int[ArrayLike, "*batch time"]:
    """Range of every token: 0 for the prompt, 1..S for the response's steps, -1 for padding.

    A step ends right after its separator (`step_ends`).

    Args:
      tokens: prompt and response, right padded (what the padding holds does not matter).
      prompt_length: tokens of the prompt.
      length: tokens of prompt and response together.
      separators: ids that end a step.

    Returns:
      `step_ids`, nondecreasing up to the padding.
    """
    xp = tokens.__array_namespace__()
    position = token_positions(tokens)
    in_prompt = position < prompt_length[..., None]
    in_response = ~in_prompt & (position < length[..., None])
    ends_step = step_ends(tokens, in_response, separators)
    ended_before = xp.cumulative_sum(xp.astype(ends_step, xp.int32), axis=-1) - ends_step
    step_ids = xp.where(in_prompt, 0, xp.where(in_response, 1 + ended_before, -1))
    return xp.astype(step_ids, xp.int32)


def end_of_thinking(
    tokens: Int[ArrayLike, "*batch time"],
    step_ids: Int[ArrayLike, "*batch time"],
    separators: Separators,
) -> Int[ArrayLike, "*batch"]:
    """First after-think range: the one that holds the last `</think>` of the response.

    Args:
      tokens: prompt and response, right padded. A `</think>` of the prompt does not count.
      step_ids: range of each token, from `segment_steps`.
      separators: names the id of `</think>`.

    Returns:
      The range, or `time + 1`, which is larger than any range, where there is none.
    """
    xp = tokens.__array_namespace__()
    none = tokens.shape[-1] + 1
    if separators.end_think is None:
        return xp.full(tokens.shape[:-1], none, dtype=xp.int32)
    marked = xp.where((tokens == separators.end_think) & (step_ids > 0), step_ids, 0)
    last = xp.max(marked, axis=-1)
    return xp.astype(xp.where(last > 0, last, none), xp.int32)


def step_bounds(
    step_ids: Int[ArrayLike, "*batch time"], num_ranges: int | None = None
) -> tuple[Int[ArrayLike, "*batch step"], Int[ArrayLike, "*batch step"]]:
    """First token and end (exclusive) of every range, in tokens from the sequence's start.

    Args:
      step_ids: range of each token.
      num_ranges: length of the step axis; by default that of the time axis, which always
        suffices where the prompt is not empty.

    Returns:
      `starts, ends`; both are the sequence's length for ranges past the last.
    """
    xp = step_ids.__array_namespace__()
    time = step_ids.shape[-1]
    num_ranges = time if num_ranges is None else num_ranges
    # Rows are sorted (padding counted as past the last range); shifted by their row number they
    # form one sorted array, in which a single binary search serves all rows.
    rows = xp.reshape(step_ids, (-1, time))
    row = xp.broadcast_to(xp.arange(rows.shape[0])[:, None], (rows.shape[0], num_ranges))
    keys = xp.where((rows < 0) | (rows > num_ranges), num_ranges, rows)
    keys = xp.reshape(keys + row[:, :1] * (num_ranges + 1), (-1,))
    wanted = token_positions(row) + row * (num_ranges + 1)
    shape = (*step_ids.shape[:-1], num_ranges)
    starts = xp.reshape(xp.searchsorted(keys, wanted, side="left") - row * time, shape)
    ends = xp.reshape(xp.searchsorted(keys, wanted, side="right") - row * time, shape)
    return xp.astype(starts, xp.int32), xp.astype(ends, xp.int32)


def count_steps(step_ids: Int[ArrayLike, "*batch time"]) -> Int[ArrayLike, "*batch"]:
    """Steps of the response, the prompt not counted; 0 for an empty response."""
    xp = step_ids.__array_namespace__()
    return xp.astype(xp.maximum(xp.max(step_ids, axis=-1), 0), xp.int32)
