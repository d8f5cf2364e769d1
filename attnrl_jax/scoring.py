"""One forward pass over given tokens: log-probabilities, entropy and step importance."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import forward, unembed
from attnrl_jax.shapes import bucket_length, pad_rows
from attnrl_jax.sharding import BATCH, constrain
from attnrl_jax.types import ArrayLike, Scores


def token_logprobs(
    params: Any,
    config: ModelConfig,
    hidden: Float[Array, "batch time width"],
    tokens: Int[ArrayLike, "batch time"],
    temperature: Float[Array, ""] | float,
    *,
    chunk_length: int = 256,
    with_entropy: bool = False,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"] | None]:
    """Log-probability of each token given those before it, chunked over time.

    Logits exist for `chunk_length` positions at a time, in the backward pass too (they are
    recomputed), so that `[batch, time, vocab]` is never held.

    Args:
      params: parameter pytree.
      config: the model.
      hidden: last hidden states of `tokens`.
      tokens: ids.
      temperature: divides the logits.
      chunk_length: positions per chunk.
      with_entropy: also return the entropy of each token's distribution.

    Returns:
      `(logprobs, entropy)` in nats, float32; 0 for the first token. Entropy is None if not
      asked for.
    """
    batch, time = tokens.shape
    predictions = time - 1
    chunk = min(chunk_length, max(predictions, 1))
    num_chunks = max(-(-predictions // chunk), 1)
    padding = num_chunks * chunk - predictions

    def chunked(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, num_chunks, chunk, *x.shape[2:]), 1, 0)

    def one_chunk(inputs):
        states, targets = inputs
        logits = unembed(params, config, states) / temperature
        logits = constrain(logits, BATCH, None, "tensor")
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        if not with_entropy:
            return chosen - normalizer, None
        mean_logit = jnp.sum(jnp.exp(logits - normalizer[..., None]) * logits, axis=-1)
        return chosen - normalizer, normalizer - mean_logit

    inputs = (chunked(hidden[:, :-1]), chunked(tokens[:, 1:]))
    if num_chunks == 1:
        outputs = jax.tree.map(lambda x: x[None], one_chunk(jax.tree.map(lambda x: x[0], inputs)))
    else:
        outputs = jax.lax.map(jax.checkpoint(one_chunk, prevent_cse=False), inputs)

    def whole(x):
        x = jnp.moveaxis(x, 0, 1).reshape(batch, num_chunks * chunk)[:, :predictions]
        return jnp.pad(x, [(0, 0), (1, 0)])

    logprobs, entropy = jax.tree.map(whole, outputs)
    return logprobs, entropy


@functools.partial(jax.jit, static_argnames=("config", "delta", "with_fci", "chunk_length"))
def score(
    params: Any,
    config: ModelConfig,
    tokens: Int[Array, "batch time"],
    lengths: Int[Array, "batch"],
    step_ids: Int[Array, "batch time"],
    temperature: Float[Array, ""] | float = 1.0,
    *,
    delta: int = 4,
    with_fci: bool = True,
    chunk_length: int = 256,
) -> Scores:
    """Scores right-padded sequences in one forward pass.

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
    """
    output = forward(
        params, config, tokens, lengths, step_ids=step_ids if with_fci else None, delta=delta
    )
    logprobs, entropy = token_logprobs(
        params,
        config,
        output.hidden,
        tokens,
        temperature,
        chunk_length=chunk_length,
        with_entropy=True,
    )
    inside = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
    fci = jnp.zeros(tokens.shape, jnp.float32) if output.fci is None else output.fci
    assert entropy is not None
    return Scores(jnp.where(inside, logprobs, 0.0), jnp.where(inside, entropy, 0.0), fci)


def score_rows(
    params: Any,
    config: ModelConfig,
    tokens: Int[np.ndarray, "row time"],
    lengths: Int[np.ndarray, "row"],
    step_ids: Int[np.ndarray, "row time"],
    temperature: float,
    *,
    delta: int,
    with_fci: bool,
    batch_rows: int,
    length_multiple: int,
    sharding: jax.sharding.Sharding | None = None,
    row_multiple: int = 1,
) -> Scores:
    """`score` for any number of host rows, in batches of a few fixed shapes.

    Rows are sorted by length, so that short ones share short batches; results come back in the
    given order as host arrays of the given width.

    Args:
      params: parameter pytree.
      config: the model.
      tokens, lengths, step_ids, temperature, delta, with_fci: as in `score`.
      batch_rows: rows of one batch; the last one is padded with empty rows.
      length_multiple: widths are rounded up to it.
      sharding: of a batch's rows over devices.
      row_multiple: rows of a batch are rounded up to it.
    """
    batch_rows = bucket_length(batch_rows, row_multiple)
    rows, time = tokens.shape
    result = Scores(*(np.zeros((rows, time), np.float32) for _ in range(3)))
    order = np.argsort(lengths, kind="stable")
    pending = []
    for start in range(0, rows, batch_rows):
        chosen = order[start : start + batch_rows]
        width = bucket_length(int(lengths[chosen].max()), length_multiple)
        batch = (
            pad_rows(tokens[chosen], batch_rows, width, 0),
            pad_rows(lengths[chosen], batch_rows, None, 0),
            pad_rows(step_ids[chosen], batch_rows, width, -1),
        )
        if sharding is not None:
            batch = jax.device_put(batch, sharding)
        pending.append(
            (chosen, score(params, config, *batch, temperature, delta=delta, with_fci=with_fci))
        )
    # Read back only after everything is dispatched.
    for chosen, scores in pending:
        for target, source in zip(
            (result.logprobs, result.entropy, result.fci),
            jax.device_get((scores.logprobs, scores.entropy, scores.fci)),
            strict=True,
        ):
            width = min(time, source.shape[1])
            target[chosen, :width] = source[: len(chosen), :width]
    return result
