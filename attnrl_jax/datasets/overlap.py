"""When two problems are the same text, and how much of one is found in another."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_RAISED = re.compile(r"([⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
_MATH_DELIMITERS = re.compile(r"\$|\\[()\[\]]")
_PROSE_MARKS = re.compile(r"[.,:;?。、](?!\d)")
_SPACE_BETWEEN_DIGITS = re.compile(r"(\d)\s+(?=\d)")
# Han and kana are written without spaces: each character is a word.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORDS = re.compile(rf"\d+|[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+")


def _plain(text: str) -> str:
    """NFKC and case folded: full-width and styled letters become plain ones.

    Raised digits become powers first: NFKC alone would read 10² as 102.
    """
    return unicodedata.normalize("NFKC", _RAISED.sub(r"^\1", text)).casefold()


def same_text_key(text: str) -> str:
    r"""Equal for two texts that differ in nothing a reader would call another problem.

    Left out of the comparison: compatibility forms of Unicode, case, white space (but between
    digits), `$`, `\(`, `\[`, and prose marks that no digit follows. Collections hold the same
    problem as `$a + b$`, `$a+b$` and `\(a+b\)`. Operators and brackets count: on the words alone
    `2n - 1` would equal `2n + 1`, and `88 \div (4 \div 2)` would equal `88 \div 4 \div 2`.
    """
    text = _PROSE_MARKS.sub("", _MATH_DELIMITERS.sub(" ", _plain(text)))
    return "".join(_SPACE_BETWEEN_DIGITS.sub("\\1\0", text).split())


def words(text: str) -> list[str]:
    r"""Runs of letters, runs of digits and single Han or kana characters, in their order.

    LaTeX commands count as words (`\frac` is "frac"), operators and punctuation do not: a
    benchmark problem is to be recognised in other mark-up and with another sign.
    """
    return _WORDS.findall(_plain(text))


class Overlap(NamedTuple):
    """What texts and benchmarks share.

    Attributes:
      problems: benchmark -> indices of its problems that overlap with some text.
      texts: benchmark -> indices of the texts that overlap with some problem of it.
    """

    problems: dict[str, set[int]]
    texts: dict[str, set[int]]


def find_overlap(
    texts: Sequence[str], benchmarks: Mapping[str, Sequence[str]], ngram: int, share: float
) -> Overlap:
    """Which texts hold at least `share` of the different n-grams of a benchmark problem.

    The measure is one-sided, so that a problem is found inside a longer text. A problem of fewer
    than `ngram` words overlaps with a text as short of the same `same_text_key`. One index from
    n-gram to benchmark problems, one pass over the texts.

    Args:
      texts: texts of training problems.
      benchmarks: name -> texts of its problems.
      ngram: words of an n-gram, at least 1.
      share: in (0, 1].
    """
    holders: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    short: dict[str, list[tuple[str, int]]] = defaultdict(list)
    needed: dict[tuple[str, int], float] = {}
    for name, problems in benchmarks.items():
        for index, problem in enumerate(problems):
            grams = set(_ngrams(problem, ngram))
            # A hair less: 0.8 * 35 is 28.000000000000004, and 28 of 35 are enough.
            needed[name, index] = share * len(grams) - 1e-9
            for gram in grams:
                holders[gram].append((name, index))
            if not grams:
                short[same_text_key(problem)].append((name, index))
    overlap = Overlap({name: set() for name in benchmarks}, {name: set() for name in benchmarks})
    for number, text in enumerate(texts):
        shared: Counter[tuple[str, int]] = Counter()
        grams = set(_ngrams(text, ngram))
        for gram in grams:
            if gram in holders:
                shared.update(holders[gram])
        hits = [problem for problem, count in shared.items() if count >= needed[problem]]
        if short and not grams:
            hits += short.get(same_text_key(text), [])
        for name, index in hits:
            overlap.problems[name].add(index)
            overlap.texts[name].add(number)
    return overlap


def _ngrams(text: str, length: int) -> Iterator[tuple[str, ...]]:
    found = words(text)
    return zip(*(found[start:] for start in range(length)), strict=False)
