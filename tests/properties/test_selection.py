"""Branch positions, expansion, filters and batch sizes, by brute force."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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
from attnrl_jax.branching.positions import BranchingConfig
from attnrl_jax.branching.selection import branch_positions
from tests.properties.strategies import cases

# Multiples of a power of two, so that quantiles are the same numbers in any precision, and few of
# them, so that ties are common.
LEVELS = st.integers(0, 4).map(lambda k: k / 8)
STEPS = st.tuples(st.integers(1, 6), LEVELS)
RESPONSES = st.tuples(st.integers(1, 5), st.lists(STEPS, max_size=9), st.integers(1, 11))
CONFIGS = st.builds(
    BranchingConfig,
    num_positions=st.integers(1, 4),
    quantile=st.integers(0, 16).map(lambda k: k / 16),
    min_distance=st.integers(0, 12),
    order=st.sampled_from(["score", "position"]),
    fill=st.sampled_from(["none", "first_steps"]),
    after_think=st.booleans(),
)


def arguments(responses):
    """Responses as `branch_positions` takes them; each step's level is also its tokens' entropy."""
    time = max(prompt + sum(n for n, _ in steps) for prompt, steps, _ in responses) + 1
    ranges = max(len(steps) for _, steps, _ in responses) + 2
    step_ids = np.full((len(responses), time), -1)
    fci = np.zeros((len(responses), ranges), np.float32)
    # Prompt and padding are the most uncertain of all, which must not matter.
    entropy = np.full((len(responses), time), 9.0)
    for row, (prompt, steps, _) in enumerate(responses):
        ids = np.repeat(np.arange(len(steps) + 1), [prompt, *(n for n, _ in steps)])
        step_ids[row, : len(ids)] = ids
        fci[row, 2 : len(steps) + 1] = [level for _, level in steps[1:]]
        entropy[row, prompt : len(ids)] = np.array([0, *(v for _, v in steps)])[ids[prompt:]]
    return {
        "fci": fci,
        "entropy": entropy,
        "step_ids": step_ids,
        "prompt_length": np.array([prompt for prompt, _, _ in responses]),
        "length": (step_ids >= 0).sum(axis=1),
    }


def bounds(prompt, steps):
    """Start and end of every range, from the sequence's start."""
    ends = np.cumsum([prompt, *(n for n, _ in steps)]).tolist()
    return [0, *ends[:-1]], ends


def interpolated(values, quantile):
    """The quantile between its two neighbours in order, exactly."""
    rank = Fraction(quantile) * (len(values) - 1)
    ordered = [Fraction(value) for value in sorted(values)]
    above = ordered[min(math.floor(rank) + 1, len(values) - 1)]
    below = ordered[math.floor(rank)]
    return below + (above - below) * (rank - math.floor(rank))


def is_apart(k, taken, starts, ends, distance):
    return starts[k] >= distance and all(
        starts[max(k, t)] - ends[min(k, t)] >= distance for t in taken
    )


def walk(fci, prompt, steps, config, after_think):
    """Steps that are taken, and those by importance, one candidate after the other."""
    starts, ends = bounds(prompt, steps)
    count = len(steps)
    if count < 2:
        return [], []
    fills = config.fill == "first_steps"
    last = count if config.after_think or fills else min(count, after_think - 1)
    values = [float(v) for v in fci[1 : count + 1]]
    threshold = interpolated(values, config.quantile)
    if threshold == 0 and max(values) > 0:
        threshold = min(v for v in values if v > 0)
    candidates = [k for k in range(2, last + 1) if fci[k] >= threshold and (fills or fci[k] > 0)]
    if config.order == "score":
        candidates.sort(key=lambda k: -fci[k])
    taken = []
    for k in candidates:
        if len(taken) < config.num_positions and is_apart(
            k, taken, starts, ends, config.min_distance
        ):
            taken.append(k)
    important = [k for k in taken if fci[k] > 0]
    if fills:
        queue = [k for k in range(2, count + 1) if k not in taken]
        queue += list(range(2, count + 1)) * config.num_positions
        taken += queue[: config.num_positions - len(taken)]
    return sorted(taken), important


def assert_positions(found, row, steps, starts, prompt, important):
    valid = found.valid[row]
    assert found.steps[row, valid].tolist() == steps
    assert found.offsets[row, valid].tolist() == [starts[k] - prompt for k in steps]
    # Valid ones come first; the others are zeros.
    assert valid.tolist() == [True] * len(steps) + [False] * (len(valid) - len(steps))
    assert not found.offsets[row, ~valid].any()
    assert not found.steps[row, ~valid].any()
    chosen = found.steps[row, found.by_importance[row]].tolist()
    assert sorted(set(chosen)) == sorted(important)


