"""Cleaning: every fault by hand, what holds for any rows, and the real files."""

import dataclasses
import json
import math
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrl_jax.datasets.cleaning import (
    CleaningConfig,
    CleaningReport,
    PromptLimit,
    clean,
    went_through_float,
)
from attnrl_jax.datasets.files import read_problems
from attnrl_jax.tasks.problems import Problem

ROOT = Path(__file__).parents[2]
FAULTS = ROOT / "tests" / "data" / "problems" / "faults.jsonl"
SHARED = ROOT.parent / "shared" / "data"
FLAGS = (
    "duplicates",
    "conflicting_answers",
    "empty_problems",
    "empty_answers",
    "corrupted_numbers",
    "placeholder_answers",
    "non_latin",
)
KEEP_ALL = CleaningConfig(**dict.fromkeys(FLAGS, False), overlap=0)
BENCHMARKS = {
    "hens": [
        Problem("h", "A farmer has twelve hens and buys seven more hens on Monday.", ("19",)),
        Problem("o", "An ox and a cow walk together over the long green hill.", ("0",)),
    ]
}


def rows(*texts_and_answers):
    return [
        Problem(str(i), text, (answers,) if isinstance(answers, str) else answers)
        for i, (text, answers) in enumerate(texts_and_answers)
    ]


def kept_ids(problems, config=CleaningConfig(), **others):  # noqa: B008
    return [problem.id for problem in clean(problems, config, **others)[0]]


def test_every_fault_of_a_small_file():
    kept, report = clean(read_problems(FAULTS), CleaningConfig(), BENCHMARKS)
    # "spider" stays although an earlier copy has no answer, "cyclic-exact" although an earlier
    # copy has a corrupted one.
    names = ["sum", "sum-other-sign", "half", "spider", "cyclic-exact", "chinese", "last"]
    assert [problem.id for problem in kept] == names
    assert (report.read, report.kept) == (15, 7)
    assert report.found == {
        "empty_problems": 0,
        "empty_answers": 2,
        "corrupted_numbers": 1,
        "placeholder_answers": 2,
        "conflicting_answers": 3,
        "non_latin": 1,
        "overlap": 1,
        "duplicates": 6,
    }
    assert report.removed == {
        "empty_problems": 0,
        "empty_answers": 2,
        "corrupted_numbers": 1,
        "placeholder_answers": 0,
        "conflicting_answers": 2,
        "non_latin": 0,
        "overlap": 1,
        "duplicates": 2,
    }
    hens = report.benchmarks["hens"]
    assert (hens.problems, hens.overlapping, hens.training_rows) == (2, 1, 1)


def test_every_setting_removes_its_fault_alone_and_counts_stay():
    problems = read_problems(FAULTS)
    everything, report = clean(problems, KEEP_ALL, BENCHMARKS)
    assert everything == problems
    assert set(report.removed.values()) == {0}
    alone = {"duplicates": 6, "conflicting_answers": 3, "empty_answers": 2, "corrupted_numbers": 1}
    for flag, removed in (alone | {"non_latin": 1}).items():
        config = CleaningConfig(**{**dict.fromkeys(FLAGS, False), flag: True}, overlap=0)
        kept, one = clean(problems, config)
        assert len(problems) - len(kept) == removed == one.removed[flag]
        assert one.found | {"overlap": 0} == report.found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("0.5", "\\frac12"),
        ("83", "83^\\circ"),
        ("049", "49"),
        ("1,000", "1000"),
        (("2", "-2"), ("-2",)),
        ("x", "$x$"),
        ("7", ""),
        ("\\boxed{7}", "7"),
    ],
)
def test_equal_answers_do_not_conflict(one, other):
    assert kept_ids(rows(("p", one), ("P", other), ("q", "1"))) == ["0", "2"]


@pytest.mark.parametrize(
    ("one", "other"), [("0", "2+2\\sqrt{2}"), ("50308", "50208"), (("1", "2"), ("3", "4"))]
)
def test_conflicting_answers_cost_every_copy(one, other):
    assert kept_ids(rows(("p", one), ("q", "1"), ("P", other), ("p", one))) == ["1"]
    config = CleaningConfig(conflicting_answers=False)
    assert kept_ids(rows(("p", one), ("q", "1"), ("P", other), ("p", one)), config) == ["0", "1"]


