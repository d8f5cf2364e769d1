"""One forward pass over given tokens: log-probabilities, entropy and step importance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from attnrl_jax import processes
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import Output, Transformer, unembed
from attnrl_jax.packing import Layout, deal_batches, place_paths, problem_groups, take_rows
from attnrl_jax.sharding import (
    BATCH,
    constrain,
    cuts_rows,
    gather_output_matrix,
)
from attnrl_jax.types import ArrayLike, LazyRows, PackedTokens, Paths, Scores

# Rows are packed for about so many batches at a time: the more, the less is padding, and the more
# the host holds at once and the longer the devices wait for the first.
GROUP_BATCHES = 8


def packed_forward(params: Any, config: ModelConfig, packed: PackedTokens, **kwargs: Any) -> Output:
    """Forward pass of packed tokens; `kwargs` as in `Transformer.__call__`."""
    output = Transformer(config).apply(
        {"params": params}, packed.tokens, packed.positions, packed.visible_until,
        layout=packed.layout, **kwargs,
    )  # fmt: skip
    assert isinstance(output, Output)
    return output


def token_logprobs(
    params: Any,
    config: ModelConfig,
    hidden: Float[Array, "batch time width"],
    packed: PackedTokens,
    wanted: Bool[Array, "batch time"],
    temperature: Float[Array, ""] | float,
    *,
    chunk_length: int = 256,
    with_entropy: bool = False,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"] | None]:
    """Log-probability of each token given those before it on its path.

    Tokens whose value is wanted are moved to the front of their sequence, and logits exist for
    `chunk_length` places at a time, in the backward pass too (they are recomputed): neither is
    `[batch, time, vocab]` ever held, nor is anything computed for chunks of prompts and padding.

    Args:
      params: parameter pytree.
      config: the model.
      hidden: last hidden states of `packed`.
      packed: the tokens, and where the token before each lies.
      wanted: tokens whose values are asked for.
      temperature: divides the logits.
      chunk_length: places per chunk.
      with_entropy: also return the entropy of each token's distribution.

    Returns:
      `(logprobs, entropy)` in nats, float32; 0 where not wanted. Entropy is None if not asked for.
    """
    # Over `fsdp` once, not again for every chunk: nothing moves out of a branch. In float32, in
    # which its gradient adds up over chunks.
    matrix = gather_output_matrix(params)
    # Decided once and for all devices: those of `tensor` work on the same chunk together, and the
    # others would only wait for the one that skips the least.
    longest = wanted.sum(axis=1).max()
    evaluate = functools.partial(
        _chunk_by_chunk,
        config=config,
        chunk=min(chunk_length, wanted.shape[1]),
        with_entropy=with_entropy,
    )
    arrays: tuple[Any, ...] = (hidden, packed.tokens, packed.previous, wanted)
    if not cuts_rows(wanted.shape[0]):
        return evaluate(matrix, temperature, longest, *arrays)
    # By hand: the compiler would add up the gradient of the matrix over devices in every chunk. So
    # every device adds up its own chunks, and the sums are added up once.
    rows, whole = PartitionSpec(BATCH), PartitionSpec()
    return jax.shard_map(
        evaluate,
        in_specs=(whole, whole, whole, *[rows] * len(arrays)),
        out_specs=(rows, rows if with_entropy else None),
        axis_names=set(BATCH),
        check_vma=False,
    )(matrix, jnp.asarray(temperature, jnp.float32), longest, *arrays)


def _chunk_by_chunk(
    matrix: Any,
    temperature: Float[Array, ""] | float,
    longest: Int[Array, ""],
    hidden: Float[Array, "batch time width"],
    tokens: Int[Array, "batch time"],
    previous: Int[Array, "batch time"],
    wanted: Bool[Array, "batch time"],
    *,
    config: ModelConfig,
    chunk: int,
    with_entropy: bool,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"] | None]:
    """`token_logprobs` of some rows, `longest` of whose tokens are wanted at the most."""
    batch, time = tokens.shape
    num_chunks = -(-time // chunk)
    order = jnp.argsort(~wanted, axis=1, stable=True)
    previous = jnp.take_along_axis(previous, order, axis=1)

    def chunked(x):
        x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, num_chunks, chunk, *x.shape[2:]), 1, 0)

    def values(states, targets):
        logits = unembed(matrix, config, states) / temperature
        logits = constrain(logits, BATCH, None, "tensor")
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        if not with_entropy:
            return (chosen - normalizer,)
        mean_logit = jnp.sum(jnp.exp(logits - normalizer[..., None]) * logits, axis=-1)
        return chosen - normalizer, normalizer - mean_logit

    def nothing(states, targets):
        return (jnp.zeros(targets.shape, jnp.float32),) * (1 + with_entropy)

    def one_chunk(inputs):
        states, targets, is_needed = inputs
        return jax.lax.cond(is_needed, values, nothing, states, targets)

    inputs = (
        chunked(jnp.take_along_axis(hidden, previous[..., None], axis=1)),
        chunked(jnp.take_along_axis(tokens, order, axis=1)),
        chunk * jnp.arange(num_chunks) < longest,
    )
    outputs = jax.lax.map(jax.checkpoint(one_chunk, prevent_cse=False), inputs)
    back = jnp.argsort(order, axis=1)

    def whole(x):
        x = jnp.moveaxis(x, 0, 1).reshape(batch, num_chunks * chunk)[:, :time]
        return jnp.where(wanted, jnp.take_along_axis(x, back, axis=1), 0.0)

    logprobs, *entropy = map(whole, outputs)
    return logprobs, entropy[0] if with_entropy else None


@functools.partial(jax.jit, static_argnames=("config", "delta", "chunk_length"))
def score_packed(
    params: Any,
    config: ModelConfig,
    packed: PackedTokens,
    wanted: Bool[Array, "batch time"],
    step_ids: Int[Array, "batch time"] | None,
    temperature: Float[Array, ""] | float = 1.0,
    *,
    delta: int = 4,
    chunk_length: int = 256,
) -> Scores:
    """Scores packed tokens in one forward pass.

    Args:
      params: parameter pytree.
      config: the model.
      packed: the tokens.
      wanted: tokens whose log-probability and entropy are asked for; 0 elsewhere.
      step_ids: range of each token, ascending through all rows of a sequence, -1 for padding; asks
        for `fci`, of these ranges. Rows must then be packed one by one. Without it `fci` is zeros.
      temperature: of sampling; divides the logits.
      delta: least distance in steps for forward context influence (paper: 4).
      chunk_length: places whose logits exist at once.
    """
    output = packed_forward(params, config, packed, step_ids=step_ids, delta=delta)
    logprobs, entropy = token_logprobs(
        params, config, output.hidden, packed, wanted, temperature,
        chunk_length=chunk_length, with_entropy=True,
    )  # fmt: skip
    fci = jnp.zeros(wanted.shape, jnp.float32) if output.fci is None else output.fci
    assert entropy is not None
    return Scores(logprobs, entropy, fci)


def score(
    params: Any,
    config: ModelConfig,
    tokens: Int[ArrayLike, "batch time"],
    lengths: Int[ArrayLike, "batch"],
    step_ids: Int[ArrayLike, "batch time"],
    temperature: Float[Array, ""] | float = 1.0,
    *,
    delta: int = 4,
    with_fci: bool = True,
    chunk_length: int = 256,
) -> Scores:
    """Scores right-padded sequences, a row each, in one forward pass.

    Args:
      params: parameter pytree.
      config: the model.
      tokens: prompt and response.
      lengths: tokens of each sequence.
      step_ids: range of each token, -1 for padding (`branching.steps.segment_steps`).
      temperature: of sampling; divides the logits.
      delta: least distance in steps for forward context influence (paper: 4).
      with_fci: without it `fci` is zeros and the column sums are not computed.
      chunk_length: positions whose logits exist at once.

    Returns:
      log-probabilities and entropies of all tokens, 0 for the first and for padding.
    """
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    lengths = jnp.asarray(lengths)[:, None]
    packed = PackedTokens(
        tokens=jnp.asarray(tokens),
        positions=index,
        visible_until=jnp.where(index < lengths, lengths, 0),
        previous=jnp.maximum(index - 1, 0),
        layout="single",
    )
    return score_packed(
        params, config, packed, (index > 0) & (index < lengths), step_ids if with_fci else None,
        temperature, delta=delta, chunk_length=chunk_length,
    )  # fmt: skip


@dataclass(frozen=True)
class RowScores:
    """Scores of each row; host arrays, parts of those that were fetched.

    Attributes:
      logprobs, entropy: as in `Scores`, of the tokens asked for.
      fci: as in `Scores`, by range; empty where it was not asked for.
    """

    logprobs: list[Float[np.ndarray, "time"]]
    entropy: list[Float[np.ndarray, "time"]]
    fci: list[Float[np.ndarray, "step"]]


def score_rows(*args: Any, **kwargs: Any) -> RowScores:
    """`start_scoring`, and what it comes to."""
    return start_scoring(*args, **kwargs)()


def start_scoring(
    params: Any,
    config: ModelConfig,
    tokens: Int[np.ndarray, "row time"] | LazyRows,
    paths: Paths,
    first: Int[np.ndarray, "row"],
    step_ids: Int[np.ndarray, "row time"] | LazyRows | None,
    num_ranges: Int[np.ndarray, "row"],
    temperature: float,
    *,
    delta: int = 4,
    batch_tokens: int,
    pack_length: int,
    sharding: jax.sharding.Sharding | None = None,
    row_multiple: int = 1,
) -> Callable[[], RowScores]:
    """Scores any number of host rows, packed into batches of a few fixed shapes.

    The devices begin with the first group of problems while the host packs the next; once all are
    packed the host is free until it calls what is returned. Of several processes each lays out only
    what goes to its own devices.

    What rows share is computed once, unless `fci` is asked for: a row's column sums are those of
    its own queries alone.

    Args:
      params: parameter pytree.
      config: the model.
      tokens: prompt and response.
      paths: of these rows.
      first: tokens from here on get log-probability and entropy: those that the row shares with no
        other one, or fewer.
      step_ids: range of each token, -1 for padding; asks for `fci`.
      num_ranges: of each row; not read without `step_ids`.
      temperature: of sampling; divides the logits.
      delta: least distance in steps for forward context influence.
      batch_tokens: padded tokens of one batch, at most (`row_multiple` sequences at least).
      pack_length: tokens of a sequence.
      sharding: of a batch's sequences over devices.
      row_multiple: sequences of a batch are a multiple of it.

    Returns:
      a function that waits for the devices and returns what they say of all rows.
    """
    pending = []
    with_fci = step_ids is not None
    whole_batch = max(batch_tokens, row_multiple * pack_length)
    for rows in problem_groups(paths, GROUP_BATCHES * whole_batch):
        placement = place_paths(take_rows(paths, rows), pack_length, share=not with_fci)
        batches = deal_batches(placement, batch_tokens, row_multiple)
        own = [processes.own_rows(len(batch), sharding) for batch in batches]
        sequences = np.concatenate([batch[k] for batch, k in zip(batches, own, strict=True)])
        here, layout = placement.lay_out(sequences)
        here = rows[here]
        laid_out = tokens[here]
        index = np.arange(laid_out.shape[1])[None, :]
        wanted = (index >= first[here][:, None]) & (index < paths.length[here][:, None])
        ranges = None
        if step_ids is not None:
            ranges = _continuous_ranges(layout, step_ids[here])
            ranges[sequences < 0] = 0
        inputs = (layout.packed_tokens(laid_out), layout.gather(wanted), ranges)
        scores, begin = [], 0
        for batch, places in zip(batches, own, strict=True):
            part = slice(begin, begin + len(places))
            begin = part.stop
            sent = processes.rows_to_devices(take_rows(inputs, part), places, len(batch), sharding)
            scores.append(score_packed(params, config, *sent, temperature, delta=delta))
        pending.append((rows, placement, batches, scores))

    def finish() -> RowScores:
        nothing = [np.zeros(0, np.float32)] * len(paths.length)
        result = RowScores(list(nothing), list(nothing), list(nothing))
        while pending:
            # Arrays of the devices go as they are read.
            rows, placement, batches, scores = pending.pop(0)
            sequence, offset = placement.own_places()
            spans = {"logprobs": (offset + first[rows], offset + paths.length[rows])}
            spans["entropy"] = spans["logprobs"]
            if with_fci:
                begin = _first_ranges(sequence, offset, num_ranges[rows])
                spans["fci"] = (begin, begin + num_ranges[rows])
            batch_of, place_of = np.zeros((2, len(placement.used)), np.int64)
            for k, batch in enumerate(batches):
                there = np.flatnonzero(batch >= 0)
                batch_of[batch[there]], place_of[batch[there]] = k, there
            where = list(zip(batch_of[sequence].tolist(), place_of[sequence].tolist(), strict=True))
            for name, (begins, ends) in spans.items():
                arrays = processes.to_host([getattr(score, name) for score in scores])
                of_rows = getattr(result, name)
                spots = zip(rows.tolist(), where, begins.tolist(), ends.tolist(), strict=True)
                for row, (k, place), begin, end in spots:
                    piece = arrays[k][place, begin:end]
                    # Ranges are few, tokens most of what was fetched.
                    of_rows[row] = piece.copy() if name == "fci" else piece
        return result

    return finish


def _continuous_ranges(layout: Layout, step_ids: np.ndarray) -> np.ndarray:
    """Ranges of each sequence, numbered through its rows; -1 for padding."""
    packed = layout.gather(step_ids, -1)
    begins = np.ones(packed.shape, bool)
    begins[:, 1:] = (packed[:, 1:] != packed[:, :-1]) | (layout.row[:, 1:] != layout.row[:, :-1])
    return np.where(layout.row >= 0, np.cumsum(begins, axis=1) - 1, -1).astype(np.int32)


def _first_ranges(sequence: np.ndarray, offset: np.ndarray, num_ranges: np.ndarray) -> np.ndarray:
    """Where in its sequence's ranges each row's begin, as `_continuous_ranges` numbers them."""
    order = np.lexsort((offset, sequence))
    before = np.cumsum(num_ranges[order]) - num_ranges[order]
    first_of_sequence = np.searchsorted(sequence[order], sequence[order])
    result = np.empty_like(before)
    result[order] = before - before[first_of_sequence]
    return result
