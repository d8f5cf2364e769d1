"""The compass by hand does what training does, and what it shows can be looked at."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from attnrl_jax.branching.positions import BranchingConfig
from attnrl_jax.sampling.sampler import Response
from attnrl_jax.tasks.judging import ExactJudge
from attnrl_jax.tasks.problems import Problem
from experiments.attention_plot import plot_attention
from experiments.compass import (
    advantage_table,
    continue_from,
    look,
    open_policy,
    respond,
    tree_by_hand,
)
from experiments.reporting import draw_tree
from experiments.trees import has_branches, read_problems

PROBLEM = Problem("chain", "h= 9 j= 1 i= 4 c: j + h f: c - i k: f + c ? k", ("6",))


@pytest.fixture(scope="module")
def policy():
    return open_policy()


@pytest.fixture(scope="module")
def seen(policy):
    [response] = respond(policy, policy.tokenizer.encode(PROBLEM.text), 1, seed=3)
    return look(policy, policy.tokenizer.encode(PROBLEM.text), response.tokens)


def test_a_look_has_steps_their_influence_and_branches(policy, seen):
    assert seen.texts[0] == policy.tokenizer.decode(seen.prompt)
    # Parts of a text are decoded without the space before them.
    words = policy.tokenizer.decode(seen.response).split()
    assert " ".join(seen.texts[1:]).split() == words
    assert len(seen.texts) == len(seen.attention.fci)
    assert seen.branch_steps
    for step in seen.branch_steps:
        assert seen.attention.fci[step] > 0
        start = seen.offset(step)
        shared = policy.tokenizer.decode(seen.response[:start])
        assert shared.split() == " ".join(seen.texts[1:step]).split()
    for step in (0, 1, len(seen.texts)):
        with pytest.raises(ValueError, match="a branch starts at a step from 2 to"):
            seen.offset(step)
    far = look(policy, seen.prompt, seen.response, BranchingConfig(delta=1, min_distance=10_000))
    assert far.branch_steps == []
    with pytest.raises(ValueError, match="no response to look at"):
        look(policy, seen.prompt, seen.response[:0])


def test_responses_and_continuations_follow_their_seed(policy, seen):
    one, same, other = (
        continue_from(seen, seen.branch_steps[0], 2, seed=seed, temperature=2.0)
        for seed in (1, 1, 2)
    )
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(one, other, strict=True))


def test_a_tree_by_hand_has_the_values_of_its_leaves(policy, seen):
    """Two branches at one step: one that ends right and one that says nothing."""
    step = seen.branch_steps[0]
    tail = seen.response[seen.offset(step) :]
    cut = Response(tail[:1], np.zeros(1, np.float32), False)
    whole = Response(tail, np.zeros(len(tail), np.float32), True)
    tree = tree_by_hand(PROBLEM, seen, [cut], {step: [cut, whole]}, ExactJudge())
    assert has_branches(tree)
    own = ExactJudge().judge_many([(policy.tokenizer.decode(seen.response), PROBLEM.answers)])
    right = float(own.rewards[0])
    assert [leaf["reward"] for leaf in tree["leaves"]] == [right, 0.0, 0.0, right]
    assert tree["value"] == pytest.approx(right / 2)
    shared = 2 * right / 3
    rows = advantage_table(tree)
    assert [(row["leaf"], row["V"], row["L"]) for row in rows] == [
        (0, round(shared, 3), 3), (0, right, 1), (1, 0.0, 1),
        (2, round(shared, 3), 3), (2, 0.0, 1), (3, round(shared, 3), 3), (3, right, 1),
    ]  # fmt: skip
    expected = ((shared - right / 2) + (shared - right / 2)) / np.sqrt(3)
    assert rows[0]["advantage"] == pytest.approx(expected, abs=1e-3)
    assert rows[-1]["advantage"] == pytest.approx((right - right / 2) + (right - shared), abs=1e-3)


def test_a_tree_without_branches_and_with_parts_of_rewards_is_drawn(seen):
    """Bugs: it had no response to show; a tenth of a reward was right."""
    tree = tree_by_hand(PROBLEM, seen, [], {}, ExactJudge())
    assert not has_branches(tree)
    for reward, verdict in ((0.1, "✗ wrong this response"), (0.5, "✓ right this response")):
        tree["leaves"][0]["reward"] = reward
        console = Console(file=io.StringIO(), width=100)
        console.print(draw_tree(tree))
        assert verdict in console.file.getvalue()


def test_what_a_notebook_shows(policy, seen):
    shown = seen._repr_html_()
    assert shown.count("<tr>") == len(seen.texts) + 1
    assert shown.count("branch</td>") == len(seen.branch_steps)
    assert re.search(r"width:100px", shown)
    assert repr(seen) == f"Look: {len(seen.texts) - 1} steps, branches at {seen.branch_steps}"
    figure = plot_attention(seen)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    assert file.getvalue().startswith(b"\x89PNG")
    mean = figure.axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(mean[2, 1], seen.attention.mean[2, 1])
    bars = [bar.get_height() for bar in figure.axes[2].patches]
    np.testing.assert_allclose(bars, seen.attention.fci[1:], rtol=1e-5)


def test_recorded_trees_are_read_back(finished):
    folder, _ = finished
    last, first = read_problems(folder), read_problems(folder, 1)
    assert len(last) == len(first) == 4
    assert last != first
    with pytest.raises(FileNotFoundError, match="no trees of step 9; there are: 1, 2, 3"):
        read_problems(folder, 9)
