"""Packed rows and trees: what is laid out, what sees what, and the way back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from attnrl_jax.packing import (
    deal_batches,
    place_paths,
    problem_groups,
    row_paths,
)
from attnrl_jax.types import Paths
from tests.trees import pack_paths, random_rollouts, train_rows_of

TIME = 32


def paths_of(*rows) -> Paths:
    """From (prompt_length, length, problem, root, shared) of each row."""
    return Paths(*np.array(rows, np.int32).T)


# A response of 6 tokens to a prompt of 2, continuations of its first 4 and of its first 2 tokens,
# and another response; rows in no order.
TREE = paths_of((2, 7, 5, 8, 4), (2, 4, 5, 9, 4), (2, 8, 5, 8, 8), (2, 8, 5, 8, 6))


def test_hand_computed_tree():
    layout = pack_paths(TREE, 20, share=True)
    assert layout.row.shape == (1, 20)
    expected = {
        "row": [2] * 8 + [3] * 2 + [0] * 3 + [1] * 2 + [-1] * 5,
        "index": [*range(8), 6, 7, 4, 5, 6, 2, 3] + [0] * 5,
        "count": [4, 4, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1] + [0] * 5,
        "visible_until": [15, 15, 13, 13, 10, 10, 8, 8, 10, 10, 13, 13, 13, 15, 15] + [0] * 5,
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(layout, name)[0], values, err_msg=name)
    np.testing.assert_array_equal(
        layout.previous[0, 1:15], [0, 1, 2, 3, 4, 5, 6, 5, 8, 3, 10, 11, 1, 13]
    )
    assert layout.padding == 5 / 20


def test_hand_computed_cut():
    """At 12 tokens the second sub-tree repeats prompt and prefix; its copies count its own rows."""
    layout = pack_paths(TREE, 12, share=True)
    counts = {
        (row, count): int(n)
        for row, count in zip(*map(np.ravel, (layout.row, layout.count)), strict=True)
        if row >= 0
        for n in [np.sum((layout.row == row) & (layout.count == count))]
    }
    assert counts == {(2, 2): 6, (2, 1): 2, (3, 1): 2, (0, 2): 2, (0, 1): 5, (1, 1): 2}


def test_rows_on_their_own():
    layout = pack_paths(TREE, 15, share=False)
    assert layout.row.shape == (2, 15)
    assert (layout.row >= 0).sum() == TREE.length.sum()
    # Best fit: 8 + 7 and 8 + 4.
    assert sorted(map(tuple, map(np.unique, layout.row))) == [(-1, 1, 3), (0, 2)]
    assert np.all(layout.count[layout.row >= 0] == 1)


def copies_of(layout, row, length):
    """Places of a row's tokens, by walking back from its last one."""
    places = layout.spread(np.arange(layout.row.size).reshape(layout.row.shape), TIME)
    sequence, place = divmod(int(places[row, length - 1]), layout.row.shape[1])
    walked = [place]
    while len(walked) < length:
        walked.append(int(layout.previous[sequence, walked[-1]]))
    walked.reverse()
    np.testing.assert_array_equal(places[row, :length] % layout.row.shape[1], walked)
    return sequence, walked


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("capacity", [TIME, 45, 200])
@pytest.mark.parametrize("share", [True, False])
def test_random_trees(seed, capacity, share):
    """Every row finds its tokens in order, sees these and nothing else, and is counted once."""
    rng = np.random.default_rng(seed)
    rows = train_rows_of(random_rollouts(rng, vocab=2), rng)
    paths = rows.paths
    layout = pack_paths(paths, capacity, share)
    time = layout.row.shape[1]
    index = np.arange(time)
    sees = (index[None, None, :] <= index[None, :, None]) & (
        index[None, :, None] < layout.visible_until[:, None, :]
    )
    count = np.zeros_like(layout.count)
    for row, length in enumerate(paths.length):
        sequence, walked = copies_of(layout, row, length)
        np.testing.assert_array_equal(layout.index[sequence, walked], np.arange(length))
        packed = layout.gather(rows.tokens)
        np.testing.assert_array_equal(packed[sequence, walked], rows.tokens[row, :length])
        for depth, place in enumerate(walked):
            np.testing.assert_array_equal(
                np.flatnonzero(sees[sequence, place]), sorted(walked[: depth + 1])
            )
        count[sequence, walked] += 1
    np.testing.assert_array_equal(layout.count, count)
    inside = np.arange(TIME) < paths.length[:, None]
    for values in (rows.advantages, rows.behaviour_logprobs):
        laid_out = layout.spread(layout.gather(values), TIME)
        np.testing.assert_array_equal(laid_out, np.where(inside, values, 0))


