"""Values and advantages of any tree, from the equations of the specification."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnrl_jax.algorithms.advantages import (
    group_advantages,
    row_is_kept,
    segment_advantages,
    token_advantages,
)
from attnrl_jax.branching.tree import path_segments
from tests.properties.strategies import cases, tree_arguments, trees

MAX_SEGMENTS = 5
PROMPT = 2
TOLERANCE = {"rtol": 0, "atol": 1e-12}


def segments_of(rows, mask, max_segments=MAX_SEGMENTS):
    mask = np.array(mask, bool)
    return path_segments(**tree_arguments(rows), max_segments=max_segments, row_mask=mask)


@st.composite
def masked_trees(draw):
    """Rows, and which of them are leaves: mostly all, at times roots are missing."""
    rows = draw(trees())
    missing = draw(st.sets(st.integers(0, max(len(rows) - 1, 0)), max_size=3))
    return rows, [i not in missing for i in range(len(rows))]


def path_ends(rows, mask, i):
    """Where the segments of a row end: at the offsets of its root's continuations, then its own."""
    row = rows[i]
    offsets = {r.split for k, r in enumerate(rows) if mask[k] and r.root == row.root != k}
    shared = sorted(o for o in offsets if i == row.root or o <= row.split)
    return [*shared, row.response_length]


def leaves_below(rows, mask, i, number, ends):
    """Leaves at or below a segment of a row's path."""
    if number == len(ends) - 1:
        return [i]
    family = [k for k, r in enumerate(rows) if mask[k] and r.root == rows[i].root]
    return [k for k in family if k == rows[i].root or rows[k].split >= ends[number]]


def is_close(found, wanted, tolerance=1e-12):
    # numpy's own comparisons take most of the time of a small tree.
    return abs(found - wanted) <= tolerance


def shared_with_root(rows, i):
    return rows[i].response_length if rows[i].root == i else rows[i].split


def mean_reward(rows, places):
    return sum(rows[k].reward for k in places) / len(places)


@cases(500)
@given(masked_trees())
def test_values_and_advantages_by_brute_force(tree):
    """V, L and adv of section 5, leaf by leaf."""
    rows, mask = tree
    segments = segments_of(rows, mask)
    advantages = segment_advantages(segments)
    scaled = segment_advantages(segments, "problem_std")
    kept = row_is_kept(segments, keep_unbranched=False)
    assert row_is_kept(segments, keep_unbranched=True).tolist() == [True] * len(rows)
    for i in (i for i in range(len(rows)) if mask[i]):
        ends = path_ends(rows, mask, i)
        count = len(ends)
        assert segments.valid[i].tolist() == [k < count for k in range(MAX_SEGMENTS)]
        assert segments.end[i, :count].tolist() == ends
        assert segments.start[i, :count].tolist() == [0, *ends[:-1]]
        assert (segments.start[i, count:] == segments.end[i, count:]).all()
        assert kept[i] == (count > 1)
        problem = [k for k, r in enumerate(rows) if mask[k] and r.problem == rows[i].problem]
        rewards = [rows[k].reward for k in problem]
        root = parent = mean_reward(rows, problem)
        std = np.std(rewards, ddof=1) if len(rewards) > 1 else 0.0
        assert is_close(segments.root_value[i], root)
        assert is_close(segments.reward_std[i], std)
        for number in range(count):
            leaves = leaves_below(rows, mask, i, number, ends)
            value = mean_reward(rows, leaves)
            gain = ((value - root) + (value - parent)) / math.sqrt(len(leaves))
            assert segments.num_leaves[i, number] == len(leaves)
            assert is_close(segments.value[i, number], value)
            assert is_close(segments.parent_value[i, number], parent)
            assert is_close(advantages[i, number], gain)
            assert is_close(
                scaled[i, number], gain / (std + 1e-6), 1e-9 * max(1, abs(scaled[i, number]))
            )
            parent = value
        assert not advantages[i, count:].any()


