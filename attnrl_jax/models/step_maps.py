"""Attention between steps, for looking at: the definition of step importance, head by head.

Training never needs it (the column sums of `models.attention` give the same influence in linear
memory); people do. Whole rows of the map exist for one block of queries at a time.

Suffixes as in `models.query_blocks`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from attnrl_jax.models.query_blocks import masked_logits, softmax
from attnrl_jax.models.tiling import StepWeights, cut


def step_maps(
    q_BTHD: Float[Array, "batch time head head_dim"],
    k_BKUD: Float[Array, "batch kv_head time head_dim"],
    visible_until: Int[Array, "batch time"],
    steps: StepWeights,
    num_ranges: int,
    block_length: int,
) -> Float[Array, "batch head step step"]:
    """Mean attention of the tokens of one range to those of another, for every head.

        M[h, j, k] = mean of A[h, q, p] over query tokens q in range j, key tokens p in range k

    (paper, section on attention-based branching). Memory beside the result grows with
    block_length x time. No gradient.

    Args:
      q_BTHD, k_BKUD: rotated queries and keys.
      visible_until: as in `models.attention`.
      steps: ranges of the tokens, and 1 / the size of each token's range; `delta` is not read.
      num_ranges: length of the step axes.
      block_length: rows of each key/value head that are worked on at once.
    """
    batch, time, heads, head_dim = q_BTHD.shape
    kv_heads = k_BKUD.shape[1]
    group = heads // kv_heads
    q_BTHD, k_BKUD = lax.stop_gradient((q_BTHD, k_BKUD))
    q = jnp.moveaxis(q_BTHD.reshape(batch, time, kv_heads, group, head_dim), 1, 3)
    queries = min(max(block_length // group, 1), time)
    # [batch, time, step]: a mean over a range is a product with this. -1 is no range.
    mean_over = jax.nn.one_hot(steps.step_ids, num_ranges) * steps.weights[..., None]

    def query_block(
        total: Array, inputs: tuple[Array, Array, Array]
    ) -> tuple[Float[Array, "batch kv_head group step step"], None]:
        i, q, own = inputs
        weights, _ = softmax(masked_logits(i, q, k_BKUD, visible_until))
        by_key = jnp.einsum("BKGTU,BUk->BKGTk", weights, mean_over, precision="highest")
        return total + jnp.einsum("BKGTk,BTj->BKGjk", by_key, own, precision="highest"), None

    blocks, own = cut(q, 3, queries), cut(mean_over, 1, queries)
    zeros = jnp.zeros((batch, kv_heads, group, num_ranges, num_ranges), jnp.float32)
    total, _ = lax.scan(query_block, zeros, (jnp.arange(len(blocks)), blocks, own))
    return total.reshape(batch, heads, num_ranges, num_ranges)
