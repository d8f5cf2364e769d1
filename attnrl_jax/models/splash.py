"""Attention on TPU: the splash kernels that ship with jax, and a kernel of ours for column sums.

Splash attention knows causal masks and segments: rows packed behind each other, not trees. Each
row's tokens share one `visible_until`, which therefore is the segment id.

Suffixes name the axes: B batch, T query time, U key time, K key/value heads, G query heads of one
key/value head, D head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from attnrl_jax.models.tiling import StepWeights

# Lengths are multiples of the lanes of a TPU register, blocks at most this long.
LANES = 128
LONGEST_BLOCK = 512
NO_WEIGHT = 1e30


def why_not(time: int, layout: str) -> str | None:
    """What keeps splash attention from running, or None."""
    if layout == "tree":
        return "it knows rows packed behind each other, not trees (layout 'tree')"
    if time % LANES:
        return f"the length {time} is no multiple of {LANES}"
    return None


def _block(time: int) -> int:
    """Longest block that divides the time axis."""
    return next(b for b in range(min(LONGEST_BLOCK, time), 0, -LANES) if time % b == 0)


def _kernel(group: int, time: int, save_residuals: bool, interpret: bool):
    block = _block(time)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash.make_splash_mqa(
        masks.MultiHeadMask([masks.CausalMask((time, time))] * group),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=save_residuals,
        interpret=interpret,
    )


def _over_heads(function):
    """Maps over batch and key/value heads; segment ids come first and have no heads."""
    return jax.vmap(jax.vmap(function, in_axes=(None, *[0] * 3)), in_axes=0)


def _scaled(q: Array) -> Array:
    # The kernels take logits as they are.
    return (q * q.shape[-1] ** -0.5).astype(q.dtype)


def forward(
    q_BKGTD: Array,
    k_BKUD: Array,
    v_BKUD: Array,
    visible_until: Int[Array, "batch time"],
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Outputs `[B, K, G, T, D]` and log-sum-exp `[B, K, G, T]`; padding comes out 0."""
    group, time = q_BKGTD.shape[2:4]
    kernel = _kernel(group, time, True, interpret)

    def one(ends, q, k, v):
        out, (logsumexp,) = kernel(q, k, v, splash.SegmentIds(ends, ends))
        return out, logsumexp

    ends = visible_until.astype(jnp.int32)
    out, logsumexp = _over_heads(one)(ends, _scaled(q_BKGTD), k_BKUD, v_BKUD)
    real = (visible_until > 0)[:, None, None, :, None]
    return jnp.where(real, out, 0).astype(v_BKUD.dtype), logsumexp.astype(jnp.float32)


