"""Causal attention of whole sequences: one function, several routes to the same numbers.

Query q sees key p exactly if p <= q < visible_until[p]. That one interval per key covers padding on
either side (an empty one), sequences packed behind each other (to the end of the sequence) and
trees laid out depth first (to the end of what hangs below the key).

| route | where | what it needs |
|---|---|---|
| `blockwise` | everywhere | nothing; any layout |
| `splash` | TPU | rows, not trees; a length that is a multiple of 128 |
| `cudnn` | NVIDIA GPU | single right-padded rows; bfloat16; head_dim a multiple of 8, at most 128 |
| `plain` | everywhere | memory for the whole map: the reference, and the quadratic comparison |

`auto` takes the kernel of the platform that the program is compiled for where it fits, otherwise
`blockwise`, and `plain` up to 64 tokens. `splash` and `cudnn`, asked for by name, are taken
wherever they fit, and `blockwise` where they do not. Scoring and updates lay rows out as `packed`
or `tree`: on a GPU these take `blockwise`, never `cudnn`, which is left with passes over `single`
rows; on a TPU trees take `blockwise`. Every route but `plain` needs memory linear in time, forward
and backward.

`blockwise` is two programs: on a CPU tiles of queries and keys, those that a sequence does not see
skipped (`models.blockwise`); elsewhere large blocks of queries, against all keys before their end
(`models.query_blocks`).

Suffixes name the axes: B batch, T query time, U key time, H heads, K key/value heads, G query heads
of one key/value head, D head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from attnrl_jax.models import blockwise, cudnn, query_blocks, splash
from attnrl_jax.models.config import LAYOUTS, ModelConfig
from attnrl_jax.models.tiling import MASKED, StepWeights
from attnrl_jax.sharding import BATCH, fit_spec

# What a backward pass needs of attention besides its inputs; `ModelConfig.remat` names them.
KEPT = ("attention_out", "attention_logsumexp")
# Up to here `auto` takes the whole map: it is no larger than a tile, and compiles faster.
SHORT = 64
# Longest edge of a tile on a CPU: its exponentials, of two key/value heads, fit a core's cache, and
# short rows packed behind each other leave more tiles unseen.
CPU_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Route:
    """How attention is computed.

    Attributes:
      name: one of `config.ATTENTION`.
      block_length: of the blockwise route, rows of each key/value head that are worked on at once.
      layout: what `visible_until` can be: `single` (one right-padded row per sequence), `packed`
        (rows behind each other, padding anywhere) or `tree` (anything).
      interpret: runs what accelerators run, for tests without one: the TPU kernels in Pallas'
        interpreter, the cuDNN call with jax's plain implementation, the blockwise route by large
        blocks of queries.
    """

    name: str = "auto"
    block_length: int = 1024
    layout: str = "tree"
    interpret: bool = False


def check_route(config: ModelConfig, platform: str) -> None:
    """Refuses a route asked for by name that the devices of a run lack, or the model never takes.

    Raises:
      ValueError: naming the route and its platform, or what of the model is in its way.
    """
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(config.attention, platform)
    if platform != needed:
        raise ValueError(
            f"attention={config.attention!r} runs on a {needed} only; the devices are {platform}"
        )
    _check_model(config.attention, config.head_dim, jnp.dtype(config.dtype))


def _check_model(name: str, head_dim: int, dtype: Any) -> None:
    obstacle = cudnn.why_never(head_dim, dtype) if name == "cudnn" else None
    if obstacle is not None:
        raise ValueError(f"attention={name!r} cannot be used with this model: {obstacle}")


def attention(
    q_BTHD: Array,
    k_BKUD: Array,
    v_BKUD: Array,
    visible_until: Int[Array, "batch time"],
    route: Route,
    steps: StepWeights | None = None,
    keep_maps: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """Attention, and the column sums of forward context influence from the same pass.

        c[h, p] = sum over q with step(q) >= step(p) + delta of A[h, q, p] / |step(q)|

    Queries that see no key (padding) come out 0. Column sums and maps carry no gradient. Asking for
    maps takes the plain route. Under a mesh every device works on its own sequences and heads.

    Returns:
      outputs `[batch, time, head, head_dim]`; column sums `[batch, head, time]` if `steps` is
      given; maps `[batch, head, query, key]` float32 if `keep_maps`.

    Raises:
      ValueError: `cudnn` asked for by name with a dtype or head_dim that it never takes, or an
        unknown layout.
    """
    batch, time, heads, head_dim = q_BTHD.shape
    kv_heads = k_BKUD.shape[1]
    if route.layout not in LAYOUTS:
        raise ValueError(f"layout {route.layout!r} is not one of {', '.join(LAYOUTS)}")
    route = dataclasses.replace(route, name=_chosen(route, time, head_dim, q_BTHD.dtype))
    by_head = q_BTHD.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    q_BKGTD = jnp.moveaxis(by_head, 1, 3)
    maps = None
    if route.name == "plain" or keep_maps:
        out, columns, maps = _plain(q_BKGTD, k_BKUD, v_BKUD, visible_until, steps)
        out = checkpoint_name(out, KEPT[0])
        maps = jax.lax.stop_gradient(maps).reshape(batch, heads, time, time) if keep_maps else None
    elif route.name == "cudnn":
        out, columns = _cudnn(route, q_BTHD, q_BKGTD, k_BKUD, v_BKUD, visible_until, steps)
    else:
        out, columns = _attend(route, q_BKGTD, k_BKUD, v_BKUD, visible_until, steps)
    if out.ndim == 5:
        out = jnp.moveaxis(out, 3, 1).reshape(batch, time, heads, head_dim)
    if columns is not None:
        columns = jax.lax.stop_gradient(columns).reshape(batch, heads, time)
    return out, columns, maps


def _chosen(route: Route, time: int, head_dim: int, dtype: Any) -> str:
    """The route to take: `auto` stays where the platform decides between kernels at lowering."""
    _check_model(route.name, head_dim, dtype)
    fits = {
        "splash": splash.why_not(time, route.layout) is None,
        "cudnn": cudnn.why_not(head_dim, dtype, route.layout) is None,
    }
    if route.name in fits:
        return route.name if fits[route.name] else "blockwise"
    if route.name != "auto":
        return route.name
    if time <= SHORT:
        return "plain"
    if jax.default_backend() == "gpu" and fits["cudnn"]:
        # Cannot be traced without a GPU, so it is not left to the lowering.
        return "cudnn"
    return "auto" if fits["splash"] else "blockwise"


def _plain(
    q_BKGTD: Array,
    k_BKUD: Array,
    v_BKUD: Array,
    visible_until: Int[Array, "batch time"],
    steps: StepWeights | None,
) -> tuple[Array, Array | None, Array]:
    """The definition, by the whole map: outputs, column sums, maps."""
    index = jnp.arange(q_BKGTD.shape[3])
    logits = jnp.einsum("BKGTD,BKUD->BKGTU", q_BKGTD, k_BKUD, preferred_element_type=jnp.float32)
    visible = (index[None, :, None] >= index[None, None, :]) & (
        index[None, :, None] < visible_until[:, None, :]
    )
    visible = visible[:, None, None]
    logits = jnp.where(visible, logits * q_BKGTD.shape[-1] ** -0.5, MASKED)
    # Rows that see nothing come out of softmax uniform: zero them.
    maps = jax.nn.softmax(logits, axis=-1) * visible
    out = jnp.einsum("BKGTU,BKUD->BKGTD", maps.astype(v_BKUD.dtype), v_BKUD)
    columns = None
    if steps is not None:
        ahead = steps.step_ids[:, :, None] >= steps.step_ids[:, None, :] + steps.delta
        columns = jnp.einsum("BKGTU,BTU->BKGU", maps, steps.weights[:, :, None] * ahead)
    return out, columns, maps


def _cudnn(route, q_BTHD, q_BKGTD, k_BKUD, v_BKUD, visible_until, steps):
    lengths = visible_until.max(axis=1)
    out = cudnn.attention(q_BTHD, k_BKUD, v_BKUD, lengths, route.interpret)
    if steps is None:
        return out, None
    sweep = functools.partial(query_blocks.column_sums, block_length=route.block_length)
    arrays = jax.lax.stop_gradient((q_BKGTD, k_BKUD))
    return out, _on_shards(sweep, *arrays, visible_until, steps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(route, q, k, v, visible_until, steps):
    out, _, columns = _forward(route, q, k, v, visible_until, steps)
    return out, columns


def _attend_forward(route, q, k, v, visible_until, steps):
    out, logsumexp, columns = _forward(route, q, k, v, visible_until, steps)
    out = checkpoint_name(out, KEPT[0])
    logsumexp = checkpoint_name(logsumexp, KEPT[1])
    return (out, columns), (q, k, v, visible_until, out, logsumexp)


def _attend_backward(route, kept, gradients):
    q, k, v, visible_until, out, logsumexp = kept
    d_q, d_k, d_v = _on_shards(
        functools.partial(_local_backward, route), q, k, v, visible_until, out, logsumexp,
        gradients[0],
    )  # fmt: skip
    return d_q, d_k, d_v, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(route, q, k, v, visible_until, steps):
    return _on_shards(functools.partial(_local_forward, route), q, k, v, visible_until, steps)


def _on_shards(function: Callable[..., Any], *arrays: Any) -> Any:
    """Runs `function` on each device's part of batch and key/value heads.

    Kernels cannot be cut by the compiler, and loops as long as the data wants are better not joined
    over devices. Arrays of two axes have no heads. Without a mesh it is a call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return function(*arrays)
    sizes = dict(mesh.shape)
    batch, kv_heads = arrays[1].shape[:2]
    cut = fit_spec(PartitionSpec(BATCH, "tensor"), (batch, kv_heads), sizes)

    def spec(x: Array) -> PartitionSpec:
        return PartitionSpec(cut[0]) if x.ndim == 2 else cut

    shapes = jax.eval_shape(function, *arrays)
    return jax.shard_map(
        function,
        in_specs=jax.tree.map(spec, arrays),
        out_specs=jax.tree.map(spec, shapes),
        check_vma=False,
    )(*arrays)


