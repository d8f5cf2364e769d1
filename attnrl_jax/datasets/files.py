"""Reads files of problems: JSONL, packed JSONL, JSON and Parquet, with the field names in use."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from attnrl_jax.tasks.problems import DataError, Problem

FORMATS = (".jsonl", ".jsonl.gz", ".json", ".parquet")

# In the order in which they are tried. A dot leads into a nested object (DAPO's and verl's files).
PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answers", "answer", "final_answer", "ground_truth", "reward_model.ground_truth")

# Rows of a Parquet file held as Python objects at once.
_BATCH_ROWS = 4096
_ABSENT = object()


@dataclass(frozen=True)
class FieldNames:
    """Where a row holds its problem and its answer.

    Attributes:
      problem: name of the field; empty: the first of `PROBLEM_FIELDS` that a row has.
      answer: the same of `ANSWER_FIELDS`.

    Dots lead into nested objects: `reward_model.ground_truth`. A name that is given must be in
    every row.
    """

    problem: str = ""
    answer: str = ""


USUAL_FIELDS = FieldNames()


def read_problems(path: str | Path, fields: FieldNames = USUAL_FIELDS) -> list[Problem]:
    """Reads the problems of a file, in their order: `.jsonl`, `.jsonl.gz`, `.json` (one array of
    rows) or `.parquet`.

    The problem is a text, or a list of chat messages, whose last message of the user is taken. The
    answer is a string or a number, or a list of them (any of them is right); of a worked answer
    that closes with `#### 72`, as GSM8K's do, it is what follows the last `####`. A float that is
    an integer below 2**53 is written without `.0`. `id` (default: file name and row) and `level`
    (a string or a number, else None) are optional, other fields are ignored, as are empty lines.

    Rows without a problem or an answer are read, for cleaning to count: null, "" and [] become the
    text "" or the one gold "". Among the usual names a field that has a value comes before one
    that has none.

    Raises:
      DataError: another suffix, a missing or unreadable file, a broken row or a missing field
        (with file and line, or file and row, from 1), or a file without problems.
    """
    path = Path(path)
    if path.name.lower().endswith(".parquet"):
        rows = _parquet_rows(path, fields)
    elif path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        rows = _jsonl_rows(path)
    elif path.name.lower().endswith(".json"):
        rows = _json_rows(path)
    else:
        raise DataError(f"{path}: not one of the formats {', '.join(FORMATS)}")
    problems = [_read_row(row, fields) for row in rows]
    if not problems:
        raise DataError(f"{path}: no problems in this file")
    return problems


@dataclass(frozen=True)
class _Row:
    """A row of a file: its values, its place for messages, its default id, all names it has."""

    values: Mapping[str, Any]
    place: str
    default_id: str
    names: Sequence[str]


def _stem(path: Path) -> str:
    ending = max((e for e in FORMATS if path.name.lower().endswith(e)), key=len)
    return path.name[: -len(ending)]


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    values = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{place}: not a JSON object in UTF-8 ({error})") from error
                if not isinstance(values, dict):
                    raise DataError(f"{place}: not a JSON object but {type(values).__name__}")
                yield _Row(values, place, f"{_stem(path)}-{number:06d}", sorted(values))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read after line {number}: {reason}") from error


def _json_rows(path: Path) -> Iterator[_Row]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON in UTF-8 ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: not a JSON array of rows but {type(rows).__name__}")
    for number, values in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        if not isinstance(values, dict):
            raise DataError(f"{place}: not a JSON object but {type(values).__name__}")
        yield _Row(values, place, f"{_stem(path)}-{number:06d}", sorted(values))


def _open(path: Path) -> IO[bytes]:
    packed = path.suffix.lower() == ".gz"
    return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]


def _parquet_rows(path: Path, fields: FieldNames) -> Iterator[_Row]:
    # Imported here: only Parquet files need it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    def exact(column: Any) -> Any:
        """0.1 kept in 32 bits is 0.10000000149011612 in 64; its shortest decimal is 0.1 in both."""
        is_short = pa.types.is_float32(column.type)
        return column.cast(pa.string()).cast(pa.float64()) if is_short else column

    used = (*PROBLEM_FIELDS, *ANSWER_FIELDS, fields.problem, fields.answer, "id", "level")
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            read = {name for name in names if any(f"{one}.".startswith(f"{name}.") for one in used)}
            if not read:
                missing = " or ".join(PROBLEM_FIELDS)
                raise DataError(f"{path}: no field {missing} (fields: {sorted(names)})")
            for batch in file.iter_batches(_BATCH_ROWS, columns=sorted(read)):
                columns = [exact(column).to_pylist() for column in batch.columns]
                for cells in zip(*columns, strict=True):
                    number += 1
                    values = dict(zip(batch.schema.names, cells, strict=True))
                    default_id = f"{_stem(path)}-{number:06d}"
                    yield _Row(values, f"{path}, row {number}", default_id, sorted(names))
    except DataError:
        raise
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        # The last two: text that is no UTF-8, and dates and times that Python cannot hold.
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read after row {number}: {reason}") from error


def _read_row(row: _Row, fields: FieldNames) -> Problem:
    try:
        return _to_problem(row, fields)
    except RecursionError as error:
        # What the parser of JSON still reads may be too deep to look into.
        raise DataError(f"{row.place}: nested too deeply") from error


def _to_problem(row: _Row, fields: FieldNames) -> Problem:
    field, problem = _find(row, fields.problem, PROBLEM_FIELDS)
    if _is_empty(problem):
        text: Any = ""
    else:
        text = _last_user_message(problem) if isinstance(problem, list) else problem
    if not isinstance(text, str):
        raise DataError(
            f"{row.place}: field '{field}' must be a string, or a list of chat messages with one "
            f"of the user, got {problem!r}"
        )
    field, found = _find(row, fields.answer, ANSWER_FIELDS)
    golds = found if isinstance(found, list) else [found]
    golds = [gold for gold in golds if gold is not None] or [""]
    answers = tuple(_read_answer(gold, row.place, field) for gold in golds)
    given = row.values.get("id")
    name = row.default_id if given is None else str(given)
    for value in (name, text, *answers):
        if not _is_unicode(value):
            raise DataError(f"{row.place}: half a surrogate pair in {value!r}, which is no text")
    return Problem(name, text, answers, _read_level(row.values.get("level")))


def problem_from_row(
    values: Mapping[str, Any], place: str, default_id: str, fields: FieldNames = USUAL_FIELDS
) -> Problem:
    """The problem of one row, by the rules of `read_problems`, from wherever the row comes.

    Args:
      values: its fields.
      place: names the row in messages.
      default_id: of a row without `id`.
      fields: which fields hold problem and answer.

    Raises:
      DataError: a missing or broken field.
    """
    return _read_row(_Row(values, place, default_id, sorted(values)), fields)


def _find(row: _Row, given: str, usual: Sequence[str]) -> tuple[str, Any]:
    """Name and value of the field that is asked for, or of the first usual one that has a value."""
    found = [(name, _lookup(row.values, name)) for name in ([given] if given else usual)]
    present = [(name, value) for name, value in found if value is not _ABSENT]
    if not present:
        missing = given or " or ".join(usual)
        raise DataError(f"{row.place}: no field {missing} (fields: {list(row.names)})")
    return next((pair for pair in present if not _is_empty(pair[1])), present[0])


def _is_empty(value: Any) -> bool:
    """Whether a field holds nothing: null, blank text, a list of such."""
    if isinstance(value, list):
        return all(map(_is_empty, value))
    return value is None or (isinstance(value, str) and not value.strip())


def _lookup(values: Mapping[str, Any], name: str) -> Any:
    if name in values:
        return values[name]
    head, _, rest = name.partition(".")
    inner = values.get(head)
    return _lookup(inner, rest) if rest and isinstance(inner, Mapping) else _ABSENT


def _last_user_message(messages: list[Any]) -> Any:
    """Its content; None if no message is the user's."""
    contents = [
        "" if message["content"] is None else message["content"]
        for message in messages
        if isinstance(message, Mapping) and message.get("role") == "user" and "content" in message
    ]
    return contents[-1] if contents else None


def _read_answer(answer: Any, place: str, field: str) -> str:
    is_number = isinstance(answer, int | float | Decimal) and not isinstance(answer, bool)
    # An integer may be too large for isfinite.
    is_fraction = isinstance(answer, float | Decimal)
    if is_fraction and not Decimal(answer).is_finite():
        raise DataError(f"{place}: field '{field}' must be finite, got {answer!r}")
    if not is_number and not isinstance(answer, str):
        raise DataError(f"{place}: field '{field}' must hold strings or numbers, got {answer!r}")
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < 2**53:
        return str(int(answer))
    if isinstance(answer, str) and "####" in answer:
        return answer.rpartition("####")[2].strip()
    return str(answer)


def _read_level(level: Any) -> str | int | None:
    if isinstance(level, float) and level.is_integer():
        return int(level)
    if isinstance(level, float | Decimal):
        return str(level) if Decimal(level).is_finite() else None
    if isinstance(level, str):
        return level if _is_unicode(level) else None
    return level if isinstance(level, int) and not isinstance(level, bool) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
