"""Settings of training that belong together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnrl_jax.algorithms.losses import LossConfig
from attnrl_jax.sharding import MeshConfig, make_mesh
from attnrl_jax.training.state import (
    OptimizerConfig,
    TrainConfig,
    abstract_state,
    init_state,
    make_optimizer,
)

BUDGETS = {"prompt_budget": 1024, "response_budget": 8192, "length_multiple": 1024}


@pytest.mark.parametrize(
    ("settings", "devices", "length"),
    [
        # One of the longest paths on each of eight devices.
        (BUDGETS | {"micro_batch_tokens": 8 * 9216}, 8, 9216),
        # Long ones are not joined: attention would cost more than sharing saves.
        (BUDGETS | {"micro_batch_tokens": 8 * 9216}, 1, 9216),
        # Up to four shorter ones where one device has the room.
        ({"prompt_budget": 64, "response_budget": 512, "micro_batch_tokens": 4096}, 1, 4 * 640),
        ({"prompt_budget": 64, "response_budget": 512, "micro_batch_tokens": 4096}, 2, 3 * 640),
        # A path has to fit, whatever a micro-batch is meant to hold.
        (BUDGETS | {"micro_batch_tokens": 4096}, 1, 9216),
        (BUDGETS | {"micro_batch_tokens": 8 * 9216, "pack_length": 10000}, 8, 10000),
        ({"prompt_budget": 64, "response_budget": 160, "length_multiple": 64}, 1, 1024),
    ],
)
def test_length_of_packed_sequences(settings, devices, length):
    assert TrainConfig(**settings).packed_length(devices) == length


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, True),
        ({"packing": "tree"}, True),
        ({"packing": "rows"}, False),
        ({"permute_advantages": True}, False),
        ({"loss": LossConfig(aggregation="seq-mean-token-mean")}, False),
        ({"loss": LossConfig(mean_over="micro-batch")}, False),
    ],
)
def test_prefixes_are_shared_where_that_is_exact(settings, shares):
    assert TrainConfig(**settings).shares_prefixes == shares


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": "trees"}, "packing must be one of auto, tree, rows; got 'trees'"),
        ({"pack_length": -1}, "pack_length must be >= 0; got -1"),
        (BUDGETS | {"pack_length": 9215}, r"pack_length 9215 is below .* = 9216"),
        ({"score_batch_tokens": 0}, "score_batch_tokens must be >= 1; got 0"),
        ({"packing": "tree", "permute_advantages": True}, "packing 'tree' needs .* and True"),
        (
            {"packing": "tree", "loss": LossConfig(mean_over="micro-batch")},
            r"'tree' needs .*loss.mean_over 'mini-batch'.*'micro-batch'",
        ),
        (
            {"packing": "tree", "loss": LossConfig(aggregation="seq-mean-token-sum")},
            r"'tree' needs loss.aggregation 'token-mean'.*'seq-mean-token-sum'",
        ),
    ],
)
def test_errors_name_the_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_a_state_without_arrays_is_laid_out_like_one_with(golden_model):
    params, mesh = golden_model("qwen2_tied").params, make_mesh(MeshConfig(data=4, fsdp=2))
    arrays = init_state(params, OptimizerConfig(), mesh)
    shapes = abstract_state(jax.eval_shape(lambda: params), OptimizerConfig(), mesh)
    assert jax.tree.structure(shapes) == jax.tree.structure(arrays)
    for shape, array in zip(*map(jax.tree.leaves, (shapes, arrays)), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


def test_a_warm_up_may_begin_or_end_in_a_run(golden_model):
    """Bug: without one the optimizer's state had another structure, and a checkpoint of it was "of
    another model"."""
    params = golden_model("qwen2_tied").params
    structures = {
        jax.tree.structure(make_optimizer(OptimizerConfig(warmup_updates=n)).init(params))
        for n in (0, 1, 10)
    }
    assert len(structures) == 1


@pytest.mark.parametrize("learning_rate", [1e-6, 3e-4, 0.0123])
def test_without_a_warm_up_the_rate_is_constant_to_the_bit(golden_model, learning_rate):
    params = golden_model("qwen2_tied").params
    config = OptimizerConfig(learning_rate=learning_rate)
    plain = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay
        ),
    )

    def after_three_updates(optimizer):
        @jax.jit
        def update(params, state):
            gradients = jax.tree.map(jnp.sin, params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        result, state = params, optimizer.init(params)
        for _ in range(3):
            result, state = update(result, state)
        return result

    jax.tree.map(
        np.testing.assert_array_equal,
        after_three_updates(make_optimizer(config)),
        after_three_updates(plain),
    )
