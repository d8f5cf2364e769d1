import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.algorithms.adaptive import (
    AdaptiveExpansionConfig,
    CumulativeMean,
    attention_level,
    problems_with_signal,
    select_expanded,
)
from attnrl_jax.algorithms.advantages import (
    group_advantages,
    row_is_kept,
    segment_advantages,
    token_advantages,
)
from attnrl_jax.branching.positions import BranchingConfig
from attnrl_jax.branching.selection import fci_branch_positions
from attnrl_jax.branching.tree import path_segments
from tests.golden_data import RecordedChoices, load_json, load_npz, question_arrays

NUM_RANGES = 64
NUM_ROWS = 144
TIME = 140


def expanded_tree(case):
    """Expansion and branch positions of a golden step, as (question, root, split) of its rows."""
    n = case["n"]
    arrays = [question_arrays(question, NUM_RANGES) for question in case["questions"]]
    level = np.array([attention_level(a["fci"], a["num_steps"]) for a in arrays])
    before = CumulativeMean(case["ra_mean_before"], case["ra_count_before"])
    recorded = RecordedChoices(*([c[key] for c in case["chosen"]] for key in ("pool", "chosen")))
    expansion, mean = select_expanded(
        np.array([question["acc"] for question in case["questions"]]) == 1,
        level,
        before,
        recorded,
        AdaptiveExpansionConfig(),
    )
    assert recorded.exhausted()
    np.testing.assert_allclose(mean.mean, case["ra_mean_after"], rtol=1e-6)
    config = BranchingConfig.golden(num_positions=case["N"], min_distance=case["token_distance"])
    children = []
    for q, a in enumerate(arrays):
        positions = fci_branch_positions(a["fci"], a["starts"], a["ends"], a["num_steps"], config)
        children += [
            (q, r, int(offset))
            for r in np.flatnonzero(expansion.expanded[q])
            for offset in np.repeat(positions.offsets[r], case["T"])
        ]
    assert np.flatnonzero(expansion.dropped).tolist() == case["filtered_questions"]
    return children, n


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("k", range(3))
def test_golden_pipeline(k, jitted):
    """From initial responses to rows, token advantages and the rows that survive the filter."""
    case = load_json("pipeline")["cases"][k]
    arrays = {
        key.removeprefix(f"k{k}_"): value
        for key, value in load_npz("pipeline").items()
        if key.startswith(f"k{k}_")
    }
    children, n = expanded_tree(case)
    assert children == [(c["question"], c["root"], c["split"]) for c in case["children"]]

    num_roots = len(case["questions"]) * n
    num_rows = num_roots + len(children)
    question, root_in_question, split = np.array(
        [(q, r, 0) for q in range(len(case["questions"])) for r in range(n)] + children
    ).T
    root = question * n + root_in_question
    own_length = np.concatenate([arrays["root_len"], [c["len"] for c in case["children"]]])
    rows = {
        "problem": question,
        "root": root,
        "split": split,
        "response_length": split + own_length,
        "reward": np.concatenate(
            [np.ravel([q["acc"] for q in case["questions"]]), [c["acc"] for c in case["children"]]]
        ).astype(np.float32),
    }
    own_tokens = np.concatenate([arrays["root_tokens"], arrays["child_tokens"]])
    R = case["R"]
    offset = np.arange(R)
    own = np.take_along_axis(own_tokens, np.maximum(offset - split[:, None], 0), axis=1)
    shared = offset < split[:, None]
    in_path = offset < rows["response_length"][:, None]
    tokens = np.where(shared, own_tokens[root], own) * in_path
    from_root = np.where(split[:, None] > 0, shared, in_path)
    behaviour = np.where(from_root, arrays["root_old_logp"][root], 0)
    row_mask = ~np.isin(question, case["filtered_questions"])

    @functools.partial(jax.jit if jitted else lambda f: f)
    def advantages_and_kept(rows, row_mask):
        xp = jnp if jitted else np
        segments = path_segments(**rows, max_segments=case["N"] + 1, row_mask=row_mask)
        advantages = token_advantages(
            segments, segment_advantages(segments), xp.zeros(len(row_mask), dtype=int), TIME
        )
        trained = row_is_kept(segments, keep_unbranched=False) & row_mask
        signal = problems_with_signal(rows["problem"], rows["reward"], trained)
        return advantages, trained, signal

    if jitted:
        pad = NUM_ROWS - num_rows
        arguments = {key: jnp.asarray(np.pad(x, (0, pad))) for key, x in rows.items()}
        mask = jnp.asarray(np.pad(row_mask, (0, pad)))
    else:
        arguments, mask = rows, row_mask
    advantages, trained, signal = map(np.asarray, advantages_and_kept(arguments, mask))

    # Golden rows: first the initial responses, then the continuations, in an order of their own.
    index = {}
    for row in np.flatnonzero(trained):
        index.setdefault((question[row], split[row] == 0, tokens[row].tobytes()), []).append(row)
    order = [
        index[q, bool(g), t.astype(tokens.dtype).tobytes()].pop()
        for q, g, t in zip(
            arrays["out_question"], arrays["out_is_grpo"], arrays["out_tokens"], strict=True
        )
    ]
    assert len(order) == trained.sum() == case["rows_before_filter"]
    np.testing.assert_array_equal(in_path[order], arrays["out_mask"])
    np.testing.assert_array_equal(rows["reward"][order], arrays["out_acc"])
    np.testing.assert_array_equal(from_root[order].sum(axis=1), arrays["out_grpo_token_num"])
    np.testing.assert_array_equal(behaviour[order], arrays["out_old_logp"])
    np.testing.assert_allclose(advantages[order][:, :R], arrays["out_adv"], rtol=0, atol=1e-6)
    assert np.flatnonzero(signal[order]).tolist() == case["kept"]
    dropped = row_mask[:num_roots].sum() - trained[:num_roots].sum()
    assert dropped == case["single_segment_dropped"]


