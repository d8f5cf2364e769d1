"""The numbers of an evaluation: pass@k, majority votes, intervals."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrl_jax.evaluation import (
    Answered,
    Summary,
    accuracies,
    average,
    bootstrap_means,
    estimate,
    evaluation_request,
    majority,
    pass_at_k,
    pass_counts,
    summarise,
)


def answered(problem, sample, answer="1", right=False, **changes):
    values = {
        "benchmark": "b", "problem": problem, "id": f"p{problem}", "sample": sample, "text": "",
        "tokens": 10, "ended": True, "answer": answer, "right": right, "lost": False,
        "elapsed": 0.5,
    }  # fmt: skip
    return Answered(**(values | changes))


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples):
    right = np.arange(samples + 1)
    for k in range(1, samples + 1):
        expected = []
        for count in right:
            subsets = list(itertools.combinations(range(samples), k))
            expected.append(np.mean([min(subset) < count for subset in subsets]))
        np.testing.assert_allclose(pass_at_k(right, samples, k), expected, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pass_at_k_equals_exact_binomials(data):
    """Also where the binomials overflow a float, and the factors below i = k would be negative."""
    samples = data.draw(st.integers(1, 3000))
    k = data.draw(st.integers(1, samples))
    right = data.draw(st.integers(0, samples))
    exact = 1 - Fraction(math.comb(samples - right, k), math.comb(samples, k))
    [estimated] = pass_at_k(np.array([right]), samples, k)
    assert estimated == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize(("right", "k"), [([1], 0), ([1], 5), ([5], 2), ([-1], 2)])
def test_pass_at_k_refuses_what_is_out_of_range(right, k):
    with pytest.raises(ValueError, match="must be within"):
        pass_at_k(np.array(right), 4, k)


def test_pass_counts():
    assert pass_counts(1) == [1]
    assert pass_counts(6) == [1, 2, 4, 6]
    assert pass_counts(32) == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["1", "1", "2"], [True, True, False], 1.0),
        (["1", "2", "2"], [True, False, False], 0.0),
        # Samples without an answer do not vote, however many they are.
        ([None, None, "3"], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        # Equal numbers and texts are one answer, whatever they look like.
        (["1/2", "0.5", r"\frac{1}{2}", "3", "3"], [True, True, True, False, False], 1.0),
        (["1,000", "1000", "7"], [True, True, False], 1.0),
        ([r"\text{ (A)}", "A", "B"], [True, True, False], 1.0),
        (["x + 1", "x+1", "1+x", "1+y"], [True, True, True, False], 1.0),
        # ... but not their rounded values, and not a percentage of them.
        (["0.3333333", "0.3333334", "2", "2"], [True, True, False, False], 0.0),
        (["50%", "0.5", "2", "2"], [True, True, False, False], 0.0),
        # Units, variables and bases that are left out.
        (["18", "18 dollars", r"18\text{ dollars}", "7", "7"], [True] * 3 + [False] * 2, 1.0),
        (["18", "x = 18", "7", "7", r"18\text{ m}"], [True, True, False, False, True], 1.0),
        (["1010_2", "1010_{2}", "1010", "7", "7"], [True] * 3 + [False] * 2, 1.0),
        (["1010_2", "1010_3", "7", "7"], [True, False, False, False], 0.0),
        # Two votes that have only a third in common.
        (["2A_{16}", "2A_{16}", "42_{10}", "42", "7", "7", "7"], [True] * 4 + [False] * 3, 1.0),
        # Ties: the mean over the answers that have most votes.
        (["1", "2"], [True, False], 0.5),
        (list("1122334"), [True, True, False, False, False, False, True], 1 / 3),
        # The judge lost one of three equal answers.
        (["1", "1", "1"], [True, False, True], 2 / 3),
    ],
)  # fmt: skip
def test_majority(answers, right, expected):
    """Regression: votes with and without a unit, a variable or a base were split."""
    assert majority(answers, right) == pytest.approx(expected)
    assert majority(answers[::-1], right[::-1]) == pytest.approx(expected)


def test_bootstrap_of_two_problems():
    """Means of two draws from {0, 1} are 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    means = bootstrap_means(np.array([[0.0], [1.0]]), seed=0)[:, 0]
    assert len(means) == 10_000
    for value, chance in ((0.0, 0.25), (0.5, 0.5), (1.0, 0.25)):
        assert np.mean(means == value) == pytest.approx(chance, abs=0.02)
    assert estimate(0.5, means) == (0.5, 0.0, 1.0)


