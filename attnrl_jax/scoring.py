"""One forward pass over given tokens: log-probabilities, entropy and step importance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import Output, Transformer, unembed
from attnrl_jax.packing import (
    Layout,
    batch_slices,
    pack_paths,
    problem_groups,
    take_rows,
    take_sequences,
)
from attnrl_jax.sharding import BATCH, constrain, gather_output_matrix
from attnrl_jax.types import ArrayLike, PackedTokens, Paths, Scores

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
    batch, time = packed.tokens.shape
    chunk = min(chunk_length, time)
    num_chunks = -(-time // chunk)
    order = jnp.argsort(~wanted, axis=1, stable=True)
    previous = jnp.take_along_axis(packed.previous, order, axis=1)

    def chunked(x):
        x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, num_chunks, chunk, *x.shape[2:]), 1, 0)

    # Over `fsdp` once, not again for every chunk: nothing moves out of a branch. In float32, in
    # which its gradient adds up over chunks.
    output_params = gather_output_matrix(params)

    def values(states, targets):
        logits = unembed(output_params, config, states) / temperature
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
        states, targets, is_wanted = inputs
        return jax.lax.cond(jnp.any(is_wanted), values, nothing, states, targets)

    inputs = (
        chunked(jnp.take_along_axis(hidden, previous[..., None], axis=1)),
        chunked(jnp.take_along_axis(packed.tokens, order, axis=1)),
        chunked(jnp.take_along_axis(wanted, order, axis=1)),
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


def score_rows(*args: Any, **kwargs: Any) -> Scores:
    """`start_scoring`, and what it comes to."""
    return start_scoring(*args, **kwargs)()


def start_scoring(
    params: Any,
    config: ModelConfig,
    tokens: Int[np.ndarray, "row time"],
    paths: Paths,
    wanted: Bool[np.ndarray, "row time"],
    step_ids: Int[np.ndarray, "row time"] | None,
    temperature: float,
    *,
    delta: int = 4,
    batch_tokens: int,
    pack_length: int,
    sharding: jax.sharding.Sharding | None = None,
    row_multiple: int = 1,
) -> Callable[[], Scores]:
    """Scores any number of host rows, packed into batches of a few fixed shapes.

    The devices begin with the first group of problems while the host packs the next; once all are
    packed the host is free until it calls what is returned.

    What rows share is computed once, unless `fci` is asked for: a row's column sums are those of
    its own queries alone.

    Args:
      params: parameter pytree.
      config: the model.
      tokens: prompt and response.
      paths: of these rows.
      wanted: tokens whose log-probability and entropy are asked for; the rest are 0.
      step_ids: range of each token, -1 for padding; asks for `fci`. None: it is zeros.
      temperature: of sampling; divides the logits.
      delta: least distance in steps for forward context influence.
      batch_tokens: padded tokens of one batch, at most (`row_multiple` sequences at least).
      pack_length: tokens of a sequence.
      sharding: of a batch's sequences over devices.
      row_multiple: sequences of a batch are a multiple of it.

    Returns:
      a function that waits for the devices and returns host arrays of the given rows and width.
    """
    pending = []
    whole_batch = max(batch_tokens, row_multiple * pack_length)
    for rows in problem_groups(paths, GROUP_BATCHES * whole_batch):
        layout = pack_paths(take_rows(paths, rows), pack_length, share=step_ids is None)
        ranges = None if step_ids is None else _continuous_ranges(layout, step_ids[rows])
        inputs = (layout.packed_tokens(tokens[rows]), layout.gather(wanted[rows]), ranges)
        scores = []
        for part in batch_slices(len(layout.row), pack_length, batch_tokens, row_multiple):
            batch = jax.device_put(take_sequences(inputs, part), sharding)
            scores.append(score_packed(params, config, *batch, temperature, delta=delta))
        pending.append((rows, layout, ranges, scores))

    def finish() -> Scores:
        time = tokens.shape[1]
        result = Scores(*(np.zeros(tokens.shape, np.float32) for _ in fields(Scores)))
        for rows, layout, ranges, scores in pending:
            of_group = jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(scores))
            asked = wanted[rows]
            result.logprobs[rows] = np.where(asked, layout.spread(of_group.logprobs, time), 0.0)
            result.entropy[rows] = np.where(asked, layout.spread(of_group.entropy, time), 0.0)
            if step_ids is not None and ranges is not None:
                result.fci[rows] = _ranges_of_rows(of_group.fci, layout, ranges, step_ids[rows])
        return result

    return finish


def _continuous_ranges(layout: Layout, step_ids: np.ndarray) -> np.ndarray:
    """Ranges of each sequence, numbered through its rows; -1 for padding."""
    packed = layout.gather(step_ids, -1)
    begins = np.ones(packed.shape, bool)
    begins[:, 1:] = (packed[:, 1:] != packed[:, :-1]) | (layout.row[:, 1:] != layout.row[:, :-1])
    return np.where(layout.row >= 0, np.cumsum(begins, axis=1) - 1, -1).astype(np.int32)


def _ranges_of_rows(
    packed: np.ndarray, layout: Layout, ranges: np.ndarray, step_ids: np.ndarray
) -> np.ndarray:
    """Values by packed range as values by range of each row; 0 for ranges past its last."""
    capacity = layout.row.shape[1]
    begin = layout.offsets[:, -1:]
    first = begin // capacity * capacity + ranges.reshape(-1)[begin]
    index = np.arange(step_ids.shape[1])[None, :]
    inside = index <= step_ids.max(axis=1, keepdims=True)
    return np.where(inside, packed.reshape(-1)[np.where(inside, first + index, 0)], 0.0)
