"""Causal attention on an accelerator, in plain XLA: a block of queries against all earlier keys.

The same numbers as `blockwise`, in few large turns: an accelerator waits longer for the start of a
small tile, and for the host that reads how many are left, than for what that tile would have saved.
Every loop's length is known when the program is compiled. Queries are cut into bands, and each band
has one bound on its keys: up to an eighth more than the causal half of the map is computed, and
what packed rows and trees hide inside that half is computed and masked.

Softmax is taken over the whole row of a query, so that attention is normalised where it is summed.
Memory grows with block_length x time for each key/value head of a sequence.

Suffixes name the axes: B batch, T query time, U key time, K key/value heads, G query heads of one
key/value head, D head_dim.
"""

from __future__ import annotations

from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

from attnrl_jax.models.tiling import MASKED, StepWeights, cut, join

# More bands compute less that is masked, and compile longer.
BANDS = 8


def bands(time: int, block_length: int, group: int) -> tuple[int, list[tuple[slice, int]]]:
    """Queries of a block, and of each band its blocks and the number of keys that they can see."""
    queries = min(max(block_length // group, 1), time)
    blocks = -(-time // queries)
    size = -(-blocks // BANDS)
    starts = range(0, blocks, size)
    return queries, [
        (slice(first, min(first + size, blocks)), min((first + size) * queries, time))
        for first in starts
    ]


def masked_logits(i: Array, q: Array, k: Array, visible_until: Array) -> Array:
    """Scaled float32 logits of block i `[B, K, G, T, U]`, `MASKED` where a key is not visible."""
    query = (i * q.shape[3] + jnp.arange(q.shape[3]))[None, :, None]
    key = jnp.arange(k.shape[2])[None, None, :]
    visible = (key <= query) & (query < visible_until[:, None, :])
    logits = jnp.einsum("BKGTD,BKUD->BKGTU", q, k, preferred_element_type=jnp.float32)
    return jnp.where(visible[:, None, None], q.shape[-1] ** -0.5 * logits, MASKED)


def softmax(logits: Array) -> tuple[Array, Array]:
    """Attention and log-sum-exp; of queries that see nothing (padding) 0 and -MASKED."""
    largest = logits.max(axis=-1)
    total = jnp.exp(logits - largest[..., None]).sum(axis=-1)
    logsumexp = jnp.where(largest > MASKED, largest + jnp.log(total), -MASKED)
    return jnp.exp(logits - logsumexp[..., None]), logsumexp


def forward(
    q_BKGTD: Array,
    k_BKUD: Array,
    v_BKUD: Array | None,
    visible_until: Int[Array, "batch time"],
    block_length: int,
    steps: StepWeights | None = None,
) -> tuple[Array | None, Array, Array | None]:
    """Outputs `[B, K, G, T, D]`, log-sum-exp `[B, K, G, T]` and, with `steps`, column sums.

    Without values there are no outputs.
    """
    batch, kv_heads, group, time, _ = q_BKGTD.shape
    queries, parts = bands(time, block_length, group)
    q_blocks = cut(q_BKGTD, 3, queries)
    columns = None
    step_blocks = None
    if steps is not None:
        columns = jnp.zeros((batch, kv_heads, group, time), jnp.float32)
        step_blocks = (cut(steps.step_ids, 1, queries), cut(steps.weights, 1, queries))
    outs, logsumexps = [], []
    for blocks, keys in parts:
        k, until = k_BKUD[:, :, :keys], visible_until[:, :keys]
        v = None if v_BKUD is None else v_BKUD[:, :, :keys]

        def query_block(columns, inputs, k=k, v=v, until=until):
            i, q, own_steps = inputs
            weights, logsumexp = softmax(masked_logits(i, q, k, until))
            if steps is not None:
                own_ids, own_weights = own_steps
                ahead = own_ids[:, :, None] >= steps.step_ids[:, None, : k.shape[2]] + steps.delta
                factor = jnp.where(ahead, own_weights[:, :, None], 0.0)[:, None, None]
                columns = columns + (weights * factor).sum(axis=3)
            if v is None:
                return columns, (None, logsumexp)
            out = jnp.einsum(
                "BKGTU,BKUD->BKGTD", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            return columns, (out.astype(v.dtype), logsumexp)

        own_steps = None
        if step_blocks is not None:
            own_steps = tuple(x[blocks] for x in step_blocks)
        inputs = (jnp.arange(blocks.start, blocks.stop), q_blocks[blocks], own_steps)
        start = None if columns is None else columns[..., :keys]
        summed, (out, logsumexp) = lax.scan(query_block, start, inputs)
        if columns is not None:
            columns = columns.at[..., :keys].set(summed)
        outs.append(out)
        logsumexps.append(logsumexp)
    logsumexp = join(jnp.concatenate(logsumexps), 3, time)
    out = None if v_BKUD is None else join(jnp.concatenate(outs), 3, time)
    return out, logsumexp, columns


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
    queries, parts = bands(time, block_length, group)
    mean = jnp.sum(d_out_BKGTD.astype(jnp.float32) * out_BKGTD.astype(jnp.float32), axis=-1)
    by_query = [cut(x, 3, queries) for x in (q_BKGTD, d_out_BKGTD, logsumexp, mean)]
    d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in (k_BKUD, v_BKUD))
    d_qs = []
    for blocks, keys in parts:
        k, v, until = k_BKUD[:, :, :keys], v_BKUD[:, :, :keys], visible_until[:, :keys]

        def query_block(carry, inputs, k=k, v=v, until=until):
            d_k, d_v = carry
            i, q, d_out, logsumexp, mean = inputs
            weights = jnp.exp(masked_logits(i, q, k, until) - logsumexp[..., None])
            d_weights = jnp.einsum(
                "BKGTD,BKUD->BKGTU", d_out, v, preferred_element_type=jnp.float32
            )
            d_logits = (scale * weights * (d_weights - mean[..., None])).astype(q.dtype)
            weights = weights.astype(q.dtype)
            d_v = d_v + jnp.einsum(
                "BKGTU,BKGTD->BKUD", weights, d_out, preferred_element_type=jnp.float32
            )
            d_k = d_k + jnp.einsum(
                "BKGTU,BKGTD->BKUD", d_logits, q, preferred_element_type=jnp.float32
            )
            d_q = jnp.einsum("BKGTU,BKUD->BKGTD", d_logits, k, preferred_element_type=jnp.float32)
            return (d_k, d_v), d_q.astype(q.dtype)

        inputs = (jnp.arange(blocks.start, blocks.stop), *(x[blocks] for x in by_query))
        start = (d_k[:, :, :keys], d_v[:, :, :keys])
        (band_k, band_v), d_q = lax.scan(query_block, start, inputs)
        d_k, d_v = d_k.at[:, :, :keys].set(band_k), d_v.at[:, :, :keys].set(band_v)
        d_qs.append(d_q)
    d_q = join(jnp.concatenate(d_qs), 3, time)
    return d_q, d_k.astype(k_BKUD.dtype), d_v.astype(v_BKUD.dtype)


def column_sums(
    q_BKGTD: Array,
    k_BKUD: Array,
    visible_until: Int[Array, "batch time"],
    steps: StepWeights,
    block_length: int,
) -> Float[Array, "batch kv_head group time"]:
    """The column sums of `forward`, for where a kernel made the outputs.

    Attention is normalised anew, in float32. The log-sum-exp that such a kernel returns may be
    rounded: jax rounds cuDNN's to bfloat16, and the row of a query whose log-sum-exp is near 64
    would be wrong by up to 13 %.
    """
    columns = forward(q_BKGTD, k_BKUD, None, visible_until, block_length, steps)[2]
    assert columns is not None
    return columns
