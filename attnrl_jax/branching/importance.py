"""Forward context influence (FCI): how much later steps look back at a step.

With A[l, h] the post-softmax causal attention of layer l, head h, over one sequence on its own,

    M[l, h, j, k] = mean of A[l, h, q, p] over query tokens q in step j, key tokens p in step k
    y[l, h, k]    = sum over j >= k + delta of M[l, h, j, k]
    FCI[k]        = max over l, h of y[l, h, k]

(paper, section on attention-based branching). The same number without the map is

    c[l, h, p] = sum over q with step(q) >= step(p) + delta of A[l, h, q, p] / |step(q)|
    y[l, h, k] = mean of c[l, h, p] over p in step k

which needs one weight per query token (`query_weights`), column sums that a blockwise attention
pass can add up, and one mean per step (`pool_columns`). `influence_from_maps` is the first form,
kept as the readable reference of the second.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnrl_jax.branching.steps import step_bounds, token_positions
from attnrl_jax.types import ArrayLike


def query_weights(step_ids: Int[ArrayLike, "*batch time"]) -> Float[ArrayLike, "*batch time"]:
    """1 / |step(q)| of each query token q; 0 for padding (all behind). Sums to one over a range."""
    xp = step_ids.__array_namespace__()
    # One range more than tokens, so that no prompt at all is no special case.
    starts, ends = step_bounds(step_ids, num_ranges=step_ids.shape[-1] + 1)
    size = xp.take_along_axis(ends - starts, xp.maximum(step_ids, 0), axis=-1)
    weight = 1.0 / xp.astype(xp.maximum(size, 1), xp.float32)
    return xp.where(step_ids >= 0, weight, xp.zeros_like(weight))


def pool_columns(
    columns: Float[Array, "*batch_and_heads time"],
    step_ids: Int[Array, "*batch time"],
    num_ranges: int | None = None,
) -> Float[Array, "*batch_and_heads step"]:
    """Mean of the key tokens' columns inside each range; 0 for ranges past the last.

        y[.., k] = mean of c[.., p] over p in range k

    Memory is linear in time whatever the number of steps.

    Args:
      columns: one number per key token. Axes between those of the batch and time (layers, heads)
        share the sequence's ranges.
      step_ids: range of each token, never falling along time; -1 for padding, all of it behind.
      num_ranges: length of the step axis; by default that of the time axis.
    """
    if step_ids.ndim > 1:
        return jax.vmap(lambda c, s: pool_columns(c, s, num_ranges))(columns, step_ids)
    num_ranges = step_ids.shape[-1] if num_ranges is None else num_ranges
    # Padding goes to a range of its own, which is cut off.
    ids = jnp.where(step_ids < 0, num_ranges, step_ids)
    sums = jax.ops.segment_sum(jnp.moveaxis(columns, -1, 0), ids, num_segments=num_ranges + 1)
    starts, ends = step_bounds(step_ids, num_ranges)
    size = jnp.maximum(ends - starts, 1).astype(columns.dtype)
    sums = jnp.moveaxis(sums[:num_ranges], 0, -1)
    return sums / jnp.broadcast_to(size, sums.shape)


def influence_from_maps(
    maps: Float[ArrayLike, "layer head query key"],
    step_ids: Int[ArrayLike, "time"],
    delta: int,
    num_ranges: int | None = None,
) -> Float[Array, "layer head step"]:
    """y[l, h, k] from whole attention maps of one sequence (the first form above).

    Args:
      maps: post-softmax attention, zero above the diagonal.
      step_ids: range of each token, -1 for padding; query and key are the same tokens.
      delta: how many ranges ahead a query must be to count (4 in the paper); 0 counts a step's
        attention to itself. The last `delta` ranges have nothing that far ahead and get 0.
      num_ranges: length of the step axis; by default that of the time axis.
    """
    step_ids = jnp.asarray(step_ids)
    num_ranges = step_ids.shape[-1] if num_ranges is None else num_ranges
    membership = jax.nn.one_hot(step_ids, num_ranges, dtype=jnp.float32)
    size = jnp.maximum(membership.sum(axis=0, keepdims=True), 1.0)
    mean_over = membership / size
    means = jnp.einsum(
        "qj,lhqp,pk->lhjk", mean_over, jnp.asarray(maps), mean_over, precision="highest"
    )
    return influence_from_steps(means, delta)


def influence_from_steps(
    step_attention: Float[ArrayLike, "*heads step step"], delta: int
) -> Float[Array, "*heads step"]:
    """y[k] = sum over j >= k + delta of M[j, k], of every head.

    Args:
      step_attention: mean attention M of the tokens of range j to those of range k.
      delta: as in `influence_from_maps`.
    """
    step_attention = jnp.asarray(step_attention)
    ahead = jnp.tri(step_attention.shape[-1], k=-delta)
    return jnp.einsum("...jk,jk->...k", step_attention, ahead, precision="highest")


def forward_context_influence(
    maps: Float[ArrayLike, "layer head query key"],
    step_ids: Int[ArrayLike, "time"],
    delta: int,
    num_ranges: int | None = None,
) -> Float[Array, "step"]:
    """FCI[k] = max over layers and heads of `influence_from_maps`; no range is zeroed yet."""
    return influence_from_maps(maps, step_ids, delta, num_ranges).max(axis=(0, 1))


def mask_candidates(
    fci: Float[ArrayLike, "*batch step"],
    zero_first: bool,
    first_after_think: Int[ArrayLike, "*batch"] | None = None,
) -> Float[ArrayLike, "*batch step"]:
    """FCI with the ranges zeroed that are no candidates to branch at (they still attend).

    Zeroed are the prompt, with `zero_first` the response's first step, and every after-think step
    where `first_after_think` is given (released program).

    Args:
      fci: forward context influence by range.
      zero_first: whether to zero the first response step.
      first_after_think: first after-think range of each sequence, from `end_of_thinking`.
    """
    xp = fci.__array_namespace__()
    ranges = token_positions(fci)
    kept = ranges >= (2 if zero_first else 1)
    if first_after_think is not None:
        kept = kept & (ranges < first_after_think[..., None])
    return xp.where(kept, fci, xp.zeros_like(fci))
