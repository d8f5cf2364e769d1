"""The attention compass of one response, to be looked at: which step looks back at which.

Training knows each step's influence (`scoring`) and nothing else of attention. This is the whole
picture of one response: attention between all its steps, averaged over heads and for the heads that
give the influence.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnrl_jax.branching.importance import influence_from_steps
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import forward
from attnrl_jax.shapes import bucket_length

# Of the result and of the loop that makes it, over all layers and heads.
MOST_BYTES = 8 * 2**30


@dataclass(frozen=True)
class StepAttention:
    """Attention between the ranges of one sequence; range 0 is the prompt. Host arrays.

    Attributes:
      mean: M[j, k] averaged over layers and heads, where M is the mean attention of the tokens of
        range j to those of range k.
      strongest: column k is that of the layer and head which give FCI[k].
      layer, head: which these are.
      fci: forward context influence, no range zeroed: the sum of `strongest[j, k]` over
        j >= k + delta.
      delta: least distance in ranges that counts.
    """

    mean: Float[np.ndarray, "step step"]
    strongest: Float[np.ndarray, "step step"]
    layer: Int[np.ndarray, "step"]
    head: Int[np.ndarray, "step"]
    fci: Float[np.ndarray, "step"]
    delta: int


def step_attention(
    params: Any,
    config: ModelConfig,
    tokens: Int[np.ndarray, "time"],
    step_ids: Int[np.ndarray, "time"],
    *,
    delta: int = 4,
    length_multiple: int = 256,
) -> StepAttention:
    """Attention between the steps of one response (paper, section on attention-based branching).

    Args:
      params: parameter pytree.
      config: the model.
      tokens: prompt and response, no padding.
      step_ids: range of each token (`branching.steps.segment_steps`).
      delta: least distance in ranges for forward context influence.
      length_multiple: sequences are padded to a multiple of it, so that few programs are compiled.

    Raises:
      ValueError: no tokens, or so many steps that the result would not fit into 8 GiB.
    """
    if len(tokens) == 0 or len(tokens) != len(step_ids):
        raise ValueError(
            f"{len(tokens)} tokens and {len(step_ids)} step_ids: one for each, and some"
        )
    ranges = int(step_ids.max()) + 1
    padded = bucket_length(ranges, 16)
    size = 4 * config.num_layers * config.num_heads * padded**2
    if size > MOST_BYTES:
        raise ValueError(
            f"attention between {ranges} ranges in {config.num_layers} layers of "
            f"{config.num_heads} heads takes {size / 2**30:.1f} GiB, more than "
            f"{MOST_BYTES / 2**30:.0f}; give fewer, longer steps"
        )
    behind = bucket_length(len(tokens), length_multiple) - len(tokens)
    found = _attention_of(
        params, config, np.pad(tokens, (0, behind))[None], np.array([len(tokens)]),
        np.pad(step_ids, (0, behind), constant_values=-1)[None], delta, padded,
    )  # fmt: skip
    mean, strongest, layer, head, fci = (np.asarray(x) for x in found)
    kept = slice(ranges)
    return StepAttention(
        mean[kept, kept], strongest[kept, kept], layer[kept], head[kept], fci[kept], delta
    )


@functools.partial(jax.jit, static_argnames=("config", "delta", "ranges"))
def _attention_of(
    params: Any,
    config: ModelConfig,
    tokens: Int[Array, "1 time"],
    lengths: Int[Array, "1"],
    step_ids: Int[Array, "1 time"],
    delta: int,
    ranges: int,
) -> tuple[Array, ...]:
    output = forward(
        params, config, tokens, lengths, step_ids=step_ids, delta=delta, step_ranges=ranges
    )
    assert output.step_attention is not None
    maps = output.step_attention[:, 0]
    layers, heads = maps.shape[:2]
    maps = maps.reshape(layers * heads, ranges, ranges)
    influence = influence_from_steps(maps, delta)
    best = jnp.argmax(influence, axis=0)
    strongest = jnp.take_along_axis(maps, best[None, None, :], axis=0)[0]
    return maps.mean(axis=0), strongest, best // heads, best % heads, influence.max(axis=0)