def test_conflicts_are_found_between_any_two_copies():
    """75 % equals both 75 and 3/4 by exact reading, which differ from each other."""
    assert kept_ids(rows(("p", "75\\%"), ("p", "75"), ("p", "\\frac34"))) == []


@pytest.mark.parametrize(
    ("gold", "placeholder"),
    [(gold, True) for gold in ("-1", "$-1$", "−1", "-1.0", "\\boxed{-1}", "None", "N/A", "n.a.")]
    + [(gold, True) for gold in ("?", "Unknown", "\\text{none}", "NaN", "-", "null")]
    + [(gold, False) for gold in ("1", "-10", "-11", "x-1", "", " ", "0", "unknown x", "n", "a")],
)
def test_placeholder_answers_are_counted(gold, placeholder):
    """Bug: 103 of DAPO's 118 answers -1 stayed, with no setting and no count."""
    problems = rows(("p", gold), ("q", "1"))
    assert clean(problems, KEEP_ALL)[1].found["placeholder_answers"] == placeholder
    assert clean(problems, KEEP_ALL)[1].kept == 2
    removing = dataclasses.replace(KEEP_ALL, placeholder_answers=True)
    assert kept_ids(problems, removing) == (["1"] if placeholder else ["0", "1"])


def test_placeholder_among_other_golds_is_an_answer():
    problems = rows(("p", ("2", "-1")), ("q", ("-1", "")), ("r", ("?", "-1")))
    assert kept_ids(problems, CleaningConfig(placeholder_answers=True)) == ["0"]


def test_placeholders_that_are_removed_are_no_evidence():
    problems = rows(("p", "-1"), ("p", "4"), ("p", "4.0"))
    assert kept_ids(problems) == []
    assert kept_ids(problems, CleaningConfig(placeholder_answers=True)) == ["1"]


def test_empty_problems():
    problems = rows((" ", "1"), ("p", "1"), ("", "2"))
    assert kept_ids(problems) == ["1"]
    assert clean(problems, CleaningConfig())[1].removed["empty_problems"] == 2
    assert kept_ids(problems, KEEP_ALL) == ["0", "1", "2"]


def test_equal_texts_overlap_where_the_share_is_zero():
    """Bug: overlap=0 let a benchmark's own problem stay."""
    problems = rows(
        ("A farmer has twelve hens, and buys seven more hens on Monday", "19"),
        ("Anna: A farmer has twelve hens and buys seven more hens on Monday.", "19"),
    )
    assert [problem.id for problem in clean(problems, KEEP_ALL, BENCHMARKS)[0]] == ["1"]


@pytest.mark.parametrize(
    "gold",
    [
        "22099999999998951424",
        "22099999999999998951424",
        "105263157894736848",
        "-105263157894736848",
        "$105263157894736848$",
        "105,263,157,894,736,848",
        "105263157894736848.0",
        "\\boxed{105263157894736848}",
        "2.2099999999999998e+22",
        str(int(float(3**50))),
    ],
)
def test_integers_that_went_through_a_float(gold):
    assert went_through_float(gold)


@pytest.mark.parametrize(
    "gold",
    [
        "105263157894736842",
        "476837158203126",
        "2^{60}",
        "8.7\\times10^8",
        "1e22",
        "2.5e+30",
        "0.10000000000000001",
        "1.2345678901234567e-5",
        "",
        "x",
        "9" * 309,
        "9" * 401,
        "9" * 5000,
        *map(str, (10**22, 2 * 10**22, 3**50, 2**53 + 1, 2**60, 2**100, 2**1000, 3 * 2**70, 6**30)),
        str(2**30 * (2**31 - 1)),
        *(str(math.factorial(n)) for n in range(18, 60)),
    ],
)
def test_exact_integers_are_left_alone(gold):
    assert not went_through_float(gold)


def test_random_integers_before_and_after_a_float():
    random = Random(0)
    exact = [random.randrange(10**19, 10**22) for _ in range(1000)]
    assert sum(went_through_float(str(value)) for value in exact) <= 1
    assert sum(went_through_float(str(int(float(value)))) for value in exact) >= 990


def test_prompts():
    problems = rows(("aa", "1"), ("aaaa", "1"), ("-", "1"), ("aaa", "1"))
    limit = PromptLimit(lambda problem: len(problem.text.strip("-")), 3)
    kept, report = clean(problems, CleaningConfig(), prompt_limit=limit)
    assert [problem.id for problem in kept] == ["0", "3"]
    assert report.removed["empty_prompts"] == report.removed["long_prompts"] == 1
    assert "long_prompts" not in clean(problems, CleaningConfig())[1].found


