"""The update: micro-batches add up, devices agree, bad gradients change nothing."""

from __future__ import annotations

import dataclasses

import jax
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
from attnrl_jax.training.step import _zeros as zeros
from attnrl_jax.training.step import accumulate, micro_batches, mini_batches, update
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
    total = zeros(params)
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
