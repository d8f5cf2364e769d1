"""Rows with each token once: laid out they are the rows that were sampled."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from attnrl_jax.branching.steps import Separators, StepRule, segment_steps
from attnrl_jax.sampling.sampler import Response
from attnrl_jax.training.leaves import (
    continuation_leaves,
    count_ranges,
    from_arrays,
    initial_leaves,
    join_leaves,
    lay_out,
    lay_out_column,
    to_arrays,
)
from attnrl_jax.types import Leaves

NONE = np.zeros(100, bool)
PROMPTS = [np.array([1, 2]), np.array([3])]


def response(*tokens: int, ended: bool = True) -> Response:
    """Its log-probabilities are minus its ids."""
    ids = np.array(tokens, np.int32)
    return Response(ids, -ids.astype(np.float32), ended)


def scored(leaves: Leaves) -> Leaves:
    """Entropies are twice the ids."""
    return dataclasses.replace(leaves, entropy=[2 * x.astype(np.float32) for x in leaves.tokens])


INITIAL = scored(
    initial_leaves(
        PROMPTS, [[response(10, 11, 12), response(13, ended=False)], [response(20, 21)]], version=4
    )
)
# Row 0 is branched after two tokens, and twice after one; row 2 after its first.
BRANCHES = [(0, 2), (0, 1), (2, 1)]
CONTINUED = scored(
    continuation_leaves(
        INITIAL,
        BRANCHES,
        [[response(30)], [response(31, 32), response(33)], [response(34)]],
        version=5,
    )
)


def test_hand_computed_rows():
    rows = lay_out(
        join_leaves(INITIAL, CONTINUED), np.arange(7), 6, StepRule(Separators(NONE, NONE))
    )
    np.testing.assert_array_equal(
        rows.tokens,
        [
            [1, 2, 10, 11, 12, 0],
            [1, 2, 13, 0, 0, 0],
            [3, 20, 21, 0, 0, 0],
            [1, 2, 10, 11, 30, 0],
            [1, 2, 10, 31, 32, 0],
            [1, 2, 10, 33, 0, 0],
            [3, 20, 34, 0, 0, 0],
        ],
    )
    np.testing.assert_array_equal(rows.logprobs, np.where(rows.tokens < 4, 0, -rows.tokens))
    np.testing.assert_array_equal(rows.entropy, np.where(rows.tokens < 4, 0, 2 * rows.tokens))
    assert rows.version[3].tolist() == [-1, -1, 4, 4, 5, -1]
    assert rows.version[6].tolist() == [-1, 4, 5, -1, -1, -1]
    assert rows.root.tolist() == [0, 1, 2, 0, 0, 0, 2]
    assert rows.split.tolist() == [0, 0, 0, 2, 1, 1, 1]
    assert rows.problem.tolist() == [0, 0, 1, 0, 0, 0, 1]
    assert rows.ended.tolist() == [True, False, *[True] * 5]
    # Without separators every token of a response is a step.
    assert rows.step_ids[0].tolist() == [0, 0, 1, 2, 3, -1]


def test_some_rows_are_those_among_all():
    both = join_leaves(INITIAL, CONTINUED)
    every, some = (
        lay_out(both, np.array(rows), 6, StepRule(Separators(NONE, NONE)))
        for rows in (range(7), (5, 2))
    )
    for name, x in vars(some).items():
        np.testing.assert_array_equal(x, getattr(every, name)[[5, 2]], err_msg=name)


def test_continuations_alone_have_their_roots_elsewhere():
    tokens = lay_out_column(CONTINUED, "tokens", np.array([1, 3]), 6, roots=INITIAL)
    np.testing.assert_array_equal(tokens, [[1, 2, 10, 31, 32, 0], [3, 20, 34, 0, 0, 0]])


@pytest.mark.parametrize("leaves", [INITIAL, CONTINUED], ids=["initial", "continuations"])
def test_one_array_a_field_and_back(leaves):
    """As a checkpoint has them, which cannot hold an empty one."""
    arrays = {name: x for name, x in to_arrays(leaves).items() if x.size}
    assert "fci" not in arrays
    again = from_arrays(arrays)
    for name, x in vars(leaves).items():
        other = getattr(again, name)
        assert len(x) == len(other)
        for one, same in zip(x, other, strict=True):
            np.testing.assert_array_equal(one, same, err_msg=name)


@pytest.mark.parametrize("seed", range(5))
def test_ranges_are_counted_as_steps_are_cut(seed):
    """Responses with blank lines (id 5), with newlines alone (6) and with neither; some end so."""
    rng = np.random.default_rng(seed)
    blank, newline = NONE.copy(), NONE.copy()
    blank[5], newline[5:7] = True, True
    separators = Separators(blank, newline)
    kinds = [[5, 6, 7, 8], [6, 7, 8], [7, 8]]
    responses = [response(*rng.choice(kinds[k % 3], rng.integers(1, 9))) for k in range(30)]
    leaves = initial_leaves([np.array([5, 5])], [responses], 0)
    tokens = lay_out_column(leaves, "tokens", np.arange(30), 12)
    step_ids = segment_steps(tokens, leaves.prompt_length, leaves.length, separators)
    np.testing.assert_array_equal(
        count_ranges(leaves, StepRule(separators)), 1 + step_ids.max(axis=1)
    )
