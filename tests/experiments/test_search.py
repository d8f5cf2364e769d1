"""Grids, lists side by side and random points, exactly."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from experiments.search import choice, grid, log_uniform, random_search, uniform, zipped


def test_the_last_setting_of_a_grid_varies_fastest():
    assert grid({"optimizer.b1": [0.8, 0.9]}, method=["grpo"], seed=range(2)) == [
        {"optimizer.b1": 0.8, "method": "grpo", "seed": 0},
        {"optimizer.b1": 0.8, "method": "grpo", "seed": 1},
        {"optimizer.b1": 0.9, "method": "grpo", "seed": 0},
        {"optimizer.b1": 0.9, "method": "grpo", "seed": 1},
    ]


def test_zipped_settings_go_together():
    assert zipped({"optimizer.b1": [0.8, 0.9]}, seed=[3, 1]) == [
        {"optimizer.b1": 0.8, "seed": 3},
        {"optimizer.b1": 0.9, "seed": 1},
    ]


@pytest.mark.parametrize("function", [grid, zipped])
@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"seed": [0]}, {"seed": [1]}, "seed: given twice"),
        ({"seed": []}, {}, "seed has no values"),
        ({"method": "grpo"}, {}, "method must be a list of values; got 'grpo'"),
        ({"seed": 3}, {}, "seed must be a list of values; got 3"),
        (None, {}, "no settings are given"),
    ],
)
def test_what_is_no_list_of_values_is_named(function, settings, more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(settings, **more)


def test_zipped_settings_must_be_as_long_as_each_other():
    with pytest.raises(ValueError, match="method has 1, seed has 2"):
        zipped(method=["grpo"], seed=[0, 1])


SPACE = {"rate": log_uniform(1e-5, 1e-1), "decay": uniform(-1, 3), "b1": choice([0.8, (1, 2)])}


def test_random_points_lie_in_their_space():
    points = random_search(400, 7, SPACE)
    rates = np.array([point["rate"] for point in points])
    decays = np.array([point["decay"] for point in points])
    assert 1e-5 <= rates.min() < 3e-5
    assert 3e-2 < rates.max() <= 1e-1
    assert -1 <= decays.min() < -0.8
    assert 2.8 < decays.max() <= 3
    # Even: a mean of 400 draws is off by 4 standard errors once in 16,000 seeds.
    assert abs(np.log10(rates).mean() + 3) < 4 * (4 / math.sqrt(12)) / 20
    assert abs(decays.mean() - 1) < 4 * (4 / math.sqrt(12)) / 20
    assert {point["b1"] for point in points} == {0.8, (1, 2)}
    assert all(type(point["rate"]) is float for point in points)


def test_values_are_short():
    points = random_search(50, 0, {"a": uniform(0, 1), "b": log_uniform(1e-6, 1, digits=2)})
    assert all(float(f"{point['a']:.4g}") == point["a"] for point in points)
    assert all(float(f"{point['b']:.2g}") == point["b"] for point in points)


def test_rounded_values_stay_within_their_bounds():
    points = random_search(20, 0, {"a": uniform(0.123456, 0.123457), "b": choice(range(1000))})
    assert all(0.123456 <= point["a"] <= 0.123457 for point in points)


def test_random_points_stay_as_a_search_grows():
    few = random_search(5, 1, SPACE)
    assert random_search(9, 1, SPACE)[:5] == few
    assert random_search(5, 2, SPACE) != few
    alone = random_search(5, 1, {"rate": SPACE["rate"]})
    assert [point["rate"] for point in alone] == [point["rate"] for point in few]


def test_random_points_differ():
    space = {"seed": choice(range(4)), "method": choice(["grpo", "random"])}
    points = random_search(8, 0, space)
    assert sorted((p["seed"], p["method"]) for p in points) == [
        (seed, method) for seed in range(4) for method in ("grpo", "random")
    ]
    with pytest.raises(ValueError, match="9 different points are asked for, only 8 were found"):
        random_search(9, 0, space)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_search(0, 0, SPACE), "count must be at least 1; got 0"),
        (lambda: random_search(1, 0, {}), "no settings are given"),
        (lambda: random_search(1, 0, {"a": 3}), "a must be uniform(...), log_uniform(...) or"),
        (lambda: uniform(1, 1), "uniform needs low < high, both finite; got 1 and 1"),
        (lambda: uniform(0, math.inf), "uniform needs low < high, both finite"),
        (lambda: log_uniform(0, 1), "log_uniform needs 0 < low < high, both finite; got 0 and 1"),
        (lambda: choice([]), "choice has no values"),
        (lambda: choice("ab"), "choice must be a list of values; got 'ab'"),
    ],
)
def test_bad_searches_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