@pytest.mark.parametrize("share", [True, False])
def test_some_sequences_are_laid_out_as_among_all(share):
    """In any order, with an empty one among them, and with the rows they hold alone."""
    rng = np.random.default_rng(0)
    rows = train_rows_of(random_rollouts(rng, vocab=2), rng)
    placement = place_paths(rows.paths, 45, share)
    whole = pack_paths(rows.paths, 45, share)
    np.testing.assert_array_equal(placement.used, (whole.row >= 0).sum(axis=1))
    chosen = np.array([3, -1, 0, len(whole.row) - 1])
    here, layout = placement.lay_out(chosen)
    assert set(here) == set(whole.row[chosen[chosen >= 0]].ravel()) - {-1}
    there = (chosen >= 0)[:, None]
    named = np.where(layout.row >= 0, here[layout.row], -1)
    np.testing.assert_array_equal(named, np.where(there, whole.row[chosen], -1))
    for name in ("index", "visible_until", "previous", "count"):
        values = np.where(there, getattr(whole, name)[chosen], 0)
        np.testing.assert_array_equal(getattr(layout, name), values, err_msg=name)
    values = rows.behaviour_logprobs[here]
    inside = np.arange(TIME) < rows.paths.length[here, None]
    laid_out = layout.spread(layout.gather(values), TIME)
    np.testing.assert_array_equal(laid_out, np.where(inside, values, 0))
    # None at all: a process may have nothing to do.
    here, layout = placement.lay_out(np.array([-1]))
    assert not len(here)
    assert not layout.gather(rows.tokens[here]).any()


@pytest.mark.parametrize("seed", range(4))
def test_only_what_was_branched_is_shared(seed):
    """Although all ids are equal. Counted by sets of what names a token: problem and depth in the
    prompt, root and depth in what is shared with it, the row itself after that."""
    rng = np.random.default_rng(seed)
    paths = train_rows_of(random_rollouts(rng, vocab=1), rng).paths
    named = set()
    for row in range(len(paths.length)):
        for depth in range(paths.length[row]):
            if depth < paths.prompt_length[row]:
                named.add((paths.problem[row], depth))
            elif depth < paths.shared[row]:
                named.add((paths.problem[row], paths.root[row], depth))
            else:
                named.add((row, "own", depth))
    whole = pack_paths(paths, 1000, share=True)
    assert (whole.row >= 0).sum() == len(named)
    # Sub-trees repeat prefixes, and rows on their own repeat everything.
    cut = (pack_paths(paths, TIME, share=True).row >= 0).sum()
    assert len(named) < cut < paths.length.sum()


def test_the_order_of_rows_does_not_matter():
    rng = np.random.default_rng(0)
    rows = random_rollouts(rng)
    paths = row_paths(rows, rows.root == np.arange(len(rows.root)))
    order = rng.permutation(len(rows.length))
    shuffled = Paths(**{k: v[order] for k, v in vars(paths).items()})
    one, other = (pack_paths(p, 400, share=True) for p in (paths, shuffled))
    assert (one.row >= 0).sum() == (other.row >= 0).sum()
    np.testing.assert_array_equal(
        one.spread(one.gather(rows.tokens), TIME)[order],
        other.spread(other.gather(rows.tokens[order]), TIME),
    )


