"""Pytrees that cross modules, and the one legend of axis names.

Axis names in signatures (jaxtyping) and what they count:

    batch      sequences of one device batch
    row        responses of a whole training step, on the host
    time       tokens of prompt and response, right padded; or of several rows in one sequence
    vocab      vocabulary ids
    width      model width (residual stream)
    layer, head, kv_head, head_dim
    slot       decode slots of the sampler
    step       ranges of a sequence: 0 is the prompt, 1.. the steps of the response
    segment    pieces of a leaf's path between branch points
    response   initial responses of one problem
    position   branch positions of one response

Tokens are aligned with themselves: entry `t` of `logprobs`, `entropy`, `version`, ... belongs to
token `t`, that is, to the distribution which tokens `< t` gave for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Num

ArrayLike = Array | np.ndarray


@struct.dataclass
class Rollouts:
    """Responses of a batch of problems: one row each, prompt and response in one sequence.

    An initial response is its own root and its `split` is 0; a continuation shares the first
    `split` response tokens with the initial response in row `root`. Host arrays (numpy).

    Attributes:
      tokens: prompt, then response (end token included), then padding.
      prompt_length: tokens of the prompt.
      length: tokens of prompt and response.
      problem: index of the problem in its batch.
      root: row of the initial response this row branches from (its own row for initial ones).
      split: response tokens shared with the root.
      ended: whether the response closed with an end token (False: cut at its budget).
      logprobs: behaviour log-probability of each response token, nats; 0 elsewhere.
      version: number of the parameters that sampled each response token; -1 elsewhere.
      entropy: entropy of the distribution each response token came from, nats; 0 elsewhere.
      step_ids: range of each token, -1 for padding.
      fci: forward context influence by range; zeros for rows that were not scored for it.
      reward: outcome of the whole path.
    """

    tokens: Int[np.ndarray, "row time"]
    prompt_length: Int[np.ndarray, "row"]
    length: Int[np.ndarray, "row"]
    problem: Int[np.ndarray, "row"]
    root: Int[np.ndarray, "row"]
    split: Int[np.ndarray, "row"]
    ended: Bool[np.ndarray, "row"]
    logprobs: Float[np.ndarray, "row time"]
    version: Int[np.ndarray, "row time"]
    entropy: Float[np.ndarray, "row time"]
    step_ids: Int[np.ndarray, "row time"]
    fci: Float[np.ndarray, "row step"]
    reward: Float[np.ndarray, "row"]


@dataclass(frozen=True)
class Leaves:
    """`Rollouts` as all processes hold them: every token once. Host arrays.

    A row holds the tokens it sampled itself; those before are its root's, and those before these
    the prompt's. `training.leaves.lay_out` makes `Rollouts` of some rows. Pieces, but for
    `fci`, stay where they were fetched to, since to copy all of them takes the host long.

    Attributes:
      prompt_length, length, problem, root, split, ended, reward: as in `Rollouts`.
      version: number of the parameters that sampled the row's own tokens.
      num_ranges: ranges of the row in `fci`; 0 for rows that were not scored for it.
      prompts: of each problem; none where there are only continuations.
      tokens, logprobs, entropy: of the own tokens of each row.
      importance: weight of each own token in the loss, where its sampler's log-probabilities are
        corrected (truncated importance sampling); none where they are not.
      fci: forward context influence by range, of each row.
    """

    prompt_length: Int[np.ndarray, "row"]
    length: Int[np.ndarray, "row"]
    problem: Int[np.ndarray, "row"]
    root: Int[np.ndarray, "row"]
    split: Int[np.ndarray, "row"]
    ended: Bool[np.ndarray, "row"]
    reward: Float[np.ndarray, "row"]
    version: Int[np.ndarray, "row"]
    num_ranges: Int[np.ndarray, "row"]
    prompts: list[Int[np.ndarray, "time"]]
    tokens: list[Int[np.ndarray, "time"]]
    logprobs: list[Float[np.ndarray, "time"]]
    entropy: list[Float[np.ndarray, "time"]]
    importance: list[Float[np.ndarray, "time"]]
    fci: list[Float[np.ndarray, "step"]]

    @property
    def own_length(self) -> Int[np.ndarray, "row"]:
        """Tokens that each row sampled itself."""
        return self.length - self.prompt_length - self.split


@dataclass(frozen=True)
class LazyRows:
    """Some array `[row, time]` of which only the rows asked for are ever made.

    Attributes:
      make: the array of some rows, given as indices.
    """

    make: Callable[[np.ndarray], np.ndarray]

    def __getitem__(self, rows: Int[np.ndarray, "chosen"]) -> Num[np.ndarray, "chosen time"]:
        return self.make(rows)


@struct.dataclass
class Scores:
    """What one forward pass says of given tokens.

    Attributes:
      logprobs: log p(token t | tokens < t) at the sampling temperature, nats; 0 for the first
        token and for padding.
      entropy: entropy of the distribution token t was drawn from, nats; 0 likewise.
      fci: forward context influence by range, before any range is zeroed.
    """

    logprobs: Float[ArrayLike, "batch time"]
    entropy: Float[ArrayLike, "batch time"]
    fci: Float[ArrayLike, "batch step"]


@struct.dataclass
class Paths:
    """What rows have in common; host arrays.

    Rows of one problem share its prompt. Of these, rows of one root share more: as many tokens
    as both of them share with the root. The root itself need not be among the rows.

    Attributes:
      prompt_length: tokens of the prompt.
      length: tokens of prompt and response.
      problem, root: any numbers that tell problems, and the roots of a problem, from each other.
      shared: tokens, counted from the first of the prompt, that the row shares with its root:
        all of an initial response, which is its own root.
    """

    prompt_length: Int[np.ndarray, "row"]
    length: Int[np.ndarray, "row"]
    problem: Int[np.ndarray, "row"]
    root: Int[np.ndarray, "row"]
    shared: Int[np.ndarray, "row"]


@struct.dataclass
class PackedTokens:
    """Rows packed into sequences (`attnrl_jax.packing`), as the model takes them.

    Attributes:
      tokens: ids; 0 for padding.
      positions: index of each token in its row.
      visible_until: query q sees key p exactly if p <= q < visible_until[p].
      previous: where in the sequence the token before lies, whose hidden state predicts this one.
      layout: what `visible_until` is promised to be, as `Transformer.__call__` has it.
    """

    tokens: Int[ArrayLike, "batch time"]
    positions: Int[ArrayLike, "batch time"]
    visible_until: Int[ArrayLike, "batch time"]
    previous: Int[ArrayLike, "batch time"]
    layout: str = struct.field(pytree_node=False, default="tree")


@struct.dataclass
class TrainRows:
    """Rows of the policy-gradient update; host arrays, or what makes them row by row.

    Attributes:
      tokens: prompt and response, right padded.
      paths: lengths, and what rows share.
      advantages: advantage of each response token.
      behaviour_logprobs: log-probability under the parameters that sampled the token.
    """

    tokens: Int[np.ndarray, "row time"] | LazyRows
    paths: Paths
    advantages: Float[np.ndarray, "row time"] | LazyRows
    behaviour_logprobs: Float[np.ndarray, "row time"] | LazyRows


@struct.dataclass
class TrainBatch:
    """Packed tokens of one micro-batch of the update.

    Attributes:
      packed: what the model is given.
      mask: rows in which the token is trained on, 0 for prompts and padding.
      weights: of the token in the loss, before the denominator (`mask` in a mean over tokens).
      advantages: advantage of each token.
      behaviour_logprobs: log-probability under the parameters that sampled the token.
    """

    packed: PackedTokens
    mask: Float[ArrayLike, "batch time"]
    weights: Float[ArrayLike, "batch time"]
    advantages: Float[ArrayLike, "batch time"]
    behaviour_logprobs: Float[ArrayLike, "batch time"]
