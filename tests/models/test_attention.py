"""Every route of attention: plain against numpy, the others against plain."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from attnrl_jax.branching.importance import query_weights
from attnrl_jax.models import blockwise, cudnn, query_blocks, splash
from attnrl_jax.models.attention import Route, StepWeights, attention, check_route
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.sharding import BATCH as BATCH_AXES
from attnrl_jax.sharding import MeshConfig, make_mesh
from tests.segments import segment_ends

BATCH, TIME, HEADS, KV_HEADS, DIM = 2, 13, 4, 2, 6
DELTA = 2
# Row 0: two packed sequences and right padding. Row 1: left padding.
SEGMENTS = np.array([[1] * 6 + [2] * 5 + [0] * 2, [0] * 3 + [1] * 10], np.int32)
# Ranges of a row never go back; segments hide one from another.
STEPS = np.array([[0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, -1, -1], [0] * 4 + [1, 1, 2, 3, 3, 4, 5, 6, 6]])
# A prompt of 3; below it 2 tokens with branches of 3 and 2, and a branch of 1; a second tree of 2.
TREE = np.array([[11, 11, 11, 10, 10, 8, 8, 8, 10, 10, 11, 13, 13]], np.int32).repeat(BATCH, 0)
INTERVALS = {"packed": segment_ends(SEGMENTS), "tree": TREE}
WHOLE = Route("plain")


def random_qkv(batch=BATCH, time=TIME, dim=DIM):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(batch, time, HEADS, dim)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, KV_HEADS, time, dim)).astype(np.float32)
    return q, k, v


def step_weights(step_ids, delta=DELTA):
    return StepWeights(jnp.asarray(step_ids), query_weights(jnp.asarray(step_ids)), delta)


def reference(q, k, v, visible_until, step_ids, delta):
    """The same by loops over batch and heads, in float64."""
    outputs = np.zeros(q.shape)
    columns = np.zeros((BATCH, HEADS, TIME))
    maps = np.zeros((BATCH, HEADS, TIME, TIME))
    index = np.arange(TIME)
    for b in range(BATCH):
        sees = np.tril(index[:, None] < visible_until[b][None, :])
        sizes = {j: np.sum(step_ids[b] == j) for j in set(step_ids[b])}
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            logits = q[b, :, h].astype(np.float64) @ k[b, kv].T / np.sqrt(DIM)
            weights = np.exp(logits - logits.max()) * sees
            maps[b, h] = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
            outputs[b, :, h] = maps[b, h] @ v[b, kv]
            for p in range(TIME):
                for query in range(TIME):
                    if step_ids[b, query] >= max(step_ids[b, p] + delta, 0):
                        columns[b, h, p] += maps[b, h, query, p] / sizes[step_ids[b, query]]
    return outputs, columns, maps


@pytest.mark.parametrize("layout", INTERVALS)
def test_plain_equals_numpy(layout):
    q, k, v = random_qkv()
    until = INTERVALS[layout]
    expected = reference(q, k, v, until, STEPS, DELTA)
    got = attention(q, k, v, jnp.asarray(until), WHOLE, step_weights(STEPS), keep_maps=True)
    outputs, columns, maps = got
    np.testing.assert_allclose(outputs, expected[0], atol=2e-6)
    np.testing.assert_allclose(maps, expected[2], atol=1e-6)
    real = (until > 0)[:, None]
    np.testing.assert_allclose(columns * real, expected[1] * real, atol=2e-6)


@partial(jax.jit, static_argnums=0)
def compute(route, q, k, v, visible_until, step_ids):
    """Outputs, column sums, and the gradients of a function of the outputs."""

    def loss(q, k, v):
        out, columns, _ = attention(q, k, v, visible_until, route, step_weights(step_ids))
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(columns), (out, columns)

    (_, values), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return *values, *gradients


def assert_equal(got, expected, visible_until, atol):
    columns = got[1] * (visible_until > 0)[:, None]
    for a, b in zip((got[0], columns, *got[2:]), expected, strict=True):
        assert np.isfinite(a).all()
        assert np.abs(b).max() > 0.05
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol)


@pytest.mark.parametrize("layout", INTERVALS)
@pytest.mark.parametrize(
    ("block", "accelerator"), [(1, False), (5, False), (64, False), (5, True), (64, True)]
)
def test_blocks_equal_the_whole_map(layout, block, accelerator):
    """Tiles, as on a CPU, and blocks of queries against all keys, as on an accelerator."""
    inputs = (*random_qkv(), jnp.asarray(INTERVALS[layout]), jnp.asarray(STEPS))
    expected = compute(WHOLE, *inputs)
    got = compute(Route("blockwise", block, interpret=accelerator), *inputs)
    assert_equal(got, expected, INTERVALS[layout], 2e-6)
    padding = INTERVALS[layout] == 0
    assert not np.asarray(got[0])[padding].any()
    assert not np.asarray(got[2])[padding].any()


@pytest.mark.parametrize("accelerator", [False, True])
def test_blocks_in_bfloat16_are_close(accelerator):
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv())
    inputs = (q, k, v, jnp.asarray(INTERVALS["packed"]), jnp.asarray(STEPS))
    got = compute(Route("blockwise", 5, interpret=accelerator), *inputs)
    expected = compute(WHOLE, *inputs)
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    assert_equal(got, expected, INTERVALS["packed"], 0.04)


def long_inputs(layout, time=96):
    """Two sequences of three rows and padding, or of a prompt with two branches and a third tree.

    The steps of tokens go on counting from row to row.
    """
    ends = np.repeat([40, 75, 90, 0], [40, 35, 15, 6])
    if layout == "tree":
        ends = np.repeat([80, 50, 80, 96], [20, 30, 30, 16])
    until = np.stack([ends, np.where(np.arange(time) < 80, 80, 0)]).astype(np.int32)
    steps = np.where(until > 0, np.arange(time) // 3, -1)
    return (*random_qkv(time=time), jnp.asarray(until), jnp.asarray(steps))


@pytest.mark.parametrize("layout", INTERVALS)
@pytest.mark.parametrize("accelerator", [False, True])
def test_what_is_chosen_equals_the_whole_map(layout, accelerator):
    """Above the length up to which `auto` is the whole map itself."""
    inputs = long_inputs(layout)
    expected = compute(WHOLE, *inputs)
    got = compute(Route("auto", 32, layout, accelerator), *inputs)
    assert_equal(got, expected, np.asarray(inputs[3]), 5e-6)


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_a_kernel_gives_way_where_it_does_not_fit(name):
    """A bug: a run that asked for a kernel by name failed at its first tree."""
    q, k, v, until, steps = long_inputs("tree")
    q, k, v = (jnp.asarray(np.tile(x, (1, 1, 1, 4)), jnp.bfloat16) for x in (q, k, v))
    got = compute(Route(name, layout="tree"), q, k, v, until, steps)
    for a, b in zip(got, compute(Route("blockwise"), q, k, v, until, steps), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sums_swept_alone_equal_the_joint_ones():
    """Column sums from queries and keys, as where a kernel made the outputs."""
    q, k, v = random_qkv()
    q = np.moveaxis(q.reshape(BATCH, TIME, KV_HEADS, 2, DIM), 1, 3)
    for until in INTERVALS.values():
        q, k, v, until = (jnp.asarray(x) for x in (q, k, v, until))
        columns = jax.jit(blockwise.forward, static_argnums=4)(
            q, k, v, until, 5, step_weights(STEPS)
        )[2]
        swept = jax.jit(query_blocks.column_sums, static_argnums=4)(
            q, k, until, step_weights(STEPS), 5
        )
        np.testing.assert_allclose(swept, columns, atol=1e-6)


def test_bands_by_hand():
    """Twenty tokens in ten blocks of two queries: five bands of two blocks, at most eight."""
    assert query_blocks.bands(20, 4, 2) == (
        2, [(slice(i, i + 2), 2 * i + 4) for i in range(0, 10, 2)]
    )  # fmt: skip
    # Blocks that do not divide the length: the last band sees all keys, no more.
    assert query_blocks.bands(13, 5, 1) == (
        5, [(slice(0, 1), 5), (slice(1, 2), 10), (slice(2, 3), 13)]
    )  # fmt: skip
    assert query_blocks.bands(3, 64, 2) == (3, [(slice(0, 1), 3)])
    # The causal half of the map, and an eighth more.
    queries, parts = query_blocks.bands(4096, 64, 1)
    computed = sum((blocks.stop - blocks.start) * queries * keys for blocks, keys in parts)
    assert len(parts) == 8
    assert computed == 4096**2 * 9 // 16


def test_memory_of_large_blocks_is_linear_in_time(monkeypatch):
    """Of outputs, column sums and gradients; few bands, to compile less."""
    monkeypatch.setattr(query_blocks, "BANDS", 2)

    def temporary_bytes(time):
        def shape(*sizes):
            return jax.ShapeDtypeStruct(sizes, jnp.float32)

        kv = shape(1, KV_HEADS, time, DIM)
        ids = jax.ShapeDtypeStruct((1, time), jnp.int32)
        lowered = compute.lower(
            Route("blockwise", 64, interpret=True), shape(1, time, HEADS, DIM), kv, kv, ids, ids
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(1024), temporary_bytes(2048)
    assert 0 < large <= 2.2 * small


def test_only_tiles_that_are_seen_are_visited():
    """Sixteen tokens in tiles of two queries and four keys, row and tree worked out by hand."""
    rows = jnp.array([[4] * 4 + [12] * 8 + [0] * 4])
    blocks = blockwise._blocks(rows, 4, 2)
    assert (blocks.queries, blocks.keys) == (2, 4)
    assert blocks.turns.tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    assert blocks.order[4, :2].tolist() == [1, 2]
    # A prompt of four that all see, two branches of four that do not see each other, a third.
    tree = jnp.array([[16] * 4 + [8] * 4 + [12] * 4 + [16] * 4])
    blocks = blockwise._blocks(tree, 4, 2)
    assert blocks.turns.tolist() == [1, 1, 2, 2, 2, 2, 2, 2]
    assert blocks.order[6, :2].tolist() == [0, 3]


def test_maps_and_sums_only_when_asked():
    q, k, v = random_qkv()
    until = jnp.asarray(INTERVALS["tree"])
    expected = attention(q, k, v, until, WHOLE)
    for route in (WHOLE, Route("blockwise", 5), Route("auto")):
        out, columns, maps = attention(q, k, v, until, route)
        assert columns is None
        assert maps is None
        np.testing.assert_allclose(out, expected[0], atol=1e-6)


def test_devices_work_on_their_own_sequences_and_heads():
    q, k, v = random_qkv(batch=4)
    until, steps = (jnp.tile(x, (2, 1)) for x in (INTERVALS["packed"], STEPS))
    route = Route("blockwise", 5)
    expected = compute(route, q, k, v, until, steps)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        inputs = jax.device_put((q, k, v, until, steps), whole)
        compiled = compute.lower(route, *inputs).compile()
        got = compiled(*inputs)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    # Keys and values of a device are one sequence and one head: none are gathered.
    assert not re.search(r"f32\S+ all-gather", compiled.as_text())
    assert "f32[1,1,13,6]" in compiled.as_text()


@pytest.mark.parametrize(
    ("route", "dtype", "dim", "message"),
    [
        (Route("cudnn", layout="single"), jnp.float32, 8, "cudnn.*bfloat16.*float32"),
        (Route("cudnn", layout="tree"), jnp.bfloat16, 6, "cudnn.*head_dim 6"),
        (Route("auto", layout="row"), jnp.float32, 8, "'row'.*single, packed, tree"),
    ],
)
def test_a_route_that_can_never_run_says_why(route, dtype, dim, message):
    q, k, v = (x.astype(dtype) for x in random_qkv(dim=dim))
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, jnp.full((BATCH, TIME), TIME), route)


def test_what_kernels_need():
    assert "tree" in splash.why_not(128, "tree")
    assert re.search("100.*128", splash.why_not(100, "packed"))
    assert splash.why_not(256, "packed") is None
    assert re.search("single.*packed", cudnn.why_not(64, jnp.bfloat16, "packed"))
    assert cudnn.why_not(64, jnp.bfloat16, "single") is None


def test_cudnn_call_equals_the_whole_map():
    """The call around cuDNN's kernel, with the implementation that any platform has."""
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv(dim=8))
    lengths = np.array([TIME, 9])
    until = segment_ends(np.arange(TIME)[None] < lengths[:, None])
    steps = np.where(until > 0, np.arange(TIME) // 2, -1)
    inputs = (q, k, v, jnp.asarray(until), jnp.asarray(steps))
    route = Route("cudnn", layout="single", interpret=True)
    got, expected = compute(route, *inputs), compute(replace(route, name="plain"), *inputs)
    assert_equal(got, expected, until, 0.04)
    # Normalised in float32, whatever dtype the kernel's own sums have.
    real = (until > 0)[:, None]
    np.testing.assert_allclose(got[1] * real, expected[1] * real, atol=1e-6)


def test_a_route_that_devices_or_model_lack_is_refused():
    def config(name, dtype="bfloat16", head_dim=64):
        return ModelConfig(
            "qwen2", 32, 128, 1, 2, 2, head_dim, 128, dtype=dtype, attention=name
        )  # fmt: skip

    for name, platform in (("splash", "cpu"), ("cudnn", "tpu")):
        with pytest.raises(ValueError, match=f"{name}.*{platform}"):
            check_route(config(name), platform)
    with pytest.raises(ValueError, match=r"cudnn.*float32"):
        check_route(config("cudnn", dtype="float32"), "gpu")
    with pytest.raises(ValueError, match=r"cudnn.*head_dim 192"):
        check_route(config("cudnn", head_dim=192), "gpu")
    for name, platform in (("splash", "tpu"), ("cudnn", "gpu"), ("auto", "cpu")):
        check_route(config(name), platform)
