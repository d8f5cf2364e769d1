"""Reads files of problems."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import IO, Any

from attnrl_jax.tasks.problems import DataError, Problem


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
