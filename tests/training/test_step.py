"""The update: micro-batches add up, devices agree, bad gradients change nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.sharding import (
    MeshConfig,
    batch_devices,
    batch_sharding,
    make_mesh,
    parameter_shardings,
)
from attnrl_jax.training.state import OptimizerConfig, init_state
from attnrl_jax.training.step import (
    accumulate,
    micro_batches,
    mini_batches,
    no_gradients,
    update,
)
from attnrl_jax.types import TrainRows
from tests.training.tiny import tiny_config

ROWS, TIME = 24, 32


@pytest.fixture(scope="module")
def golden(golden_model):
    return golden_model("qwen2_tied")


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    length = rng.integers(8, TIME + 1, ROWS).astype(np.int32)
    index = np.arange(TIME)[None, :]
    mask = ((index >= 4) & (index < length[:, None])).astype(np.float32)
    return TrainRows(
        tokens=rng.integers(0, 256, (ROWS, TIME)).astype(np.int32),
        length=length,
        mask=mask,
        advantages=(rng.normal(size=(ROWS, TIME)) * mask).astype(np.float32),
        behaviour_logprobs=(rng.uniform(-7, -4, (ROWS, TIME)) * mask).astype(np.float32),
        reference_logprobs=(rng.uniform(-7, -4, (ROWS, TIME)) * mask).astype(np.float32),
    )


PROBLEM = np.repeat(np.arange(6), 4)


def gradients(golden, rows, micro_tokens, mesh=None):
    """Gradient and metric sums of one mini-batch, cut into micro-batches of that many tokens."""
    config = tiny_config()
    params = golden.params
    sharding, multiple = None, 1
    if mesh is not None:
        params = jax.device_put(params, parameter_shardings(params, mesh))
        sharding, multiple = batch_sharding(mesh), batch_devices(mesh)
    total = no_gradients(params)
    for micro in micro_batches(rows, micro_tokens, 32, multiple):
        micro = jax.device_put(micro, sharding)
        total = accumulate(
            total, params, golden.config, config.loss, micro, np.float32(rows.mask.sum()), 1.0
        )
    return jax.tree.map(np.array, total)


def assert_close(one, other, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-4), one, other
    )


def test_micro_batches_add_up(golden, rows):
    """However rows are cut, the sum is the gradient of the mean over the whole mini-batch."""
    assert_close(gradients(golden, rows, 32 * 24), gradients(golden, rows, 32 * 5), 1e-5)


def test_sharded_equals_one_device(golden, rows):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        sharded = gradients(golden, rows, 32 * 24, mesh)
    assert_close(sharded, gradients(golden, rows, 32 * 24), 1e-5)


def test_gradients_are_cut_like_their_parameters(golden, rows):
    """A bug: zeros follow no input, so the accumulator, and with it every gradient, was whole on
    every device, and the second micro-batch compiled anew."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        params = jax.device_put(golden.params, parameter_shardings(golden.params, mesh))
        total = no_gradients(params)
        compiled = []
        for micro in micro_batches(rows, 32 * 8, 32, 4):
            micro = jax.device_put(micro, batch_sharding(mesh))
            total = accumulate(
                total, params, golden.config, tiny_config().loss, micro, np.float32(1), 1.0
            )
            compiled.append(accumulate._cache_size())
    assert len(compiled) > 1
    assert compiled[0] == compiled[-1]
    jax.tree.map(lambda g, p: assert_same_layout(g.sharding, p.sharding, g.ndim), total[0], params)
    kernel = total[0]["layers"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def assert_same_layout(one, other, ndim):
    assert one.is_equivalent_to(other, ndim)


def test_update_on_a_mesh_equals_one_device(golden, rows):
    """Several updates, optimizer state included. (With its usual epsilon Adam turns the rounding
    of gradients near 0 into whole steps.)"""
    config = tiny_config(mini_batch_rows=8, optimizer=OptimizerConfig(learning_rate=1e-2, eps=0.1))
    alone, metrics = run_update(golden, rows, mini_batch_rows=8, optimizer=config.optimizer)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        params = jax.device_put(golden.params, parameter_shardings(golden.params, mesh))
        params = jax.tree.map(jnp.copy, params)
        state = init_state(params, config.optimizer, mesh)
        state, sharded = update(
            state, golden.config, config, rows, PROBLEM, np.random.default_rng(0),
            batch_sharding(mesh), batch_devices(mesh),
        )  # fmt: skip
    assert_close(jax.tree.map(np.array, state.params), jax.tree.map(np.array, alone.params), 2e-5)
    assert sharded["updates"] == metrics["updates"] == 3
    assert abs(sharded["loss"] - metrics["loss"]) < 1e-4


def test_fewer_rows_than_devices(golden, rows):
    few = jax.tree.map(lambda x: x[:3], rows)
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        sharded = gradients(golden, few, 32, mesh)
    assert_close(sharded, gradients(golden, few, 32 * 24), 1e-5)


def test_micro_batches_hold_every_row_once(rows):
    seen = []
    for micro in micro_batches(rows, 32 * 5, 32, 2):
        assert micro.tokens.shape[0] % 2 == 0
        assert micro.tokens.size <= 32 * 5
        seen += [tuple(t[:n]) for t, n in zip(micro.tokens, micro.length, strict=True) if n]
        assert np.all(micro.mask[micro.length == 0] == 0)
    expected = [tuple(t[:n]) for t, n in zip(rows.tokens, rows.length, strict=True)]
    assert sorted(seen) == sorted(expected)


def test_mini_batches_keep_problems_whole():
    batches = mini_batches(PROBLEM, 10, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(24))
    for batch in batches[:-1]:
        assert 10 <= len(batch) < 10 + 4
    for batch in batches:
        assert all(np.sum(PROBLEM[batch] == p) == 4 for p in np.unique(PROBLEM[batch]))


def run_update(golden, rows, **changes):
    config = tiny_config(**changes)
    params = jax.tree.map(lambda x: x.copy(), golden.params)
    state = init_state(params, config.optimizer, None)
    return update(state, golden.config, config, rows, PROBLEM, np.random.default_rng(0))


def test_update_lowers_the_loss(golden, rows):
    optimizer = OptimizerConfig(learning_rate=1e-3)
    state, before = run_update(golden, rows, optimizer=optimizer, mini_batch_rows=24)
    _, after = update(
        state, golden.config, tiny_config(optimizer=optimizer, mini_batch_rows=24), rows, PROBLEM,
        np.random.default_rng(0),
    )  # fmt: skip
    assert after["loss"] < before["loss"]
    assert before["updates"] == 1


def test_several_updates_a_step(golden, rows):
    state, metrics = run_update(golden, rows, mini_batch_rows=8)
    assert metrics["updates"] == 3
    assert int(state.updates) == 3


def test_a_gradient_that_is_not_finite_skips_the_update(golden, rows):
    advantages = rows.advantages.copy()
    advantages[0, 5] = np.nan
    bad = dataclasses.replace(rows, advantages=advantages)
    state, _ = run_update(golden, bad, mini_batch_rows=24)
    assert int(state.skipped) == 1
    assert int(state.updates) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, golden.params)
