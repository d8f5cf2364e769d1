"""What is asked of attention is what the generator and the sampler say."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from attnrl_jax.tasks.graph import BLANK_LINE, GraphSource, GraphTaskConfig, demonstration
from experiments.compass import open_policy
from experiments.study import attention, report
from experiments.study.graph_steps import graph_steps
from experiments.study.policies import answers_of
from experiments.study.reading import read_responses
from experiments.terminal import make_console

PROBLEMS = GraphSource(GraphTaskConfig(), "held_out", seed=5, size=33)


@pytest.fixture(scope="module")
def policy():
    return open_policy()


@pytest.fixture(scope="module")
def reads(policy):
    return read_responses(policy, PROBLEMS)


@pytest.mark.parametrize("hasty", [0.0, 1.0])
def test_steps_of_a_demonstration(hasty):
    for number in range(len(PROBLEMS)):
        problem = PROBLEMS.graph(number)
        text = demonstration(problem, np.random.default_rng(number), hasty)
        steps = graph_steps(problem, text.split(BLANK_LINE))
        assert [step.name for step in steps[1:-1]] == [d.name for d in problem.definitions]
        assert steps[0].name is steps[-1].name is None
        operands = {name for pair in problem.depends_on.values() for name in pair}
        for step in steps[1:-1]:
            assert step.used == (step.name in operands or step.name == problem.asked)
            # What the answer depends on changes it when its value changes, for these operators.
            assert step.hasty == (hasty == 1.0)
            below = {step.name}
            for definition in problem.definitions:
                if below & {definition.left, definition.right}:
                    below.add(definition.name)
            assert step.decides == (problem.asked in below)


def test_a_step_that_names_nothing_solves_nothing():
    problem = PROBLEMS.graph(0)
    first = problem.definitions[0].name
    steps = graph_steps(problem, ["", "zz: a + b", first, f"{first}: nonsense"])
    assert [step.name for step in steps] == [None, None, None, first]
    assert not steps[-1].used


def test_responses_are_read_whole(policy, reads):
    assert len(reads) > 25
    for read in reads:
        assert read.starts[0] == 0
        assert read.starts[-1] == len(read.response)
        assert (np.diff(read.starts) > 0).all()
        assert len(read.steps) == len(read.fci) == len(read.starts) - 1
        for steps in read.chosen.values():
            assert all(0 <= step < len(read.steps) for step in steps)
        # Branches of importance and of chance begin a step, and never the first.
        assert all(step > 0 for rule in ("fci", "random") for step in read.chosen[rule])
        best = int(read.fci[1:].argmax()) + 1
        if read.fci[best] > 0:
            assert best in read.chosen["fci"]


def test_shares_of_what_is_picked(reads):
    found = attention.what_is_picked(reads)
    steps = [step for read in reads for step in read.steps[1:]]
    for kind in ("used", "decides", "hasty"):
        share = np.mean([getattr(step, kind) for step in steps])
        assert found["any"][kind].value == pytest.approx(share)
    picked = [read.steps[k].decides for read in reads for k in read.chosen["fci"]]
    assert found["fci"]["decides"].value == pytest.approx(np.mean(picked))


def test_values_are_shares_of_right_continuations(policy, reads):
    """Of a whole response its verdict; near its end nearly that."""
    whole = [attention._prefix(read, len(read.steps), (1, k)) for k, read in enumerate(reads)]
    verdicts = attention.values(policy, whole, samples=2)
    np.testing.assert_array_equal(verdicts, [read.right for read in reads])
    begin = [attention._prefix(read, 1, (2, k)) for k, read in enumerate(reads)]
    at_first = attention.values(policy, begin, samples=4)
    assert set(4 * at_first) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert 0.2 < at_first.mean() < 0.8


def test_changes_of_the_value_are_without_what_sampling_adds(monkeypatch, policy, reads):
    """With noise alone the mean change is 0; where one step decides all, it is that step."""
    rng = np.random.default_rng(0)
    many = reads * 20

    def noise(_, asked, samples):
        return rng.binomial(samples, 0.5, size=len(asked)) / samples

    monkeypatch.setattr(attention, "values", noise)
    found = attention.where_it_is_decided(policy, many, samples=4)
    # The value at the end is a verdict: what it changes from is a coin's.
    inner = np.concatenate([one.change[:-1] for one in found])
    assert abs(inner.mean()) < 0.01
    assert np.mean([one.change[-1] for one in found]) > 0.03

    def decided(_, asked, samples):
        return np.array([float(len(a.prefix) - a.prompt_length >= 12) for a in asked])

    monkeypatch.setattr(attention, "values", decided)
    for one, read in zip(attention.where_it_is_decided(policy, reads, 4), reads, strict=True):
        crossing = np.searchsorted(read.starts, 12)
        expected = np.zeros(len(one.change))
        if crossing > 1:
            expected[crossing - 2] = 1.0
        np.testing.assert_allclose(one.change, expected)


def test_changes_by_rule():
    decided = [
        attention.Decided(np.array([0.0, 4.0, 0.0, 0.0]), np.zeros(4),
                          {"fci": [2], "entropy": [1, 2], "random": []}),
        attention.Decided(np.array([2.0, 0.0]), np.zeros(2),
                          {"fci": [2], "entropy": [0, 1], "random": [1]}),
    ]  # fmt: skip
    found = attention.change_by_rule(decided)
    assert found["fci"]["change"].value == pytest.approx((4 + 0) / (1 + 1))
    assert found["fci"]["hits"].value == 0.5
    assert found["fci"]["hits_expected"].value == pytest.approx((1 / 4 + 1 / 2) / 2)
    # A branch within the first step is left out.
    assert found["entropy"]["hits"].value == 1.0
    assert found["random"]["change"].value == 2.0


def test_pairs_are_matched(reads):
    pairs = attention.matched_pairs(reads * 3, np.random.default_rng(0))
    assert pairs
    for pair in pairs:
        assert pair.treated.right
        assert pair.control.right
        assert len(pair.treated.steps) == len(pair.control.steps)
        assert int(pair.treated.fci[1:].argmax()) + 1 == pair.step
        assert int(pair.control.fci[1:].argmax()) + 1 != pair.step
        assert pair.control.steps[pair.step].name is not None


def test_a_corrupted_step_has_one_other_digit(policy, reads):
    rng = np.random.default_rng(0)
    changed = 0
    for read in reads:
        for step in range(len(read.steps)):
            ids = attention.corrupted(policy, read, step, rng)
            if ids is None:
                continue
            end = int(read.starts[step + 1])
            assert len(ids) == end
            [place] = np.flatnonzero(ids != read.response[:end])
            assert place >= read.starts[step]
            old, new = (policy.tokenizer.decode(x[place : place + 1]) for x in (read.response, ids))
            assert old.strip().isdigit()
            assert new.strip().isdigit()
            # The value that it finds, rather than one that it looks up.
            written = policy.tokenizer.decode(read.response[read.starts[step] : end]).split()
            assert [word for word in written if word.isdigit()][-1] == old.strip()
            changed += 1
    assert changed > 2 * len(reads)


def test_corruption_makes_right_responses_wrong(policy, reads):
    pairs = attention.matched_pairs(reads, np.random.default_rng(0))
    found = attention.what_a_step_is_worth(policy, pairs, samples=4)
    for name in ("another digit", "sampled anew"):
        falls = found[name]
        difference = falls["highest FCI"].value - falls["same place"].value
        assert falls["difference"].value == pytest.approx(difference)
    assert found["another digit"]["highest FCI"].value > 0.3


def test_answers_are_what_the_policy_is_known_for(policy):
    """The pretrained policy solves what is short and not what is long."""
    answers = answers_of(policy, PROBLEMS, samples=2)
    assert answers.sampled.max() <= 2
    levels = np.array([PROBLEMS[k].level for k in range(len(PROBLEMS))])
    assert answers.sampled[levels <= 4].mean() > answers.sampled[levels >= 10].mean()
    assert 40 < answers.response_length < 110
    assert answers.greedy.max() == 1


def test_policies_are_asked_once_and_reported(policy, tmp_path, monkeypatch):
    asked = []

    def opened():
        asked.append(1)
        return policy

    few = replace(PROBLEMS, size=22)
    monkeypatch.setattr(attention, "TEST", few)
    monkeypatch.setattr(attention.ask_all, "__defaults__", (few, 4))
    console = make_console(quiet=True)
    for _ in range(2):
        attention.write(tmp_path, {"pretrained": opened}, console)
    assert len(asked) == 1
    found = json.loads((tmp_path / "attention.json").read_text())
    assert found["pretrained"]["responses"] <= 22
    text = report.attention_tables(found)
    value, low, high = (100 * x for x in found["pretrained"]["picked"]["fci"]["decides"])
    assert f"{value:.1f} ({low:.1f} to {high:.1f})" in text
