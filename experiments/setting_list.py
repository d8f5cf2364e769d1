"""Every setting of a run with its value and its meaning, as `experiments.run --settings` prints it.

Meanings are those of the dataclasses' docstrings (`Attributes:`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from experiments.settings import Settings


def meanings(kind: type) -> dict[str, str]:
    """What the `Attributes:` section of a dataclass's docstring says of its fields."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    # An entry is "  names: text"; its text goes on in lines that are further in.
    for entry in re.findall(r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", section, re.MULTILINE):
        text = " ".join(entry[1].split())
        found |= dict.fromkeys(re.split(r",\s*", entry[0]), text)
    return found


def settings_of(values: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Dotted name, value and meaning of every setting in a dataclass and those within."""
    known = meanings(type(values))
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        # The settings of training are not in a section of their own.
        place = "" if isinstance(values, Settings) and field.name == "train" else field.name
        name = f"{prefix}.{place}".strip(".") if place else prefix
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, name)
        else:
            yield name, value, known.get(field.name, "")


def setting_list(settings: Settings, width: int = 80) -> str:
    """A line for each setting, as the command line takes it, and below it what it means.

    Args:
      settings: of a run; what its method decides is in them.
      width: columns that the meanings may take.
    """
    lines = []
    for name, value, meaning in settings_of(settings):
        lines.append(f"--config.{name}={value!r}")
        lines += textwrap.wrap(
            meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6,
            break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)
