"""The protocol is what docs/study.md says, and what the recorded outcomes were run with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from attnrl_jax.tasks.graph import GraphSource, GraphTaskConfig
from experiments.plan import ROOT, load_sweep, plan
from experiments.settings import build
from experiments.study import comparison
from experiments.study.outcomes import file_of, read_all
from experiments.study.policies import TEST
from experiments.study.protocol import (
    COMPARISONS,
    FIRST,
    RESULTS,
    SECOND,
    THIRD,
    TUNING_SEEDS,
    name_of,
)

SWEEPS = {
    "first": {"tuning": "study_tuning.py", "comparison": "study.py"},
    "second": {"tuning": "study_second_tuning.py", "comparison": "study_second.py"},
    "third": {"tuning": "study_third_tuning.py", "comparison": "study_third.py"},
}


@pytest.fixture(scope="module")
def planned():
    """Runs of each comparison, of its tuning and of itself."""
    return {
        which: {
            part: plan(load_sweep(ROOT / "experiments" / "sweeps" / name), Path("runs"))
            for part, name in sweeps.items()
        }
        for which, sweeps in SWEEPS.items()
    }


@pytest.fixture(params=SWEEPS)
def which(request):
    return request.param


@pytest.fixture
def protocol(which):
    return COMPARISONS[which]


@pytest.fixture
def runs(which, planned):
    return planned[which]


def test_every_method_runs_at_every_rate_and_with_every_seed(runs, protocol):
    tuned = {(name_of(r.overrides), r.overrides["optimizer.learning_rate"])
             for r in runs["tuning"]}  # fmt: skip
    assert {name for name, _ in tuned} == {*protocol.methods}
    assert tuned >= {(n, rate) for n in protocol.methods for rate in protocol.rates}
    compared = [(name_of(r.overrides), r.overrides["seed"]) for r in runs["comparison"]]
    assert sorted(compared) == sorted(
        (name, seed) for name in protocol.methods for seed in protocol.seeds
    )
    assert len({file_of(run, Path()) for part in runs.values() for run in part}) == sum(
        map(len, runs.values())
    )


def test_no_seed_is_used_twice():
    used = [*TUNING_SEEDS, *(seed for one in COMPARISONS.values() for seed in one.seeds)]
    assert len({*used}) == len(used)


def test_methods_differ_in_what_they_are_called_by_alone(runs, protocol):
    """But for what its overrides name, and what its method means, a run is like all others."""
    settings = {}
    for run in runs["comparison"]:
        if run.overrides["seed"] == protocol.seeds[0]:
            settings[name_of(run.overrides)] = build(run.config).train
    ours = settings["AttnRL"]
    assert settings["GRPO, 8 responses"].rows_per_problem == 8
    assert settings["TreeRL"].rows_per_problem == 30
    for name, train in settings.items():
        same = ["loss", "temperature", "mini_batch_split", "max_sampled_tokens", "response_budget"]
        same += ["mini_batch_rows"] * (protocol is not THIRD)
        assert all(getattr(train, field) == getattr(ours, field) for field in same), name
        assert train.max_sampled_tokens == protocol.budget
        on_policy = not name.startswith("AttnRL") or name == "AttnRL, on-policy"
        assert (train.schedule == "on_policy") == on_policy
        assert train.batch_size.adaptive == (
            name.startswith("AttnRL") and name != "AttnRL, fixed batch"
        )
    assert settings["AttnRL, random steps"].branching.rule == "random"
    assert ours.mini_batch_split == ("even" if protocol is THIRD else "fill")
    if protocol is FIRST:
        assert ours.rows_per_problem == settings["GRPO"].rows_per_problem == 30
        assert settings["AttnRL, left to right"].branching.order == "position"
        assert settings["AttnRL, entropy"].branching.rule == "entropy"
        assert not settings["AttnRL, all expanded"].expansion.filter_easy
    else:
        assert ours.rows_per_problem == 8
    if protocol is SECOND:
        assert settings["GRPO, 16 responses"].rows_per_problem == 16
    if protocol is THIRD:
        rows = {name: train.mini_batch_rows for name, train in settings.items()}
        assert rows.pop("GRPO, 8 responses") == 48
        assert rows.pop("TreeRL") == 60
        assert {*rows.values()} == {24}
        problems = {name: train.num_problems for name, train in settings.items()}
        assert [problems.pop(name) for name in ("GRPO, 8 responses", "TreeRL")] == [15, 4]
        assert {*problems.values()} == {6}


def test_the_document_names_every_method(protocol):
    headings = {"": "Protocol", "second": "The second comparison", "third": "The third comparison"}
    text = (ROOT / "docs" / "study.md").read_text()
    text = text.split(f"\n## {headings[protocol.folder]}\n")[1].split("\n## ")[0]
    for name in protocol.methods:
        assert re.search(rf"^\| {re.escape(name)} \|", text, re.MULTILINE), name
    assert f"{protocol.budget:,} tokens" in text
    with pytest.raises(ValueError, match="no method of the study"):
        name_of({"method": "grpo"})


def test_rates_are_those_that_were_best(protocol):
    """Of the recorded tuning, and none at an end of what was tried."""
    scores = comparison.tuning_scores(read_all(RESULTS / protocol.folder / "tuning"))
    assert scores.keys() == protocol.methods.keys()
    for name, by_rate in scores.items():
        best = comparison.best_rate(by_rate)
        assert protocol.chosen[name] == best, name
        assert min(by_rate) < best < max(by_rate), name
        # Those that the first seed could not tell apart had a second.
        first, second, *_ = sorted((s[0] for s in by_rate.values()), reverse=True)
        twice = {rate for rate, own in by_rate.items() if len(own) == 2}
        assert twice == {*protocol.close_rates.get(name, ())}, name
        if protocol is THIRD:
            assert twice == {*by_rate}
        elif first - second > 0.02 + 1e-9:
            assert not twice


def test_the_best_rate_is_of_those_with_most_seeds():
    assert comparison.best_rate({1e-4: [0.9], 2e-4: [0.7, 0.8], 4e-4: [0.8, 0.72]}) == 4e-4


def test_outcomes_are_of_the_protocol(runs, protocol):
    for part, planned in runs.items():
        expected = {file_of(run, RESULTS / protocol.folder / part): run for run in planned}
        for path in (RESULTS / protocol.folder / part).glob("*.json"):
            found = json.loads(path.read_text())
            assert found["overrides"] == expected[path].overrides
            assert found["curve"][-1][2] >= protocol.budget


def test_the_test_is_of_no_problem_that_runs_see():
    shown = GraphSource(GraphTaskConfig(), "held_out", 0, 256)
    seen = {shown[k].text for k in range(len(shown))}
    test = [TEST[k] for k in range(len(TEST))]
    assert not seen & {problem.text for problem in test}
    levels = [problem.level for problem in test]
    assert {levels.count(level) for level in range(2, 13)} == {48}