def test_bootstrap_has_the_variance_of_a_mean():
    """Of n problems resampled: var / n; the percentiles are those of a normal distribution."""
    values = np.random.default_rng(1).random((400, 1))
    means = bootstrap_means(values, seed=3)[:, 0]
    error = values.std() / 20
    assert means.mean() == pytest.approx(values.mean(), abs=0.05 * error)
    assert means.std() == pytest.approx(error, rel=0.03)
    value, low, high = estimate(float(values.mean()), means)
    assert value - low == pytest.approx(1.96 * error, rel=0.05)
    assert high - value == pytest.approx(1.96 * error, rel=0.05)


def test_bootstrap_draws_the_same_problems_for_all_metrics():
    values = np.random.default_rng(0).random((7, 1))
    means = bootstrap_means(np.hstack([values, 1 - 2 * values]), seed=(1, 2), resamples=1234)
    assert means.shape == (1234, 2)
    np.testing.assert_allclose(means[:, 1], 1 - 2 * means[:, 0], atol=1e-12)
    again = bootstrap_means(values, seed=(1, 2), resamples=1234)
    np.testing.assert_allclose(means[:, 0], again[:, 0], atol=1e-12)
    assert np.any(again != bootstrap_means(values, seed=(1, 3), resamples=1234))


def test_one_problem_has_an_interval_of_no_width():
    means = bootstrap_means(np.array([[0.25]]), seed=0)[:, 0]
    assert estimate(0.25, means) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="no problems"):
        bootstrap_means(np.zeros((0, 1)), seed=0)


def two_problems():
    """Problem 0: answers 1, 2, 2, none, the 1 right; problem 4: all right."""
    return [
        answered(0, 0, "1", True, tokens=4),
        answered(0, 1, "2", False),
        answered(0, 2, "2", False, lost=True),
        answered(0, 3, None, False, ended=False, tokens=20),
        *(answered(4, sample, "5", True) for sample in range(4)),
    ]


def test_accuracies_of_each_problem():
    found = accuracies(two_problems(), samples=4)
    expected = {
        "avg@4": [0.25, 1.0], "pass@1": [0.25, 1.0], "pass@2": [0.5, 1.0], "pass@4": [1.0, 1.0],
        "maj@4": [0.0, 1.0],
    }  # fmt: skip
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values)


def test_accuracies_need_every_sample_once():
    responses = two_problems()
    for wrong in (responses[:-1], [*responses, responses[0]], [answered(0, 1)] * 4):
        with pytest.raises(ValueError, match=r"samples, not 0 \.\. 3"):
            accuracies(wrong, samples=4)


def test_summary_counts_responses_and_ignores_their_order():
    responses = two_problems()
    summary = summarise(responses, samples=4, seed=0)
    assert summary.accuracy["avg@4"].value == 0.625
    assert summary.accuracy["avg@4"].low == 0.25
    assert summary.accuracy["avg@4"].high == 1.0
    assert (summary.problems, summary.lost, summary.tokens) == (2, 1, 84)
    assert (summary.truncated, summary.unanswered) == (1 / 8, 1 / 8)
    assert summary.response_length == 84 / 8
    assert summary.tokens_per_second == 84 / 4.0
    other = summarise(responses[::-1], samples=4, seed=0)
    assert other.accuracy == summary.accuracy
    assert other.seconds == summary.seconds


def summary_of(means, samples=1):
    names = [f"{metric}@{samples}" for metric in ("avg", "pass", "maj")]
    value = {name: estimate(float(np.mean(means)), means) for name in names}
    return Summary(1, samples, value, dict.fromkeys(names, means), 0.0, 0.0, 0.0, 0, 0, 1.0)


def test_the_average_weighs_benchmarks_equally():
    """The error of a mean of two independent means is half the root of their squared errors."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.2, 0.03, 10_000), rng.normal(0.6, 0.04, 10_000)
    overall = average([summary_of(first), summary_of(second)])["avg@n"]
    assert overall.value == pytest.approx(0.4, abs=1e-3)
    assert overall.high - overall.low == pytest.approx(2 * 1.96 * 0.025, rel=0.03)
    # pass@n and maj@n grow with n: no mean where benchmarks differ in it.
    mixed = average([summary_of(first, 4), summary_of(second, 32)])
    assert mixed == {"avg@n": overall}


def test_requests_are_told_apart_by_problem_sample_and_seed():
    prompt = np.array([1, 2])
    noise = {
        (r.seed, r.first_sample)
        for r in (
            evaluation_request(prompt, problem, sample, budget=4, temperature=1.0, seed=seed)
            for problem in range(3)
            for sample in range(3)
            for seed in range(3)
        )
    }
    assert len(noise) == 27
