"""Gradients and memory of whole models: attention by blocks, what a layer keeps or recomputes."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.models.config import REMAT
from attnrl_jax.models.transformer import Transformer, forward, unembed
from tests.segments import segment_ends

TIME = 24


@partial(jax.jit, static_argnums=1)
def loss_and_gradient(params, config):
    """Of two rows: three packed sequences with padding behind, and one whole sequence."""
    tokens = np.random.default_rng(0).integers(1, 256, (2, TIME)).astype(np.int32)
    segments = np.ones((2, TIME), np.int32)
    segments[0] = np.repeat([1, 2, 3, 0], [9, 6, 7, 2])
    positions = np.broadcast_to(np.arange(TIME, dtype=np.int32), (2, TIME))
    step_ids = jnp.asarray(np.repeat(np.arange(8), 3)[None].repeat(2, 0))

    def loss(params):
        out = Transformer(config).apply(
            {"params": params}, tokens, positions, segment_ends(segments), step_ids=step_ids,
            delta=1, layout="packed",
        )  # fmt: skip
        logits = unembed(params, config, out.hidden)
        logprobs = jax.nn.log_softmax(logits)[:, :-1]
        taken = jnp.take_along_axis(logprobs, jnp.asarray(tokens)[:, 1:, None], axis=-1)
        return jnp.mean(taken), (logits, out.fci)

    return jax.value_and_grad(loss, has_aux=True)(params)


def assert_same(got, expected):
    for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        assert np.isfinite(a).all()
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("remat", REMAT)
def test_no_recomputation_changes_gradients(golden_model, remat):
    """Blocks that do not divide the length, every policy, against the whole map kept."""
    model = golden_model("qwen3")
    reference = replace(model.config, attention="plain", remat="none")
    config = replace(model.config, attention="blockwise", block_length=7, remat=remat)
    assert_same(loss_and_gradient(model.params, config), loss_and_gradient(model.params, reference))


def program(config, time):
    """Hidden states and influence of one sequence, and the gradient of the former."""

    def compute(params, tokens, step_ids):
        out = forward(params, config, tokens, jnp.array([time]), step_ids=step_ids)
        return jnp.sum(out.hidden), out.fci

    return compute


def temporary_bytes(compute, params, time):
    tokens = jax.ShapeDtypeStruct((1, time), jnp.int32)
    compiled = jax.jit(compute).lower(params, tokens, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_linear_in_time(golden_model, gradient):
    """No buffer of time x time, and temporaries at most double, whatever the number of steps.

    The number of steps is data: the program that is measured is the one for one token a step.
    """
    model = golden_model("qwen3")
    config = replace(model.config, block_length=128)
    sizes = []
    for time in (1024, 2048) if gradient else (1024, 2048, 4096):
        compute = program(config, time)
        if gradient:
            compute = jax.grad(compute, has_aux=True)
        size, text = temporary_bytes(compute, model.params, time)
        sizes.append(size)
        shapes = re.findall(r"\[([\d,]+)\]", text)
        largest = max(np.prod([int(n) for n in s.strip(",").split(",")]) for s in shapes)
        # What is kept of one block of queries, all heads, is the largest thing there is.
        assert largest <= config.num_heads * config.block_length * time
    assert sizes[0] > 0
    for small, large in itertools.pairwise(sizes):
        assert large <= 2.2 * small, sizes


def test_the_whole_map_is_quadratic(golden_model):
    """What the linear routes are compared with."""
    model = golden_model("qwen3")
    config = replace(model.config, attention="plain")
    small, large = (
        temporary_bytes(program(config, time), model.params, time)[0] for time in (1024, 2048)
    )
    assert large > 3 * small


def test_a_layer_keeps_what_its_policy_says(golden_model):
    """More kept is more memory: nothing, results of attention, those of projections, all."""
    model = golden_model("qwen3")
    tokens = jnp.zeros((1, 256), jnp.int32)
    kept = {}
    for remat in REMAT:
        config = replace(model.config, attention="blockwise", block_length=64, remat=remat)

        def loss(params, config=config):
            return jnp.sum(forward(params, config, tokens, jnp.array([256])).hidden)

        backward = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], model.params)
        kept[remat] = sum(x.size for x in jax.tree.leaves(backward))
    assert kept["full"] < kept["attention"] < kept["dots"] < kept["none"]
    layer = 256 * model.config.num_heads * (model.config.head_dim + 1)
    assert kept["attention"] - kept["full"] == model.config.num_layers * layer