@cases(500)
@given(masked_trees())
def test_tokens_are_valued_by_the_leaves_through_them(tree):
    """Without segments: a token's value is the mean of the leaves whose path holds it, and tokens
    that leaves share have one value and one advantage."""
    rows, mask = tree
    segments = segments_of(rows, mask)
    time = PROMPT + 16
    prompt = np.full(len(rows), PROMPT)
    values = token_advantages(segments, segments.value, prompt, time)
    counts = token_advantages(segments, segments.num_leaves, prompt, time)
    advantages = token_advantages(segments, segment_advantages(segments), prompt, time)
    for i in (i for i in range(len(rows)) if mask[i]):
        own = rows[i]
        for token in range(own.response_length):
            # Two leaves of one root share as many tokens as both of them share with it.
            through = [i] if token >= shared_with_root(rows, i) else []
            through += [
                k
                for k, row in enumerate(rows)
                if mask[k]
                and row.root == own.root
                and k not in through
                and token < min(shared_with_root(rows, k), shared_with_root(rows, i))
            ]
            place = PROMPT + token
            assert counts[i, place] == len(through)
            assert is_close(values[i, place], mean_reward(rows, through))
            np.testing.assert_allclose(
                advantages[through, place], advantages[i, place], **TOLERANCE
            )
        assert not advantages[i, :PROMPT].any()
        assert not advantages[i, PROMPT + own.response_length :].any()


@cases(300)
@given(masked_trees(), st.randoms(use_true_random=False))
def test_order_and_other_problems_change_nothing(tree, random):
    """A problem on its own, its rows in another order, has the segments it has among all."""
    rows, mask = tree
    together = segments_of(rows, mask)
    for problem in {row.problem for row in rows}:
        members = [i for i, row in enumerate(rows) if row.problem == problem]
        random.shuffle(members)
        place = {i: k for k, i in enumerate(members)}
        own = [replace(rows[i], problem=7, root=place[rows[i].root]) for i in members]
        alone = segments_of(own, [mask[i] for i in members])
        for name in ("start", "end", "num_leaves", "valid"):
            np.testing.assert_array_equal(getattr(together, name)[members], getattr(alone, name))
        for name in ("value", "parent_value", "root_value", "reward_std"):
            np.testing.assert_allclose(
                getattr(together, name)[members], getattr(alone, name), **TOLERANCE
            )


@cases(300)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-4, 4), st.booleans()), max_size=12),
    st.booleans(),
)
def test_advantages_of_whole_responses(rows, all_there):
    """(r - mean) / (sample standard deviation + 1e-6) over the problem's rows."""
    problem, reward = (np.array([row[k] for row in rows], int) for k in (0, 1))
    mask = np.array([all_there or row[2] for row in rows], bool)
    found = group_advantages(reward / 4, problem, None if all_there else mask)
    for i in range(len(rows)):
        others = reward[mask & (problem == problem[i])] / 4
        std = np.std(others, ddof=1) if len(others) > 1 else 0.0
        wanted = (reward[i] / 4 - others.mean()) / (std + 1e-6) if mask[i] else 0.0
        assert is_close(found[i], wanted, 1e-9 * max(1, abs(wanted)))


@cases(200)
@given(masked_trees(), st.integers(1, MAX_SEGMENTS))
def test_paths_of_too_many_segments_are_refused(tree, max_segments):
    """And never cut."""
    rows, mask = tree
    longest = max([len(path_ends(rows, mask, row.root)) for row in rows], default=0)
    # The path of a root that is no leaf itself counts as well: its continuations take it.
    if longest > max_segments:
        with pytest.raises(ValueError, match=f"a path has {longest} segments, more than"):
            segments_of(rows, mask, max_segments)
    else:
        found = segments_of(rows, mask, max_segments)
        assert found.value.shape == (len(rows), max_segments)
