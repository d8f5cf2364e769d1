"""Tables, exactly."""

from __future__ import annotations

import re

import pytest

from experiments.tables import one_line, table


def test_columns_are_even_and_aligned():
    assert table([["a", "name", "n"], ["long one", "x", "1"], ["b", "", "1,000"]], left=2) == (
        "| a        | name |     n |\n"
        "| -------- | ---- | ----: |\n"
        "| long one | x    |     1 |\n"
        "| b        |      | 1,000 |"
    )
    assert table([["a", "b"], ["1", "2"]]) == "| a   |   b |\n| --- | --: |\n| 1   |   2 |"
    # Markdown's rule takes three characters.
    assert table([["a"]], left=0) == "|   a |\n| --: |"


@pytest.mark.parametrize("text", ["a\nb", "a|b", "a\\|b", "\r\n", "|", "a\x85b\u2028\x0b", "\\n\n"])
def test_no_value_breaks_the_table(text):
    """Bug: a line break in an override ended its row."""
    lines = table([["setting", "n"], [text, "1"]]).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    # Bars behind an even number of backslashes separate cells.
    row = re.split(r"(?<!\\)(?:\\\\)*\|", lines[2])
    assert len(row) == 4
    assert row[2].strip() == "1"


def test_what_cannot_be_printed_is_escaped():
    assert one_line("a\nb\t\x1b[1m ü 中") == r"a\nb\t\x1b[1m ü 中"
    assert one_line(r"$\boxed{}$ 'it' " + '"is"') == r"$\boxed{}$ 'it' " + '"is"'
