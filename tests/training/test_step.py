"""The update: packed trees equal padded rows, micro-batches add up, devices agree, bad gradients
change nothing."""

from __future__ import annotations

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.algorithms.losses import AGGREGATIONS, LossConfig, policy_loss
from attnrl_jax.models.transformer import forward, unembed
from attnrl_jax.packing import deal_batches
from attnrl_jax.sharding import (
    MeshConfig,
    batch_devices,
    batch_sharding,
    make_mesh,
    parameter_shardings,
)
from attnrl_jax.training.state import MiniBatchSplit, OptimizerConfig, init_state
from attnrl_jax.training.step import (
    accumulate,
    mini_batches,
    no_gradients,
    pack_rows,
    reference_logprobs,
    update,
)
from attnrl_jax.types import Paths, TrainRows
from tests.training.tiny import tiny_config
from tests.trees import random_rollouts, train_rows_of

ROWS, TIME = 24, 32
# Eight sequences a micro-batch. The lengths of `rows` are such that every test that packs them into
# these has batches of 8 or 4: few programs to compile.
MICRO = 8 * TIME


@pytest.fixture(scope="module")
def golden(golden_model):
    return golden_model("qwen2_tied")


@pytest.fixture(scope="module")
def rows():
    """Initial responses, each different from the next in its tokens, but for the prompt."""
    rng = np.random.default_rng(1)
    length = rng.integers(12, TIME + 1, ROWS).astype(np.int32)
    index = np.arange(TIME)[None, :]
    mask = ((index >= 4) & (index < length[:, None])).astype(np.float32)
    tokens = rng.integers(0, 256, (ROWS, TIME)).astype(np.int32)
    tokens[:, :4] = tokens[PROBLEM * 4, :4]
    return TrainRows(
        tokens=tokens,
        paths=Paths(np.full(ROWS, 4), length, PROBLEM, np.arange(ROWS), length),
        advantages=(rng.normal(size=(ROWS, TIME)) * mask).astype(np.float32),
        behaviour_logprobs=(rng.uniform(-7, -4, (ROWS, TIME)) * mask).astype(np.float32),
    )


PROBLEM = np.repeat(np.arange(6), 4)


def small_config(**changes):
    return tiny_config(**({"pack_length": TIME, "micro_batch_tokens": MICRO} | changes))


def mask_of(rows):
    index = np.arange(rows.tokens.shape[1])[None, :]
    paths = rows.paths
    inside = (index >= paths.prompt_length[:, None]) & (index < paths.length[:, None])
    return inside.astype(np.float32)


def gradients(golden, rows, micro_tokens, mesh=None, reference=None, **changes):
    """Gradient and metric sums of one mini-batch, cut into micro-batches of that many tokens."""
    config = small_config(micro_batch_tokens=micro_tokens, **changes)
    params = golden.params
    sharding, multiple = None, 1
    if mesh is not None:
        params = jax.device_put(params, parameter_shardings(params, mesh))
        sharding, multiple = batch_sharding(mesh), batch_devices(mesh)
    total = no_gradients(params)
    for packed in pack_rows(rows, config, multiple)[1]:
        micro = jax.device_put(packed.batch, sharding)
        logprobs = None
        if reference is not None:
            logprobs = reference_logprobs(reference, golden.config, micro, 1.0)
        total = accumulate(
            total, params, golden.config, config.loss, micro, logprobs,
            np.float32(packed.denominator), 1.0,
        )  # fmt: skip
    return jax.tree.map(np.array, total)


def assert_close(one, other, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-5), one, other
    )


@functools.partial(jax.jit, static_argnames=("config", "loss"))
def padded_gradients(params, config, loss, tokens, length, mask, behaviour, reference, advantages):
    """The same from right-padded rows, without any packing: what it has to be equal to."""

    def logprobs_of(params):
        logits = unembed(params, config, forward(params, config, tokens, length).hidden)
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
        )
        return jnp.pad(chosen[..., 0], [(0, 0), (1, 0)])

    def objective(params):
        return policy_loss(
            logprobs_of(params), behaviour, logprobs_of(reference), advantages, mask, loss
        )

    return jax.grad(objective, has_aux=True)(params)


