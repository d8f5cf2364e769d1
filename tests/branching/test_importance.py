import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.branching.importance import (
    forward_context_influence,
    influence_from_maps,
    mask_candidates,
    pool_columns,
    query_weights,
)
from tests.golden_data import load_json, load_npz

NUM_RANGES = 64
influence = jax.jit(influence_from_maps, static_argnums=(2, 3))


def masked(fci, variant):
    stop = variant["stop_think_step"]
    after = None if stop == -1 else np.full(fci.shape[:-1], stop)
    return mask_candidates(np.asarray(fci), variant["zero_first"], after)


def ids_of(ranges):
    return np.repeat(np.arange(len(ranges)), ranges[:, 1] - ranges[:, 0])


def influence_by_columns(maps, step_ids, delta, num_ranges=None):
    """The second form: column sums of weighted queries far enough ahead, pooled by range."""
    ahead = step_ids[:, None] >= step_ids[None, :] + delta
    weight = query_weights(step_ids)[:, None] * ahead
    columns = jnp.einsum("lhqp,qp->lhp", maps, weight, precision="highest")
    return pool_columns(columns, step_ids, num_ranges)


@pytest.mark.parametrize("case", range(10))
def test_golden_fci_from_step_attention(case):
    """Every golden case: one "token" per range, so that the map is the step attention itself."""
    arrays, about = load_npz("fci"), load_json("fci")["cases"][case]
    step = arrays[f"c{case}_step"]
    heads, size = step.shape[1], step.shape[-1]
    padding = ((0, 3 - step.shape[0]), (0, 4 - heads), *[(0, NUM_RANGES - size)] * 2)
    maps = np.pad(step, padding)
    step_ids = np.where(np.arange(NUM_RANGES) < size, np.arange(NUM_RANGES), -1)
    for v, variant in enumerate(about["variants"]):
        y = np.asarray(influence(maps, step_ids, variant["delta"], NUM_RANGES))
        assert not y[..., size:].any()
        y = masked(y, {**variant, "stop_think_step": -1})[: step.shape[0], :heads, :size]
        expected = arrays[f"c{case}_v{v}_fci_lh"][:, :heads].copy()
        if variant["zero_first"] and variant["stop_think_step"] != -1:
            y = np.where(np.arange(size) < variant["stop_think_step"], y, 0)
        np.testing.assert_allclose(y, expected, atol=2e-5)
        if about["step_heads_stored"] == "all":
            np.testing.assert_allclose(y.max(axis=(0, 1)), arrays[f"c{case}_v{v}_fci"], atol=2e-5)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("form", [influence_from_maps, influence_by_columns])
def test_golden_fci_from_token_attention(form, jitted):
    arrays, about = load_npz("fci"), load_json("fci")["cases"][0]
    maps, step_ids = jnp.asarray(arrays["c0_attn"]), jnp.asarray(ids_of(arrays["c0_ranges"]))
    size = len(arrays["c0_ranges"])
    for v, variant in enumerate(about["variants"]):
        function = functools.partial(form, delta=variant["delta"], num_ranges=size)
        y = (jax.jit(function) if jitted else function)(maps, step_ids)
        assert y.shape == (2, 4, size)
        np.testing.assert_allclose(masked(y, variant), arrays[f"c0_v{v}_fci_lh"], atol=2e-5)
        fci = np.asarray(y).max(axis=(0, 1))
        np.testing.assert_allclose(masked(fci, variant), arrays[f"c0_v{v}_fci"], atol=2e-5)
    whole = forward_context_influence(maps, step_ids, about["variants"][-1]["delta"], size)
    np.testing.assert_allclose(whole, fci, rtol=1e-6)


def test_both_forms_agree_on_padded_batches():
    rng = np.random.default_rng(0)
    maps = np.tril(rng.random((3, 2, 2, 24, 24))).astype(np.float32)
    step_ids = np.full((3, 24), -1)
    step_ids[0] = np.arange(24)  # every token a step
    step_ids[1, :20] = np.sort(np.concatenate([[0, 0, 1, 2, 3, 4, 5], rng.integers(0, 6, 13)]))
    step_ids[2, :9] = [0, 0, 1, 1, 1, 1, 1, 1, 1]
    by_columns = jax.jit(jax.vmap(functools.partial(influence_by_columns, delta=1)))(maps, step_ids)
    for b in range(3):
        by_maps = influence(maps[b], step_ids[b], 1)
        np.testing.assert_allclose(by_columns[b], by_maps, rtol=1e-5, atol=1e-6)


def test_hand_computed_influence():
    """Prompt of 1, steps of 2 and 1 tokens, uniform attention: column 1 of queries 3 is 1/4."""
    maps = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    step_ids = np.array([0, 1, 1, 2])
    y = influence_from_maps(maps[None, None], step_ids, 1)[0, 0]
    # y[0] = mean(1/2, 1/3) + 1/4, y[1] = 1/4, y[2] = 0
    np.testing.assert_allclose(y, [5 / 12 + 1 / 4, 1 / 4, 0, 0], rtol=1e-6)
    y = influence_from_maps(maps[None, None], step_ids, 0)[0, 0]
    # M[1, 1] = mean(1/2, 0, 1/3, 1/3) = 7/24
    np.testing.assert_allclose(y, [1 + 2 / 3, 7 / 24 + 1 / 4, 1 / 4, 0], rtol=1e-6)


def test_query_weights_and_pooling():
    step_ids = np.array([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, -1, -1]])
    third = np.float32(1 / 3)
    weights = [[third, third, third, 1, 0.5, 0.5], [1, third, third, third, 0, 0]]
    np.testing.assert_array_equal(query_weights(step_ids), weights)
    columns = np.arange(24, dtype=np.float32).reshape(2, 2, 6)
    pool = jax.jit(pool_columns, static_argnums=2)
    pooled = pool(columns, step_ids, 3)
    expected = [[[1, 3, 4.5], [7, 9, 10.5]], [[12, 14, 0], [18, 20, 0]]]
    np.testing.assert_allclose(pooled, expected)
    flat = pool(columns[0, 0], step_ids[0])
    np.testing.assert_allclose(flat, [1, 3, 4.5, 0, 0, 0])


@pytest.mark.parametrize(
    ("zero_first", "first_after_think", "expected"),
    [
        (True, None, [[0, 0, 3, 4, 5], [0, 0, 3, 4, 5]]),
        (False, None, [[0, 2, 3, 4, 5], [0, 2, 3, 4, 5]]),
        (True, [3, 9], [[0, 0, 3, 0, 0], [0, 0, 3, 4, 5]]),
        (False, [1, 4], [[0, 0, 0, 0, 0], [0, 2, 3, 4, 0]]),
    ],
)
def test_mask_candidates(zero_first, first_after_think, expected):
    fci = np.tile(np.arange(1.0, 6.0), (2, 1))
    after = None if first_after_think is None else np.array(first_after_think)
    np.testing.assert_array_equal(mask_candidates(fci, zero_first, after), expected)
