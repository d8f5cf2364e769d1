"""The loop: which parameters sample which token, schedules, methods, skipped steps."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from attnrl_jax.algorithms.adaptive import AdaptiveExpansionConfig, BatchSizeConfig
from attnrl_jax.algorithms.losses import LossConfig
from attnrl_jax.branching.positions import BranchingConfig
from attnrl_jax.branching.tree import PathSegments
from attnrl_jax.datasets.stream import ProblemStream
from attnrl_jax.scoring import score
from attnrl_jax.tasks.problems import Problem
from attnrl_jax.training.leaves import empty_rollouts
from attnrl_jax.training.loop import evaluate, start
from attnrl_jax.training.rollout import (
    Advantages,
    permute_across_problems,
)
from tests.training.tiny import ChecksumJudge, ConstantJudge, fresh_state, run_steps, tiny_setup
from tests.trees import own_tokens, response_tokens


@pytest.fixture(scope="module")
def golden(golden_model):
    return golden_model("qwen2_tied")


@pytest.fixture(scope="module")
def off_policy(golden):
    """Four steps with the sampler's own log-probabilities, and the parameters after each."""
    setup = tiny_setup(golden, behaviour="sampler")
    _, reports, params = run_steps(fresh_state(golden, setup), setup)
    return reports, [jax.tree.map(np.array, golden.params), *params]


def recompute(params, config, rows):
    return np.asarray(
        score(params, config, rows.tokens, rows.length, rows.step_ids, with_fci=False).logprobs
    )


def test_every_token_carries_the_version_that_sampled_it(off_policy):
    reports, _ = off_policy
    for report in reports:
        step, rows = int(report.metrics["step"]), report.rows
        own, response = own_tokens(rows), response_tokens(rows)
        continued = (rows.root != np.arange(len(rows.root)))[:, None]
        assert np.all(rows.version[~response] == -1)
        assert np.all(rows.version[own & continued] == step - 1)
        # Initial responses, and the prefixes that continuations share with them.
        assert np.all(rows.version[response & ~(own & continued)] == max(step - 2, 0))
        assert (own & continued).any()
        assert (response & continued & ~own).any()


def test_behaviour_logprobs_are_those_of_the_parameters_named(golden, off_policy):
    """The sampler's log-probabilities, recomputed by the scorer.

    For continuations this also shows that the prefix's cache was computed with θ_{t-1}: a cache
    left over from θ_{t-2} would give other numbers, as the last assertion makes sure.
    """
    reports, params = off_policy
    for report in reports:
        step, rows = int(report.metrics["step"]), report.rows
        new = recompute(params[step - 1], golden.config, rows)
        old = recompute(params[max(step - 2, 0)], golden.config, rows)
        is_new = rows.version == step - 1
        is_old = (rows.version >= 0) & (rows.version == max(step - 2, 0))
        np.testing.assert_allclose(rows.logprobs[is_new], new[is_new], atol=1e-4)
        np.testing.assert_allclose(rows.logprobs[is_old], old[is_old], atol=1e-4)
        if step > 1:
            assert np.abs(new - old)[is_new].max() > 1e-2


def test_scorer_and_sampler_agree_on_behaviour(golden, off_policy):
    setup = tiny_setup(golden, behaviour="scorer", steps=1)
    _, [report], _ = run_steps(fresh_state(golden, setup), setup)
    sampled = off_policy[0][0].rows
    np.testing.assert_array_equal(report.rows.tokens, sampled.tokens)
    np.testing.assert_allclose(report.rows.logprobs, sampled.logprobs, atol=1e-4)


def test_rows_are_trees(off_policy):
    """Continuations repeat their root's prefix and differ after it; rewards decide values."""
    reports, _ = off_policy
    for report in reports:
        rows, segments = report.rows, report.segments
        for row in np.flatnonzero(rows.root != np.arange(len(rows.root))):
            root, end = rows.root[row], rows.prompt_length[row] + rows.split[row]
            np.testing.assert_array_equal(rows.tokens[row, :end], rows.tokens[root, :end])
            np.testing.assert_array_equal(rows.logprobs[row, :end], rows.logprobs[root, :end])
            assert rows.split[row] >= 1
            assert rows.problem[row] == rows.problem[root]
        for problem in np.unique(rows.problem):
            members = rows.problem == problem
            np.testing.assert_allclose(
                segments.root_value[members], rows.reward[members].mean(), atol=1e-6
            )
        assert report.metrics["branching/by_importance"] == 1.0


def test_trained_rows_belong_to_problems_with_both_outcomes(off_policy):
    reports, _ = off_policy
    for report in reports:
        rows = report.rows
        for problem in np.unique(rows.problem[report.trained]):
            rewards = rows.reward[report.trained & (rows.problem == problem)]
            assert rewards.min() != rewards.max()
        assert report.metrics["rows/trained"] == report.trained.sum()
        assert report.metrics["tokens/trained"] == response_tokens(rows)[report.trained].sum()
        # Every token of the trained rows, told apart by the row that sampled it.
        distinct = {
            (int(rows.root[row]) if t < rows.split[row] else int(row), t)
            for row in np.flatnonzero(report.trained)
            for t in range(int(rows.length[row] - rows.prompt_length[row]))
        }
        assert report.metrics["tokens/trained_distinct"] == len(distinct)


