"""Reads the project's documents (Markdown): their blocks, links and headings."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_PRINTS = re.compile(
    r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE
)
_LINK = re.compile(r"\[([^\]\[]*)\]\(([^()\s]+)\)")


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of a language, in order."""
    return [text for name, text in _BLOCK.findall(path.read_text()) if name == language]


def run_blocks(path: Path) -> tuple[dict[str, Any], str]:
    """Executes a document's Python blocks in one namespace, as a reader does who pastes them.

    Returns:
      the namespace, and all that was printed.

    Raises:
      AssertionError: a block is followed by a `text` block that is not what it prints.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for match in _PRINTS.finditer(path.read_text()):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(match[1], path.name, "exec"), namespace)
        assert match[2] is None or output.getvalue() == match[2], path
        printed += output.getvalue()
    return namespace, printed


def prose(path: Path) -> str:
    """The text without fenced blocks."""
    return _BLOCK.sub("", path.read_text())


def links(path: Path) -> list[tuple[str, str]]:
    """Text and target of every link."""
    return _LINK.findall(prose(path))


def anchors(path: Path) -> set[str]:
    """What `#...` can name in a document, as GitHub makes it from the headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(path), flags=re.MULTILINE):
        text = _LINK.sub(r"\1", heading).lower().strip()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found