def test_rows_of_workload_lengths_fill_their_sequences():
    """Lengths of the benchmark: lognormal, median 64, sigma 1, cut at 256, after 64 of prompt."""
    rng = np.random.default_rng(0)
    length = 64 + np.clip(np.exp(np.log(64) + rng.standard_normal(192)), 1, 256).astype(np.int32)
    row = np.arange(192)
    paths = Paths(np.full(192, 64), length, row // 8, row, length)
    for capacity in (512, 1024, 2048):
        assert pack_paths(paths, capacity, share=False).padding < 0.05
        # Also where a tree (780 tokens on average) leaves half a sequence empty.
        assert pack_paths(paths, capacity, share=True).padding < 0.1


def test_trees_fill_the_room_that_others_leave():
    """Trees of a prompt of 2 and five responses of 2. Three of them in sequences of 20: the second
    is cut to fill the room behind the first, and what is left of it fills that behind the third."""
    paths = paths_of(*((2, 4, row // 5, row, 4) for row in range(15)))
    layout = pack_paths(paths, 20, share=True)
    assert layout.row.shape == (2, 20)
    assert (layout.row >= 0).sum() == 3 * 12 + 2
    assert sorted(layout.count[layout.index == 0].tolist()) == [0, 0, 2, 3, 5, 5]
    # Room for a prompt alone holds nothing.
    assert pack_paths(paths, 14, share=True).row.shape == (3, 14)


def test_groups_of_whole_problems():
    """Rows of a problem need not lie side by side; a group ends where it has its tokens."""
    lengths = {3: (4, 4), 1: (6,), 7: (9, 3, 2), 4: (1,), 5: (1,), 6: (12,)}
    rows = [(1, n, problem, 0, 1) for problem, ns in lengths.items() for n in ns]
    paths = paths_of(*rows[::2], *rows[1::2])
    groups = problem_groups(paths, 10)
    assert [set(paths.problem[g].tolist()) for g in groups] == [{1, 3}, {4, 5, 6}, {7}]
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(rows)))
    assert len(problem_groups(paths, 1000)) == 1


@pytest.mark.parametrize(
    ("sequences", "tokens", "multiple", "expected"),
    [
        (8, 40, 1, [4, 4]),
        (9, 40, 1, [4, 4, 1]),
        (10, 40, 1, [4, 4, 2]),
        (7, 40, 1, [4, 2, 1]),
        (3, 1, 1, [1, 1, 1]),
        (5, 40, 8, [8]),
        (21, 160, 2, [16, 8]),
        (12, 60, 1, [6, 6]),
        (11, 60, 1, [6, 3, 2]),
    ],
)
def test_batches_of_few_shapes(sequences, tokens, multiple, expected):
    rng = np.random.default_rng(0)
    rows = [(1, int(n), k, k, int(n)) for k, n in enumerate(rng.integers(6, 11, sequences))]
    batches = deal_batches(place_paths(paths_of(*rows), 10, share=False), tokens, multiple)
    assert [len(batch) for batch in batches] == expected
    covered = [k for batch in batches for k in batch[batch >= 0]]
    assert sorted(covered) == list(range(sequences))
    if multiple == 1:
        assert covered == sorted(covered)


def test_devices_get_equal_shares_of_tokens():
    """12 sequences of 22 to 11 tokens over 4 devices, 3 each; and 5 over 4."""
    rows = [(1, n, n, n, n) for n in range(11, 23)]
    placement = place_paths(paths_of(*rows), 22, share=False)
    [batch] = deal_batches(placement, 264, 4)
    assert placement.used[batch].reshape(4, 3).sum(axis=1).tolist() == [51, 50, 49, 48]
    few = place_paths(paths_of(*rows[:5]), 22, share=False)
    [batch] = deal_batches(few, 176, 4)
    assert (batch.reshape(4, 2) >= 0).sum(axis=1).tolist() == [1, 1, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 21}, "row 1 does not fit a sequence of 20 tokens"),
        ({"prompt_length": 0, "shared": 0}, "row 1 has no prompt"),
        ({"shared": 1}, "row 1 shares less than its prompt"),
        ({"shared": 5}, "row 1 is shorter than what it shares"),
        ({"prompt_length": 3}, "row 1 has a prompt of another length"),
    ],
)
def test_errors(change, message):
    changed = {name: getattr(TREE, name).copy() for name in change}
    for name, value in change.items():
        changed[name][1] = value
    with pytest.raises(ValueError, match=message):
        pack_paths(dataclasses.replace(TREE, **changed), 20, share=True)