def test_sampled_tokens_are_counted_once(golden):
    """Joint rounds and the warm-up add up to every token that was sampled."""
    setup = tiny_setup(golden, steps=2)
    state = fresh_state(golden, setup)
    warm_up = int((state.batch.length - state.batch.prompt_length).sum())
    assert state.sampled_tokens == warm_up
    state, reports, _ = run_steps(state, setup)
    own = [own_tokens(report.rows).sum() for report in reports]
    in_flight = int((state.batch.length - state.batch.prompt_length).sum())
    assert state.sampled_tokens == sum(own) + in_flight


def test_on_policy_samples_everything_with_one_version(golden):
    setup = tiny_setup(golden, schedule="on_policy", steps=2)
    state = fresh_state(golden, setup)
    assert state.batch is None
    state, reports, _ = run_steps(state, setup)
    for report in reports:
        versions = report.rows.version[response_tokens(report.rows)]
        assert np.all(versions == report.metrics["step"] - 1)
        assert report.metrics["branching/positions"] > 0
    assert state.batch is None


def test_the_batch_size_follows_the_rows_that_survive(golden):
    setup = tiny_setup(golden, batch_size=BatchSizeConfig(alpha=1.0, bounds=None))
    state = fresh_state(golden, setup)
    drawn, survivors = [state.batch_count, state.next_count], []
    for _ in range(3):
        step_setup = dataclasses.replace(
            setup, config=dataclasses.replace(setup.config, steps=state.step + 1)
        )
        state, [report], _ = run_steps(state, step_setup)
        drawn.append(state.next_count)
        survivors.append(report.metrics["rows/trained"])
    # The first three draws are nominal; the fourth and fifth follow steps 1 and 2.
    expected = [4, 4, 4]
    for trained in survivors[:2]:
        expected.append(int(expected[-1] * (4 * 15) / trained))
    assert drawn == expected


def test_nothing_to_learn_leaves_parameters_and_batch_size(golden):
    setup = tiny_setup(golden, reward=ConstantJudge(), steps=2)
    before = jax.tree.map(np.array, golden.params)
    state, reports, params = run_steps(fresh_state(golden, setup), setup)
    for after in params:
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert [r.metrics["step/skipped"] for r in reports] == [1.0, 1.0]
    assert state.skipped_steps == 2
    assert state.batch_size == 4
    # The pipeline went on: each step worked on problems of its own.
    assert reports[0].problems != reports[1].problems


@pytest.mark.parametrize("rule", ["entropy", "random", "none"])
def test_other_methods_run_through_the_same_loop(golden, rule):
    setup = tiny_setup(
        golden,
        steps=1,
        branching=BranchingConfig(rule=rule, delta=1, min_distance=0),
        expansion=AdaptiveExpansionConfig(False, False),
    )
    _, [report], _ = run_steps(fresh_state(golden, setup), setup)
    rows = report.rows
    initial = rows.root == np.arange(len(rows.root))
    if rule == "none":
        # n (1 + N C) responses of each problem, and one advantage for a whole response.
        assert initial.all()
        assert np.all(np.bincount(rows.problem) == 15)
        rewards = rows.reward[rows.problem == 0]
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        first = report.advantages[np.arange(15), rows.prompt_length[:15]]
        np.testing.assert_allclose(first, expected, atol=1e-5)
    else:
        assert np.bincount(rows.problem[initial]).tolist() == [3] * 4
        assert report.metrics["branching/responses_expanded"] == 12
        assert report.metrics["branching/by_importance"] == 0.0
        assert (~initial).any()