@cases(900)
@given(st.lists(RESPONSES, min_size=1, max_size=3), CONFIGS)
def test_fci_positions_equal_a_walk(responses, config):
    given_ = arguments(responses)
    thinking = np.array([first for _, _, first in responses])
    found = branch_positions(
        config, **given_, first_after_think=thinking, rng=np.random.default_rng(0)
    )
    for row, (prompt, steps, first) in enumerate(responses):
        starts, _ = bounds(prompt, steps)
        taken, important = walk(given_["fci"][row], prompt, steps, config, first)
        assert_positions(found, row, taken, starts, prompt, important)


@cases(500)
@given(st.lists(RESPONSES, min_size=1, max_size=3), st.integers(1, 4), st.booleans(), st.randoms())
def test_entropy_positions_are_the_most_uncertain_tokens(responses, count, after_think, random):
    given_ = arguments(responses)
    length = given_["length"]
    # Tokens of a step differ here, but for ties.
    noise = [[random.randrange(4) for _ in row] for row in given_["entropy"]]
    given_["entropy"] = given_["entropy"] + np.array(noise)
    config = BranchingConfig(rule="entropy", num_positions=count, after_think=after_think)
    thinking = np.array([first for _, _, first in responses])
    found = branch_positions(
        config, **given_, first_after_think=thinking, rng=np.random.default_rng(0)
    )
    for row, (prompt, _, first) in enumerate(responses):
        tokens = [
            t
            for t in range(prompt + 1, length[row] - 1)
            if after_think or given_["step_ids"][row, t] < first
        ]
        best = sorted(tokens, key=lambda t: -given_["entropy"][row, t])[:count]
        valid = found.valid[row]
        assert found.offsets[row, valid].tolist() == [t - prompt for t in sorted(best)]
        assert found.steps[row, valid].tolist() == given_["step_ids"][row, sorted(best)].tolist()
        assert not found.by_importance[row].any()
        assert not found.offsets[row, ~valid].any()


@cases(400)
@given(
    st.lists(RESPONSES, min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 8),
    st.integers(0, 2**32 - 1),
)
def test_random_positions_keep_their_distance_and_leave_no_room(responses, count, distance, seed):
    given_ = arguments(responses)
    config = BranchingConfig(rule="random", num_positions=count, min_distance=distance)
    thinking = np.array([first for _, _, first in responses])

    def choose():
        rng = np.random.default_rng(seed)
        return branch_positions(config, **given_, first_after_think=thinking, rng=rng)

    found, again = choose(), choose()
    np.testing.assert_array_equal(found.offsets, again.offsets)
    for row, (prompt, steps, first) in enumerate(responses):
        starts, ends = bounds(prompt, steps)
        taken = found.steps[row, found.valid[row]].tolist()
        assert_positions(found, row, sorted(set(taken)), starts, prompt, [])
        allowed = [k for k in range(2, len(steps) + 1) if k < first]
        for k in taken:
            assert k in allowed
            assert is_apart(k, set(taken) - {k}, starts, ends, distance)
        if len(taken) < count:
            left = set(allowed) - set(taken)
            assert not any(is_apart(k, taken, starts, ends, distance) for k in left)


@cases(100)
@given(st.lists(RESPONSES, min_size=1, max_size=3), st.integers(1, 4))
def test_without_a_rule_nothing_branches(responses, count):
    config = BranchingConfig(rule="none", num_positions=count)
    found = branch_positions(
        config, **arguments(responses), first_after_think=None, rng=np.random.default_rng(0)
    )
    assert found.valid.shape == (len(responses), count)
    assert not found.valid.any()
    assert not found.offsets.any()


@st.composite
def judged(draw):
    """Problems of n responses, right or wrong, each with an attention level."""
    n = draw(st.integers(1, 8))
    # Whole problems right or wrong are common, as they are with a policy.
    outcomes = st.one_of(
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.booleans().map(lambda right: [right] * n),
    )
    problems = draw(st.lists(st.tuples(outcomes, st.integers(0, 5)), min_size=1, max_size=6))
    correct = np.array([outcome for outcome, _ in problems])
    return correct, np.array([level / 4 for _, level in problems])