# Narrow bounds and far behaviour: all three branches of the clipping, and a penalty that counts.
LOSS = LossConfig(clip_low=0.2, clip_high=0.28, dual_clip=1.5, kl_beta=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_packed_trees_equal_padded_rows(golden, golden_model, seed):
    """Gradients and metrics, with clip, dual clip and KL: trees that are cut into sub-trees, and
    rows packed one by one, against rows padded one by one. Trees repeat offsets, branch at 0 and
    at the end, and have lost some of their rows, roots among them."""
    rng = np.random.default_rng(seed)
    rows = train_rows_of(random_rollouts(rng), rng)
    reference = jax.tree.map(lambda x: x * 1.1, golden.params)
    few = 40 - len(rows.tokens)
    inputs = (rows.tokens, rows.paths.length, mask_of(rows), rows.behaviour_logprobs)
    inputs = [np.pad(x, [(0, few)] + [(0, 0)] * (x.ndim - 1)) for x in (*inputs, rows.advantages)]
    expected = padded_gradients(
        golden.params, golden.config, LOSS, *inputs[:4], reference, inputs[4]
    )
    # One sequence a micro-batch: every tree has the same compiled program.
    for packing in ("tree", "rows"):
        packed = gradients(
            golden, rows, 64, reference=reference, loss=LOSS, packing=packing, pack_length=64
        )
        assert_close(packed, expected, 1e-5)
    metrics = expected[1]
    assert min(metrics.clipped, metrics.dual_clipped, metrics.reference_kl) > 0
    assert metrics.tokens == mask_of(rows).sum()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mean_over", ["mini-batch", "micro-batch"])
def test_every_mean_of_packed_rows(aggregation, mean_over):
    """Without a model: log-probabilities of rows, packed like their tokens, give the same loss.
    Trees are refused but for the mean over all tokens."""
    rng = np.random.default_rng(0)
    rows = train_rows_of(random_rollouts(rng), rng)
    logprobs = rows.behaviour_logprobs + rng.normal(size=rows.tokens.shape).astype(np.float32)
    loss = LossConfig(kl_beta=0.0, aggregation=aggregation, mean_over=mean_over)
    settings = {"loss": loss, "pack_length": 64, "micro_batch_tokens": 64}
    exact = (aggregation, mean_over) == ("token-mean", "mini-batch")
    assert small_config(**settings).shares_prefixes == exact
    if not exact:
        with pytest.raises(ValueError, match=rf"'tree' needs loss.aggregation.*'{aggregation}'"):
            small_config(**settings, packing="tree")
    config = small_config(**settings, packing="rows")
    placement, batches = pack_rows(rows, config, 1)
    assert len(batches) > 1
    layout = placement.lay_out(np.arange(len(batches)))[1]
    packed_logprobs = layout.gather(logprobs)
    mask = mask_of(rows)
    total = expected = 0.0
    for k, micro in enumerate(batches):
        batch = micro.batch
        part, _ = policy_loss(
            packed_logprobs[k : k + 1], batch.behaviour_logprobs, None, batch.advantages,
            batch.mask, loss, micro.denominator, batch.weights,
        )  # fmt: skip
        total += part
        members = mask * np.isin(np.arange(len(mask)), layout.row[k])[:, None]
        own, _ = policy_loss(
            logprobs, rows.behaviour_logprobs, None, rows.advantages, members, loss
        )
        expected += own * members.any(axis=1).sum() / config.mini_batch_rows
    if mean_over == "mini-batch":
        expected, _ = policy_loss(
            logprobs, rows.behaviour_logprobs, None, rows.advantages, mask, loss
        )
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_rows_that_disagree_on_a_shared_token_are_refused():
    rng = np.random.default_rng(0)
    rows = train_rows_of(random_rollouts(rng), rng, drop=0)
    row = int(np.flatnonzero(rows.paths.shared < rows.paths.length)[-1])
    assert rows.paths.shared[row] > rows.paths.prompt_length[row]
    for name in ("advantages", "behaviour_logprobs"):
        changed = getattr(rows, name).copy()
        changed[row, rows.paths.prompt_length[row]] += 0.5
        bad = dataclasses.replace(rows, **{name: changed})
        with pytest.raises(ValueError, match=rf"{name} of row {row}, response token 0: .* packing"):
            pack_rows(bad, small_config(packing="tree", pack_length=400), 1)
        pack_rows(bad, small_config(packing="rows", pack_length=400), 1)


def test_micro_batches_add_up(golden, rows):
    """However rows are cut, the sum is the gradient of the mean over the whole mini-batch."""
    whole = gradients(golden, rows, MICRO)
    assert_close(whole, gradients(golden, rows, 32), 1e-5)
    assert_close(whole, gradients(golden, rows, 32, packing="rows"), 1e-5)


def test_sharded_equals_one_device(golden, rows):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        sharded = gradients(golden, rows, MICRO, mesh)
    assert_close(sharded, gradients(golden, rows, MICRO), 1e-5)


def test_gradients_are_cut_like_their_parameters(golden, rows):
    """A bug: zeros follow no input, so the accumulator, and with it every gradient, was whole on
    every device, and the second micro-batch compiled anew."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        params = jax.device_put(golden.params, parameter_shardings(golden.params, mesh))
        total = no_gradients(params)
        compiled = []
        config = small_config(micro_batch_tokens=32 * 4, packing="rows")
        for packed in pack_rows(rows, config, 4)[1]:
            micro = jax.device_put(packed.batch, batch_sharding(mesh))
            total = accumulate(
                total, params, golden.config, config.loss, micro, None, np.float32(1), 1.0
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
    optimizer = OptimizerConfig(learning_rate=1e-2, eps=0.1)
    config = small_config(mini_batch_rows=8, micro_batch_tokens=MICRO, optimizer=optimizer)
    alone, metrics = run_update(golden, rows, mini_batch_rows=8, optimizer=optimizer)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        params = jax.device_put(golden.params, parameter_shardings(golden.params, mesh))
        params = jax.tree.map(jnp.copy, params)
        state = init_state(params, config.optimizer, mesh)
        state, sharded = update(
            state, golden.config, config, rows, np.random.default_rng(0), None,
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
    assert_close(sharded, gradients(golden, few, 32), 1e-5)


def test_micro_batches_hold_every_row_once(rows):
    config = small_config(micro_batch_tokens=32 * 5, packing="rows")
    placement, packed = pack_rows(rows, config, 2)
    batches = [micro.batch for micro in packed]
    for micro, batch in zip(packed, batches, strict=True):
        assert micro.sequences == len(batch.mask)
        assert len(batch.mask) % 2 == 0
        assert batch.mask.size <= 32 * 5
        assert micro.denominator == mask_of(rows).sum()
    sequences = np.concatenate(deal_batches(placement, 32 * 5, 2))
    layout = placement.lay_out(sequences)[1]
    np.testing.assert_array_equal(
        layout.spread(np.concatenate([batch.packed.tokens for batch in batches]), TIME),
        np.where(np.arange(TIME) < layout.length[:, None], rows.tokens, 0),
    )
    assert sum(batch.mask.sum() for batch in batches) == mask_of(rows).sum()


@pytest.mark.parametrize("split", get_args(MiniBatchSplit))
def test_mini_batches_keep_problems_whole(split):
    batches = mini_batches(PROBLEM, 10, np.random.default_rng(0), split)
    assert sorted(np.concatenate(batches).tolist()) == list(range(24))
    for batch in batches:
        assert all(np.sum(PROBLEM[batch] == p) == 4 for p in np.unique(PROBLEM[batch]))


def test_mini_batches_that_are_filled():
    batches = mini_batches(PROBLEM, 10, np.random.default_rng(0), "fill")
    assert [*map(len, batches)] == [12, 12]
    batches = mini_batches(PROBLEM, 20, np.random.default_rng(0), "fill")
    assert [*map(len, batches)] == [20, 4]


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1000, [24]), (20, [24]), (16, [12, 12]), (10, [12, 12]), (8, [8] * 3), (1, [4] * 6)],
)
def test_mini_batches_that_are_even(rows, sizes):
    batches = mini_batches(PROBLEM, rows, np.random.default_rng(0))
    assert [*map(len, batches)] == sizes


def test_even_mini_batches_of_problems_of_many_sizes():
    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes = rng.integers(1, 30, size=20)
        batches = mini_batches(np.repeat(np.arange(20), sizes), 48, rng)
        wanted = sizes.sum() / 48
        assert abs(len(batches) - wanted) <= 0.5 + 1e-9
        # Both ends of a mini-batch are within half a problem of where they should be.
        assert all(abs(len(batch) - sizes.sum() / len(batches)) <= 30 for batch in batches)


def run_update(golden, rows, **changes):
    config = small_config(micro_batch_tokens=MICRO, **changes)
    params = jax.tree.map(lambda x: x.copy(), golden.params)
    state = init_state(params, config.optimizer, None)
    return update(state, golden.config, config, rows, np.random.default_rng(0))


def test_update_lowers_the_loss(golden, rows):
    optimizer = OptimizerConfig(learning_rate=1e-3)
    state, before = run_update(golden, rows, optimizer=optimizer, mini_batch_rows=24)
    config = small_config(micro_batch_tokens=MICRO, optimizer=optimizer, mini_batch_rows=24)
    _, after = update(state, golden.config, config, rows, np.random.default_rng(0))
    assert after["loss"] < before["loss"]
    assert before["updates"] == 1


def test_several_updates_a_step(golden, rows):
    state, metrics = run_update(golden, rows, mini_batch_rows=8)
    assert metrics["updates"] == 3
    assert int(state.updates) == 3
    assert 0 < metrics["padding"] < 0.5
    # Prompts of 4 tokens, where two rows of a problem are in one sequence.
    assert 1 < metrics["sharing"] < 1.25


def test_a_gradient_that_is_not_finite_skips_the_update(golden, rows):
    advantages = rows.advantages.copy()
    advantages[0, 5] = np.nan
    bad = dataclasses.replace(rows, advantages=advantages)
    state, _ = run_update(golden, bad, mini_batch_rows=24)
    assert int(state.skipped) == 1
    assert int(state.updates) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, golden.params)
