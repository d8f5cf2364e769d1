"""The benchmarks' harness and command: order of runs, judgement, tables. Nothing timed."""

from __future__ import annotations

import json
import os
import sys
from functools import partial

import jax
import pytest

from experiments.bench import __main__ as command
from experiments.bench import report
from experiments.bench.harness import (
    Contender,
    Fact,
    Measured,
    Part,
    Ratio,
    Table,
    fastest,
    is_met,
    judged,
    missed,
    run_part,
)
from experiments.bench.report import markdown, write


def contender(name, seconds, order=None, amount=100.0):
    """Runs that take the given seconds, one after the other."""
    left = iter(seconds)

    def run():
        if order is not None:
            order.append(name)
        return Measured(next(left), amount, {"steps": 7.0})

    return Contender(name, run, lambda: f"settings of {name}")


def example_part(order=None, **changes):
    values = {
        "title": "example",
        "unit": "tokens/s",
        # Rates 100, 50, 25 against 50, 25, 12.5 and 10, 100, 10.
        "contenders": [
            contender("ours", [1.0, 2.0, 4.0], order),
            contender("one", [2.0, 4.0, 8.0], order),
            contender("two", [10.0, 1.0, 10.0], order),
        ],
        "ratios": [Ratio("ours", ("one", "two"), at_least=2.0)],
        "facts": lambda runs: [Fact("steps", runs["ours"][0].detail["steps"], at_most=8.0)],
        "tables": lambda runs: [Table("more", [["a", "b"], ["1", "2"]])],
    }
    return Part(**(values | changes))


def test_contenders_run_in_turn():
    """Each round begins with another one."""
    order, said = [], []
    result = run_part(example_part(order), 3, said.append, pause=0)
    assert order == ["ours", "one", "two", "one", "two", "ours", "two", "ours", "one"]
    assert [c["median"] for c in result["contenders"]] == [50.0, 25.0, 10.0]
    assert [c["settings"] for c in result["contenders"]][1] == "settings of one"
    assert result["contenders"][2]["max"] == 100.0
    assert len(result["load_average"]) == 4


def test_a_ratio_is_of_medians_over_the_best():
    (ratio,) = run_part(example_part(), 3, print, pause=0)["ratios"]
    assert ratio["value"] == 2.0
    # In the second round the best of the others is another one.
    assert ratio["rounds"] == [2.0, 0.5, 2.0]
    assert ratio["met"]


def test_seconds_are_better_when_fewer():
    part = example_part(quantity="seconds", ratios=[Ratio("ours", ("one", "two"), at_most=0.4)])
    (ratio,) = run_part(part, 3, print, pause=0)["ratios"]
    assert ratio["value"] == 2.0 / 4.0
    assert ratio["rounds"] == [1.0 / 2.0, 2.0 / 1.0, 4.0 / 8.0]
    assert not ratio["met"]


@pytest.mark.parametrize(
    ("number", "at_least", "at_most", "met"),
    [
        (3.0, 3.0, None, True),
        (2.99, 3.0, None, False),
        (1.3, None, 1.3, True),
        (1.31, None, 1.3, False),
        (0.0, None, None, True),
        (float("nan"), 1.0, None, False),
        (float("nan"), None, 1.0, False),
    ],
)
def test_what_is_wanted(number, at_least, at_most, met):
    assert is_met(number, at_least, at_most) == met


def test_what_is_missed_is_named():
    part = example_part(
        ratios=[Ratio("ours", ("one", "two"), at_least=3.0), Ratio("ours", ("two",))],
        facts=lambda runs: [Fact("padding", 0.2, at_most=0.1), Fact("size", 5.0)],
    )
    result = run_part(part, 3, print, pause=0)
    assert missed({"A": result}) == [
        "A: ours over the best of one, two is 2, wanted >= 3",
        "A: padding is 0.2, wanted <= 0.1",
    ]
    assert missed({"A": run_part(example_part(), 3, print, pause=0)}) == []


def test_a_ratio_of_nobody_is_refused():
    with pytest.raises(ValueError, match="'them'"):
        judged(example_part(ratios=[Ratio("ours", ("them",))]), {}, {"ours": [Measured(1.0)]})


def test_the_fastest_variant_is_that_of_the_least_timing():
    order = []
    # To compile, then twice in turn.
    seconds = {"a": iter([9.0, 2.0, 5.0]), "b": iter([1.0, 3.0, 4.0])}

    def run(name):
        order.append(name)
        return next(seconds[name])

    assert fastest(["a", "b"], run) == ("a", {"a": 2.0, "b": 3.0})
    assert order == ["a", "b"] * 3


def bench(tmp_path, monkeypatch, part, *flags, **others):
    """The command on a benchmark of one part A, or of some; its exit code."""
    monkeypatch.setitem(command.BENCHMARKS, "rollouts", {"A": lambda context: part} | others)
    # The devices of the test session are made before its flags are taken away.
    jax.devices()
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(command, "run_part", partial(run_part, pause=0))
    # The cores of the whole test session.
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)
    arguments = ["rollouts", "--rounds=3", "--threads=1", f"--out={tmp_path}", *flags]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    try:
        command.main(command.make_parser().parse_args(arguments))
    except SystemExit as end:
        return end.code
    return 0