@cases(600)
@given(
    judged(),
    st.lists(st.integers(0, 5).map(lambda k: k / 4), max_size=5),
    st.builds(AdaptiveExpansionConfig, st.booleans(), st.booleans()),
    st.integers(0, 99),
)
def test_expansion_follows_the_rules(problems, seen, config, seed):
    """Of section 3 of the specification, problem by problem."""
    correct, level = problems
    n = correct.shape[1]
    before = CumulativeMean().update(seen)
    expansion, after = select_expanded(correct, level, before, np.random.default_rng(seed), config)
    easy = [float(v) for v, right in zip(level, correct, strict=True) if right.all()]
    assert after.count == len(seen) + len(easy)
    if seen or easy:
        assert math.isclose(after.mean, math.fsum(seen + easy) / after.count, abs_tol=1e-12)
    # In float64 and one after the other, as the filter's state is kept.
    mean = before.update(easy).mean
    for row, right in enumerate(correct):
        c, expanded = int(right.sum()), expansion.expanded[row]
        wanted = math.ceil(n * math.exp(-c / n)) if config.expand_by_difficulty else n
        if c == n and config.filter_easy and level[row] <= mean:
            assert expansion.dropped[row]
            assert not expanded.any()
            continue
        assert not expansion.dropped[row]
        assert expanded.sum() == max(wanted, 0)
        if config.expand_by_difficulty and c == n:
            assert expanded[:wanted].all()
        elif config.expand_by_difficulty and c:
            rarer = ~right if 2 * c >= n else right
            assert expanded[rarer].all()


@cases(200)
@given(st.lists(st.floats(-1e6, 1e6), max_size=12), st.lists(st.integers(0, 12), max_size=3))
def test_a_cumulative_mean_forgets_how_values_came(values, cuts):
    parts = np.split(np.array(values), sorted(min(cut, len(values)) for cut in cuts))
    mean = CumulativeMean()
    for part in parts:
        mean = mean.update(part)
    assert mean == CumulativeMean().update(values)
    assert mean.count == len(values)
    if values:
        assert math.isclose(mean.mean, math.fsum(values) / len(values), abs_tol=1e-6)


@cases(200)
@given(st.lists(st.lists(LEVELS, max_size=6), min_size=1, max_size=4))
def test_attention_level_is_a_mean_of_means(responses):
    ranges = max(map(len, responses)) + 2
    fci = np.full((len(responses), ranges), 7, np.float32)  # of prompt and padding: no part of it
    for row, values in enumerate(responses):
        fci[row, 1 : len(values) + 1] = values
    level = attention_level(fci, np.array([len(values) for values in responses]))
    wanted = sum(sum(values) / len(values) for values in responses if values) / len(responses)
    np.testing.assert_allclose(level, wanted, rtol=1e-12)


@cases(500)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.booleans()), max_size=12),
)
def test_problems_without_variance_are_dropped(rows):
    problem, reward, mask = (np.array([row[k] for row in rows], int) for k in range(3))
    kept = problems_with_signal(problem, reward.astype(np.float32), mask.astype(bool))
    for row, (p, _, there) in enumerate(rows):
        rewards = {r for q, r, counts in rows if q == p and counts}
        assert kept[row] == (there and len(rewards) > 1)


BOUNDS = st.none() | st.tuples(
    st.sampled_from([1.0, 0.5, 0.25, 0.01]), st.sampled_from([1.0, 1.5, 4.0, 1e300, math.inf])
)


@cases(600)
@given(
    st.integers(1, 300),
    st.integers(1, 100),
    st.integers(1, 60),
    st.integers(1, 50_000),
    st.sampled_from([0.1, 0.5, 1.0]),
    BOUNDS,
)
def test_batch_sizes_follow_the_formula(current, nominal, rows, surviving, alpha, limits):
    config = BatchSizeConfig(alpha=alpha, bounds=limits)
    size = next_batch_size(current, nominal, rows, surviving, config)
    target = math.floor(current * (nominal * rows) / surviving)
    free = max(1, math.ceil(alpha * target + (1 - alpha) * current))
    assert type(size) is int
    assert size >= 1
    if limits is None:
        assert size == free
        return
    low, high = (bound * nominal for bound in limits)
    assert low <= size <= high
    # Between its bounds it is what the formula says, and outside as near to it as they allow.
    if low <= free <= high:
        assert size == free
    else:
        assert (size - 1 < low) if free < low else (size + 1 > high)


def test_batch_sizes_at_the_ends_of_what_is_allowed():
    """Bugs: an upper bound of infinity was an OverflowError; without bounds and at alpha 1 the size
    could become 0, and stayed it."""
    config = BatchSizeConfig(alpha=1.0, bounds=(0.25, math.inf))
    assert next_batch_size(64, 64, 30, 1, config) == 64 * 64 * 30
    assert next_batch_size(1, 64, 1, 1000, BatchSizeConfig(alpha=1.0, bounds=None)) == 1


@cases(100)
@given(judged(), st.integers(1, 300), st.integers(-5, 0))
def test_what_has_no_answer_is_refused(problems, size, surviving):
    """A batch size needs a trained step; off, the batch size never moves."""
    config = BatchSizeConfig(adaptive=False)
    with pytest.raises(ValueError, match=f"surviving_rows={surviving}"):
        next_batch_size(size, size, 30, surviving, config)
    assert next_batch_size(size + 1, size, 30, 1, config) == size
    n = problems[0].shape[1]
    assume(n > 1)
    counts = [expand_count(c, n) for c in range(n + 1)]
    assert counts[0] == n
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 1
