"""When two problems are the same text, and how much of one is found in another."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

# Characters that NFKC would put on the line: raised (10² is not 102) and lowered (101₂ not 1012)
# digits, letters and signs, and fractions (2½ is not 21⁄2).
_OFF_THE_LINE = re.compile(
    r"([ªº²³¹\u02b0-\u02b8\u02e0-\u02e4\u1d2c-\u1d61\u1d78\u1d9b-\u1dbf\u2070-\u207f]+)"
    r"|([\u1d62-\u1d6a\u2080-\u209c\u2c7c]+)|[¼-¾\u2150-\u215f\u2189]"
)
# Han and kana are written without spaces: each character is a word.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_LETTER = r"[^\W\d_]"
_WORDS = re.compile(rf"\d+|[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+")

# A dollar that closes is not followed by a digit: "$2 each, or three for $5" holds two prices.
_MATHEMATICS = (
    r"(?<!\\)(?:\$\$(?:[^$\\]|\\.)+\$\$|\$(?:[^$\\]|\\.)+\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\]"
    r"|\\begin\{(?:align|equation|eqnarray|gather|multline).+?\\end\{)"
)
_MATHEMATICS_ALONE = re.compile(_MATHEMATICS, re.DOTALL)
_MATHEMATICS_OR_COMMAND = re.compile(rf"{_MATHEMATICS}|\\[a-z]+", re.DOTALL)
_DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
# Commands, with the words of `\text{...}` and the space that ends a command's name; and the spaces
# between letters, which mathematics does not print.
_COMMAND_OR_SPACE = re.compile(
    rf"(\\(?:text[a-z]*|mbox|mathrm)\s*\{{[^{{}}]*\}}|\\[a-z]+\s*)|(?<={_LETTER})\s+(?={_LETTER})"
)

_SPACING = re.compile(r"(?<!\\)\\[,;:! ]")
_BRACKETED = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")
_MARKS = ".,:;?"
_FULL_STOPS = str.maketrans("、。", ",.")
_MARKS_INSIDE = re.compile(rf"\s*([{_MARKS}])(?!\s*(?:\\\\|\\end))\s*")
_SPACE_AT_MARKS = re.compile(rf"\s*([{_MARKS}])\s*")
_MARK_RUN = re.compile(rf"[{_MARKS}]+")
_PROSE_BEFORE = re.compile(rf"(?:{_LETTER}{{2}}|.?[{_UNSPACED}])?", re.DOTALL)
_PROSE_AFTER = re.compile(rf"(?:a\s+)?{_LETTER}{{2}}|[{_UNSPACED}]|\\\\|\\end|$")
_ONE_DIGIT_SCRIPT = re.compile(r"([_^]\s*\d)\s*(?=\d)")
_SPACE_BETWEEN_DIGITS = re.compile(r"(\d)\s+(?=\d)")
# Control characters stand beside what is no prose, and for brackets that were seen.
_SEEN = str.maketrans("([{)]}", "\2\3\4\5\6\7")
_UNSEEN = str.maketrans("\2\3\4\5\6\7", "([{)]}", "\1")


def _plain(text: str) -> str:
    """NFKC and case folded: full-width and styled letters become plain ones.

    Raised and lowered characters become powers and indices, fractions stand apart from the number
    before them.
    """
    text = _OFF_THE_LINE.sub(_on_the_line, text)
    return unicodedata.normalize("NFKC", text).casefold()


def _on_the_line(found: re.Match[str]) -> str:
    raised, lowered = found.groups()
    if not (script := raised or lowered):
        return f" {found[0]}"
    sign = "^" if raised else "_"
    return f"{sign}{script}" if len(script) == 1 else f"{sign}{{{script}}}"


def same_text_key(text: str) -> str:
    r"""Equal for two texts that differ in nothing a reader would call another problem.

    Left out of the comparison: compatibility forms of Unicode, case, white space (but between
    digits), `$`, `\(`, `\[`, and prose marks. Collections hold the same problem as `$a + b$`,
    `$a+b$` and `\(a+b\)`. Operators and brackets count: on the words alone `2n - 1` would equal
    `2n + 1`, and `88 \div (4 \div 2)` would equal `88 \div 4 \div 2`.

    A mark is prose at either end of the text, and beside a word of prose: two letters or more,
    or a Han or kana character, outside brackets, mathematics and LaTeX commands. All other marks
    count: `\gcd(a,b)` is not `\gcd(ab)`, `x_1,x_2` not `x_1x_2`, `0.\overline{3}` not
    `0\overline{3}`.
    """
    text = _SPACING.sub(" ", _plain(text).translate(_FULL_STOPS))
    text = _DELIMITERS.sub(" ", _MATHEMATICS_OR_COMMAND.sub(_hide_mathematics, text))
    brackets = 1
    while brackets:
        # From the innermost ones out.
        text, brackets = _BRACKETED.subn(_hide_brackets, text)
    text = _MARK_RUN.sub(_keep_unless_prose, _SPACE_AT_MARKS.sub(r"\1", text.strip()))
    # TeX takes one digit: x_12 is x_1 followed by 2.
    text = _ONE_DIGIT_SCRIPT.sub("\\1\0", text.translate(_UNSEEN))
    return "".join(_SPACE_BETWEEN_DIGITS.sub("\\1\0", text).split())


def _hide_mathematics(found: re.Match[str]) -> str:
    """Without prose to either side of its marks, but for the last ones, which may be prose's."""
    inside = _DELIMITERS.sub(" ", found[0]).rstrip()
    body = inside.rstrip(_MARKS + string.whitespace)
    return f" \1{_hide_marks(body).translate(_SEEN)}\1{inside[len(body) :]} "