def test_report_is_plain_and_comes_back():
    limit = PromptLimit(lambda problem: len(problem.text), 80)
    _, report = clean(read_problems(FAULTS), CleaningConfig(), BENCHMARKS, limit)
    assert CleaningReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    table = report.to_table()
    assert "| copies of the text have different answers | 3 | 2 |" in table
    assert "| all: 15 read, 7 kept | | 8 |" in table
    assert "| hens | 2 | 1 | 1 |" in table


@pytest.mark.parametrize(
    ("setting", "value"),
    [("overlap", 1.1), ("overlap", -0.1), ("overlap", float("nan")), ("ngram", 0)],
)
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} must be"):
        CleaningConfig(**{setting: value})


def test_prompt_limit_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"^tokens must be at least 1, got 0"):
        PromptLimit(len, 0)


def test_no_rows():
    kept, report = clean([], CleaningConfig(), BENCHMARKS)
    assert (kept, report.read, report.kept) == ([], 0, 0)


GOLDS = st.sampled_from(["", " ", "1", "1.0", "75\\%", "75", "\\frac34", "105263157894736848", "x"])
PROBLEMS = st.builds(
    Problem,
    st.uuids().map(str),
    st.lists(st.sampled_from(["a", "A ", "b", "$c$", "+", "求", "1", "2", " "]), max_size=5).map(
        "".join
    ),
    st.lists(GOLDS, min_size=1, max_size=2).map(tuple),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    problems=st.lists(PROBLEMS, max_size=12),
    benchmark=st.lists(PROBLEMS, max_size=3),
    flags=st.fixed_dictionaries({flag: st.booleans() for flag in FLAGS}),
    overlap=st.sampled_from([0.0, 0.5, 1.0]),
    limit=st.sampled_from([None, 1, 3]),
)
def test_what_holds_for_any_rows(problems, benchmark, flags, overlap, limit):
    config = CleaningConfig(**flags, overlap=overlap, ngram=2)
    others = (
        {"bench": benchmark},
        limit and PromptLimit(lambda problem: len(problem.text), limit),
    )
    kept, report = clean(problems, config, *others)
    remaining = iter(problems)
    assert all(any(problem is one for one in remaining) for problem in kept), "a subsequence"
    assert report.read == len(problems)
    assert report.kept == len(kept)
    assert report.kept + sum(report.removed.values()) == report.read
    assert all(report.removed[fault] <= found for fault, found in report.found.items())
    again, second = clean(kept, config, *others)
    assert again == kept
    assert set(second.removed.values()) == {0}
    for flag in FLAGS:
        assert not (flags[flag] and second.found[flag])


@pytest.mark.skipif(not SHARED.is_dir(), reason="problem files are not here")
def test_faults_of_the_real_files():
    """The figures of the README beside the files, but for duplicates and one benchmark.

    It counts 2,323 groups with 2,563 extra rows and does not say how it compared; `same_text_key`
    makes 2,435 groups. Of the 23 in conflict by plain comparison 18 (44 rows) remain in conflict
    when 49 equals 049; one more pair is equal but for the space in `(1, 2)`.

    It counts 46 problems of olympiad; six more differ from training rows in the space of `x y`,
    which split words.
    """
    names = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiad")
    benchmarks = {name: read_problems(SHARED / "eval" / f"{name}.jsonl") for name in names}
    problems = read_problems(SHARED / "train" / "dapo_math_train.jsonl.gz")
    kept, report = clean(problems, CleaningConfig(), benchmarks)
    assert report.read == 24_898
    assert report.found == {
        "empty_problems": 0,
        "empty_answers": 2,
        "corrupted_numbers": 3,
        "placeholder_answers": 118,
        "conflicting_answers": 46,
        "non_latin": 3282,
        "overlap": 125,
        "duplicates": 2699,
    }
    assert [report.benchmarks[name].overlapping for name in names] == [0, 0, 18, 21, 0, 52]
    assert report.kept == len(kept) == 22_059
    corrupted = [row.id for row in problems if any(map(went_through_float, row.answers))]
    assert corrupted == ["dapo_math-00994", "dapo_math-05053", "dapo_math-11693"]
