"""Problems, files of problems, and an endless shuffled stream of them whose state is one integer.

A source is anything with `__len__` and `__getitem__` that yields `Problem`: a list read from
JSONL, or a generator that makes problem `i` from the number `i`.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol


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


def read_jsonl(path: str | Path) -> list[Problem]:
    """Reads `.jsonl` or `.jsonl.gz`: one object a line with `problem` and `answer` or `answers`.

    `answer` is a string or a number, `answers` a non-empty list of them (it wins over `answer`);
    `id` (default: file name and line) and `level` are optional, other fields are ignored, as are
    empty lines.

    Raises:
      DataError: a missing or unreadable file, a broken line or a missing field (with file and
        line number), or a file without problems.
    """
    path = Path(path)
    problems = []
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    problems.append(_read_line(line, path, number))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read after line {number}: {reason}") from error
    if not problems:
        raise DataError(f"{path}: no problems in this file")
    return problems


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_line(line: bytes, path: Path, number: int) -> Problem:
    place = f"{path}:{number}"
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON object in UTF-8 ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object but {type(row).__name__}")
    if "problem" not in row:
        raise DataError(f"{place}: field 'problem' is missing (fields: {sorted(row)})")
    if "answer" not in row and "answers" not in row:
        raise DataError(
            f"{place}: field 'answer' (or 'answers') is missing (fields: {sorted(row)})"
        )
    text, level = row["problem"], row.get("level")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place}: field 'problem' must be a non-empty string, got {text!r}")
    if "answers" in row:
        if not isinstance(row["answers"], list) or not row["answers"]:
            raise DataError(
                f"{place}: field 'answers' must be a non-empty list, got {row['answers']!r}"
            )
        answers = tuple(_read_answer(answer, place, "answers") for answer in row["answers"])
    else:
        answers = (_read_answer(row["answer"], place, "answer"),)
    if isinstance(level, bool) or not isinstance(level, str | int | None):
        raise DataError(f"{place}: field 'level' must be a string or an integer, got {level!r}")
    name = row.get("id")
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return Problem(f"{stem}-{number:06d}" if name is None else str(name), text, answers, level)


def _read_answer(answer: Any, place: str, field: str) -> str:
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if is_number and not math.isfinite(answer):
        raise DataError(f"{place}: field '{field}' must be finite, got {answer!r}")
    if not is_number and not isinstance(answer, str):
        raise DataError(f"{place}: field '{field}' must hold strings or numbers, got {answer!r}")
    return str(answer)


class Source(Protocol):
    """Random access to problems."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


class Draw(NamedTuple):
    """Problems drawn from a stream.

    Attributes:
      problems: as many as were asked for, in order.
      cursor: where the next draw starts; all there is to save of a stream.
      skipped: problems passed over in this draw, by the name of the filter that refused them.
    """

    problems: list[Problem]
    cursor: int
    skipped: dict[str, int]


class ProblemStream:
    """An endless stream over a source: every epoch is one shuffled pass, each shuffled anew.

    The order is a function of the seed and the length of the source alone, and any position is
    reached directly (grain's index shuffle), so the state is the cursor: `take` is pure.

    Args:
      source: at most 2**32 problems.
      seed: 0 .. 2**32-1.
      filters: name -> predicate that says whether a problem is kept, asked in order.

    Raises:
      DataError: the source is empty.
      ValueError: a seed out of range.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        filters: Mapping[str, Callable[[Problem], bool]] | None = None,
    ):
        # Imported here: grain takes two seconds, which library users of this file need not pay.
        import grain

        if len(source) == 0:
            raise DataError("the source of problems is empty")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be within 0 .. 2**32-1, got {seed}")
        self._length = len(source)
        self._filters = dict(filters or {})
        self._dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()

    def take(self, cursor: int, count: int) -> Draw:
        """The next `count` problems from `cursor` (0 at the start of a run).

        Raises:
          DataError: a whole epoch in a row was refused by the filters.
          ValueError: a negative cursor or count.
        """
        if cursor < 0 or count < 0:
            raise ValueError(f"cursor and count must not be negative, got {cursor} and {count}")
        problems: list[Problem] = []
        skipped = dict.fromkeys(self._filters, 0)
        refused_in_a_row = 0
        while len(problems) < count:
            problem = self._dataset[cursor]
            cursor += 1
            refused_by = next(
                (name for name, keep in self._filters.items() if not keep(problem)), None
            )
            if refused_by is None:
                problems.append(problem)
                refused_in_a_row = 0
                continue
            skipped[refused_by] += 1
            refused_in_a_row += 1
            if refused_in_a_row >= 2 * self._length:
                raise DataError(
                    f"none of the {self._length} problems passes the filters; skipped: {skipped}"
                )
        return Draw(problems, cursor, skipped)
