"""Operations of jaxprs and collectives of compiled texts, against numbers counted by hand."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnrl_jax.algorithms.losses import LossConfig
from attnrl_jax.compilation.counts import (
    Collectives,
    bytes_per_device,
    count_collectives,
    count_flops,
)
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from attnrl_jax.training import step
from attnrl_jax.types import PackedTokens, TrainBatch

BATCH, TIME, LAYERS, HEADS, HEAD_DIM, WIDTH, MLP, VOCAB = 3, 32, 4, 4, 8, 48, 80, 100


def product(x):
    return x @ x


def flops(function, *shapes, platform="tpu"):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.jit(function).trace(*arguments).jaxpr, platform)


def update_flops(remat):
    """Operations of one micro-batch of a small model."""
    model = ModelConfig(
        "qwen2", VOCAB, WIDTH, LAYERS, HEADS, 2, HEAD_DIM, MLP, qkv_bias=True, remat=remat
    )
    params = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32)
    real = jax.ShapeDtypeStruct((BATCH, TIME), jnp.float32)
    batch = TrainBatch(PackedTokens(*[ids] * 4), *[real] * 4)
    accumulated = jax.eval_shape(step.no_gradients, params)
    denominator = jax.ShapeDtypeStruct((), jnp.float32)
    arguments = (accumulated, params, model, LossConfig(), batch, real, denominator, 1.0)
    return count_flops(step.accumulate.trace(*arguments).jaxpr)


@pytest.mark.parametrize(("remat", "forward_passes"), [("none", 1), ("full", 2)])
def test_an_update_takes_six_operations_for_each_parameter_and_token(remat, forward_passes):
    tokens = BATCH * TIME
    by_layer = 2 * WIDTH * (HEADS + 2) * HEAD_DIM + 3 * WIDTH * MLP
    # Logits of each query with each key, and their values; of a map that is not cut.
    attention = 2 * 2 * HEADS * TIME * HEAD_DIM
    forward = tokens * LAYERS * (2 * by_layer + attention)
    # Logits are always computed again in the backward pass.
    unembedding = tokens * 2 * WIDTH * VOCAB
    # What a layer ends with is not computed again: nothing of its backward pass needs it.
    ends = (forward_passes - 1) * tokens * LAYERS * 2 * WIDTH * MLP
    expected = (forward_passes + 2) * forward - ends + 4 * unembedding
    assert update_flops(remat) == expected


def test_loops_and_branches():
    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=7)[0]

    def looped(x):
        return jax.lax.while_loop(lambda c: c.sum() > 0, product, x)

    def branched(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    def by_platform(x):
        return jax.lax.platform_dependent(x, tpu=product, default=scanned)

    one = 2 * 5**3
    assert flops(product, (5, 5)) == one
    assert flops(scanned, (5, 5)) == 7 * one
    assert flops(lambda x: jax.vmap(product)(scanned(x)[None]), (5, 5)) == 8 * one
    assert flops(looped, (5, 5)) == one
    assert flops(branched, (5, 5)) == 2 * one
    assert flops(by_platform, (5, 5)) == one
    assert flops(by_platform, (5, 5), platform="cpu") == 7 * one


def test_what_runs_on_every_device_counts_for_each():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    split = jax.shard_map(
        product, mesh=mesh, in_specs=PartitionSpec("a"), out_specs=PartitionSpec("a")
    )
    assert flops(lambda x: split(x), (20, 5)) == 8 * 2 * 5**3


def test_a_kernel_counts_for_its_grid():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    def tiled(x, y):
        return pl.pallas_call(
            kernel,
            grid=(4, 3),
            in_specs=[
                pl.BlockSpec((8, 16), lambda i, j: (i, 0)),
                pl.BlockSpec((16, 8), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((32, 24), jnp.float32),
            interpret=True,
        )(x, y)

    assert flops(tiled, (32, 16), (16, 24)) == 2 * 32 * 16 * 24


def test_collectives_of_a_compiled_program():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def on_device(x):
        def inner(_, x):
            return jax.lax.psum(jnp.sin(x), "a")

        def outer(_, x):
            x = jax.lax.fori_loop(0, 3, inner, x)
            return jax.lax.ppermute(x, "b", [(0, 1), (1, 0)])

        x = jax.lax.fori_loop(0, 5, outer, x)
        whole = jax.lax.all_gather(x, "a", tiled=True)
        return jnp.sin(whole).sum(0, keepdims=True) * x

    function = jax.shard_map(
        on_device, mesh=mesh, in_specs=PartitionSpec("a"), out_specs=PartitionSpec("a"),
        check_vma=False,
    )  # fmt: skip
    rows = jax.ShapeDtypeStruct(
        (16, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("a"))
    )
    found = count_collectives(jax.jit(function).lower(rows).compile().as_text())
    own = 4 * 32 * 4
    assert found == {
        # 2 (n - 1) / n of what is summed by n devices; what is gathered, less the own part.
        "all-reduce": Collectives(15, 15 * own, 15 * own * 1.5),
        "collective-permute": Collectives(5, 5 * own, 5 * own),
        "all-gather": Collectives(1, 4 * own, 3 * own),
    }


TPU_TEXT = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%start (p: bf16[1,64,64]) -> (bf16[1,64,64], bf16[1,256,64], u32[]) {
  %all-gather.1 = bf16[1,256,64]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}, use_global_device_ids=true
  ROOT %c = (bf16[1,64,64]{2,1,0}, bf16[1,256,64]{2,1,0}, u32[]{:S(2)}) custom-call(%all-gather.1)
}

%done (p: bf16[1,64,64]) -> bf16[1,256,64] {
  ROOT %all-gather.2 = bf16[1,256,64]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}, use_global_device_ids=true
}

%part (p: bf16[1,64,64]) -> bf16[1,256,64] {
  ROOT %all-gather.3 = bf16[1,256,64]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}, use_global_device_ids=true
}

%attention (s: (s32[], bf16[1,256,64])) -> (s32[], bf16[1,256,64]) {
  ROOT %f.3 = (s32[], bf16[1,256,64]) fusion(%s), kind=kCustom, calls=%part
}

%body (s: (s32[], bf16[1,64,64])) -> (s32[], bf16[1,64,64]) {
  %f.1 = (bf16[1,64,64]{2,1,0}, /*index=1*/bf16[1,256,64]{2,1,0}, u32[]) fusion(%x), kind=kCustom, \
calls=%start
  %inner = (s32[], bf16[1,256,64]) while(%f.1), condition=%condition, body=%attention
  %f.2 = bf16[1,256,64]{2,1,0} fusion(%inner), kind=kCustom, calls=%done
  %r = f32[16,8]{1,0:T(8,128)} reduce-scatter(%f.2), channel_id=8, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, to_apply=%add
}

%condition (s: (s32[], bf16[1,64,64])) -> pred[] {
  %n = s32[]{:T(128)} constant(28)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%small (x: f32[8]) -> f32[8] {
  ROOT %p.1 = f32[8]{0} collective-permute(%x), channel_id=9, source_target_pairs={{0,1},{1,0}}
}

%large (x: f32[8]) -> f32[8] {
  %ag = ((f32[8]{0}, f32[4]{0}), (f32[64]{0}, f32[32]{0})) all-gather-start(%x, %x), \
channel_id=10, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %agd = (f32[64]{0}, f32[32]{0}) all-gather-done(%ag)
}

ENTRY %main.5_spmd (p: bf16[1,64,64]) -> f32[] {
  %while.1 = (s32[], bf16[1,64,64]) while(%t), condition=%condition, body=%body
  %k = f32[8]{0} conditional(%i, %a, %b), branch_computations={%small, %large}
  ROOT %s = (f32[]{:T(128)}, pred[3]{0}) all-reduce(%k, %q), channel_id=11, replica_groups={}, \
to_apply=%add
}
"""


def test_collectives_of_a_tpu_text():
    found = count_collectives(TPU_TEXT)
    gathered, scattered = 256 * 64 * 2, 16 * 8 * 4
    # A collective in several pieces counts once; the branch that sends more counts.
    assert found["all-gather"] == Collectives(
        28 + 1, 28 * gathered + 96 * 4, 28 * gathered * 3 / 4 + 96 * 4 * 7 / 8
    )
    assert found["reduce-scatter"] == Collectives(28, 28 * scattered, 28 * scattered * 3)
    assert found["all-reduce"] == Collectives(1, 7, 7 * 2 * 7 / 8)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}


def test_bytes_of_a_device_are_its_share():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    cut = NamedSharding(mesh, PartitionSpec("a", "b"))
    tree = {
        "cut": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=cut),
        "whole": jax.ShapeDtypeStruct((3,), jnp.float32),
    }
    assert bytes_per_device(tree) == 2 * 3 * 2 + 3 * 4
