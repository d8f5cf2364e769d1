"""Tables of text that read well in a terminal and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table with columns of even width.

    Args:
      rows: the first is the heading; all of equal length.
      left: number of columns, from the first, that align to the left; the others to the right.

    Returns:
      as many lines as rows and the rule; what would break a cell is escaped.
    """
    cells = [[_cell(text) for text in row] for row in rows]
    # A column's rule takes three characters at least.
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    cells = [
        [text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(row)]
        for row in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])


def one_line(text: str) -> str:
    r"""Text with what cannot be printed escaped as in Python: a line break is `\n`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _cell(text: str) -> str:
    # Backslashes before an escaped bar would unescape it.
    return re.sub(r"(\\*)\|", r"\1\1\\|", one_line(text))
