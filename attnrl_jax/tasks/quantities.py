r"""One answer as exact reading understands it: text, number, unit, base.

Everything here is pure and evaluates nothing. Numbers (`attnrl_jax.tasks.numerals`) and units are
read only from texts of bounded length. This module imports neither jax nor numpy.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from attnrl_jax.tasks.numerals import MAX_DIGITS, Number, Numeral, parse_number, parse_numeral

_WRAPPER = (
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|hbox|boldsymbol|operatorname"
    r"|underline)\s*"
)
_WRAPPERS = re.compile(_WRAPPER + r"\{([^{}]*)\}")
_DROPPED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\boxed(?![a-z])")
_NEGATIVE_SPACE = re.compile(r"\\!\s*")
_THIN_SPACE = re.compile(r"(?<=[\d,])\s*(?:\\[,;:! ]|~)\s*(?=\d{3}(?!\d))")
_SPACES = re.compile(r"(?:\\[,;:! ]|\\q?quad(?![a-z])|~|\s)+")
_INNER_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
_DOTS = re.compile(r"\\(?:[lcv]?dots[bcmio]?)(?![a-z])|\.{3,}")
_DEGREES = re.compile(r"\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})")
_FRAC = re.compile(r"\\[dtc]frac(?![a-z])")

_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_FRACTIONS = {
    code: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", chr(code)).split("⁄"))
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))
}
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


def plain_characters(text: str) -> str:
    """Full-width, raised, lowered and fraction characters as LaTeX writes them."""
    if text.isascii():
        return text
    text = text.replace("º", "°").replace("−", "-")
    text = re.sub("[⁰¹²³⁴-⁹⁻⁺]+", lambda run: "^{" + run[0].translate(_RAISED) + "}", text)
    text = re.sub("[₀-₉]+", lambda run: "_{" + run[0].translate(_LOWERED) + "}", text)
    return unicodedata.normalize("NFKC", text.translate(_FRACTIONS))


def _tidy(text: str) -> str:
    """Mark-up that never changes an answer is taken off, but for text commands and currencies."""
    text = plain_characters(text.strip())
    if len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2].strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inside = text[len(opening) : -len(closing)]
        escaped = text.endswith("\\" + closing)
        alone = "$" not in inside.replace(r"\$", "")
        if text.startswith(opening) and text.endswith(closing) and alone and not escaped:
            text = inside
            break
    text = _NEGATIVE_SPACE.sub("", text).replace("{,}", ",")
    text = _DOTS.sub(r"\\dots ", _DROPPED.sub("", text))
    text = _FRAC.sub(r"\\frac", text).replace(r"\%", "%")
    text = _DEGREES.sub("°", text)
    text = _SPACES.sub(" ", _THIN_SPACE.sub("", text)).strip()
    text = _unbrace(text.rstrip(" .,;") or text)
    return text.rstrip(" .,;") or text


def _unbrace(text: str) -> str:
    """Without one pair of braces around the whole text."""
    if not (text.startswith("{") and text.endswith("}")):
        return text
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[1:-1].strip() if match.end() == len(text) else text
    return text


def _unwrap(tidied: str) -> str:
    text = _WRAPPERS.sub(r"\1", _WRAPPERS.sub(r"\1", tidied)).replace(r"\$", "").strip()
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:]:
        text = text[1:-1].strip()
    text = _SPACES.sub(" ", text)
    return text.rstrip(" .,;") or text


def _clean(text: str) -> str:
    return _unwrap(_tidy(text))


def normalise(text: str) -> str:
    """The text by which answers are compared as strings: mark-up and idle spaces taken off."""
    return _normalise(_clean(text))


def _normalise(cleaned: str) -> str:
    text = _INNER_SPACE.sub("", cleaned)
    choice = re.fullmatch(r"\(([A-Z])\)", text)
    return choice.group(1) if choice else text


def read_number(text: str) -> Number | None:
    r"""Reads an exact rational: `1,000`, `1\,000`, `204.`, `8.7\times10^8`, `1\frac12`, `75\%`.

    None where the text is no single number, and where it is too large to write out: a tower of
    powers is never computed here.
    """
    return parse_number(_clean(text))


_SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# Words after a number that change its value or take it back, and are no units.
_VALUE_WORDS = re.compile(
    r"i|e|k|pi|and|or|if|but|to|at|half|halves|thirds?|quarters?|lakhs?|crores?|dozens|hundreds"
    r"|thousands|\w+illions?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie"
    r"|hundred|thousand|\w+illion)ths?|percent|percentage|pct|mod|modulo|base|factorial|squared"
    r"|cubed|sqrt|sin|cos|tan|log|ln|exp|times|plus|minus|over|under|above|below|less|least"
    r"|more|most|than|of|off|not?|non|none|never|isnt|is|was|are|be|wrong|incorrect|false|except"
    r"|negative|positive|approximately|about|nearly|almost|roughly|maybe|perhaps|twice|double"
)
_SAME_UNITS = {
    name: unit
    for unit, names in {
        "in": "inch", "ft": "foot feet", "yd": "yard", "mi": "mile", "m": "meter metre",
        "mm": "millimeter millimetre", "cm": "centimeter centimetre", "km": "kilometer kilometre",
        "g": "gram", "mg": "milligram", "kg": "kilogram", "lb": "pound lbs", "oz": "ounce",
        "s": "second sec", "ms": "millisecond", "min": "minute mins", "h": "hour hr hrs",
        "l": "liter litre", "ml": "milliliter millilitre", "°": "degree deg", "$": "dollar usd",
        "¢": "cent", "€": "euro", "°c": "celsius", "°f": "fahrenheit", "k": "kelvin",
        "rad": "radian", "hz": "hertz", "mph": "", "am": "", "pm": "", "ev": "",
    }.items()
    for name in (unit, *names.split())
}  # fmt: skip
_LETTER_UNITS = frozenset("mgshlJNKLVWAC")
_SURFACE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}

_POWER = r"(?:\s*\^\s*(?:\d|\{\s*-?\d\s*\}))?"
_MARKED = rf"{_WRAPPER}\{{[A-Za-z .,'/^\d-]+\}}{_POWER}"
# In text commands, or as up to three plain words, which are no product of variables.
_UNIT = re.compile(
    rf"(?: ?(?:\\cdot|/)? ?(?:{_MARKED}|°(?: ?[CF](?![A-Za-z]))?))+$"
    rf"|(?<=[\d}}])(?: [A-Za-z]{{2,}}{_POWER}){{1,3}}$|(?<=\d) ?(?:\\\$|\$|¢|€|£)$"
)
_UNIT_TOKEN = re.compile(r"[A-Za-z]+|\^ ?\{? ?(-?\d) ?\}?|[/°$¢€£]|[^ ]")
_CURRENCY = re.compile(r"(?P<sign>[-+]?) ?(?:US|USD)? ?(?P<unit>\\\$|[$€£¥]) ?(?=[-+.\d])")


class _Unit(NamedTuple):
    scale: int
    name: str


def _read_unit(text: str) -> _Unit | None:
    """Scale and canonical name of the words after a number; None where they are no unit."""
    marked = "\\" in text
    scale, power = 1, ""
    names: list[str] = []
    text = _WRAPPERS.sub(r" \1 ", text).replace("\\cdot", " ").replace("\\$", "$")
    for token in _UNIT_TOKEN.finditer(text.replace(".", "").replace("'", "").replace(",", "")):
        word = token[0]
        if token[1] or word in ("squared", "cubed"):
            if not names:
                return None
            names[-1] += token[1] or {"squared": "2", "cubed": "3"}[word]
            continue
        if word == "/":
            names.append("per")
            continue
        folded = _singular(word.casefold())
        if folded in _SURFACE:
            power = str(_SURFACE[folded])
        elif folded in _SCALES and not names and scale == 1:
            scale = _SCALES.get(word.casefold(), 0)
        elif len(word) == 1 and names[-1:] == ["°"] and word in "CF":
            names[-1] += folded
        elif not _is_unit(word, marked):
            return None
        else:
            names.append(_SAME_UNITS.get(folded, folded) + power)
            power = ""
    # What is counted in bare units is a bare number.
    names = [name for name in names if not re.fullmatch(r"unit\d?", name)]
    return _Unit(scale, " ".join(names)) if scale else None


def _is_unit(word: str, marked: bool) -> bool:
    if not word.isalpha():
        return word in "°$¢€£"
    if len(word) == 1:
        return marked and word in _LETTER_UNITS
    folded = word.casefold()
    if len(word) == 2 and not marked and folded not in _SAME_UNITS:
        return False
    return not _VALUE_WORDS.fullmatch(folded)


def _singular(word: str) -> str:
    if word in _SAME_UNITS or len(word) < 4 or not word.endswith("s") or word.endswith("ss"):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("ches", "shes", "xes", "sses")) else word[:-1]


_ASSIGNED = re.compile(
    r"(?P<name>[A-Za-z]) ?= ?(?P<value>[^=]+)|(?P<value2>[^=]+?) ?= ?(?P<name2>[A-Za-z])"
)
_LABEL = re.compile(rf"(?:{_WRAPPER}\{{ ?\(([A-E])\) ?\}} ?|\(([A-E])\) (?=[\d\\$-]))(?=.)")
_SET_OF_ONE = re.compile(r"\\\{ ?(\([^(){}]*\)) ?\\\}")
_LETTERS = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)*")


class Reading(NamedTuple):
    """What exact reading makes of a text of bounded length.

    Attributes:
      normal: for comparison as a string.
      number: of a number, a quantity or an assignment (`x = 5`), or None.
      unit: canonical name of the unit, or empty.
      name: variable that is assigned, or empty.
      numeral: digits and base, or None.
      word: of letters that are no product of variables, case folded, or empty.
      quoted: whether the whole text stood in a text command.
      label: letter of the choice before the answer, or empty.
      body: the text without label, unit and text command around it, for math-verify.
    """

    normal: str
    number: Number | None
    unit: str
    name: str
    numeral: Numeral | None
    word: str
    quoted: bool
    label: str
    body: str


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Reading:
    """Reads an answer or a gold; linear in its length."""
    whole = tidied = _tidy(text)
    label, quoted = "", False
    if match := _LABEL.match(tidied):
        label, tidied = match[1] or match[2], tidied[match.end() :]
    elif match := _WRAPPERS.fullmatch(tidied):
        quoted, tidied = True, match[1].strip()
    elif match := _SET_OF_ONE.fullmatch(tidied):
        tidied = match[1]
    cleaned = _unwrap(tidied)
    number, unit, name, body = _read_quantity(tidied)
    if r"\boxed" in text or (not body and tidied is whole):
        body = plain_characters(text)
    normal = _normalise(cleaned)
    return Reading(
        normal=normal,
        number=number,
        unit=unit,
        name=name,
        numeral=parse_numeral(cleaned),
        word=_word(normal, quoted),
        quoted=quoted,
        label=label,
        body=body or tidied,
    )


def _read_quantity(tidied: str) -> tuple[Number | None, str, str, str]:
    """Number, unit, variable, and the text without its unit (empty where it has none)."""
    if tidied.isdigit() and tidied.isascii() and len(tidied) <= MAX_DIGITS:
        return Number(Fraction(tidied), False), "", "", ""
    if len(tidied) > MAX_DIGITS:
        return None, "", "", ""
    name = ""
    if match := _ASSIGNED.fullmatch(tidied):
        name = match["name"] or match["name2"]
        tidied = (match["value"] or match["value2"]).strip()
    unit, body, scale = "", "", 1
    rest = tidied
    if match := _CURRENCY.match(rest):
        unit = match["unit"].removeprefix("\\")
        rest = match["sign"] + rest[match.end() :]
    if (match := _UNIT.search(rest)) and (found := _read_unit(match[0])):
        scale = found.scale
        # "$18 per hour", "$5 million": the currency comes first.
        unit = " ".join(filter(None, (unit, found.name)))
        rest = body = rest[: match.start()].strip()
    number = parse_number(_unwrap(rest))
    if number is None:
        # A sentence that ends in a word is no quantity.
        if body and scale == 1 and not name and not re.search(r"[=$]", body):
            return None, unit, "", body
        number = parse_number(_unwrap(tidied))
        return number, "", name if number else "", ""
    return Number(number.value * scale, number.percent), unit, name, body


def _word(normal: str, quoted: bool) -> str:
    if not _LETTERS.fullmatch(normal):
        return ""
    if len(normal) == 1:
        return normal
    words = normal.split(" ")
    if quoted or any(len(w) > 2 or (len(w) > 1 and not w.islower()) for w in words):
        return normal.casefold()
    return ""
