"""Causal attention by tiles of queries and keys, in plain XLA: forward, backward, column sums.

The form of a CPU (`query_blocks` has that of accelerators). Tiles that no query sees are not
visited: which ones is data (packed sequences and trees hide most of a long sequence from each
other), so the loops over keys have as many turns as a block of queries has visible tiles. A tile
counts as seen if one sequence of the batch sees it: `models.attention` gives sequences one by one,
so that each skips its own. Softmax is taken as in flash attention (arXiv 2307.08691): a running
maximum and sum per query, kept as their log-sum-exp for the backward pass. No buffer grows faster
than time.

Suffixes name the axes: B batch, T query time, U key time, H heads, K key/value heads, G query heads
of one key/value head, D head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnrl_jax.models.tiling import MASKED, StepWeights, cut, join


class _Blocks(NamedTuple):
    """How the sequence is cut, and which tiles each block of queries visits.

    Attributes:
      queries, keys: length of a block of each.
      visible_until: by block of keys, `[block, batch, key]`.
      order: by block of queries, the blocks of keys that it sees in any sequence of the batch,
        ascending, then the others.
      turns: how many it sees.
    """

    queries: int
    keys: int
    visible_until: Int[Array, "key_block batch key"]
    order: Int[Array, "query_block key_block"]
    turns: Int[Array, "query_block"]


def _blocks(visible_until: Int[Array, "batch time"], block_length: int, group: int) -> _Blocks:
    time = visible_until.shape[1]
    keys = min(block_length, time)
    # A tile has about block_length rows for each key/value head.
    queries = min(max(block_length // group, 1), time)
    until = cut(visible_until, 1, keys)
    first_query = jnp.arange(-(-time // queries)) * queries
    first_key = jnp.arange(until.shape[0]) * keys
    sees = (first_key[None, :] < first_query[:, None] + queries) & (
        until.max(axis=(1, 2))[None, :] > first_query[:, None]
    )
    order = jnp.argsort(~sees, axis=1, stable=True).astype(jnp.int32)
    return _Blocks(queries, keys, until, order, sees.sum(axis=1).astype(jnp.int32))


def _visible(blocks: _Blocks, i: Array, j: Array) -> Bool[Array, "batch 1 1 query key"]:
    query = (i * blocks.queries + jnp.arange(blocks.queries))[None, :, None]
    key = (j * blocks.keys + jnp.arange(blocks.keys))[None, None, :]
    return ((key <= query) & (query < blocks.visible_until[j][:, None, :]))[:, None, None]


def forward(
    q_BKGTD: Array,
    k_BKUD: Array,
    v_BKUD: Array,
    visible_until: Int[Array, "batch time"],
    block_length: int,
    steps: StepWeights | None = None,
) -> tuple[Array, Array, Array | None]:
    """Outputs `[B, K, G, T, D]`, log-sum-exp `[B, K, G, T]` and, with `steps`, column sums.

    The column sums come from the same sweep: the exponentials of one block of queries are kept
    until their sums are known.
    """
    batch, kv_heads, group, time, _ = q_BKGTD.shape
    scale = q_BKGTD.shape[-1] ** -0.5
    blocks = _blocks(visible_until, block_length, group)
    num_keys = blocks.order.shape[1]
    k_blocks, v_blocks = cut(k_BKUD, 2, blocks.keys), cut(v_BKUD, 2, blocks.keys)
    rows = (batch, kv_heads, group, blocks.queries)
    if steps is not None:
        query_steps = tuple(cut(x, 1, blocks.queries) for x in (steps.step_ids, steps.weights))
        key_steps = cut(steps.step_ids, 1, blocks.keys)

    def query_block(carry, inputs):
        i, q, order, turns, own_steps = inputs

        def tile(turn, state):
            largest, total, out, kept = state
            j = order[turn]
            logits = jnp.einsum(
                "BKGTD,BKUD->BKGTU", q, k_blocks[j], preferred_element_type=jnp.float32
            )
            logits = jnp.where(_visible(blocks, i, j), logits, MASKED)
            new = jnp.maximum(largest, logits.max(axis=-1))
            shrink = jnp.exp(scale * (largest - new))
            weights = jnp.exp(scale * (logits - new[..., None]))
            total = total * shrink + weights.sum(axis=-1)
            update = jnp.einsum(
                "BKGTU,BKUD->BKGTD", weights.astype(v_BKUD.dtype), v_blocks[j],
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            if kept is not None:
                kept = (kept[0].at[turn].set(weights), kept[1].at[turn].set(new))
            return new, total, out * shrink[..., None] + update, kept

        columns, kept = carry
        start = (
            jnp.full(rows, MASKED, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros((*rows, v_BKUD.shape[-1]), jnp.float32),
            kept,
        )
        largest, total, out, kept = jax.lax.fori_loop(0, turns, tile, start)
        # Rows that see nothing (padding) have added up what is hidden: they are 0.
        real = largest > MASKED
        inverse = jnp.where(real, 1 / jnp.where(real, total, 1.0), 0.0)
        if steps is not None:
            own_ids, own_weights = own_steps
            factor = inverse * own_weights[:, None, None]

            def add_columns(turn, columns):
                j = order[turn]
                ahead = own_ids[:, :, None] >= key_steps[j][:, None, :] + steps.delta
                scaled = factor * jnp.exp(scale * (kept[1][turn] - largest))
                weighted = jnp.where(ahead[:, None, None], kept[0][turn] * scaled[..., None], 0.0)
                return columns.at[j].add(weighted.sum(axis=3))

            columns = jax.lax.fori_loop(0, turns, add_columns, columns)
        # Far above every logit where nothing is seen, so that the backward pass finds 0 there.
        logsumexp = jnp.where(real, scale * largest + jnp.log(jnp.where(real, total, 1.0)), -MASKED)
        out = (out * inverse[..., None]).astype(v_BKUD.dtype)
        return (columns, kept), (out, logsumexp)

    carry: Any = (None, None)
    if steps is not None:
        # What is kept is overwritten by every block of queries: allocated once.
        carry = (
            jnp.zeros((num_keys, batch, kv_heads, group, blocks.keys), jnp.float32),
            (
                jnp.zeros((num_keys, *rows, blocks.keys), jnp.float32),
                jnp.zeros((num_keys, *rows), jnp.float32),
            ),
        )
    inputs = (
        jnp.arange(blocks.order.shape[0]),
        cut(q_BKGTD, 3, blocks.queries),
        blocks.order,
        blocks.turns,
        query_steps if steps is not None else None,
    )
    (columns, _), (out, logsumexp) = jax.lax.scan(query_block, carry, inputs)
    if columns is not None:
        columns = join(columns, 3, time)
    return join(out, 3, time), join(logsumexp, 3, time), columns


def backward(
    q_BKGTD: Array,
    k_BKUD: Array,
    v_BKUD: Array,
    visible_until: Int[Array, "batch time"],
    out_BKGTD: Array,
    logsumexp: Float[Array, "batch kv_head group time"],
    d_out_BKGTD: Array,
    block_length: int,
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values (flash attention 2, algorithm 2)."""
    group, time, head_dim = q_BKGTD.shape[2:]
    scale = head_dim**-0.5
    blocks = _blocks(visible_until, block_length, group)
    k_blocks, v_blocks = cut(k_BKUD, 2, blocks.keys), cut(v_BKUD, 2, blocks.keys)
    mean = jnp.sum(d_out_BKGTD.astype(jnp.float32) * out_BKGTD.astype(jnp.float32), axis=-1)

    def query_block(carry, inputs):
        i, q, d_out, logsumexp, mean, order, turns = inputs

        def tile(turn, state):
            d_q, d_k, d_v = state
            j = order[turn]
            k, v = k_blocks[j], v_blocks[j]
            logits = jnp.einsum("BKGTD,BKUD->BKGTU", q, k, preferred_element_type=jnp.float32)
            d_weights = jnp.einsum(
                "BKGTD,BKUD->BKGTU", d_out, v, preferred_element_type=jnp.float32
            )
            weights = jnp.exp(scale * logits - logsumexp[..., None])
            weights = jnp.where(_visible(blocks, i, j), weights, 0.0)
            d_logits = (scale * weights * (d_weights - mean[..., None])).astype(q.dtype)
            weights = weights.astype(q.dtype)
            d_v = d_v.at[j].add(
                jnp.einsum("BKGTU,BKGTD->BKUD", weights, d_out, preferred_element_type=jnp.float32)
            )
            d_k = d_k.at[j].add(
                jnp.einsum("BKGTU,BKGTD->BKUD", d_logits, q, preferred_element_type=jnp.float32)
            )
            d_q = d_q + jnp.einsum(
                "BKGTU,BKUD->BKGTD", d_logits, k, preferred_element_type=jnp.float32
            )
            return d_q, d_k, d_v

        state = (jnp.zeros(q.shape, jnp.float32), *carry)
        d_q, d_k, d_v = jax.lax.fori_loop(0, turns, tile, state)
        return (d_k, d_v), d_q.astype(q.dtype)

    inputs = (
        jnp.arange(blocks.order.shape[0]),
        *(cut(x, 3, blocks.queries) for x in (q_BKGTD, d_out_BKGTD, logsumexp, mean)),
        blocks.order,
        blocks.turns,
    )
    zeros = jnp.zeros(k_blocks.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(query_block, (zeros, zeros), inputs)
    return (
        join(d_q, 3, time),
        join(d_k, 2, time).astype(k_BKUD.dtype),
        join(d_v, 2, time).astype(v_BKUD.dtype),
    )
