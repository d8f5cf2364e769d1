"""The boxed answer, and what exact reading decides."""

import json
import string
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnrl_jax.tasks.answers import (
    equality_keys,
    exact_verdict,
    final_answer,
    final_answers,
    gold_text,
    normalise,
    read_number,
)

ROOT = Path(__file__).parents[2]
CASES = (
    ROOT / "tests" / "data" / "problems" / "judged_answers.json",
    ROOT.parent / "shared" / "data" / "grader_cases.json",
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed {42}", "42"),
        (r"\boxed{41} no, \boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"\boxed{7 and \boxed{8}", "8"),
        (r"} {{ \boxed{7}", "7"),
        (r"\boxed{\boxed{7}}", "{7}"),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}</think> no box", None),
        (r"<think>\boxed{1}", None),
        (r"<think>\boxed{1}</think>\boxed{2}<think>\boxed{3}", "2"),
        (r"\boxed{1}</think>", None),
        (r"\boxed{1}</think>\boxed{2}", "2"),
        (r"a</think>\boxed{1}</think>\boxed{2}", "2"),
        (r"\boxed{42", None),
        (r"\boxed{}", None),
        (r"\boxed{3} \boxed{ }", "3"),
        (r"\boxedtext{3}", None),
        (r"\\boxed{3}", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_boxes_joined_by_and_are_also_one_list():
    assert final_answers(r"$\boxed{6}$ and $\boxed{8}$") == ("8", "6, 8")
    assert final_answers(r"\boxed{1}, \boxed{2} \quad \text{or} \quad \boxed{3}")[1] == "1, 2, 3"
    assert final_answers(r"\boxed{6} \boxed{8}") == ("8",)
    assert final_answers(r"\boxed{6} no, \boxed{8}") == ("8",)


@given(st.text(alphabet=string.ascii_letters + "{}\\ $", max_size=60))
def test_any_text_is_read(text):
    answer = final_answer(text)
    assert answer is None or answer.replace(" ", "") in text.replace(" ", "").replace(r"\boxed", "")
    normalise(text)
    assert exact_verdict(text, text) is bool(text.strip())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-42", -42),
        ("−7", -7),
        ("+7", 7),
        ("007", 7),
        ("204.", 204),
        (".5", Fraction(1, 2)),
        ("1,234,567.5", Fraction(2469135, 2)),
        (r"1\,000\,000", 10**6),
        (r"32,\! 349", 32349),
        ("1{,}000", 1000),
        ("1 000", 1000),
        (r"\$18.00", 18),
        (r"\text{70}", 70),
        ("8.7e8", 870_000_000),
        (r"8.7 \times 10^{8}", 870_000_000),
        (r"-2\cdot10^{-2}", Fraction(-1, 50)),
        ("10^6", 10**6),
        (r"\dfrac{3}{4}", Fraction(3, 4)),
        (r"\frac34", Fraction(3, 4)),
        (r"-\frac{-3}{4}", Fraction(3, 4)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        (r"12 \frac{3}{5}", Fraction(63, 5)),
        ("-3/4", Fraction(-3, 4)),
        (r"90^\circ", 90),
        ("$5$", 5),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"0.8\overline{45}", Fraction(837, 990)),
        ("½", Fraction(1, 2)),
        ("1½", Fraction(3, 2)),
        ("１８", 18),
        (r"\frac{270}7", Fraction(270, 7)),
        (r"\left( 5", None),
        ("32, 349", None),
        ("0,111", None),
        ("1,23", None),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        (r"1\frac{-1}{2}", None),
        ("10^{999999999}", None),
        ("1e999999", None),
        ("9" * 5000, None),
        ("2^{10}", None),
        ("9**9**9**9", None),
        ("٣", None),
        ("", None),
        ("x", None),
    ],
)
def test_read_number(text, value):
    number = read_number(text)
    assert (number.value if number else None) == value


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_a_number_is_read_as_it_is_written(mantissa, places):
    value = Fraction(mantissa, 10**places)
    whole, decimals = divmod(abs(mantissa), 10**places)
    tail = f".{decimals:0{places}d}" if places else ""
    sign = "-" if mantissa < 0 else ""
    assert read_number(f"{sign}{whole}{tail}").value == value
    assert read_number(f"{sign}{whole:,}{tail}").value == value
    assert read_number(rf"{mantissa}\times10^{{-{places}}}").value == value


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("25", "025", True),
        ("0", "-0", True),
        ("8.7e8", "870000000", True),
        (r"8.7\times10^9", r"8.7 \times 10^{8}", False),
        ("0.0000001", "0.0000002", False),
        ("0.3333333", r"\frac{1}{3}", False),
        (r"75\%", "0.75", True),
        ("75%", "75", True),
        (r"0.28\%", r"28\%", False),
        ("32, 349", "32349", None),
        (r"18\text{ dollars}", "18", True),
        (r"\$1,800.50 \text{ per hour}", "1800.5", True),
        ("18 square feet", "18", True),
        ("18", r"18\text{ feet}", True),
        (r"5\text{ cm}^{2}", "6", False),
        (r"$\frac{1}{2} \mathrm{~cup}.$", "0.5", True),
        (r"10\text{ feet}", "10 feet", True),
        (r"10\text{ feet}", r"10\text{ inches}", False),
        ("3 hours 20 minutes", "3", None),
        (r"18\text{ million}", "18", False),
        (r"18\text{ and a half}", "18", None),
        (r"18\text{ or }19", "18", None),
        ("2 or more", "2", None),
        ("18 ab", "18", None),
        ("18x", "18", None),
        (r"2\mathrm{e}", "2", None),
        ("x = 18", "18", True),
        ("x=18", "19", False),
        ("x=5", "y=5", False),
        ("x=y=5", "5", None),
        ("2220_{5}", "2220_5", True),
        ("2220_6", "2220_5", False),
        ("2220", "2220_5", True),
        ("2221", "2220_5", False),
        ("2A_{16}", "42_{10}", True),
        ("a_{12}", "a_{13}", None),
        (r"\text{(B)}", "B", True),
        (r"\textbf{Evelyn}", r"\text{Evelyn}", True),
        (r"\dfrac{x}{2}", r"\frac{x}{2}", True),
        ("1 2", "12", None),
        ("x", "X", False),
        ("", "", False),
        ("5", "", False),
        ("x" * 5000, "y", False),
        ("x" * 5000, "x" * 5000, True),
    ],
)
def test_exact_verdict(answer, gold, verdict):
    assert exact_verdict(answer, gold) is verdict


