import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.algorithms.adaptive import problems_with_signal
from attnrl_jax.algorithms.advantages import row_is_kept, segment_advantages
from attnrl_jax.branching.tree import path_segments
from tests.golden_data import load_json

NUM_ROWS = 48
MAX_SEGMENTS = 12


def rows_of(case):
    """Rows of a golden tree: the initial responses, then the continuations."""
    roots, children = case["roots"], case["children"]
    return {
        "problem": np.zeros(len(roots) + len(children), np.int32),
        "root": np.array([*range(len(roots)), *(c["root"] for c in children)], np.int32),
        "split": np.array([0] * len(roots) + [c["split"] for c in children], np.int32),
        "response_length": np.array(
            [length for length, _ in roots] + [c["split"] + c["len"] for c in children], np.int32
        ),
        "reward": np.array([reward for _, reward in roots] + [c["reward"] for c in children]),
    }


@functools.partial(jax.jit, static_argnums=1)
def segments_jit(rows, max_segments):
    return path_segments(**rows, max_segments=max_segments)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("case", range(26))
def test_golden_trees(case, jitted):
    case = load_json("tree_advantage")["cases"][case]
    rows = rows_of(case)
    row_of = {(i, 0): i for i in range(len(case["roots"]))} | {
        (c["root"], c["node_idx"]): len(case["roots"]) + i for i, c in enumerate(case["children"])
    }
    if jitted:
        pad = NUM_ROWS - len(rows["root"])
        mask = jnp.arange(NUM_ROWS) < len(rows["root"])
        rows = {key: jnp.asarray(np.pad(x, (0, pad))) for key, x in rows.items()}
        rows["reward"] = jnp.where(mask, rows["reward"], 7.0)
        segments = segments_jit(rows | {"row_mask": mask}, MAX_SEGMENTS)
        tolerance = {"rtol": 0, "atol": 1e-6}
    else:
        segments = path_segments(**rows, max_segments=MAX_SEGMENTS)
        assert segments.value.dtype == np.float64
        tolerance = {"rtol": 0, "atol": 1e-12}
    advantages = segment_advantages(segments)
    kept = row_is_kept(segments, keep_unbranched=False)
    assert len(case["paths"]) == len(row_of)
    for path in case["paths"]:
        row = row_of[path["tree_idx"], path["node_idx"]]
        expected = path["segments"]
        count = len(expected)
        assert int(np.sum(segments.valid[row])) == count
        split = int(rows["split"][row])
        starts = [s["start"] + (split if s["node_idx"] else 0) for s in expected]
        ends = [start + s["len"] for start, s in zip(starts, expected, strict=True)]
        assert list(np.asarray(segments.start[row, :count])) == starts
        assert list(np.asarray(segments.end[row, :count])) == ends
        assert list(np.asarray(segments.num_leaves[row, :count])) == path["n_leaves"]
        value, parent, advantage = (
            np.asarray(x[row, :count]) for x in (segments.value, segments.parent_value, advantages)
        )
        for ours, name in (
            (value, "value"),
            (value - parent, "local_adv"),
            (value - np.asarray(segments.root_value[row]), "global_adv"),
            (advantage, "adv"),
        ):
            np.testing.assert_allclose(ours, [s[name] for s in expected], **tolerance)
        np.testing.assert_allclose(segments.root_value[row], case["root_value"], **tolerance)
        assert not np.asarray(advantages[row, count:]).any()
        assert bool(kept[row]) != path["dropped_single_segment"]


def test_hand_computed_tree_among_other_problems():
    """Rows of problem 1 interleaved with another problem, continuations out of order.

    Problem 1: response A (right, 10 tokens) branched at 6 (right, wrong) and at 3 (wrong), and
    response B (wrong). Leaves: A 1, at 6: 1, 0, at 3: 0, B 0.
    """
    segments = path_segments(
        problem=np.array([0, 1, 1, 1, 0, 1, 1]),
        root=np.array([0, 1, 1, 1, 0, 5, 1]),
        split=np.array([0, 0, 6, 3, 4, 0, 6]),
        response_length=np.array([9, 10, 8, 12, 5, 4, 7]),
        reward=np.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]),
        max_segments=3,
    )
    np.testing.assert_allclose(segments.root_value, [1, 0.4, 0.4, 0.4, 1, 0.4, 0.4])
    np.testing.assert_allclose(segments.reward_std[[0, 1]], [0, np.std([1, 1, 0, 0, 0], ddof=1)])
    np.testing.assert_array_equal(segments.end[1], [3, 6, 10])
    np.testing.assert_allclose(segments.value[1], [2 / 4, 2 / 3, 1])
    np.testing.assert_array_equal(segments.num_leaves[1], [4, 3, 1])
    np.testing.assert_array_equal(segments.end[6], [3, 6, 7])
    np.testing.assert_allclose(segments.value[6], [2 / 4, 2 / 3, 0])
    np.testing.assert_allclose(segments.parent_value[6], [0.4, 2 / 4, 2 / 3])
    np.testing.assert_array_equal(segments.valid[[3, 5]], [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(segments.end[3], [3, 12, 12])
    np.testing.assert_allclose(segments.value[5, 0], 0)
    np.testing.assert_array_equal(segments.end[4], [4, 5, 5])
    np.testing.assert_array_equal(segments.num_leaves[4, :2], [2, 1])


def test_many_problems_equal_one_by_one():
    """More rows than a table of all their pairs would fit for."""
    rng = np.random.default_rng(0)
    problems, responses, branches = 700, 6, 4
    size = responses * (1 + branches)
    first = np.arange(0, problems * size, size)
    own = {
        "root": np.concatenate([np.arange(responses), np.repeat(np.arange(responses), branches)]),
        "split": rng.integers(1, 6, (problems, size)) * (np.arange(size) >= responses),
        "reward": rng.random((problems, size)),
    }
    own["response_length"] = own["split"] + rng.integers(6, 20, (problems, size))
    own["row_mask"] = rng.random((problems, size)) < 0.9
    order = rng.permutation(problems * size)  # of the rows that are given, and where each one went
    place = np.argsort(order)
    rows = {key: np.broadcast_to(x, (problems, size)).reshape(-1)[order] for key, x in own.items()}
    rows["root"] = place[(first[:, None] + own["root"]).reshape(-1)][order]
    rows["problem"] = np.repeat(rng.permutation(problems), size)[order]
    assert len(order) > 20_000
    together = path_segments(**rows, max_segments=5)
    signal = problems_with_signal(rows["problem"], rows["reward"].round(), rows["row_mask"])
    for p in range(problems):
        one = {key: np.broadcast_to(x, (problems, size))[p] for key, x in own.items()}
        problem = np.zeros(size, int)
        alone = path_segments(problem, **one, max_segments=5)
        here = place[first[p] : first[p] + size]
        for ours, wanted in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(ours[here], wanted, rtol=0, atol=1e-12)
        rounded = one["reward"].round()
        leaves = rounded[one["row_mask"]]
        np.testing.assert_allclose(together.root_value[here], one["reward"][one["row_mask"]].mean())
        np.testing.assert_array_equal(signal[here], one["row_mask"] & (np.ptp(leaves) > 0))


def test_too_few_segments_are_refused():
    rows = rows_of(load_json("tree_advantage")["cases"][0])
    with pytest.raises(ValueError, match="4 segments, more than max_segments=3"):
        path_segments(**rows, max_segments=3)
