"""Folders of results: each belongs to one configuration and to one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FolderError(ValueError):
    """A folder that cannot be used."""


@contextmanager
def claimed(
    folder: Path,
    kind: str,
    name: str,
    values: dict[str, Any],
    free: Sequence[str] = (),
    hint: str = "",
) -> Iterator[None]:
    """Holds a folder: makes it, or checks that the one there is of the same settings.

    Args:
      folder: of results.
      kind: what it holds, for messages: `run`, `evaluation`.
      name: file in it that keeps the settings.
      values: the settings, as JSON has them.
      free: dotted names of settings that may differ.
      hint: follows the differences of a refusal.

    Raises:
      FolderError: it belongs to other settings (the difference is named), holds other files, or is
        in use by another process.
    """
    # Before anything of ours is in there.
    if not is_same(folder, kind, name, values, free, hint) and not _is_free(folder):
        raise FolderError(f"{folder} exists, but has no {name}: it is no {kind} folder")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderError(f"{folder} is in use by another process") from error
        # Another process may have held it in between.
        is_same(folder, kind, name, values, free, hint)
        text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False)
        write_atomically(folder / name, text + "\n")
        yield


def _is_free(folder: Path) -> bool:
    """Whether nothing is there but what a start that was killed leaves."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


def is_same(
    folder: Path,
    kind: str,
    name: str,
    values: dict[str, Any],
    free: Sequence[str] = (),
    hint: str = "",
) -> bool:
    """Whether the folder has settings, which must then be these. Arguments as `claimed`.

    Raises:
      FolderError: they differ; the differences are named.
    """
    path = folder / name
    if not path.exists():
        return False
    try:
        stored = flat(json.loads(path.read_text()))
    except ValueError as error:
        raise FolderError(f"{path} is not valid JSON: {error}") from error
    if changed := differences(stored, flat(values), free):
        raise FolderError(f"{folder} is the folder of another {kind}; {described(changed)}{hint}")
    return True


def differences(
    there: dict[str, Any], here: dict[str, Any], free: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Settings by dotted name that differ, but for `free` ones: their values there and here."""
    # As they come back from a file: tuples are lists there.
    here = json.loads(json.dumps(here))
    return {
        key: (there.get(key), here.get(key))
        for key in sorted({*there, *here} - {*free})
        if there.get(key) != here.get(key)
    }


def described(changed: dict[str, tuple[Any, Any]]) -> str:
    """`differences` in words."""
    return "; ".join(
        f"{key}: {one!r} there, {other!r} here" for key, (one, other) in changed.items()
    )


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    if not isinstance(values, dict):
        return {name: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{name}.{key}" if name else key)
    return found


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all, even where the machine stops meanwhile."""
    staging = path.with_name(f".{path.name}.tmp")
    with staging.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
