r"""Answers as text: the boxed answer of a response, and what exact reading alone can decide.

Everything here is pure, linear in the length of the text and evaluates nothing: numbers are read
by regular expressions into fractions, with bounds on digits and exponents. What cannot be decided
this way goes to math-verify in a worker process (`attnrl_jax.tasks.judging`), through
`math_verify_equal` below. This module imports neither jax nor numpy, so that a worker starts fast.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import NamedTuple

# Longer answers are compared as strings only: the longest gold of the seven benchmarks has 204.
MAX_ANSWER_CHARS = 1000
_MAX_DIGITS = 200
_MAX_EXPONENT = 400

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_CONNECTOR = re.compile(
    r"(?:\\(?:text|mathrm|textrm|mbox)\s*\{|\\q?quad|\\[()\[\],;:! ]|[${},;\s]|and\b|or\b)*"
)


class _Box(NamedTuple):
    start: int
    end: int
    content: str


def _boxes(text: str) -> list[_Box]:
    """Outermost balanced boxes in order; one pass, so a wall of unclosed boxes stays linear."""
    begin = text.find(r"\boxed")
    if begin < 0:
        return []
    # Braces before the first box change nothing; whether its backslash is escaped does.
    while begin and text[begin - 1] == "\\":
        begin -= 1
    opened: list[tuple[int, int] | None] = []
    found: list[_Box] = []
    for token in _BRACES.finditer(text, begin):
        start, end = token.span()
        if text[start] == "{":
            opened.append(None)
        elif text[start] == "}":
            opening = opened.pop() if opened else None
            if opening is not None:
                while found and found[-1].start > opening[0]:
                    found.pop()
                found.append(_Box(opening[0], end, text[opening[1] : start]))
        elif end - start > 2:  # a box; otherwise an escaped character
            opened.append((start, end))
    return found


def after_think(response_text: str) -> str:
    """What follows the last `</think>`, up to a `<think>` that is never closed.

    The whole text where there is neither. A response that was cut in its reasoning has said
    nothing yet.
    """
    return response_text.rpartition("</think>")[2].partition("<think>")[0]


def final_answers(response_text: str) -> tuple[str, ...]:
    r"""Readings of the final answer, at most two: the last box, and the list it closes.

    `\boxed{6} and \boxed{8}` reads as `8` and as `6, 8`: boxes that only commas or "and"/"or"
    part are one answer in several boxes. Any other earlier box is a discarded attempt.
    """
    text = after_think(response_text)
    boxes = [box for box in _boxes(text) if box.content.strip()]
    if not boxes:
        return ()
    first = len(boxes) - 1
    while first > 0:
        between = text[boxes[first - 1].end : boxes[first].start]
        # White space alone does not join: "\boxed{7} \boxed{8}" are two attempts.
        joined = not between or (between.strip() and _CONNECTOR.fullmatch(between))
        if not joined:
            break
        first -= 1
    contents = [box.content.replace(r"\boxed", "").strip() for box in boxes[first:]]
    readings = [contents[-1]]
    if len(contents) > 1:
        readings.append(", ".join(contents))
    return tuple(readings)


def final_answer(response_text: str) -> str | None:
    r"""Content of the last balanced `\boxed{...}` after the reasoning, or None."""
    readings = final_answers(response_text)
    return readings[0] if readings else None


_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|hbox|operatorname)\s*\{([^{}]*)\}"
)
_DROPPED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\boxed(?![a-z])")
_NEGATIVE_SPACE = re.compile(r"\\!\s*")
_THIN_SPACE = re.compile(r"(?<=[\d,])\s*(?:\\[,;:! ]|~)\s*(?=\d{3}(?!\d))")
_SPACES = re.compile(r"(?:\\[,;:! ]|\\q?quad(?![a-z])|~|\s)+")
_INNER_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")


def _clean(text: str) -> str:
    """Mark-up that never changes an answer is taken off; single spaces remain."""
    text = text.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and "$" not in inside:
            text = inside
            break
    text = _NEGATIVE_SPACE.sub("", text).replace("{,}", ",").replace("−", "-")
    text = _WRAPPERS.sub(r"\1", _WRAPPERS.sub(r"\1", text))
    text = _DROPPED.sub("", text)
    text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", text).replace(r"\%", "%")
    text = text.replace(r"\$", "").replace(r"^{\circ}", "°").replace(r"^\circ", "°")
    text = _SPACES.sub(" ", _THIN_SPACE.sub("", text)).strip()
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:]:
        text = text[1:-1].strip()
    return text.rstrip(".").strip() if text.rstrip(".") else text


def normalise(text: str) -> str:
    """The text by which answers are compared as strings: mark-up and idle spaces taken off."""
    return _normalise(_clean(text))


def _normalise(cleaned: str) -> str:
    text = _INNER_SPACE.sub("", cleaned)
    choice = re.fullmatch(r"\(([A-Z])\)", text)
    return choice.group(1) if choice else text


class Number(NamedTuple):
    """An exact rational; `percent` says that it was written with a percent sign."""

    value: Fraction
    percent: bool


_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)"
_TIMES = r"\s*(?:\\times|\\cdot|\*|×|x)\s*"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*[€£¥]?\s*"
    rf"(?:(?P<decimal>{_DIGITS}(?:\.\d*)?|\.\d+)"
    rf"(?:[eE](?P<e>[-+]?\d+)|{_TIMES}10\s*\^\s*(?P<brace>\{{)?\s*(?P<ten>[-+]?\d+)\s*(?(brace)\}}))?"
    rf"|10\s*\^\s*(?P<brace2>\{{)?\s*(?P<power>[-+]?\d+)\s*(?(brace2)\}}))"
    rf"\s*(?P<unit>%|°|percent|pct)?",
    re.ASCII,
)
_FRACTION = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<whole>\d+)?\s*"
    r"\\frac\s*(?:\{\s*(?P<n>[-+]?\d+)\s*\}\s*\{\s*(?P<d>[-+]?\d+)\s*\}|(?P<n1>\d)\s*(?P<d1>\d))"
    r"\s*(?P<unit>%)?",
    re.ASCII,
)
_SLASH = re.compile(r"(?P<sign>[-+]?)\s*(?P<n>\d+)\s*/\s*(?P<d>\d+)", re.ASCII)
# A leading digit keeps indexed letters (a_{12}) apart from numerals.
_BASED = re.compile(r"(?P<digits>\d[0-9A-Za-z]*)_(?:\{(?P<b>\d{1,2})\}|(?P<b1>\d{1,2}))", re.ASCII)


def read_number(text: str) -> Number | None:
    r"""Reads an exact rational: `1,000`, `1\,000`, `204.`, `8.7\times10^8`, `1\frac12`, `75\%`.

    None where the text is no single number, and where it is too large to write out: a tower of
    powers is never computed here.
    """
    return _number(_clean(text))


def _number(text: str) -> Number | None:
    if len(text) > _MAX_DIGITS:
        return None
    if match := _NUMBER.fullmatch(text):
        exponent = match["e"] or match["ten"] or match["power"] or "0"
        if len(exponent) > 5 or abs(int(exponent)) > _MAX_EXPONENT:
            return None
        digits = re.sub(r"[ ,]", "", match["decimal"] or "1")
        value = Fraction(digits) * Fraction(10) ** int(exponent)
        percent = match["unit"] in ("%", "percent", "pct")
        return Number(-value if match["sign"] == "-" else value, percent)
    if match := _FRACTION.fullmatch(text):
        numerator, denominator = match["n"] or match["n1"], match["d"] or match["d1"]
        # A whole part before a signed fraction is a product or a difference, not a mixed number.
        if int(denominator) == 0 or (match["whole"] and not (numerator + denominator).isdigit()):
            return None
        value = Fraction(int(match["whole"] or 0)) + Fraction(int(numerator), int(denominator))
        return Number(-value if match["sign"] == "-" else value, bool(match["unit"]))
    if (match := _SLASH.fullmatch(text)) and int(match["d"]):
        value = Fraction(int(match["n"]), int(match["d"]))
        return Number(-value if match["sign"] == "-" else value, False)
    return None


def _numbers_equal(answer: Number, gold: Number) -> bool:
    """75 % is both 3/4 and 75, as its writers mean either; two percentages compare as they are."""
    if answer.percent == gold.percent:
        return answer.value == gold.value
    percent, plain = (answer, gold) if answer.percent else (gold, answer)
    return plain.value in (percent.value, percent.value / 100)


def _read_based(text: str) -> tuple[str, int | None] | None:
    """Digits and base of `2220_5`; a bare numeral has base None."""
    text = text.replace(" ", "")
    if match := _BASED.fullmatch(text):
        base = int(match["b"] or match["b1"])
        digits = match["digits"].upper()
        valid = 2 <= base <= 36 and all(int(digit, 36) < base for digit in digits)
        return (digits.lstrip("0"), base) if valid and len(digits) <= _MAX_DIGITS else None
    if text.isascii() and text.isdigit():
        return text.lstrip("0"), None
    return None


# A unit, or what is counted, after a number: in a text command, or as up to three plain words (of
# three letters, so that no product of variables is taken for one).
_UNIT = re.compile(
    r"(?:\\(?:text|textbf|textit|textrm|textnormal|mathrm|mbox|hbox)\s*"
    r"\{(?P<marked>[A-Za-z~,.' -]+)\}"
    r"|(?P<plain>(?:[ ~][A-Za-z]{3,}){1,3}))(?P<power>\s*\^\s*(?:\d|\{\d\}))?\s*\.?"
)
# Words after a number that change its value, and are no units.
_VALUE_WORDS = re.compile(
    r"\b(?:i|e|k|pi|and|or|half|halves|dozens?|hundreds?|thousands?|\w*illions?|percent|pct|mod"
    r"|modulo|base|factorial|squared|cubed|sqrt|sin|cos|tan|log|ln|exp|times|plus|minus|over|less"
    r"|more|than|of)\b",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(r"(?P<name>[A-Za-z])\s*=\s*(?P<value>[^=]+)")


class _Reading(NamedTuple):
    """What exact reading makes of a text of bounded length.

    Attributes:
      normal: for comparison as a string.
      based: digits and base, or None.
      number: or None.
      measured: number of a quantity and its unit, or of an assignment `x = 5`; or None.
      unit: that unit or variable.
    """

    normal: str
    based: tuple[str, int | None] | None
    number: Number | None
    measured: Number | None
    unit: str


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> _Reading:
    cleaned = _clean(text)
    number = _number(cleaned)
    measured, unit = (None, "") if number else _read_measured(text)
    return _Reading(_normalise(cleaned), _read_based(cleaned), number, measured, unit)


def _read_measured(text: str) -> tuple[Number | None, str]:
    text = text.strip().strip("$").strip()
    if len(text) > _MAX_DIGITS:
        return None, ""
    if match := _ASSIGNED.fullmatch(text):
        return read_number(match["value"]), match["name"]
    # A unit within the text ("3 hours 20 minutes") is part of no single number.
    for match in _UNIT.finditer(text):
        if match.end() == len(text) and not _VALUE_WORDS.search(match.group()):
            words = (match["marked"] or match["plain"]).replace("~", " ").strip(" .,")
            return read_number(text[: match.start()]), words + (match["power"] or "")
    return None, ""


def exact_verdict(answer: str, gold: str) -> bool | None:
    r"""Whether `answer` equals `gold`, by exact reading alone; None where that cannot tell.

    Equal normalised texts are equal. Two numbers are compared as fractions, so that neither
    rounding nor notation counts: math-verify alone rounds to six decimals and does not read
    scientific notation. A unit (`18\text{ dollars}`, `18 dollars`) or a variable (`x = 18`) that
    only one of the two has does not count. Numerals with a base subscript are compared by value if
    both have one, and by digits if one leaves its base out (math-verify alone ignores the base). An
    empty text equals nothing.
    """
    if not answer.strip() or not gold.strip():
        return False
    if len(answer) > MAX_ANSWER_CHARS:
        return normalise(answer) == normalise(gold)
    # Golds are trusted, but some are whole solutions.
    read, wanted = _read(answer), _read(gold)
    if read.normal == wanted.normal:
        return True
    if read.based and wanted.based and (read.based[1] or wanted.based[1]):
        if read.based[1] and wanted.based[1]:
            return int(read.based[0] or "0", read.based[1]) == int(
                wanted.based[0] or "0", wanted.based[1]
            )
        return read.based[0] == wanted.based[0]
    number, gold_number = read.number or read.measured, wanted.number or wanted.measured
    if number and gold_number and (not read.unit or not wanted.unit or read.unit == wanted.unit):
        return _numbers_equal(number, gold_number)
    return None


def gold_text(gold: str) -> str:
    r"""A gold without the sentence around it: the content of its box, or boxes, where it has one.

    Golds of some collections are whole solutions. Where the boxes do not form one list the text
    is left for math-verify to read.
    """
    if r"\boxed" not in gold:
        return gold
    readings = final_answers(gold)
    if not readings or (len(readings) == 1 and gold.count(r"\boxed") > 1):
        return gold
    return readings[-1]


def math_verify_equal(pairs: tuple[tuple[str, str], ...]) -> bool:
    r"""Whether math-verify holds the answer of any (answer, gold) pair equal to its gold.

    Runs in a worker process that can be killed: it has no time limit of its own, since
    math-verify's use SIGALRM. Only its LaTeX reader is used: the other one calls sympy's
    `parse_expr`, which evaluates Python.
    """
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, I, Symbol

    config = (LatexExtractionConfig(boxed_match_priority=0),)
    unit = Symbol("i", real=False)

    def parsed(text: str) -> list:
        wrapped = text if r"\boxed" in text or "$" in text else f"${text}$"
        expressions = parse(wrapped, extraction_config=config, parsing_timeout=None)
        # math-verify leaves the imaginary unit a symbol, so that e^{i\pi} would not equal -1.
        return [
            expression.subs(unit, I)
            if isinstance(expression, Basic) and expression.has(unit)
            else expression
            for expression in expressions
        ]

    return any(
        verify(parsed(gold), parsed(answer), timeout_seconds=None, allow_set_relation_comp=True)
        for answer, gold in pairs
    )