def small_tree():
    """A (right) branched at 2 into a wrong and a right one; B wrong; another problem's response."""
    rows = {
        "problem": np.array([0, 0, 0, 0, 1]),
        "root": np.array([0, 1, 0, 0, 4]),
        "split": np.array([0, 0, 2, 2, 0]),
        "response_length": np.array([4, 3, 3, 5, 2]),
        "reward": np.array([1.0, 0.0, 0.0, 1.0, 1.0]),
    }
    return rows, path_segments(**rows, max_segments=2)


def test_hand_computed_advantages():
    _, segments = small_tree()
    # V_root = 1/2, V(first segment of A) = 2/3 with 3 leaves below it.
    first = (1 / 6 + 1 / 6) / np.sqrt(3)
    right, wrong = 1 / 2 + 1 / 3, -1 / 2 - 2 / 3
    expected = np.array([[first, right], [-1, 0], [first, wrong], [first, right], [0, 0]])
    np.testing.assert_allclose(segment_advantages(segments), expected, atol=1e-12)
    scaled = segment_advantages(segments, "problem_std")
    std = np.std([1, 0, 0, 1], ddof=1)
    np.testing.assert_allclose(scaled, expected / (std + 1e-6), atol=1e-12)
    with pytest.raises(ValueError, match="advantage norm 'std'"):
        segment_advantages(segments, "std")


def test_tokens_carry_the_advantage_of_their_segment():
    _, segments = small_tree()
    advantages = np.array([[1.0, 2], [3, 9], [4, 5], [6, 7], [8, 9]])
    tokens = token_advantages(segments, advantages, np.array([1, 2, 0, 2, 0]), 7)
    expected = [
        [0, 1, 1, 2, 2, 0, 0],
        [0, 0, 3, 3, 3, 0, 0],
        [4, 4, 5, 0, 0, 0, 0],
        [0, 0, 6, 6, 7, 7, 7],
        [8, 8, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(tokens, expected)


def test_unbranched_rows_are_kept_by_setting():
    _, segments = small_tree()
    np.testing.assert_array_equal(row_is_kept(segments, True), [1, 1, 1, 1, 1])
    np.testing.assert_array_equal(row_is_kept(segments, False), [1, 0, 1, 1, 0])


@pytest.mark.parametrize("jitted", [False, True])
def test_group_advantages(jitted):
    reward = np.array([1.0, 0, 1, 0, 0, 1, 5], np.float32)
    problem = np.array([0, 1, 0, 0, 0, 2, 1])
    mask = np.arange(7) < 6
    function = group_advantages
    if jitted:
        function = jax.jit(function)
        reward, problem, mask = map(jnp.asarray, (reward, problem, mask))
    # Problem 0: mean 1/2, sample standard deviation sqrt(4 · 1/4 / 3); the others have one row.
    right = 0.5 / (np.sqrt(1 / 3) + 1e-6)
    expected = [right, 0, right, -right, -right, 0, 0]
    np.testing.assert_allclose(function(reward, problem, mask), expected, rtol=1e-6)