def test_permuted_advantages_come_from_other_problems():
    """Also where one problem has most of the rows. Tokens of a problem's rows are worth 10 times
    its number, and one more each; those that are not trained keep them, and give none."""
    rows = empty_rollouts(8, 9)
    rows.problem[:] = [0, 0, 0, 0, 0, 1, 1, 2]
    rows.prompt_length[:], rows.length[:] = 2, [4, 5, 6, 4, 9, 6, 5, 4]
    response = rows.length - rows.prompt_length
    # Two segments of each row: its first two tokens, and the others.
    start, end = np.stack([response * 0, response * 0 + 2]), np.stack([response * 0 + 2, response])
    segments = PathSegments(start.T, end.T, *[None] * 3, (end > start).T, None, None)
    value = 10.0 * rows.problem[:, None] + np.arange(2)
    advantages = Advantages(segments, value.astype(np.float32))
    trained = rows.problem < 2
    given = permute_across_problems(advantages, rows.problem, trained, np.random.default_rng(0))
    laid_out = given.lay_out(rows, np.arange(8), 9)
    offset = np.arange(9) - rows.prompt_length[:, None]
    inside = response_tokens(rows)
    others = np.where(trained, 1 - rows.problem, 2)[:, None]
    # Both rows of problem 1 have two segments, rows 0 and 3 of problem 0 have one.
    assert np.all(laid_out[~inside] == 0)
    np.testing.assert_array_equal(laid_out[inside] // 10, (others + offset * 0)[inside])
    np.testing.assert_array_equal(laid_out[:5][inside[:5]] % 10, (offset[:5] >= 2)[inside[:5]])
    alone = permute_across_problems(advantages, rows.problem * 0, trained, np.random.default_rng(0))
    assert not alone.value[trained].any()
    np.testing.assert_array_equal(alone.value[~trained], advantages.value[~trained])


def test_the_control_trains_the_same_rows_with_other_advantages(golden):
    plain, permuted = (
        tiny_setup(golden, steps=1, permute_advantages=permute) for permute in (False, True)
    )
    _, [honest], _ = run_steps(fresh_state(golden, plain), plain)
    _, [shuffled], _ = run_steps(fresh_state(golden, permuted), permuted)
    np.testing.assert_array_equal(honest.rows.tokens, shuffled.rows.tokens)
    np.testing.assert_array_equal(honest.trained, shuffled.trained)
    assert np.any(honest.advantages != shuffled.advantages)


@pytest.mark.parametrize("judged", ["full", "continuation"])
def test_rewards_belong_to_their_responses(golden, judged):
    """Responses are judged as they finish, in any order; whole, or a continuation on its own."""
    setup = tiny_setup(golden, steps=1, judge=judged)
    _, [report], _ = run_steps(fresh_state(golden, setup), setup)
    rows = report.rows
    continued = rows.root != np.arange(len(rows.root))
    assert 0 < continued.sum() < len(continued)
    begin = rows.prompt_length + (rows.split if judged == "continuation" else 0)
    texts = [
        setup.task.tokenizer.decode(rows.tokens[r, begin[r] : rows.length[r]])
        for r in range(len(rows.length))
    ]
    rewards, _ = ChecksumJudge().judge_many([(text, ("1",)) for text in texts])
    np.testing.assert_array_equal(rows.reward, rewards)
    assert 0 < rows.reward[continued].sum() < continued.sum()


def test_the_penalty_is_towards_the_reference(golden):
    """The policy starts at the reference, where the divergence is 0, and leaves it."""
    setup = tiny_setup(
        golden, reference=golden.params, loss=LossConfig(kl_beta=1e-3), steps=2,
        schedule="on_policy", mini_batch_rows=1000,
    )  # fmt: skip
    _, reports, _ = run_steps(fresh_state(golden, setup), setup)
    first, second = (report.metrics["update/kl"] for report in reports)
    assert abs(first) < 1e-6
    assert second > 1e-4


def test_a_penalty_needs_a_reference(golden):
    with pytest.raises(ValueError, match=r"loss.kl_beta is 0.001, but there is no reference"):
        tiny_setup(golden, loss=LossConfig(kl_beta=1e-3))


def test_batches_draw_noise_of_their_own(golden):
    """A bug: b_1 and b_2 are both sampled by θ_0, and shared their seeds through its number."""
    setup = tiny_setup(golden, steps=1)
    same = Problem("same", "q", ("1",))
    stream = ProblemStream([same], seed=0)
    setup = dataclasses.replace(setup, task=dataclasses.replace(setup.task, stream=stream))
    state = fresh_state(golden, setup)
    first = np.concatenate(state.batch.tokens)
    state, _, _ = run_steps(state, setup)
    assert not np.array_equal(first, np.concatenate(state.batch.tokens))


def test_evaluation_repeats_itself(golden):
    setup = tiny_setup(golden, steps=0)
    state = fresh_state(golden, setup)
    first, second = (evaluate(state, setup) for _ in range(2))
    assert first["held_out/accuracy"] == second["held_out/accuracy"]
    assert first["held_out/problems"] == 6


class SignalError(Exception):
    """A signal."""


class JudgeOfAJobThatEnds(ChecksumJudge):
    """The signal comes while the last answer is judged, and costs its verdict."""

    is_signalled = False

    def judge_many(self, items):
        self.is_signalled = True
        return super().judge_many(items)

    def interrupt(self):
        if self.is_signalled:
            raise SignalError


@pytest.mark.parametrize("overlap", ["none", "all"])
def test_verdicts_that_a_signal_may_have_cost_are_not_recorded(golden, overlap):
    """Bug: nobody asked for a signal between the last verdict and what is saved of it."""
    setup = tiny_setup(golden, overlap=overlap)
    state = fresh_state(golden, setup)
    judge = JudgeOfAJobThatEnds()
    task = dataclasses.replace(setup.task, judge=judge)
    ending = dataclasses.replace(setup, task=task, interrupt=judge.interrupt)
    with pytest.raises(SignalError):
        evaluate(state, ending)
    judge.is_signalled = False
    with pytest.raises(SignalError):
        start(ending, state.train)
