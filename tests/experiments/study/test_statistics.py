"""Bootstrap intervals, and methods held against each other, on made outcomes."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from experiments.curves import Point
from experiments.study import bootstrap, comparison, report
from experiments.study.outcomes import PER_STEP, Outcome, read
from experiments.study.policies import TEST
from experiments.study.protocol import FIRST, SECOND
from experiments.study.signal import Gradients, cosines, signal

BUDGET, METHODS = FIRST.budget, FIRST.methods


def outcome(method, seed, final, sampled=None, tokens=BUDGET, rate=2e-4):
    """A run whose accuracy rises evenly from 0.4 to `final`."""
    curve = tuple(
        Point(step, 0.4 + (final - 0.4) * step / 4, tokens * step // 4, 40 * step, 10.0 * step)
        for step in range(5)
    )
    per_step = {name: np.full(4, 2.0) for name in PER_STEP}
    sampled = np.full(len(TEST), round(8 * final)) if sampled is None else sampled
    return Outcome(method, rate, seed, curve, per_step, sampled // 8, sampled)


def runs_of(method, finals, **options):
    return {seed: outcome(method, seed, final, **options) for seed, final in enumerate(finals)}


def test_draws_are_with_replacement():
    drawn = bootstrap.draws(7, seed=0, resamples=400)
    assert (drawn.sum(axis=1) == 7).all()
    assert (drawn == 0).any()
    assert abs(drawn.mean() - 1) < 1e-12
    assert drawn.tolist() == bootstrap.draws(7, seed=0, resamples=400).tolist()


def test_an_interval_is_of_seeds_and_of_problems():
    """Its width is that of the larger of the two sources, and 0 where there is neither."""
    rng = np.random.default_rng(1)
    seeds = np.repeat(rng.normal(size=(40, 1)), 50, axis=1)
    problems = np.repeat(rng.normal(size=(1, 400)), 5, axis=0)
    for values, count in ((seeds, 40), (problems, 400)):
        found = bootstrap.interval(values)
        assert found.value == pytest.approx(values.mean())
        expected = 2 * 1.96 * values.std() / np.sqrt(count)
        assert found.high - found.low == pytest.approx(expected, rel=0.1)
    nothing = bootstrap.interval(np.full((5, 30), 0.25))
    assert nothing == pytest.approx((0.25, 0.25, 0.25))


def test_a_difference_is_paired():
    """What two methods have in common, seed by seed and problem by problem, does not widen it."""
    rng = np.random.default_rng(2)
    shared = rng.normal(size=(5, 60)) + 10 * rng.normal(size=(5, 1))
    found = bootstrap.difference(shared + 0.5, shared)
    assert found == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_is_of_sums():
    found = bootstrap.ratio(np.array([1.0, 3.0, 2.0]), np.array([2.0, 6.0, 4.0]))
    assert found == pytest.approx((0.5, 0.5, 0.5))
    assert bootstrap.ratio(np.array([0.0, 4.0]), np.array([1.0, 1.0])).value == 2.0


def test_problems_of_a_difficulty():
    operations = np.array([TEST[k].level for k in range(len(TEST))], float)
    parts = [comparison.of_difficulty(operations[None], *d) for d in comparison.DIFFICULTIES]
    assert sum(part.size for part in parts) == len(TEST)
    for part, (low, high) in zip(parts, comparison.DIFFICULTIES, strict=True):
        assert (part.min(), part.max()) == (low, high)


def test_leads_are_of_common_seeds():
    ours, theirs = runs_of("AttnRL", [0.75, 0.75, 0.25]), runs_of("TreeRL", [0.5, 0.5])
    assert comparison.lead(ours, theirs) == pytest.approx((0.25, 0.25, 0.25))
    at = comparison.lead_at(ours, theirs, "sampled_tokens", BUDGET / 2)
    assert at == pytest.approx((0.125, 0.125, 0.125))


def test_tokens_to_reach_the_other():
    ours, theirs = runs_of("AttnRL", [0.8] * 5), runs_of("GRPO", [0.6] * 5)
    assert comparison.tokens_to_reach(ours, theirs, BUDGET) == pytest.approx(
        (0.5, 0.5, 0.5), abs=0.01
    )
    assert np.isinf(comparison.tokens_to_reach(theirs, ours, BUDGET).value)
    mixed = runs_of("AttnRL", [0.8, 0.8, 0.8, 0.8, 0.5])
    found = comparison.tokens_to_reach(mixed, theirs, BUDGET)
    assert found.low < found.value < found.high


def test_seconds_are_held_against_tokens():
    """A run that overshot its budget by half is not slower for it."""
    ours = runs_of("AttnRL", [0.8] * 5, tokens=BUDGET * 3 // 2)
    theirs = runs_of("AttnRL, on-policy", [0.8] * 5)
    assert comparison.seconds_ratio(ours, theirs).value == pytest.approx(2 / 3)


def test_rounds_of_generation():
    """Of four steps, all of whose continuations come with the next initial responses, or not."""
    runs = runs_of("AttnRL", [0.8] * 3)
    assert comparison.rounds(runs, METHODS["AttnRL"]) == 5
    assert comparison.rounds(runs, METHODS["AttnRL, on-policy"]) == 8
    assert comparison.rounds(runs, METHODS["GRPO"]) == 4


def write_outcome(folder, one):
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "method": one.method,
        "learning_rate": one.learning_rate,
        "seed": one.seed,
        "curve": [[*asdict(point).values()] for point in one.curve],
        "per_step": {name: values.tolist() for name, values in one.per_step.items()},
        "test": {
            "greedy": "".join(map(str, one.greedy)),
            "sampled": "".join(map(str, one.sampled)),
        },
    }
    path = folder / f"{len([*folder.iterdir()])}.json"
    path.write_text(json.dumps(found))
    return path


def test_an_outcome_is_read_as_it_was_written(tmp_path):
    one = outcome("GRPO", 3, 0.7, np.random.default_rng(0).integers(9, size=len(TEST)))
    again = read(write_outcome(tmp_path, one))
    assert again.curve == one.curve
    np.testing.assert_array_equal(again.sampled, one.sampled)
    np.testing.assert_array_equal(again.greedy, one.greedy)
    broken = tmp_path / "broken.json"
    broken.write_text('{"method": "GRPO"}')
    with pytest.raises(ValueError, match=r"broken.json is no outcome of the study"):
        read(broken)


def test_the_report_says_what_the_outcomes_are(tmp_path):
    with pytest.raises(ValueError, match="no outcome of AttnRL yet"):
        report.write(tmp_path, FIRST)
    finals = {"AttnRL": 0.75, "GRPO": 0.5, "GRPO, 8 responses": 0.625}
    for name in METHODS:
        for seed in range(3):
            write_outcome(tmp_path / "comparison", outcome(name, seed, finals.get(name, 0.875)))
            for rate in (1e-4, 2e-4):
                tuned = outcome(name, seed, finals.get(name, 0.875) - rate, rate=rate)
                write_outcome(tmp_path / "tuning", tuned)
    text = report.write(tmp_path, FIRST)
    assert text == (tmp_path / "report.md").read_text()
    # The better GRPO is the one that AttnRL is held against.
    assert "AttnRL less GRPO, 8 responses, avg@8 at the end: +12.5 (+12.5" in text
    assert "AttnRL less TreeRL, avg@8 at the end: -12.5" in text
    assert "reaches the final accuracy of GRPO, 8 responses with 64 (64 to 64) %" in text
    assert "reaches the final accuracy of TreeRL with more than 100" in text
    assert "1.00 (1.00 to 1.00) times the wall clock a sampled token" in text
    lines = text.splitlines()
    [row] = [line for line in lines if line.startswith("| GRPO  ") and "+25.0" in line]
    assert "50.0 (50.0 to 50.0)" in row
    assert "150" in row
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    twice = outcome("AttnRL", 0, 0.5, rate=1e-4)
    write_outcome(tmp_path / "comparison", twice)
    with pytest.raises(ValueError, match="AttnRL has two runs of seed 0"):
        report.write(tmp_path, FIRST)


def test_the_second_report_has_its_own_methods_and_budget(tmp_path):
    for name in SECOND.methods:
        for seed in range(2):
            write_outcome(tmp_path / "comparison", outcome(name, seed, 0.75, tokens=SECOND.budget))
    text = report.write(tmp_path, SECOND)
    assert "Runs of 2 seeds, 75,000 sampled tokens each." in text
    assert "AttnRL less GRPO, 8 responses at 37,500 sampled tokens" in text
    # Its runs shared their cores with other work.
    assert "wall clock" not in text
    for name in SECOND.methods:
        assert f"| {name} " in text, name


def test_cosines_are_weighed_as_adam_would():
    """A parameter of small gradients counts as one of large ones does, one of none not at all."""
    truth = Gradients(np.array([[100.0, 0.1, 0.0], [100.0, 0.1, 0.0]]), np.ones(2))
    of = Gradients(
        np.array([[50.0, 0.05, 9.0], [100.0, -0.1, 0.0], [0, 0, 0], [-1, -0.001, 0]]), np.ones(4)
    )
    np.testing.assert_allclose(cosines(of, truth), [1, 99.9 / 100.1, 0, -1], atol=1e-6)
    even = Gradients(np.array([[1.0, 1.0], [1.0, -1.0]]), np.ones(2))
    np.testing.assert_allclose(
        cosines(Gradients(np.array([[1.0, 1.0]]), np.ones(1)), even), [np.sqrt(0.5)], rtol=1e-6
    )


def test_signal_grows_with_the_tokens_alone():
    """Of the same truth and noise: a mean of four steps has four times the signal, a token as
    much."""
    rng = np.random.default_rng(3)
    noisy = 1.0 + 30 * rng.normal(size=(4000, 300))
    truth = Gradients(np.ones((1, 300)), np.ones(1))
    fine = Gradients(noisy, np.full(4000, 1000.0))
    coarse = Gradients(noisy.reshape(1000, 4, 300).mean(1), np.full(1000, 4000.0))
    one, four = (signal(cosines(of, truth), of.tokens) for of in (fine, coarse))
    assert one.low < 10 / 900 < one.high
    assert four.low < 10 / 900 < four.high
    assert one.value == pytest.approx(four.value, rel=0.15)
