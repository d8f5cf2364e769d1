"""Cleaning of training problems: each fault is a setting, counted and reported."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from typing import Any

from attnrl_jax.datasets.overlap import find_overlap, same_text_key
from attnrl_jax.tasks.answers import exact_verdict, gold_text
from attnrl_jax.tasks.problems import Problem

# Every fault with its words in a report. A row that shows several is removed for the first of
# them; duplicates come last, so that a faulty first copy does not cost a good second one.
FAULTS = {
    "empty_problems": "no text",
    "empty_answers": "no answer",
    "corrupted_numbers": "integer answer that went through a float",
    "placeholder_answers": "answer that may stand for none (-1, n/a, ...)",
    "conflicting_answers": "copies of the text have different answers",
    "non_latin": "text in a script other than Latin and Greek",
    "empty_prompts": "empty prompt",
    "long_prompts": "prompt over its limit",
    "overlap": "overlap with a benchmark",
    "duplicates": "later copy of a text",
}

# Scripts from Cyrillic on, without the letters and symbols that mathematics borrows.
_NON_LATIN = re.compile(
    r"[\u0400-\u1cff\u2e80-\u2fff\u3040-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_INTEGER = re.compile(r"[-+]?(\d{16,300}|\d{1,3}(?:,\d{3}){5,99})(?:\.0*)?", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\d(?:\.\d+)?)e\+?(\d{1,3})", re.ASCII | re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"[-−]1(?:\.0*)?|none|null|nan|n\.?/?a\.?|unknown|unsolved|tbd|todo|[?？]+|[-–—]+",
    re.IGNORECASE,
)
_TEXT_COMMAND = re.compile(r"\\(?:text[a-z]*|mbox|mathrm)\s*\{([^{}]*)\}")
_SMALL_PRIMES = [p for p in range(2, 100) if all(p % divisor for divisor in range(2, p))]


@dataclass(frozen=True)
class CleaningConfig:
    """Which faults remove a row. Every fault is counted and reported either way.

    Attributes:
      duplicates: later copies of a text, whatever their answer. Texts are compared by
        `same_text_key`.
      conflicting_answers: all rows of a text of which two answers cannot be shown equal by exact
        reading (`1/2` and `\\frac12` can). Which of them is right is not known, and a reward for a
        wrong answer costs more than a problem. Answers that are empty or went through a float are
        no evidence against the others, nor are placeholders where these are removed.
      empty_answers: rows of which no gold has any text.
      corrupted_numbers: rows with a gold that went through a float (`went_through_float`).
      non_latin: rows with text in a script other than Latin and Greek. They are good data for a
        model that reads them.
      empty_problems: rows whose text is blank.
      placeholder_answers: rows of which every gold that has text may stand for "no answer"
        (`is_placeholder`). They are kept by default, since -1 can be right.
      overlap: a row that holds at least this share of the n-grams of one benchmark problem is
        removed, as is one that equals a benchmark problem; in [0, 1], 0: equal texts alone.
      ngram: words of an n-gram, at least 1.

    Raises:
      ValueError: `overlap` or `ngram` out of range.
    """

    duplicates: bool = True
    conflicting_answers: bool = True
    empty_answers: bool = True
    corrupted_numbers: bool = True
    non_latin: bool = False
    empty_problems: bool = True
    placeholder_answers: bool = False
    overlap: float = 0.8
    ngram: int = 6

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap must be within 0 .. 1, got {self.overlap}")
        if self.ngram < 1:
            raise ValueError(f"ngram must be at least 1, got {self.ngram}")


@dataclass(frozen=True)
class PromptLimit:
    """Rows whose prompt is empty or too long are removed.

    Attributes:
      length: tokens of a problem's prompt.
      tokens: the most a prompt may have, at least 1.

    Raises:
      ValueError: `tokens` below 1.
    """

    length: Callable[[Problem], int]
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")


@dataclass(frozen=True)
class BenchmarkOverlap:
    """How a benchmark overlaps with the rows that were read.

    Attributes:
      problems: problems of the benchmark.
      overlapping: those of them that overlap with a training row.
      training_rows: training rows that overlap with one of them.
    """

    problems: int
    overlapping: int
    training_rows: int


@dataclass(frozen=True)
class CleaningReport:
    """What cleaning found and removed. Checks that were not asked for are left out.

    Attributes:
      read: rows given.
      kept: rows that remain.
      found: fault (a key of `FAULTS`) -> rows that show it.
      removed: fault -> rows removed for it, the first of a row's faults; the sum is read - kept.
      benchmarks: name -> its overlap.
    """

    read: int
    kept: int
    found: dict[str, int]
    removed: dict[str, int]
    benchmarks: dict[str, BenchmarkOverlap] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and integers, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CleaningReport:
        """The report of which `to_dict` made `values`."""
        benchmarks = {
            name: BenchmarkOverlap(**counts) for name, counts in values["benchmarks"].items()
        }
        return cls(**{**values, "benchmarks": benchmarks})

    def to_table(self) -> str:
        """Markdown: one table of faults, and one of benchmarks if there are any."""
        lines = ["| fault | rows found | rows removed |", "|---|---:|---:|"]
        lines += [
            f"| {FAULTS[fault]} | {self.found[fault]:,} | {self.removed[fault]:,} |"
            for fault in self.found
        ]
        lines += [f"| all: {self.read:,} read, {self.kept:,} kept | | {self.read - self.kept:,} |"]
        if self.benchmarks:
            lines += ["", "| benchmark | problems | overlapping | training rows |"]
            lines += ["|---|---:|---:|---:|"]
            lines += [
                f"| {name} | {counts.problems:,} | {counts.overlapping:,} "
                f"| {counts.training_rows:,} |"
                for name, counts in self.benchmarks.items()
            ]
        return "\n".join(lines)


def clean(
    problems: Sequence[Problem],
    config: CleaningConfig,
    benchmarks: Mapping[str, Sequence[Problem]] | None = None,
    prompt_limit: PromptLimit | None = None,
) -> tuple[list[Problem], CleaningReport]:
    """Removes the rows that the settings name; the others keep their order.

    Cleaning what was cleaned removes nothing more.

    Args:
      problems: training rows.
      config: which faults remove a row.
      benchmarks: name -> problems that must not be trained on.
      prompt_limit: None: prompts are not measured.
    """
    keys = [same_text_key(problem.text) for problem in problems]
    empty = {i for i, row in enumerate(problems) if not any(map(str.strip, row.answers))}
    corrupted = {i for i, row in enumerate(problems) if any(map(went_through_float, row.answers))}
    placeholders = {i for i, row in enumerate(problems) if _is_placeholder_row(row)}
    no_evidence = empty | corrupted | (placeholders if config.placeholder_answers else set())
    rows = {
        "empty_problems": {i for i, row in enumerate(problems) if not row.text.strip()},
        "empty_answers": empty,
        "corrupted_numbers": corrupted,
        "placeholder_answers": placeholders,
        "conflicting_answers": _conflicting(problems, keys, no_evidence),
        "non_latin": {i for i, row in enumerate(problems) if _NON_LATIN.search(row.text)},
    }
    removing = {fault for fault in rows if getattr(config, fault)}
    if prompt_limit is not None:
        lengths = [prompt_limit.length(problem) for problem in problems]
        rows["empty_prompts"] = {i for i, length in enumerate(lengths) if length == 0}
        rows["long_prompts"] = {
            i for i, length in enumerate(lengths) if length > prompt_limit.tokens
        }
        removing |= {"empty_prompts", "long_prompts"}
    counts = {}
    if benchmarks:
        overlap = find_overlap(
            [problem.text for problem in problems],
            {name: [problem.text for problem in them] for name, them in benchmarks.items()},
            config.ngram,
            config.overlap,
            keys,
        )
        counts = {
            name: BenchmarkOverlap(len(them), len(overlap.problems[name]), len(overlap.texts[name]))
            for name, them in benchmarks.items()
        }
        rows["overlap"] = set().union(*overlap.texts.values())
        removing.add("overlap")
    # Counted among all rows here, removed among those that remain below.
    rows["duplicates"] = _later_copies(keys, range(len(problems)))

    removed = dict.fromkeys(rows, 0)
    remaining = []
    for i in range(len(problems)):
        fault = next((fault for fault in rows if fault in removing and i in rows[fault]), None)
        if fault is None:
            remaining.append(i)
        else:
            removed[fault] += 1
    if config.duplicates:
        copies = _later_copies(keys, remaining)
        removed["duplicates"] = len(copies)
        remaining = [i for i in remaining if i not in copies]
    found = {fault: len(them) for fault, them in rows.items()}
    report = CleaningReport(len(problems), len(remaining), found, removed, counts)
    return [problems[i] for i in remaining], report


def _later_copies(keys: Sequence[str], rows: Sequence[int]) -> set[int]:
    """The rows whose key an earlier one of them has."""
    seen: set[str] = set()
    copies = set()
    for i in rows:
        if keys[i] in seen:
            copies.add(i)
        seen.add(keys[i])
    return copies


def _conflicting(
    problems: Sequence[Problem], keys: Sequence[str], no_evidence: set[int]
) -> set[int]:
    """All rows of the texts that have two answers of which no gold equals one of the other."""
    copies: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        copies[key].append(i)
    conflicting: set[int] = set()
    for rows in copies.values():
        answers = {problems[i].answers for i in rows if i not in no_evidence}
        # Every pair: equality by exact reading is not transitive (75 %, 75 and 3/4).
        if any(not _agree(*pair) for pair in combinations(answers, 2)):
            conflicting.update(rows)
    return conflicting


def _agree(answers: tuple[str, ...], others: tuple[str, ...]) -> bool:
    return any(
        exact_verdict(gold_text(one), gold_text(other)) for one in answers for other in others
    )


def _is_placeholder_row(problem: Problem) -> bool:
    golds = [gold for gold in problem.answers if gold.strip()]
    return bool(golds) and all(map(is_placeholder, golds))


def is_placeholder(gold: str) -> bool:
    r"""Whether an answer may stand for "no answer": -1, none, n/a, ?, unknown and their like.

    Collections mark problems without a known answer so. It cannot be told from an answer that is
    right: -1 and `\text{none}` are also what some problems ask for.
    """
    text = _TEXT_COMMAND.sub(r"\1", gold_text(gold)).strip().strip("$").strip()
    return _PLACEHOLDER.fullmatch(text) is not None


def went_through_float(gold: str) -> bool:
    """Whether an integer answer lost digits in a 64-bit float: 22099999999998951424.

    It did if it

    - is at least `2**53` and exactly a float, as every number printed from one is: of other
      integers of 18 digits one in 16 to 128 is, of 20 digits at most one in 2,048;
    - is not the shortest decimal that names this float. This spares the round numbers people
      write: `2 * 10**22` is a float too, but its shortest decimal is itself;
    - keeps a factor above `2**31` when primes below 100 are divided out. This spares the integers
      that are floats by their powers of two: `2**60`, `6**30`, 22!, and the perfect
      number `2**30 (2**31 - 1)`.

    Scientific notation counts as such an integer where it has 16 digits or more, which is how a
    large float is printed. A false alarm needs an answer of 17 digits or more; a corrupted one is
    missed where it is below `2**53` or happens to end in zeros from the 17th digit on.
    """
    text = gold_text(gold).strip().strip("$").strip()
    if match := _FLOAT.fullmatch(text):
        printed = Fraction(text)
        return len(match[1]) > 16 and printed.denominator == 1 and abs(printed) >= 2**53
    if not (match := _INTEGER.fullmatch(text)):
        return False
    value = int(match[1].replace(",", ""))
    if value < 2**53 or int(float(value)) != value or Fraction(repr(float(value))) == value:
        return False
    for prime in _SMALL_PRIMES:
        while value % prime == 0:
            value //= prime
    return value > 2**31