def _row_by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sequences one after the other: a tile stays in a CPU's cache, and each skips its own."""

    def by_row(*arrays: Any) -> Any:
        def one(row: Any) -> Any:
            return jax.tree.map(lambda x: x[0], function(*jax.tree.map(lambda x: x[None], row)))

        return jax.lax.map(one, arrays)

    return by_row


def _by_platform(route: Route, cpu: Any, others: Any, tpu: Any, *arrays: Any) -> Any:
    """`tpu` where the route allows it, and the blockwise route in the form of the platform."""
    if route.name == "splash":
        return tpu(*arrays)
    if route.interpret:
        return others(*arrays)
    if route.name == "auto":
        return jax.lax.platform_dependent(*arrays, cpu=cpu, tpu=tpu, default=others)
    return jax.lax.platform_dependent(*arrays, cpu=cpu, default=others)


def _local_forward(
    route: Route, q: Array, k: Array, v: Array, visible_until: Array, steps: StepWeights | None
) -> tuple[Array, Float[Array, "batch kv_head group time"], Array | None]:
    def tiles(q, k, v, visible_until, steps):
        return blockwise.forward(q, k, v, visible_until, _cpu_block(route), steps)

    def large_blocks(q, k, v, visible_until, steps):
        return query_blocks.forward(q, k, v, visible_until, route.block_length, steps)

    def tpu(q, k, v, visible_until, steps):
        out, logsumexp = splash.forward(q, k, v, visible_until, route.interpret)
        columns = None
        if steps is not None:
            columns = splash.column_sums(q, k, logsumexp, visible_until, steps, route.interpret)
        return out, logsumexp, columns

    return _by_platform(route, _row_by_row(tiles), large_blocks, tpu, q, k, v, visible_until, steps)


def _local_backward(route: Route, *arrays: Array) -> tuple[Array, Array, Array]:
    tiles = functools.partial(blockwise.backward, block_length=_cpu_block(route))
    large_blocks = functools.partial(query_blocks.backward, block_length=route.block_length)
    tpu = functools.partial(splash.backward, interpret=route.interpret)
    return _by_platform(route, _row_by_row(tiles), large_blocks, tpu, *arrays)


def _cpu_block(route: Route) -> int:
    return min(route.block_length, CPU_BLOCK)