def backward(
    q_BKGTD: Array,
    k_BKUD: Array,
    v_BKUD: Array,
    visible_until: Int[Array, "batch time"],
    out_BKGTD: Array,
    logsumexp: Float[Array, "batch kv_head group time"],
    d_out_BKGTD: Array,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values.

    The kernel's own rule is called by its name, on what `forward` kept: differentiating the kernel
    here would run its forward pass once more.
    """
    group, time, head_dim = q_BKGTD.shape[2:]
    kernel = _kernel(group, time, False, interpret)

    def one(ends, inputs, results, d_out):
        q, k, v = inputs
        out, logsumexp = results
        kept = (
            q, k, v, splash.SegmentIds(ends, ends), None, out, logsumexp,
            kernel.dq_mask_info, kernel.dkv_mask_info,
        )  # fmt: skip
        gradients = splash._splash_attention_bwd(
            False, splash.DEFAULT_MASK_VALUE, True, kernel.kwargs["block_sizes"], None,
            kernel.kwargs["mask_function"], None, interpret, kept, d_out,
        )  # fmt: skip
        return gradients[3:6]

    ends = visible_until.astype(jnp.int32)
    d_out = jnp.where((visible_until > 0)[:, None, None, :, None], d_out_BKGTD, 0)
    d_q, d_k, d_v = _over_heads(one)(
        ends, (_scaled(q_BKGTD), k_BKUD, v_BKUD), (out_BKGTD, logsumexp), d_out
    )
    return (d_q * head_dim**-0.5).astype(d_q.dtype), d_k, d_v


def first_queries(steps: StepWeights) -> Int[Array, "batch time"]:
    """Index of the first query far enough ahead of each key, step ids never falling along time."""

    def one(step_ids):
        # Padding behind would go back; its queries weigh nothing.
        rising = jax.lax.cummax(step_ids)
        return jnp.searchsorted(rising, step_ids + steps.delta, side="left", method="sort")

    return jax.vmap(one)(steps.step_ids).astype(jnp.int32)


def _columns_kernel(
    low_ref, high_ref, q_ref, k_ref, offset_ref, first_ref, until_ref, out_ref, sums_ref
):
    """One block of keys (rows) by one block of queries (columns); queries come last in the grid."""
    b, j, i = pl.program_id(0), pl.program_id(3), pl.program_id(4)

    @pl.when(i == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when((low_ref[b, j] <= i) & (i < high_ref[b, j]))
    def _():
        logits = jax.lax.dot_general(
            k_ref[...], q_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        query = i * q_ref.shape[0] + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        counted = (query >= first_ref[...]) & (query < until_ref[...])
        sums_ref[...] += jnp.where(counted, jnp.exp(logits - offset_ref[...]), 0.0)

    @pl.when(i == pl.num_programs(4) - 1)
    def _():
        # Summed over queries by a product, which leaves keys along the lanes.
        ones = jnp.ones((8, sums_ref.shape[1]), jnp.float32)
        out_ref[...] = jax.lax.dot_general(
            ones, sums_ref[...], (((1,), (1,)), ((), ())), precision="highest"
        )[:1]


def column_sums(
    q_BKGTD: Array,
    k_BKUD: Array,
    logsumexp: Float[Array, "batch kv_head group time"],
    visible_until: Int[Array, "batch time"],
    steps: StepWeights,
    interpret: bool = False,
) -> Float[Array, "batch kv_head group time"]:
    """Column sums from the log-sum-exp of a forward pass.

        c[h, p] = sum over q with step(q) >= step(p) + delta of A[h, q, p] / |step(q)|

    Step ids must never fall along the time axis (padding behind, whose queries weigh nothing,
    aside): sequences packed behind each other go on counting. Key intervals may be any. Then the
    queries that count for key p are an interval, and most blocks of queries count for a block of
    keys as a whole or not at all: those that do not are neither fetched nor computed.
    """
    batch, kv_heads, group, time, head_dim = q_BKGTD.shape
    block = _block(time)
    blocks = time // block
    index = jnp.arange(time, dtype=jnp.int32)[None, :]
    first = jnp.maximum(first_queries(steps), index)
    until = visible_until.astype(jnp.int32)
    empty = first >= until
    by_block = (batch, blocks, block)
    low = jnp.where(empty, time, first).reshape(by_block).min(axis=2) // block
    high = -(-jnp.where(empty, 0, until).reshape(by_block).max(axis=2) // block)
    # exp(logit - offset) = attention * weight.
    weights = steps.weights[:, None, None]
    weighs = weights > 0
    offset = jnp.where(weighs, logsumexp - jnp.log(jnp.where(weighs, weights, 1.0)), NO_WEIGHT)

    def nearest(b, j, i, low, high):
        # Blocks that do not count repeat one that does: nothing new is fetched.
        return jnp.clip(i, jnp.minimum(low[b, j], blocks - 1), jnp.maximum(high[b, j] - 1, 0))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch, kv_heads, group, blocks, blocks),
        in_specs=[
            pl.BlockSpec(
                (None, None, None, block, head_dim),
                lambda b, k, g, j, i, low, high: (b, k, g, nearest(b, j, i, low, high), 0),
            ),
            pl.BlockSpec((None, None, block, head_dim), lambda b, k, g, j, i, *_: (b, k, j, 0)),
            pl.BlockSpec(
                (None, None, None, 1, block),
                lambda b, k, g, j, i, low, high: (b, k, g, 0, nearest(b, j, i, low, high)),
            ),
            pl.BlockSpec((None, block, 1), lambda b, k, g, j, i, *_: (b, j, 0)),
            pl.BlockSpec((None, block, 1), lambda b, k, g, j, i, *_: (b, j, 0)),
        ],
        out_specs=pl.BlockSpec(
            (None, None, None, 1, block), lambda b, k, g, j, i, *_: (b, k, g, 0, j)
        ),
        scratch_shapes=[pltpu.VMEM((block, block), jnp.float32)],
    )
    columns = pl.pallas_call(
        _columns_kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, group, 1, time), jnp.float32),
        interpret=interpret,
        name="column_sums",
    )(
        low,
        high,
        _scaled(q_BKGTD),
        k_BKUD,
        offset[..., None, :],
        first[..., None],
        until[..., None],
    )
    return columns[..., 0, :]