@pytest.mark.parametrize(
    ("front", "answer"),
    [("\\", None), ("\\\\", "1"), ("\\\\\\", None), ("{{ ", "1"), ("} ", "1"), (r"\{", "1")],
)
def test_a_box_is_found_whatever_is_in_front(front, answer):
    """The search begins at the first box: only whether its backslash is escaped matters."""
    assert final_answer(front + r"\boxed{1} }}") == answer


def test_gold_text():
    assert gold_text("42") == "42"
    assert gold_text(r"So it is \[ \boxed{32349} \]") == "32349"
    assert gold_text(r"\boxed{1} and \boxed{-2}.") == "1, -2"
    prose = r"\boxed{1} papers and \boxed{2} bins"
    assert gold_text(prose) == prose


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 15_000,
        r"\boxed{" + "{" * 100_000,
        "}" * 100_000 + r"\boxed{1}",
        r"\boxed{" + "9" * 100_000 + "}",
        r"\boxed{" + r"\text{" * 20_000 + "}" * 20_001,
        r"\boxed{1}, " * 10_000,
        r"\boxed{" + " " * 100_000 + "x}",
        r"\boxed" + " " * 100_000,
        r"\boxed{" + r"1\, " * 25_000 + "}",
        r"\boxed{" + "1," * 50_000 + "}",
        "<think>" * 15_000 + r"\boxed{2}",
        r"\boxed{2}" + "</think>" * 15_000 + r"\boxed{2}",
        r"\boxed{" + "{" * 50_000 + "}" * 50_001,
        "\\" * 100_001 + "boxed{2}",
        r"\boxed{" + "\0" * 100_000 + "}",
        r"\boxed{" + r"\frac{1}{" * 5_000 + "2" + "}" * 5_001,
        r"\boxed{" + r"1\text{ aa" * 90 + "}" * 91,
        r"\boxed{1" + " aaa" * 240 + "}",
        r"\boxed{" + "x=" * 490 + "}",
        r"\boxed{" + "½²" * 50_000 + "}",
        r"\boxed{" + r"7\text{ a}/" * 90 + "}",
    ],
)
def test_long_texts_are_read_in_linear_time(text):
    """Quadratic reading of a hundred thousand characters would not end within this suite."""
    for reading in final_answers(text):
        exact_verdict(reading, "17")
        exact_verdict("17", reading)


