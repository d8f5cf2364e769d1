"""Sources of problems by name: files, folders, `tfds:NAME` and `hf:OWNER/NAME`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnrl_jax.datasets import hub
from attnrl_jax.datasets.files import (
    FORMATS,
    USUAL_FIELDS,
    FieldNames,
    problem_from_row,
    read_problems,
)
from attnrl_jax.datasets.prepared import (
    find_prepared,
    is_prepared,
    open_prepared,
    read_metadata,
)
from attnrl_jax.tasks.problems import DataError, Problem

_TFDS = re.compile(
    r"tfds:(?P<name>\w+)(/(?P<config>[^/:@]+))?(:(?P<version>[^/:@]+))?(@(?P<split>.+))?", re.ASCII
)


@dataclass(frozen=True)
class Resolved:
    """What a name stands for: files of problems, or a data set of tensorflow-datasets.

    Attributes:
      name: as it was given.
      files: all files with its content, sorted; of a data set, all of one folder.
      split: of the data set; empty for files of problems.
    """

    name: str
    files: tuple[Path, ...]
    split: str = ""

    def read(self, fields: FieldNames = USUAL_FIELDS) -> list[Problem]:
        """All problems, file by file.

        Args:
          fields: names of the fields; prepared problems need none.

        Raises:
          DataError: a file that cannot be used.
        """
        return [problem for _, problems in self.read_parts(fields) for problem in problems]

    def read_parts(self, fields: FieldNames = USUAL_FIELDS) -> Iterator[tuple[str, list[Problem]]]:
        """Problems with a short name of where they are from.

        A local file goes by its name without ending, anything else by the name it was given.

        Raises:
          DataError: a file that cannot be used.
        """
        if self.split:
            yield self.name, _read_data_set(self.files[0].parent, self.split, self.name, fields)
            return
        is_local = not self.name.startswith("hf:")
        for path in self.files:
            yield _stem(path) if is_local else self.name, read_problems(path, fields)


def split_names(text: str) -> tuple[str, ...]:
    """Names from one setting, separated by commas; empty text is no name.

    Raises:
      DataError: nothing between two commas.
    """
    names = tuple(name.strip() for name in text.split(","))
    if names == ("",):
        return ()
    if "" in names:
        raise DataError(f"{text!r}: an empty name between commas")
    return names


def resolve(name: str, data_dir: str | Path | None = None) -> Resolved:
    """Finds, and if need be downloads, what a name stands for. Reads no problem yet.

    Args:
      name: one of
        a file of `FORMATS`;
        a folder of such files: all of them, sorted;
        a folder of prepared problems, as `find_prepared` takes it: its split `train`, or another
          as `FOLDER@SPLIT`;
        `tfds:NAME[/CONFIG][:VERSION][@SPLIT]`: a data set of tensorflow-datasets, prepared as
          ArrayRecord if it is not yet there; the split is `train` by default;
        `hf:OWNER/NAME[@REVISION][:PATTERN]`: files of a dataset on the Hugging Face hub
          (`hub.data_files` says which).
      data_dir: where tensorflow-datasets keeps its data; by default the environment variable
        TFDS_DATA_DIR, or `~/tensorflow_datasets`.

    Raises:
      DataError: there is no such thing, it cannot be used, or it cannot be reached.
    """
    if name.startswith("tfds:"):
        return _resolve_tfds(name, data_dir)
    if name.startswith("hf:"):
        return Resolved(name, tuple(hub.data_files(name, FORMATS)))
    path = Path(name)
    base, _, split = name.rpartition("@")
    if not path.exists() and base and (prepared := find_prepared(base)) is not None:
        if split not in read_metadata(prepared)["problems"]:
            raise DataError(f"{name}: these prepared problems have no split {split!r}")
        return Resolved(name, _record_files(prepared), split)
    if path.is_file():
        if not _is_usable(path):
            raise DataError(f"{name}: files of problems end in {', '.join(FORMATS)}")
        return Resolved(name, (path,))
    if not path.is_dir():
        raise DataError(
            f"{name}: no such file or folder (other names of problems have the form tfds:NAME or "
            "hf:OWNER/NAME)"
        )
    files = tuple(sorted(p for p in path.iterdir() if p.is_file() and _is_usable(p)))
    if files and not is_prepared(path):
        return Resolved(name, files)
    prepared = find_prepared(path)
    if prepared is None:
        raise DataError(
            f"{name}: neither prepared problems nor files that end in {', '.join(FORMATS)} are in "
            "this folder"
        )
    return Resolved(name, _record_files(prepared), "train")


def is_prepared_folder(name: str) -> bool:
    """Whether `resolve` takes the name for a folder of prepared problems."""
    return Path(name).is_dir() and resolve(name).split != ""


def read_held_out(source: Resolved, fields: FieldNames) -> Iterator[tuple[str, list[Problem]]]:
    """`read_parts` of problems that come beside the training problems: they may have the same field
    names or the usual ones.

    Raises:
      DataError: they have neither.
    """
    try:
        return iter(list(source.read_parts(fields)))
    except DataError:
        if fields == USUAL_FIELDS:
            raise
        with suppress(DataError):
            return iter(list(source.read_parts()))
        raise


def read_names(
    names: Sequence[str], fields: FieldNames = USUAL_FIELDS, data_dir: str | Path | None = None
) -> list[Problem]:
    """Problems of all sources, in the order of their names. Arguments and errors as `resolve`."""
    return [problem for name in names for problem in resolve(name, data_dir).read(fields)]


def _is_usable(path: Path) -> bool:
    return path.name.lower().endswith(FORMATS)


def _stem(path: Path) -> str:
    ending = max((e for e in FORMATS if path.name.lower().endswith(e)), key=len)
    return path.name[: -len(ending)]


def _record_files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if ".array_record" in path.name))


def _resolve_tfds(name: str, data_dir: str | Path | None) -> Resolved:
    match = _TFDS.fullmatch(name)
    if match is None:
        raise DataError(
            f"{name}: names of tensorflow-datasets have the form "
            "tfds:NAME[/CONFIG][:VERSION][@SPLIT]"
        )
    import tensorflow_datasets as tfds

    full_name = name.removeprefix("tfds:").split("@")[0]
    split = match["split"] or "train"
    try:
        # Its progress must not end up in the output of a command.
        with redirect_stdout(sys.stderr), _few_retries():
            builder = tfds.builder(full_name, data_dir=None if data_dir is None else str(data_dir))
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"{name}: tensorflow-datasets knows no data set of this name, and none is in "
            f"{data_dir or tfds.core.constants.DATA_DIR}"
        ) from error
    except ImportError as error:
        raise DataError(
            f"{name}: cannot be prepared here, its builder needs {error.name or error}; prepare it "
            "elsewhere with file_format='array_record' and copy it to "
            f"{data_dir or tfds.core.constants.DATA_DIR}"
        ) from error
    except Exception as error:  # builders are programs: downloads, archives, parsers
        raise DataError(
            f"{name}: cannot be downloaded and prepared ({type(error).__name__}: "
            f"{str(error).strip()}); without network give a local file instead"
        ) from error
    folder = Path(builder.data_dir)
    files = _record_files(folder)
    if not files:
        raise DataError(
            f"{name}: {folder} holds no ArrayRecord files; prepare it anew with "
            "file_format='array_record'"
        )
    if re.split(r"[\[+]", split)[0] not in builder.info.splits:
        raise DataError(
            f"{name}: no such split; there are: {', '.join(sorted(builder.info.splits))}"
        )
    return Resolved(name, files, split)


@contextmanager
def _few_retries() -> Iterator[None]:
    """Ends a download without network after seconds: TFDS tries ten times, over minutes."""
    from tensorflow_datasets.core.download import downloader

    before = downloader.MAX_RETRIES
    downloader.MAX_RETRIES = 4
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before


def _read_data_set(folder: Path, split: str, name: str, fields: FieldNames) -> list[Problem]:
    if is_prepared(folder):
        source = open_prepared(folder, split)
        return [source[index] for index in range(len(source))]
    import tensorflow_datasets as tfds

    try:
        rows = tfds.builder_from_directory(folder).as_data_source(split)
        texts = [_plain(row) for row in rows]
    except Exception as error:  # damaged files and unknown features: each its own class
        raise DataError(f"{name}: {folder} cannot be read: {error}") from error
    stem = name.removeprefix("tfds:").replace("/", "-")
    return [
        problem_from_row(row, f"{name}, row {number}", f"{stem}-{number:06d}", fields)
        for number, row in enumerate(texts, start=1)
    ]


def _plain(value: Any) -> Any:
    """A record with text instead of bytes, lists and numbers instead of arrays."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
