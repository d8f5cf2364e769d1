r"""Numbers and numerals in texts without mark-up, read into fractions.

Pure, with bounds on digits and exponents: nothing is evaluated.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 200
_MAX_EXPONENT = 400


class Number(NamedTuple):
    """An exact rational; `percent` says that it was written with a percent sign."""

    value: Fraction
    percent: bool


_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)"
_TIMES = r"\s*(?:\\times|\\cdot|\*|×|x)\s*"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*"
    rf"(?:(?P<decimal>{_DIGITS}(?:\.\d*)?|\.\d+)(?:\\overline\s*\{{\s*(?P<repeated>\d+)\s*\}})?"
    rf"(?:[eE](?P<e>[-+]?\d+)|{_TIMES}10\s*\^\s*(?P<brace>\{{)?\s*(?P<ten>[-+]?\d+)\s*(?(brace)\}}))?"
    rf"|10\s*\^\s*(?P<brace2>\{{)?\s*(?P<power>[-+]?\d+)\s*(?(brace2)\}}))"
    rf"\s*(?P<unit>%|°|percent|pct)?",
    re.ASCII,
)
_FRACTION = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<whole>\d+)?\s*"
    r"\\frac\s*(?:\{\s*(?P<n>[-+]?\d+)\s*\}\s*\{\s*(?P<d>[-+]?\d+)\s*\}"
    r"|\{\s*(?P<n2>\d+)\s*\}\s*(?P<d2>\d)|(?P<n1>\d)\s*(?P<d1>\d))"
    r"\s*(?P<unit>%)?",
    re.ASCII,
)
_SLASH = re.compile(r"(?P<sign>[-+]?)\s*(?P<n>\d+)\s*/\s*(?P<d>\d+)", re.ASCII)


def parse_number(text: str) -> Number | None:
    """The exact rational that a cleaned text is, as a whole; None where it is none."""
    if len(text) > MAX_DIGITS:
        return None
    if match := _NUMBER.fullmatch(text):
        exponent = match["e"] or match["ten"] or match["power"] or "0"
        if len(exponent) > 5 or abs(int(exponent)) > _MAX_EXPONENT:
            return None
        digits = re.sub(r"[ ,]", "", match["decimal"] or "1")
        value = Fraction(digits)
        if repeated := match["repeated"]:
            _, point, places = digits.partition(".")
            if not point:
                return None
            period = 10 ** len(repeated) - 1
            value += Fraction(int(repeated), period * 10 ** len(places))
        value *= Fraction(10) ** int(exponent)
        percent = match["unit"] in ("%", "percent", "pct")
        return Number(-value if match["sign"] == "-" else value, percent)
    if match := _FRACTION.fullmatch(text):
        numerator = match["n"] or match["n1"] or match["n2"]
        denominator = match["d"] or match["d1"] or match["d2"]
        # A whole part before a signed fraction is a product or a difference, not a mixed number.
        if int(denominator) == 0 or (match["whole"] and not (numerator + denominator).isdigit()):
            return None
        value = Fraction(int(match["whole"] or 0)) + Fraction(int(numerator), int(denominator))
        return Number(-value if match["sign"] == "-" else value, bool(match["unit"]))
    if (match := _SLASH.fullmatch(text)) and int(match["d"]):
        value = Fraction(int(match["n"]), int(match["d"]))
        return Number(-value if match["sign"] == "-" else value, False)
    return None


class Numeral(NamedTuple):
    """Digits with sign and point, and their base: None where it is left out.

    The value is None without a base, and with one that cannot be read or lacks a digit used.
    """

    digits: str
    base: int | None
    value: Fraction | None


_BASE_NAMES = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
)
_BASES = {name: base for base, name in enumerate(_BASE_NAMES.split(), start=2)}
# A leading digit keeps indexed letters (a_{12}) apart from numerals.
_NUMERAL = re.compile(
    r"(?P<sign>[-+]?)\(?(?P<digits>\d[0-9A-Za-z]*?(?:\.[0-9A-Za-z]+?)?)\)?"
    r"(?:_(?:\{(?P<braced>[^{}]*)\}|(?P<bare>\w+))|(?P<words>\(?(?:in)?base-?\w+\)?))?",
    re.ASCII,
)


def parse_numeral(text: str) -> Numeral | None:
    """`2220_5`, `2220_{(5)}`, `2220_{five}`, `2220 base 5`, or a bare `2220`."""
    if len(text) > MAX_DIGITS or not (match := _NUMERAL.fullmatch(text.replace(" ", ""))):
        return None
    written = match["braced"] or match["bare"] or match["words"]
    if written is None and not re.fullmatch(r"[\d.]+", match["digits"], re.ASCII):
        return None
    whole, _, places = match["digits"].upper().partition(".")
    sign = "-" if match["sign"] == "-" and (whole + places).strip("0") else ""
    digits = f"{sign}{whole.lstrip('0')}.{places.rstrip('0')}"
    if written is None:
        return Numeral(digits, None, None)
    name = re.sub(r"^\(?(?:in)?(?:base)?-?|\)$", "", written).lower()
    base = int(name) if re.fullmatch(r"\d{1,2}", name, re.ASCII) else _BASES.get(name, 0)
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in whole + places):
        return Numeral(digits, base, None)
    value = Fraction(int(whole + places, base), base ** len(places))
    return Numeral(digits, base, -value if sign else value)