@settings(max_examples=30)
@given(st.integers(-(10**30), 10**30))
def test_integers_are_decided_both_ways(value):
    assert exact_verdict(str(value), f"{value:,}") is True
    assert exact_verdict(str(value), str(value + 1)) is False


def same(first, second):
    return not equality_keys(first).isdisjoint(equality_keys(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("18", "18 dollars"),
        ("18.0", r"18\text{ dollars}"),
        ("18", "x = 18"),
        (r"\frac{1}{2} \text{ cup}", "0.5"),
        ("18 cm", r"18\text{ cm}"),
        ("1010_2", "1010_{2}"),
        ("1010", "01010_2"),
        ("2A_{16}", "42_{10}"),
        ("75%", r"75.0\%"),
        ("x + 1", "x+1"),
        ("x" * 2000, " " + "x" * 2000),
    ],
)
def test_equal_answers_have_a_key_in_common(first, second):
    """Regression: units, assignments and bases were no part of what majority votes compare."""
    assert exact_verdict(first, second) is True
    assert same(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("18", "19"),
        ("18 feet", "18.5 feet"),
        ("1010_2", "1010_3"),
        ("1010_2", "10"),
        ("75%", "75"),
        ("75%", "0.75"),
        ("x = 5", "x = y = 5"),
        ("18 million", "18"),
    ],
)
def test_other_answers_have_none(first, second):
    assert not same(first, second)


PIECES = ["18", "10", "1010", "1", "2", "0", "/", r"\frac", "{1}{2}", "_2", "_{2}", "_{10}", "_16",
          "x = ", "x=", "-", ".", ",", " ", "$", "%", r"\%", "A", r"\text{ dollars}", " dollars",
          r"\text{ cm}", " cm", " feet", "^2", r"\times10^", "e", r"^\circ"]  # fmt: skip
WRITTEN = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)


@settings(max_examples=1000, deadline=None)
@given(WRITTEN, WRITTEN)
def test_what_exact_reading_holds_equal_has_a_key_in_common(first, second):
    """But a percentage and a plain number."""
    assume(("%" in first) == ("%" in second))
    if exact_verdict(first, second):
        assert same(first, second)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["18", "1010", "0.5", "-3"]), st.data())
def test_ways_to_write_a_number_have_a_key_in_common(number, data):
    frames = st.sampled_from(["{}", "x = {}", "{} dollars", r"{}\text{{ m}}", "${}$", "{}.", "0{}"])
    first, second = (data.draw(frames).format(number) for _ in range(2))
    assume(exact_verdict(first, second))
    assert same(first, second)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_collected_answers_that_are_read_as_equal_have_a_key_in_common(path):
    if not path.is_file():
        pytest.skip("answer-checking cases are not here")
    equal = 0
    for case in json.loads(path.read_text()):
        answer, gold = final_answer(case["response"]), gold_text(case["answer"])
        if answer and ("%" in answer) == ("%" in gold) and exact_verdict(answer, gold):
            equal += 1
            assert same(answer, gold), case
    assert equal > 5
