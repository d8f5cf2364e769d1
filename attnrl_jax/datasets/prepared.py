"""Prepared problems: a folder of ArrayRecord files, read at random places.

A prepared folder is a data set of tensorflow-datasets (read without TensorFlow) with the cleaning
report in its metadata. `attnrl_jax.datasets.preparation` writes them.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnrl_jax.datasets.cleaning import FAULTS, CleaningReport
from attnrl_jax.tasks.problems import DataError, Problem

# Of the records and the metadata, and of what cleaning and splitting mean: data prepared by a
# program with another number are another version, and are not read.
FORMAT = 2
METADATA_FILE = "metadata.json"
_INFO_FILES = ("dataset_info.json", "features.json", METADATA_FILE)
# tensorflow-datasets writes to a folder of this prefix and renames it when all is written.
_INCOMPLETE = "incomplete."


class PreparedSource:
    """Problems of a prepared folder. Nothing but their number is read before they are asked for.

    Attributes:
      folder: the version's own folder.
      split: `train` or `held_out`.
    """

    def __init__(self, folder: Path, split: str, records: Any):
        self.folder = folder
        self.split = split
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Problem:
        """Problem `index`, counted from the end if negative.

        Raises:
          IndexError: there are not that many.
          DataError: the record is damaged or its file gone.
        """
        wanted, length = operator.index(index), len(self)
        position = wanted + length if wanted < 0 else wanted
        if not 0 <= position < length:
            raise IndexError(f"{self.folder}: problem {wanted} of {length}")
        try:
            return from_record(self._records[position])
        except Exception as error:  # the reader raises bare RuntimeError on damage
            raise DataError(
                f"{self.folder}: problem {position} of split {self.split!r} cannot be read "
                f"({error}); delete the folder and prepare the problems again"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return open_prepared, (self.folder, self.split)

    def __repr__(self) -> str:
        return f"PreparedSource({str(self.folder)!r}, {self.split!r}, {len(self)} problems)"


def to_record(problem: Problem) -> dict[str, Any]:
    """A problem as the features of a record.

    Text goes in as bytes, because JSON files may hold half surrogate pairs, which are not UTF-8;
    the level as JSON, which tells numbers, strings and None apart.
    """
    return {
        "id": _to_bytes(problem.id),
        "problem": _to_bytes(problem.text),
        "answers": [_to_bytes(answer) for answer in problem.answers],
        "level": json.dumps(problem.level).encode(),
    }


def from_record(record: Mapping[str, Any]) -> Problem:
    """The problem that `to_record` was given."""
    return Problem(
        _to_text(record["id"]),
        _to_text(record["problem"]),
        tuple(_to_text(answer) for answer in record["answers"]),
        json.loads(record["level"]),
    )


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _to_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def open_prepared(path: str | Path, split: str = "train") -> PreparedSource:
    """Opens prepared problems.

    Args:
      path: as `find_prepared` takes it.
      split: `train` or, if some were set aside, `held_out`.

    Raises:
      DataError: no prepared problems there, or several, or damaged ones; no such split.
    """
    folder = _required(path)
    lengths = read_metadata(folder)["problems"]
    if split not in lengths:
        raise DataError(
            f"{folder}: no split {split!r} was prepared; there are: {', '.join(lengths)}"
        )
    import tensorflow_datasets as tfds

    try:
        records = tfds.builder_from_directory(folder).as_data_source(split)
        length = len(records)
    except Exception as error:  # broken JSON, protocol buffers, missing files: each its own class
        raise _damaged(folder, str(error)) from error
    if length != lengths[split]:
        raise _damaged(folder, f"{length} problems in split {split!r} instead of {lengths[split]}")
    return PreparedSource(folder, split, records)


def is_prepared(path: str | Path) -> bool:
    """Whether a folder is a version of prepared problems, complete when it was written."""
    folder = Path(path)
    if folder.name.startswith(_INCOMPLETE):
        return False
    if not all((folder / name).is_file() for name in _INFO_FILES):
        return False
    try:
        values = json.loads((folder / METADATA_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("attnrl_jax") == FORMAT


def find_prepared(path: str | Path) -> Path | None:
    """The prepared folder that a path stands for, None if there is none.

    Args:
      path: a version's own folder, or the folder it was prepared into (`--out`), if that holds
        exactly one version.

    Raises:
      DataError: it holds several versions; they are listed.
    """
    folder = Path(path)
    if is_prepared(folder):
        return folder
    # OUT/problems/HASH/VERSION: any of the folders above may be given.
    levels = ["*/*"] if folder.name == "problems" else ["problems/*/*", "*"]
    found = [
        inner.parent
        for level in levels
        for inner in sorted(folder.glob(f"{level}/{METADATA_FILE}"))
        if is_prepared(inner.parent)
    ]
    if len(found) > 1:
        raise DataError(
            f"{folder} holds {len(found)} versions of prepared problems; give one of them: "
            + "; ".join(f"{inner} ({_origin(inner)})" for inner in found)
        )
    return found[0] if found else None


def _origin(folder: Path) -> str:
    values = json.loads((folder / METADATA_FILE).read_bytes())
    sources = ", ".join(source["name"] for source in values.get("sources", []))
    return f"{sources}, prepared {values.get('prepared', 'at an unknown time')}"


def read_report(path: str | Path) -> CleaningReport:
    """What cleaning found when the problems were prepared.

    Args:
      path: as `find_prepared` takes it.

    Raises:
      DataError: no prepared problems there, or several, or damaged ones.
    """
    folder = _required(path)
    try:
        report = CleaningReport.from_dict(read_metadata(folder)["report"])
        counts = [report.found, report.removed, {"read": report.read, "kept": report.kept}]
        counts += map(vars, report.benchmarks.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"its report cannot be read: {error}") from error
    if not all(map(_is_counts, counts)) or not report.found.keys() <= FAULTS.keys():
        raise _damaged(folder, "its report has something else than counts of faults")
    if report.found.keys() != report.removed.keys():
        raise _damaged(folder, "its report has faults that were only found, or only removed")
    return report


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a prepared folder, after a check that its files are all there.

    Raises:
      DataError: a file is missing or of another size than it was written with.
    """
    values = json.loads((folder / METADATA_FILE).read_bytes())
    try:
        sizes = {folder / name: size for name, size in values["files"].items()}
        complete = {"problems", "report"} <= values.keys()
    except (KeyError, AttributeError) as error:
        raise _damaged(folder, f"{METADATA_FILE} lacks {error}") from error
    if not complete:
        raise _damaged(folder, f"{METADATA_FILE} lacks its report")
    if not _is_counts(values["problems"]):
        raise _damaged(folder, f"{METADATA_FILE} has no numbers of problems")
    for path, size in sizes.items():
        if not path.is_file():
            raise _damaged(folder, f"{path.name} is missing")
        if path.stat().st_size != size:
            raise _damaged(folder, f"{path.name} has {path.stat().st_size} bytes, not {size}")
    return values


def _is_counts(values: Any) -> bool:
    return isinstance(values, dict) and all(type(count) is int for count in values.values())


def _required(path: str | Path) -> Path:
    folder = find_prepared(path)
    if folder is None:
        raise DataError(
            f"{path}: no prepared problems here; python -m experiments.data prepares them"
        )
    return folder


def _damaged(folder: Path, reason: str) -> DataError:
    return DataError(
        f"{folder}: damaged ({reason}); delete the folder and prepare the problems again"
    )
