r"""Answers as text: the boxed answer of a response, and what exact reading alone can decide.

Everything here is pure, linear in the length of the text and evaluates nothing. How one answer is
read is in `attnrl_jax.tasks.quantities`; here two are compared. What cannot be decided this way
goes to math-verify in a worker process (`attnrl_jax.tasks.judging`), through `math_verify_equal`
below. This module imports neither jax nor numpy, so that a worker starts fast.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from attnrl_jax.tasks.numerals import Number, Numeral
from attnrl_jax.tasks.quantities import Reading, normalise, read, read_number

__all__ = [
    "MAX_ANSWER_CHARS",
    "after_think",
    "equality_keys",
    "exact_verdict",
    "final_answer",
    "final_answers",
    "gold_text",
    "math_verify_equal",
    "normalise",
    "question",
    "read_number",
]

# Longer answers are compared as strings only: the longest gold of the seven benchmarks has 204.
MAX_ANSWER_CHARS = 1000

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


_SUBSCRIPTED = re.compile(r"\d ?_ ?(?:\{([^{}]*)\}|(\w))", re.ASCII)
_SIGNS = re.compile(r"[-+] ?[-+]")
# Exponents and factorials of six digits or more, and factorials of factorials.
_HUGE = re.compile(r"(?:\^|\*\*) ?\{?[^{}]{0,20}?(?<![.\d])\d{6}|\d{6} ?!|! ?\)+ ?!", re.ASCII)
_RAISE = r"(?:\^|\*\*) ?[{(]? ?"
_TOWER = re.compile(rf"{_RAISE}(\d+) ?{_RAISE}(\d+)(?P<third> ?{_RAISE}\d)?", re.ASCII)


def exact_verdict(answer: str, gold: str) -> bool | None:
    r"""Whether `answer` equals `gold`, by exact reading alone; None where that cannot tell.

    Equal normalised texts are equal. Two numbers are compared as fractions, so that neither
    rounding nor notation counts: math-verify alone rounds to six decimals and does not read
    scientific notation. A unit (`18\text{ dollars}`, `18 dollars`) or a variable (`x = 18`) that
    only one of the two has does not count; two that differ do, and words that change the value
    (`million`, `not`) are no units. Numerals with a base subscript are compared by value if both
    have one, and by digits if one leaves its base out (math-verify alone ignores the base). Words
    are compared by their letters in order (math-verify alone reads products). An empty text equals
    nothing, and neither do dots or the label of another choice.
    """
    if not answer.strip() or not gold.strip():
        return False
    if len(answer) > MAX_ANSWER_CHARS:
        return normalise(answer) == normalise(gold)
    # Golds are trusted, but some are whole solutions.
    given, wanted = read(answer), read(gold)
    for one, other in ((given, wanted), (wanted, given)):
        if one.label and (other.label or (other.word and len(other.normal) == 1)):
            return one.label == (other.label or other.normal)
    if given.normal == wanted.normal:
        # The pair "1, 234" is not the number "1,234".
        return "," not in given.normal or bool(given.number) == bool(wanted.number)
    if r"\dots" in given.normal or r"\dots" in wanted.normal:
        return False
    if _SIGNS.search(given.normal) and not _SIGNS.search(wanted.normal):
        return False
    if given.word and wanted.word:
        # Single letters are variables or choices, whose case counts.
        return given.word == wanted.word
    if wanted.word and wanted.quoted and len(wanted.word) > 1:
        return False
    based = _same_numeral(given, wanted)
    if based is not None:
        return based
    if (given.unit and wanted.unit and given.unit != wanted.unit) or (
        given.name and wanted.name and given.name != wanted.name
    ):
        return False
    if given.number and wanted.number:
        return _same_number(given.number, wanted.number)
    brackets = {_brackets(given.normal), _brackets(wanted.normal)}
    if brackets == {"()", "{}"} or _is_huge(given.normal):
        return False
    return None


def _same_number(answer: Number, gold: Number) -> bool:
    """75 % is both 3/4 and 75, as its writers mean either; two percentages compare as they are."""
    if answer.percent == gold.percent:
        return answer.value == gold.value
    percent, plain = (answer, gold) if answer.percent else (gold, answer)
    return plain.value in (percent.value, percent.value / 100)


def _same_numeral(given: Reading, wanted: Reading) -> bool | None:
    """None where neither has a base, or any other subscript under a digit that the other lacks."""
    one, other = given.numeral, wanted.numeral
    if _is_based(one) or _is_based(other):
        if one is None or other is None:
            return False
        if any(_is_based(numeral) and numeral.value is None for numeral in (one, other)):
            return False
        if one.base is None or other.base is None:
            return one.digits == other.digits
        return one.value == other.value
    same = _SUBSCRIPTED.findall(given.normal) == _SUBSCRIPTED.findall(wanted.normal)
    return None if same else False


def _is_based(numeral: Numeral | None) -> bool:
    return numeral is not None and numeral.base is not None


def _is_huge(text: str) -> bool:
    """Whether an integer in it would take long to write out. Golds hold none: such an answer is
    wrong, and sending it to a worker would cost a time limit for each."""
    if _HUGE.search(text):
        return True
    for tower in _TOWER.finditer(text):
        base, exponent, third = tower.groups()
        if third or len(base) > 4 or len(exponent) > 2 or int(base) ** int(exponent) > 10**5:
            return True
    return False


def _brackets(normal: str) -> str:
    r"""`()` around a tuple or an open interval, `{}` around a set, else empty."""
    text = normal.replace(r"\{", "{").replace(r"\}", "}")
    if normal.startswith("(") and normal.endswith(")"):
        kind = "()"
    elif normal.startswith(r"\{") and normal.endswith(r"\}"):
        kind = "{}"
    else:
        return ""
    depth, several = 0, False
    for place, character in enumerate(text, start=1):
        depth += (character in "({[") - (character in ")}]")
        several |= depth == 1 and character in ",;"
        if depth == 0 and place < len(text):
            return ""
    return kind if several else ""


def equality_keys(answer: str) -> frozenset[tuple[Any, ...]]:
    r"""What a text has in common with each text that `exact_verdict` holds equal to it.

    Equality is not transitive: `10` equals `10_2` and `10_3`, `10 feet` and `10 inches`. A numeral
    without a base has the keys of its digits in every base; quantities of one number have one key,
    whatever their units. A percentage and a plain number have no key in common, although
    `exact_verdict` lets 75 % equal both 75 and 3/4. Texts of more than `MAX_ANSWER_CHARS` have
    the key of their text only.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return frozenset({("text", normalise(answer))})
    reading = read(answer)
    keys: set[tuple[Any, ...]] = {("text", reading.normal)}
    if reading.word:
        keys.add(("word", reading.word))
    if reading.label:
        keys.add(("word", reading.label))
    if reading.number:
        keys.add(("number", *reading.number))
    if numeral := reading.numeral:
        bases = range(2, 37) if numeral.base is None else [numeral.base]
        keys.update(("digits", numeral.digits, base) for base in bases)
        if numeral.value is not None:
            keys.add(("numeral", numeral.value))
    return frozenset(keys)


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


