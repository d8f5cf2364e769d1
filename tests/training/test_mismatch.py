"""Sampler and scorer: how far their log-probabilities are apart, and what corrects for it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from attnrl_jax.algorithms.losses import LossConfig, policy_loss
from attnrl_jax.training.rollout import importance_weights, train_rows
from attnrl_jax.training.rounds import compare_logprobs
from attnrl_jax.training.state import TrainConfig
from tests.training.tiny import fresh_state, run_steps, tiny_setup


@pytest.fixture(scope="module")
def golden(golden_model):
    return golden_model("qwen2_tied")


@pytest.fixture(scope="module")
def reports(golden):
    """Two steps whose sampler computes in bfloat16, with the correction; and in float32."""
    found = {}
    for dtype in ("", "bfloat16"):
        setup = tiny_setup(golden, steps=2, importance_cap=1.5)
        setup = dataclasses.replace(setup, sampling_dtype=dtype)
        _, found[dtype], _ = run_steps(fresh_state(golden, setup), setup)
    return found


def test_the_difference_is_measured_every_step(reports):
    for report in reports[""]:
        assert 0 < report.metrics["sampler/mismatch_mean"] < 1e-5
        assert report.metrics["sampler/mismatch_mean"] <= report.metrics["sampler/mismatch_max"]
        assert report.metrics["sampler/mismatch_max"] < 1e-4
    for report in reports["bfloat16"]:
        assert report.metrics["sampler/mismatch_mean"] > 1e-3
        assert report.metrics["sampler/mismatch_max"] > 1e-2


def test_differences_by_hand():
    ours = [np.array([-1.0, -2.0], np.float32), np.zeros(0, np.float32), np.float32([-3.0, np.nan])]
    theirs = [np.array([-1.5, -2.0], np.float32), np.zeros(0, np.float32), np.float32([-2.0, -1.0])]
    found = compare_logprobs(ours, theirs)
    assert (found.tokens, found.largest) == (3, 1.0)
    assert found.mean == pytest.approx(0.5)
    assert compare_logprobs([], []).mean == 0.0


def test_weights_are_truncated_ratios(reports):
    [weights] = importance_weights([np.log([0.2, 0.9, 0.5])], [np.log([0.4, 0.3, 0.5])], 2.0)
    np.testing.assert_allclose(weights, [0.5, 2.0, 1.0])
    for dtype, apart in (("", 1e-4), ("bfloat16", 1.0)):
        for report in reports[dtype]:
            held = np.concatenate(report.leaves.importance)
            assert len(held) == len(np.concatenate(report.leaves.tokens))
            assert held.max() <= 1.5 + 1e-6
            assert 0 < np.abs(held - 1).max() < apart


def test_weights_multiply_the_loss_of_their_tokens(reports):
    """In the advantages, for every token and whatever bound of the loss it meets."""
    report = reports["bfloat16"][-1]
    width = report.rows.tokens.shape[1]
    rows = np.arange(int(report.trained.sum()))
    arguments = report.leaves, report.leaf_advantages, report.trained, width
    plain, corrected = (train_rows(*arguments, corrected=c) for c in (False, True))
    advantages, weighted = plain.advantages[rows], corrected.advantages[rows]
    inside = advantages != 0
    weight = np.where(inside, weighted / np.where(inside, advantages, 1), 0)
    assert inside.any()
    assert np.all(weight[inside] > 0)
    # A continuation's prefix has the weights of its root.
    kept = np.flatnonzero(report.trained)
    for k, row in enumerate(kept):
        prompt, split = report.leaves.prompt_length[row], report.leaves.split[row]
        root = report.leaves.root[row]
        whole = np.concatenate(
            [report.leaves.importance[root][:split], report.leaves.importance[row]]
        )
        here = inside[k, prompt : prompt + len(whole)]
        found = weight[k, prompt : prompt + len(whole)]
        np.testing.assert_allclose(found[here], whole[here], rtol=1e-5)
    logprobs = np.random.default_rng(0).normal(-1, 1.5, advantages.shape).astype(np.float32)
    behaviour, mask = plain.behaviour_logprobs[rows], inside.astype(np.float32)
    config = LossConfig(kl_beta=0.0)
    # Token by token.
    first = np.flatnonzero(mask)[:40]
    single = np.zeros((len(first), mask.size), np.float32)
    single[np.arange(len(first)), first] = 1
    parts = [
        float(policy_loss(logprobs, behaviour, None, advantages, one, config, 1.0)[0])
        for one in single.reshape(-1, *mask.shape)
    ]
    mask.reshape(-1)[np.setdiff1d(np.arange(mask.size), first)] = 0
    whole, _ = policy_loss(logprobs, behaviour, None, weighted, mask, config, 1.0)
    expected = float(np.dot(parts, weight.reshape(-1)[first]))
    assert float(whole) == pytest.approx(expected, rel=1e-4)


def test_without_a_cap_nothing_is_weighted(golden, reports):
    setup = tiny_setup(golden, steps=1)
    _, [report], _ = run_steps(fresh_state(golden, setup), setup)
    assert not any(len(x) for x in report.leaves.importance)
    # The same tokens: the correction changes the update alone.
    np.testing.assert_array_equal(report.rows.tokens, reports[""][0].rows.tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance_cap": 0.5}, "importance_cap must be 0 or at least 1; got 0.5"),
        ({"importance_cap": float("inf")}, "importance_cap must be 0 or at least 1; got inf"),
        (
            {"importance_cap": 2.0, "behaviour": "sampler"},
            "needs behaviour 'scorer'; got 'sampler'",
        ),
    ],
)
def test_caps_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
