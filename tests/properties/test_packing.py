"""Layouts of any rows: nothing lost, nothing doubled, nothing seen that is not its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnrl_jax.packing import deal_batches, place_paths, problem_groups, take_rows
from attnrl_jax.types import Paths
from tests.properties.strategies import cases, paths_of, trees

TIME = 24  # more than any path of `trees`


@st.composite
def some_rows(draw):
    """Rows of trees as the filters leave them: roots may be gone."""
    paths = paths_of(draw(trees()))
    kept = [draw(st.integers(0, 5)) > 0 for _ in paths.length]
    return take_rows(paths, np.array(kept, bool))


def distinct_tokens(paths: Paths) -> int:
    """Tokens of the rows, those that rows share by their branching once, one after the other."""
    tokens = set()
    for row in range(len(paths.length)):
        for index in range(paths.length[row]):
            if index < paths.prompt_length[row]:
                owner: tuple = ("prompt",)
            elif index < paths.shared[row]:
                owner = ("root", paths.root[row])
            else:
                owner = ("row", row)
            tokens.add((paths.problem[row], *owner, index))
    return len(tokens)


@cases(450)
@given(some_rows(), st.integers(0, 60), st.booleans())
def test_every_token_is_laid_out_and_found_again(paths, room, share):
    capacity = max([1, *paths.length]) + room
    placement = place_paths(paths, capacity, share)
    rows, layout = placement.lay_out(np.arange(len(placement.used)))
    assert rows.tolist() == list(range(len(paths.length)))
    shape = (len(placement.used), capacity)
    assert layout.row.shape == shape
    there = layout.row >= 0
    np.testing.assert_array_equal(there.sum(axis=1), placement.used)
    assert (placement.used > 0).all()

    # Back and forth, with values that tell all tokens apart.
    inside = np.arange(TIME) < paths.length[:, None]
    numbered = 1 + np.arange(len(rows) * TIME).reshape(len(rows), TIME)
    own = np.where(np.arange(TIME) < paths.shared[:, None], 0, numbered)
    gathered = layout.gather(numbered, -5)
    assert (gathered[~there] == -5).all()
    spread = layout.spread(layout.gather(own), TIME)
    np.testing.assert_array_equal(np.where(inside, own, 0), np.where(own > 0, spread, 0))
    places = layout.spread(1 + np.arange(layout.row.size).reshape(shape), TIME) - 1
    assert (places[~inside] == -1).all()

    # Every row by itself: walking back from its last token it meets all its tokens in their order,
    # and these are what it sees.
    count = np.zeros(shape, int)
    key = np.arange(capacity)
    for row, length in enumerate(paths.length):
        sequence, path = places[row, :length] // capacity, places[row, :length] % capacity
        assert (sequence == sequence[0]).all()
        line = sequence[0]
        assert layout.index[line, path].tolist() == list(range(length))
        assert layout.previous[line, path[1:]].tolist() == path[:-1].tolist()
        last = path[-1]
        seen = key[(key <= last) & (last < layout.visible_until[line])]
        assert seen.tolist() == sorted(path.tolist())
        count[line, path] += 1
    np.testing.assert_array_equal(layout.count, count)
    np.testing.assert_array_equal(count > 0, there)
    packed = layout.packed_tokens(numbered)
    assert packed.layout == ("tree" if share else "packed")
    np.testing.assert_array_equal(packed.tokens, layout.gather(numbered))


@pytest.mark.parametrize("share", [True, False])
def test_no_rows_need_no_sequence(share):
    """Bug: they were a ValueError of `zip`."""
    none = np.zeros(0, int)
    placement = place_paths(Paths(none, none, none, none, none), 8, share)
    rows, layout = placement.lay_out(np.arange(0))
    assert rows.shape == (0,)
    assert layout.row.shape == (0, 8)
    assert layout.spread(np.zeros((0, 8)), 4).shape == (0, 4)
    assert deal_batches(placement, 8, 2) == []


@cases(350)
@given(some_rows())
def test_shared_tokens_are_laid_out_once_where_trees_fit(paths):
    """And as often as there are rows where nothing is shared; the values of all come back."""
    capacity = max(1, int(paths.length.sum()))
    used = place_paths(paths, capacity, True).used
    assert used.sum() == distinct_tokens(paths)
    assert len(used) <= 1
    assert place_paths(paths, capacity, False).used.sum() == paths.length.sum()


@cases(250)
@given(some_rows(), st.integers(0, 20), st.booleans(), st.randoms(use_true_random=False))
def test_sequences_are_laid_out_alone_as_among_all(paths, room, share, random):
    placement = place_paths(paths, max([1, *paths.length]) + room, share)
    _, whole = placement.lay_out(np.arange(len(placement.used)))
    chosen = [i for i in range(len(placement.used)) if random.random() < 0.5]
    random.shuffle(chosen)
    chosen.insert(random.randrange(len(chosen) + 1), -1)
    rows, part = placement.lay_out(np.array(chosen))
    by_row, shift = placement.own_places()
    assert rows.tolist() == np.flatnonzero(np.isin(by_row, chosen)).tolist()
    for line, sequence in enumerate(chosen):
        if sequence < 0:
            assert (part.row[line] == -1).all()
            assert not part.count[line].any()
            continue
        there = whole.row[sequence] >= 0
        np.testing.assert_array_equal(part.row[line] >= 0, there)
        np.testing.assert_array_equal(rows[part.row[line][there]], whole.row[sequence][there])
        for name in ("index", "visible_until", "previous", "count"):
            np.testing.assert_array_equal(
                getattr(part, name)[line][there], getattr(whole, name)[sequence][there], name
            )
    for row in range(len(paths.length)):
        place = paths.length[row] - 1 + shift[row]
        if paths.length[row] > paths.shared[row]:
            assert whole.row[by_row[row], place] == row
            assert whole.index[by_row[row], place] == paths.length[row] - 1


@cases(250)
@given(
    some_rows().filter(lambda paths: len(paths.length)),
    st.sampled_from(["capacity", "prompt", "shared", "length", "other_prompt"]),
    st.integers(0, 99),
    st.booleans(),
)
def test_rows_that_cannot_be_are_named(paths, fault, which, share):
    row = which % len(paths.length)
    capacity = int(paths.length.max())

    def changed(name, value):
        values = getattr(paths, name).copy()
        values[row] = value
        return replace(paths, **{name: values})

    if fault == "capacity":
        said, capacity = "does not fit a sequence", capacity - 1
        row = int(np.argmax(paths.length > capacity))
    elif fault == "prompt":
        paths, said = changed("prompt_length", 0), "has no prompt"
    elif fault == "shared":
        paths, said = changed("shared", paths.prompt_length[row] - 1), "shares less than its prompt"
    elif fault == "length":
        paths, said = changed("length", paths.shared[row] - 1), "is shorter than what it shares"
    else:
        same = np.flatnonzero(paths.problem == paths.problem[row])
        # A later row of the problem, which must be one that only this fault is found in.
        row = int(same[-1])
        grown = int(paths.length.max())
        paths = changed("shared", grown)
        paths = replace(changed("length", grown), prompt_length=paths.prompt_length.copy())
        paths.prompt_length[row] = grown if paths.prompt_length[row] < grown else grown - 1
        if len(same) == 1 or paths.prompt_length[row] < 1:
            return
        said = "has a prompt of another length"
    with pytest.raises(ValueError, match=f"^row {row} {said}"):
        place_paths(paths, capacity, share)


@cases(500)
@given(
    st.lists(st.integers(0, 9), max_size=40),
    st.integers(1, 200),
    st.integers(1, 5),
)
def test_batches_lose_and_double_no_sequence(sizes, tokens, devices):
    capacity = 20
    length = np.array([capacity - size for size in sizes], int)
    alone = np.arange(len(sizes))
    # More than half of a sequence each, so that there are as many sequences as rows.
    placement = place_paths(
        Paths(np.ones_like(length), length, alone, alone, length), capacity, True
    )
    assert len(placement.used) == len(sizes)
    batches = deal_batches(placement, tokens, devices)
    dealt = [i for batch in batches for i in batch.tolist() if i >= 0]
    assert sorted(dealt) == list(range(len(sizes)))
    whole = max(tokens // capacity // devices, 1) * devices
    assert all(len(batch) % devices == 0 for batch in batches)
    assert len({len(batch) for batch in batches}) <= 3
    assert all(len(batch) == whole for batch in batches[: len(sizes) // whole])
    assert all(len(batch) <= whole for batch in batches)
    # No batch of padding alone, and no more room than the last, cut in quarters, needs.
    assert all((batch >= 0).any() for batch in batches)
    room = sum(map(len, batches)) - len(sizes)
    assert room < devices * max(-(-whole // devices // 4) * 2, 1) + devices
    for batch in batches:
        given_ = np.where(batch >= 0, placement.used[batch], 0).reshape(devices, -1)
        numbers = (batch.reshape(devices, -1) >= 0).sum(axis=1)
        assert numbers.max() - numbers.min() <= 1
        # The most tokens first, there and back again over the devices.
        loads = [0] * devices
        for place, used in enumerate(sorted(placement.used[batch[batch >= 0]], reverse=True)):
            turn, device = divmod(place, devices)
            loads[devices - 1 - device if turn % 2 else device] += used
        assert given_.sum(axis=1).tolist() == loads


@cases(300)
@given(some_rows(), st.integers(1, 60), st.randoms(use_true_random=False))
def test_groups_hold_whole_problems(paths, tokens, random):
    order = list(range(len(paths.length)))
    random.shuffle(order)
    paths = take_rows(paths, np.array(order, int))
    wanted, total = [[]], 0
    for problem in sorted(set(paths.problem.tolist())):
        members = np.flatnonzero(paths.problem == problem)
        before, total = total, total + int(paths.length[members].sum())
        wanted[-1].extend(members.tolist())
        if total // tokens > before // tokens:
            wanted.append([])
    groups = [group.tolist() for group in problem_groups(paths, tokens)]
    assert groups == ([group for group in wanted if group] or [[]])