_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]|(?<!\\)\$")


def question(answer: str, gold: str) -> tuple[str, str]:
    """What math-verify is asked where `exact_verdict` cannot tell: both texts without their units.

    What stands outside an answer's dollars counts. An answer in round brackets is in order, also
    where the gold leaves its brackets out.
    """
    given, wanted = read(answer), read(gold)
    body = wanted.body
    if _brackets(given.normal) == "()" and not re.match(r"[\\([{]", wanted.normal):
        inside = wanted.normal.strip("$")
        if re.search("[,;]", inside) and not re.search(r"[=<>$]|\\le|\\ge", inside):
            body = f"({inside})"
    return _DELIMITERS.sub(" ", given.body), body


def math_verify_equal(pairs: tuple[tuple[str, str], ...]) -> bool:
    r"""Whether math-verify holds the answer of any (answer, gold) pair equal to its gold.

    An answer that is a chain of equations is equal only if its numbers are: `4^2=16`, not `1=16`.

    Runs in a worker process that can be killed: it has no time limit of its own, since
    math-verify's use SIGALRM. Only its LaTeX reader is used: the other one calls sympy's
    `parse_expr`, which evaluates Python. Its units are not used: they hold `t`, `more` and `east`.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, I, Symbol

    normalization = NormalizationConfig(malformed_operators=True, nits=True)
    config = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization),)
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

    def equal(gold: list, answer: list) -> bool:
        return verify(
            gold,
            answer,
            # Beyond its six decimals 0.0000001 equals 0.0000002.
            float_rounding=15,
            timeout_seconds=None,
            allow_set_relation_comp=True,
        )

    def consistent(gold: str, answer: str) -> bool:
        sides = _sides(answer)
        if len(sides) < 2:
            return True
        numbers = [
            side
            for side in map(parsed, sides)
            if side and isinstance(side[0], Basic) and not side[0].free_symbols
        ]
        wanted = numbers[-1] if "=" in gold and numbers else parsed(gold)
        return all(equal(wanted, number) for number in numbers)

    return any(
        equal(parsed(gold), parsed(answer)) and consistent(gold, answer) for answer, gold in pairs
    )


def _sides(text: str) -> list[str]:
    """Sides of one chain of equations; empty where there are several, or inequalities."""
    if re.search(r"\b(?:and|or)\b", text):
        return []
    sides, depth = [""], 0
    for token in re.findall(r"\\equiv(?![a-z])|\\?.", text, re.DOTALL):
        depth += (token in "({[") - (token in ")}]")
        if depth == 0 and token in (",", ";", "<", ">"):
            return []
        if depth == 0 and token in ("=", r"\equiv"):
            sides.append("")
        else:
            sides[-1] += token
    return sides
