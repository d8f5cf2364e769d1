import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.algorithms.losses import (
    LossConfig,
    k3,
    loss_denominator,
    masked_mean,
    policy_loss,
)
from tests.golden_data import load_json

SHAPE = (6, 15)
NAMES = ("log_prob", "old_log_prob", "ref_log_prob", "advantages", "mask")


def padded(values):
    array = np.asarray(values, np.float32)
    return jnp.asarray(np.pad(array, [(0, m - n) for n, m in zip(array.shape, SHAPE, strict=True)]))


def inputs_of(case):
    """Golden inputs, padded to one shape (which must change nothing)."""
    return tuple(padded(case[name]) for name in NAMES)


def config_of(case, **changes):
    return LossConfig(
        **{
            "clip_low": case["clip_low"],
            "clip_high": case["clip_high"],
            "dual_clip": case["clip_c"],
            "kl_beta": case["kl_coef"],
            "aggregation": case["agg"],
        }
        | changes
    )


def size_of(mask):
    """Tokens, and rows that have any."""
    return float(mask.sum()), int(np.count_nonzero(mask.sum(axis=1)))


loss_and_gradient = jax.value_and_grad(policy_loss, has_aux=True)
loss_and_gradient_jit = jax.jit(loss_and_gradient, static_argnums=5)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("k", range(9))
def test_golden_losses(k, jitted):
    case = load_json("loss")["cases"][k]
    inputs = inputs_of(case)
    logprobs, behaviour, reference, advantages, mask = inputs
    run = loss_and_gradient_jit if jitted else loss_and_gradient

    (total, metrics), gradient = run(*inputs, config_of(case))
    np.testing.assert_allclose(total, case["total"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(metrics.policy_loss, case["pg_loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(metrics.kl_loss, case["kl_loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, padded(case["grad_total"]), rtol=1e-5, atol=1e-6)
    shares = metrics.per_token()
    np.testing.assert_allclose(shares["clip_fraction"], case["pg_clipfrac"], atol=1e-6)
    np.testing.assert_allclose(shares["dual_clip_fraction"], case["pg_clipfrac_lower"], atol=1e-6)
    np.testing.assert_allclose(shares["approx_kl"], case["ppo_kl"], rtol=1e-5, atol=1e-5)

    if jitted:
        return
    (total, _), gradient = run(*inputs, config_of(case, kl_beta=0.0))
    np.testing.assert_allclose(total, case["pg_loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, padded(case["grad_pg"]), rtol=1e-5, atol=1e-6)

    only_kl = (logprobs, behaviour, reference, advantages * 0, mask)
    (total, _), gradient = run(*only_kl, config_of(case, kl_beta=1.0))
    np.testing.assert_allclose(total, case["kl_loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, padded(case["grad_kl"]), rtol=1e-5, atol=1e-6)
    kl = k3(logprobs, reference)[: len(case["kld"]), : len(case["kld"][0])]
    np.testing.assert_allclose(kl, case["kld"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", range(9))
def test_golden_weighting_of_micro_batches(k):
    """The released program weighs each micro-batch's own mean by its rows."""
    case = load_json("loss")["cases"][k]
    *inputs, mask = inputs_of(case)
    config = config_of(case, mean_over="micro-batch")
    loss, gradient = 0.0, 0.0
    for rows in case["micro"]["rows"]:
        is_in = jnp.isin(jnp.arange(SHAPE[0]), jnp.asarray(rows))[:, None]
        micro, nominal = np.asarray(mask * is_in), case["micro"]["ppo_mini_batch_size"]
        denominator = loss_denominator(config, size_of(np.asarray(mask)), size_of(micro), nominal)
        (part, _), part_gradient = loss_and_gradient_jit(*inputs, micro, config, denominator)
        loss, gradient = loss + part, gradient + part_gradient
    np.testing.assert_allclose(loss, case["micro"]["loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, padded(case["micro"]["grad"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_result_does_not_depend_on_micro_batches(aggregation):
    """With the mini-batch's denominator, losses, gradients and metrics of its parts add up."""
    case = load_json("loss")["cases"][2]
    *inputs, mask = inputs_of(case)
    config = config_of(case, aggregation=aggregation)
    denominator = jnp.sum(mask) if aggregation == "token-mean" else jnp.float32(6)
    whole = loss_and_gradient_jit(*inputs, mask, config, denominator)
    by_default = loss_and_gradient_jit(*inputs, mask, config)
    parts = None
    for rows in ([0], [3, 1], [2, 4, 5]):
        is_in = jnp.isin(jnp.arange(SHAPE[0]), jnp.asarray(rows))[:, None]
        part = loss_and_gradient_jit(*inputs, mask * is_in, config, denominator)
        parts = part if parts is None else jax.tree.map(jnp.add, parts, part)
    for other in (by_default, parts):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), whole, other
        )
    assert float(whole[0][1].clipped) > 0


def one_token(ratio, advantage, **settings):
    log_ratio = jnp.full((1, 1), np.log(ratio), jnp.float32)
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    return loss_and_gradient_jit(
        log_ratio, zero, None, one * advantage, one, LossConfig(kl_beta=0.0, **settings)
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped", "dual_clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0, 0),
        (1.5, 2.0, -2.56, 0.0, 1, 0),  # 1.28 · 2
        (0.5, 2.0, -1.0, -1.0, 0, 0),
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # 0.8 · 2
        (1.5, -2.0, 3.0, 3.0, 0, 0),
        (4.0, -2.0, 6.0, 0.0, 0, 1),  # 3 · 2
    ],
)
def test_hand_computed_clipping(ratio, advantage, loss, gradient, clipped, dual_clipped):
    (value, metrics), slope = one_token(ratio, advantage)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(slope, [[gradient]], rtol=1e-6)
    assert (metrics.clipped, metrics.dual_clipped, metrics.tokens) == (clipped, dual_clipped, 1)
    np.testing.assert_allclose(metrics.approx_kl, -np.log(ratio), rtol=1e-6)
    assert metrics.kl_loss == 0


def test_masked_mean():
    x = jnp.array([[1.0, 2.0], [jnp.nan, 5.0]])
    mask = jnp.array([[1.0, 1.0], [0.0, 1.0]])
    np.testing.assert_allclose(masked_mean(x, mask), 8 / 3)
    np.testing.assert_allclose(masked_mean(x, mask, 16), 0.5)
    assert masked_mean(x, mask * 0) == 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("aggregation", "mean"),
        ("clip_low", 1.5),
        ("clip_high", -0.1),
        ("dual_clip", 1.0),
        ("kl_beta", -1e-3),
    ],
)
def test_invalid_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"loss {setting}="):
        LossConfig(**{setting: value})