def _hide_brackets(found: re.Match[str]) -> str:
    return _hide_marks(found[0]).translate(_SEEN)


def _hide_marks(text: str) -> str:
    return _MARKS_INSIDE.sub("\1\\1\1", text)


def _keep_unless_prose(found: re.Match[str]) -> str:
    text, (start, end) = found.string, found.span()
    before = text[max(start - 2, 0) : start]
    is_prose = _PROSE_BEFORE.fullmatch(before) or _PROSE_AFTER.match(text, end)
    return "" if is_prose else found[0]


def words(text: str) -> list[str]:
    r"""Runs of letters, runs of digits and single Han or kana characters, in their order.

    LaTeX commands count as words (`\frac` is "frac"), operators and punctuation do not: a
    benchmark problem is to be recognised in other mark-up and with another sign. Between `$` the
    letters of a product are one word however they are spaced: `x y z` is "xyz".
    """
    return _WORDS.findall(_MATHEMATICS_ALONE.sub(_close_products, _plain(text)))


def _close_products(found: re.Match[str]) -> str:
    return _COMMAND_OR_SPACE.sub(lambda part: part[1] or "", found[0])


class Overlap(NamedTuple):
    """What texts and benchmarks share.

    Attributes:
      problems: benchmark -> indices of its problems that overlap with some text.
      texts: benchmark -> indices of the texts that overlap with some problem of it.
    """

    problems: dict[str, set[int]]
    texts: dict[str, set[int]]


def find_overlap(
    texts: Sequence[str],
    benchmarks: Mapping[str, Sequence[str]],
    ngram: int,
    share: float,
    keys: Sequence[str] | None = None,
) -> Overlap:
    """Which texts equal a benchmark problem, or hold at least `share` of its different n-grams.

    Texts are equal by `same_text_key`. The n-grams are counted one-sided, so that a problem is
    found inside a longer text; a problem of fewer than `ngram` words is found by its equals alone.
    One index from key and n-gram to benchmark problems, one pass over the texts.

    Args:
      texts: texts of training problems.
      benchmarks: name -> texts of its problems.
      ngram: words of an n-gram, at least 1.
      share: in [0, 1]; 0: equal texts alone.
      keys: `same_text_key` of the texts, if they are known already.
    """
    keys = [same_text_key(text) for text in texts] if keys is None else keys
    holders: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    equals: dict[str, list[tuple[str, int]]] = defaultdict(list)
    needed: dict[tuple[str, int], float] = {}
    for name, problems in benchmarks.items():
        for index, problem in enumerate(problems):
            equals[same_text_key(problem)].append((name, index))
            grams = set(_ngrams(problem, ngram)) if share else set()
            # A hair less: 0.8 * 35 is 28.000000000000004, and 28 of 35 are enough.
            needed[name, index] = share * len(grams) - 1e-9
            for gram in grams:
                holders[gram].append((name, index))
    overlap = Overlap({name: set() for name in benchmarks}, {name: set() for name in benchmarks})
    for number, (text, key) in enumerate(zip(texts, keys, strict=True)):
        shared: Counter[tuple[str, int]] = Counter()
        for gram in set(_ngrams(text, ngram)) if holders else ():
            if gram in holders:
                shared.update(holders[gram])
        hits = [problem for problem, count in shared.items() if count >= needed[problem]]
        for name, index in hits + equals.get(key, []):
            overlap.problems[name].add(index)
            overlap.texts[name].add(number)
    return overlap


def _ngrams(text: str, length: int) -> Iterator[tuple[str, ...]]:
    found = words(text)
    return zip(*(found[start:] for start in range(length)), strict=False)
