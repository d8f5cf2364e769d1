"""The benchmarks' workloads: lengths, branches, static batches, the common model."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.bench.branches import EARLY, THIRDS, branched_rows, distinct_tokens, sharing
from experiments.bench.model import COMMON, num_parameters, random_params
from experiments.bench.ours import StaticBatches
from experiments.bench.update import random_rows
from experiments.bench.workloads import (
    PROMPT,
    VOCAB,
    Rollouts,
    batches_of,
    lognormal_lengths,
    static_slot_steps,
    workload_a,
    workload_b,
    workload_c,
)
from tests.trees import pack_paths


def test_lognormal_lengths_have_median_spread_and_cut():
    lengths = lognormal_lengths(np.random.default_rng(0), 20_000, 64, 1.0, 256)
    assert lengths.min() >= 1
    assert lengths.max() == 256
    assert np.median(lengths) == pytest.approx(64, rel=0.03)
    # P(N(0, 1) > log 4) = 0.0829 are cut; a sixth lies below 64 / e.
    assert np.mean(lengths == 256) == pytest.approx(0.0829, abs=0.01)
    assert np.mean(lengths < 64 / np.e) == pytest.approx(0.1587, abs=0.01)


def test_workload_a_is_that_of_the_issue():
    work = workload_a()
    assert len(work.prefixes) == len(work.lengths) == 24 * 8
    assert {len(prefix) for prefix in work.prefixes} == {64}
    assert len({prefix.tobytes() for prefix in work.prefixes}) == 24
    assert all(np.array_equal(work.prefixes[8], prefix) for prefix in work.prefixes[8:16])
    assert work.lengths.max() <= 256
    assert work.total == 64 + 256
    # Two thirds of the slot-steps of static batches are lost.
    assert 1 - work.lengths.sum() / static_slot_steps(work.lengths, 32) == pytest.approx(0.67, 0.01)
    again = workload_a()
    assert np.array_equal(again.lengths, work.lengths)
    assert np.array_equal(again.prefixes, work.prefixes)


def test_workload_b_leaves_nothing_to_schedule():
    work = workload_b()
    assert work.lengths.tolist() == [256] * 32
    assert static_slot_steps(work.lengths, 32) == work.lengths.sum()
    assert len({prefix.tobytes() for prefix in work.prefixes}) == 32


def test_workload_c_branches_at_thirds_and_keeps_the_total():
    work = workload_c()
    assert len(work.lengths) == 16 * 6 + 48 * 4
    paths = np.array([len(prefix) for prefix in work.prefixes]) + work.lengths
    assert paths.max() == work.total == 64 + 512
    assert work.lengths.min() >= 1
    assert {len(prefix) for prefix in work.prefixes[:96]} == {64}
    for first in range(96, len(work.prefixes), 4):
        early, early_too, late, late_too = work.prefixes[first : first + 4]
        assert np.array_equal(early, early_too)
        assert np.array_equal(late, late_too)
        # One begins with the other, the late one leaves twice as far from the prompt.
        assert np.array_equal(late[: len(early)], early)
        assert len(late) - PROMPT - 2 * (len(early) - PROMPT) in (0, 1)
    assert len(np.unique(work.problem)) == 16 + 8


def test_tokens_are_of_the_vocabulary_without_padding():
    for work in (workload_a(), workload_b(), workload_c()):
        tokens = np.concatenate(work.prefixes)
        assert tokens.min() >= 1
        assert tokens.max() < VOCAB == COMMON.vocab_size


def test_static_batches_by_hand():
    assert batches_of(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    # max(3, 1) * 2 + max(2, 2) * 2 + 5
    assert static_slot_steps(np.array([3, 1, 2, 2, 5]), 2) == 15


def test_rows_of_the_update_hold_the_responses():
    work = workload_a()
    rows = random_rows(work)
    assert rows["prompts"].shape == (192, 64)
    assert rows["responses"].shape == (192, 256)
    assert np.array_equal((rows["responses"] != 0).sum(axis=1), work.lengths)
    assert np.array_equal(rows["behaviour"] != 0, rows["responses"] != 0)


def test_the_common_model_has_its_size():
    params = random_params(COMMON)
    assert num_parameters(params) == 30_947_840
    # A bias that is left out, or a scale, would show in the logits.
    attention = params["layers"]["self_attn"]
    assert np.abs(attention["q_proj"]["bias"]).min() > 0
    assert np.std(params["norm"]["scale"]) == pytest.approx(0.1, rel=0.2)
    assert np.std(attention["o_proj"]["kernel"]) == pytest.approx(512**-0.5, rel=0.01)


def test_static_batches_are_sorted_by_response_or_by_all_tokens():
    prefixes = [np.ones(length, np.int32) for length in (8, 8, 8, 68)]
    work = Rollouts(prefixes, np.array([5, 1, 3, 2]), np.zeros(4, int), 77)
    assert StaticBatches(2).sorted(work).tolist() == [0, 2, 3, 1]
    assert StaticBatches(2, order="total").sorted(work).tolist() == [3, 0, 2, 1]


@pytest.mark.parametrize("longer", [False, True])
def test_branched_rows_share_what_they_say(longer):
    rows = branched_rows(2, THIRDS, longer=longer, cut=96)
    paths = rows.paths
    assert len(rows.tokens) == 2 * 6 * (1 + 2 * 2)
    assert np.all(paths.length <= PROMPT + 96)
    for row, root in enumerate(paths.root):
        if root == row:
            assert paths.shared[row] == paths.length[row]
            continue
        shared, length = slice(paths.shared[row]), slice(paths.length[row])
        # A third or two thirds of the root's response, and at least one token of its own.
        assert paths.problem[root] == paths.problem[row]
        response = paths.length[root] - PROMPT
        assert paths.shared[row] - PROMPT in (response // 3, int(response * 2 / 3))
        assert paths.shared[row] < paths.length[row]
        for x in (rows.tokens, rows.advantages, rows.behaviour_logprobs):
            assert np.array_equal(x[row, shared], x[root, shared])
        assert not np.array_equal(rows.tokens[row, length], rows.tokens[root, length])
    outside = np.arange(rows.tokens.shape[1]) >= paths.length[:, None]
    assert not rows.advantages[:, :PROMPT].any()
    assert not rows.behaviour_logprobs[outside].any()
    # Tokens are random, so that tokens are shared exactly where all before them are the same.
    distinct = {
        rows.tokens[row, :end].tobytes()
        for row, length in enumerate(paths.length)
        for end in range(1, length + 1)
    }
    assert distinct_tokens(paths) == len(distinct)
    assert sharing(paths) == paths.length.sum() / len(distinct)
    layout = pack_paths(paths, int(paths.length.sum()), share=True)
    assert (layout.row >= 0).sum() == len(distinct)


@pytest.mark.parametrize(
    ("positions", "longer", "least", "most"),
    [
        (THIRDS, False, 1.7, 2.2),
        (THIRDS, True, 1.7, 2.2),
        (EARLY, False, 1.15, 1.5),
        (EARLY, True, 1.15, 1.5),
    ],
)
def test_rows_share_as_much_as_the_issue_says(positions, longer, least, most):
    assert least <= sharing(branched_rows(4, positions, longer=longer).paths) <= most