def test_check_is_the_exit_code(tmp_path, monkeypatch, capsys):
    wanted = [Ratio("ours", ("one", "two"), at_least=2.5)]
    assert bench(tmp_path, monkeypatch, example_part(), "--check") == 0
    assert bench(tmp_path, monkeypatch, example_part(ratios=wanted)) == 0
    assert bench(tmp_path, monkeypatch, example_part(ratios=wanted), "--check") == 1
    said = capsys.readouterr()
    assert "missed: A: ours over the best of one, two is 2, wanted >= 2.5" in said.err
    # The result is written and shown either way.
    result = json.loads((tmp_path / "rollouts.json").read_text())
    assert result["parts"]["A"]["ratios"][0]["met"] is False
    assert result["parts"]["A"]["contenders"][0]["rounds"][2] == {
        "seconds": 4.0, "amount": 100.0, "detail": {"steps": 7.0},
    }  # fmt: skip
    assert result["machine"]["cores_used"] == 1
    assert result["versions"]["jax"]
    assert (tmp_path / "rollouts.md").read_text() == markdown(result)
    assert "| ours over the best of one, two |  2.00 | >= 2.5 |  NO |" in said.out


def test_a_part_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    found = []

    def failing(context):
        found.append(json.loads((tmp_path / "rollouts.json").read_text())["parts"])
        raise ValueError("no such | thing\nat all")

    code = bench(
        tmp_path,
        monkeypatch,
        example_part(),
        "--check",
        B=failing,
        C=lambda context: example_part(),
    )
    assert code == 2
    # What had ended was written by then.
    assert list(found[0]) == ["A"]
    said = capsys.readouterr()
    assert "failed: part B: ValueError: no such | thing" in said.err
    parts = json.loads((tmp_path / "rollouts.json").read_text())["parts"]
    assert list(parts) == ["A", "B", "C"]
    assert parts["B"]["failed"] == "ValueError: no such | thing\nat all"
    assert parts["C"]["contenders"][0]["median"] == 50.0
    assert "## B\n\nFailed: ValueError: no such" in (tmp_path / "rollouts.md").read_text()


def test_no_flags_of_xla(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--something")
    with pytest.raises(ValueError, match="XLA_FLAGS"):
        command.main(command.make_parser().parse_args(["rollouts"]))


def test_the_device_is_named():
    about = report.machine(1)
    assert about["device"] == jax.devices()[0].device_kind
    assert about["devices"] == 8
    assert about["device_platform"]
    for name in ("jax-cuda12-plugin", "jax-cuda13-pjrt", "libtpu"):
        assert report.PLUGINS.fullmatch(name)
    assert not report.PLUGINS.fullmatch("jax-cuda12-plugins")


def test_only_some_parts_have_files_of_their_own(tmp_path, monkeypatch):
    assert bench(tmp_path, monkeypatch, example_part(), "--only=A") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollouts-A.json", "rollouts-A.md"]
    with pytest.raises(ValueError, match="there is no part 'D'"):
        bench(tmp_path, monkeypatch, example_part(), "--only=A,D")
    assert command.chosen_parts("C, A", {"A": 1, "B": 2, "C": 3}) == ["A", "C"]


def test_the_report_shows_every_number(tmp_path):
    part = run_part(example_part(), 3, print, pause=0)
    result = {
        "benchmark": "rollouts", "date": "2026-01-02", "command": "python -m x", "platform": "cpu",
        "machine": {"processor": "P", "cores": 4, "cores_used": 2, "memory": "M", "system": "S",
                    "device": "D", "devices": 2, "device_platform": "CUDA 13"},
        "versions": {"jax": "1"}, "peers_versions": {"torch": "2"}, "notes": ["Checked."],
        "parts": {"A": part | {"load_average": [0.5, 1.25]}},
    }  # fmt: skip
    text = markdown(result)
    assert "2026-01-02, P, 2 of 4 cores, M, S." in text
    assert "Our side computes on 2 x D (CUDA 13)." in text
    assert "Ours: jax 1. Peers: torch 2." in text
    assert "\nChecked.\n" in text
    cells = " ".join(text.split())
    assert "| contender | median tokens/s | min | max | every round |" in cells
    assert "| ours | 50 | 25 | 100 | 100, 50, 25 |" in cells
    assert "| two | 10 | 10 | 100 | 10, 100, 10 |" in cells
    assert "Load average before and after each round: 0.5, 1.2." in text
    assert "- one: settings of one" in text
    assert "| steps | 7 | <= 8 | yes |" in cells
    assert "more:\n\n| a   |   b |" in text
    paths = write(result, tmp_path / "out", "name")
    assert json.loads(paths[0].read_text()) == result
    assert paths[1].read_text() == text
