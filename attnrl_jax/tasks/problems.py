"""What a problem is, and what a source of problems is.

A source is anything with `__len__` and `__getitem__` that yields `Problem`: a list, prepared files
(`attnrl_jax.datasets`), or a generator that makes problem `i` from the number `i`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class DataError(ValueError):
    """A file or source of problems that cannot be used; the message names it and the place."""


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
      id: name in logs and result files.
      text: statement, without the instruction that prompts add.
      answers: golds; a response is right if its final answer equals any of them. A gold may be
        empty (such rows exist in the wild): it equals nothing.
      level: difficulty bucket for metrics, or None.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    level: str | int | None = None


class Source(Protocol):
    """Random access to problems."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...
