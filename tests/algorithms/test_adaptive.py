import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.algorithms.adaptive import (
    AdaptiveExpansionConfig,
    BatchSizeConfig,
    CumulativeMean,
    attention_level,
    expand_count,
    next_batch_size,
    problems_with_signal,
    select_expanded,
)
from tests.golden_data import load_json

# Running-mean constants other than 1 are out of scope.
TRACES = [trace for trace in load_json("dynamic_batch")["traces"] if trace["ra_alpha"] == 1.0]


def test_golden_expand_counts():
    for session in load_json("branch_selection")["sessions"]:
        n = session["n"]
        assert [expand_count(c, n) for c in range(n + 1)] == session["acc2num"]


@pytest.mark.parametrize("trace", TRACES)
def test_golden_batch_sizes(trace):
    """The first three draws use B0; m is that of the step before the draw."""
    config = BatchSizeConfig(alpha=trace["alpha"], bounds=None)
    sizes = [trace["B0"]] * 3
    for surviving in trace["train_sizes"][: len(trace["sampled"]) - 3]:
        sizes.append(next_batch_size(sizes[-1], trace["B0"], trace["n"] * 5, surviving, config))
    assert sizes == trace["sampled"]


def test_traces_are_there():
    assert len(TRACES) == 5


def test_batch_size_bounds_and_switch():
    config = BatchSizeConfig(alpha=1.0)
    assert next_batch_size(64, 64, 30, 1, config) == 256
    assert next_batch_size(64, 64, 30, 10**6, config) == 16
    assert next_batch_size(64, 64, 30, 1920, config) == 64
    assert next_batch_size(3, 3, 30, 10**6, config) == 1
    assert next_batch_size(80, 64, 30, 5, BatchSizeConfig(adaptive=False)) == 64
    # 0.1 · floor(64 · 1920 / 1000) + 0.9 · 64 = 12.2 + 57.6
    assert next_batch_size(64, 64, 30, 1000, BatchSizeConfig()) == math.ceil(69.8)
    with pytest.raises(ValueError, match="surviving_rows=0"):
        next_batch_size(64, 64, 30, 0, config)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("alpha", 0.0), ("alpha", 1.5), ("bounds", (0.0, 4.0)), ("bounds", (2.0, 4.0))],
)
def test_invalid_batch_size_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"batch size {setting}="):
        BatchSizeConfig(**{setting: value})


def test_cumulative_mean_does_not_depend_on_batches():
    values = np.random.default_rng(0).random(20)
    once = CumulativeMean().update(values)
    twice = CumulativeMean().update(values[:7]).update([]).update(values[7:])
    assert once == twice
    assert once.count == 20
    np.testing.assert_allclose(once.mean, values.mean())


def test_attention_level_counts_zeros_but_not_the_prompt():
    fci = np.array([[9, 0, 0.5, 1.0, 7], [9, 0.25, 7, 7, 7], [9, 7, 7, 7, 7]], np.float32)
    # (0 + 0.5 + 1) / 3, 0.25, and a response without steps
    level = attention_level(np.stack([fci, fci]), np.array([[3, 1, 0], [3, 1, 0]]))
    np.testing.assert_allclose(level, [0.25, 0.25])


def expand(correct, level, mean=None, seed=0, **config):
    correct = np.array(correct, dtype=bool)
    return select_expanded(
        correct,
        np.array(level, dtype=np.float64),
        mean or CumulativeMean(),
        np.random.default_rng(seed),
        AdaptiveExpansionConfig(**config),
    )


def test_easy_problems_compete_with_all_easy_ones_of_the_batch():
    easy = [True] * 6
    expansion, mean = expand([easy, easy, [False] * 6, easy], [0.1, 0.4, 0.9, 0.1])
    np.testing.assert_array_equal(expansion.dropped, [True, False, False, True])
    assert mean.count == 3
    np.testing.assert_allclose(mean.mean, 0.2)
    np.testing.assert_array_equal(
        expansion.expanded,
        np.array([[0] * 6, [1, 1, 1, 0, 0, 0], [1] * 6, [0] * 6], dtype=bool),
    )
    # A single easy problem equals its own mean, and is not strictly above it.
    assert expand([easy], [0.4])[0].dropped.all()
    later, mean = expand([easy], [0.4], mean)
    assert not later.dropped.any()
    assert mean.count == 4


@pytest.mark.parametrize("num_correct", range(1, 6))
def test_mixed_problems_expand_the_rarer_kind_first(num_correct):
    correct = np.arange(6) < num_correct
    subsets = set()
    for seed in range(30):
        expansion, mean = expand([correct], [0.3], seed=seed)
        expanded = expansion.expanded[0]
        assert expanded.sum() == expand_count(num_correct, 6)
        rarer = ~correct if num_correct >= 3 else correct
        assert expanded[rarer].all()
        assert not expansion.dropped.any()
        assert mean.count == 0
        subsets.add(tuple(expanded))
    assert len(subsets) > 1 or expand_count(num_correct, 6) == 6


def test_each_part_can_be_switched_off():
    correct = [[True] * 6, [True, False, False, False, True, True]]
    everything, mean = expand(correct, [0.1, 0.1], expand_by_difficulty=False, filter_easy=False)
    assert everything.expanded.all()
    assert not everything.dropped.any()
    assert mean.count == 1
    unfiltered, _ = expand(correct, [0.1, 0.1], filter_easy=False)
    np.testing.assert_array_equal(unfiltered.expanded.sum(axis=1), [3, 4])
    all_or_nothing, _ = expand(correct, [0.1, 0.1], expand_by_difficulty=False)
    np.testing.assert_array_equal(all_or_nothing.expanded.sum(axis=1), [0, 6])


@pytest.mark.parametrize("mode", ["numpy", "jit"])
def test_problems_with_signal(mode):
    problem = np.array([0, 1, 0, 2, 1, 2, 3])
    reward = np.array([1.0, 0, 1, 0, 1, 1, 1], np.float32)
    mask = np.array([1, 1, 1, 1, 1, 0, 1], dtype=bool)
    function = problems_with_signal
    if mode == "jit":
        function = jax.jit(function)
        problem, reward, mask = map(jnp.asarray, (problem, reward, mask))
    # Problem 0 is all right, 2 has a single row that counts, 3 a single row.
    np.testing.assert_array_equal(function(problem, reward, mask), [0, 1, 0, 0, 1, 0, 0])
