"""Prepares problems once: read, cleaned, and written as a data set of tensorflow-datasets."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attnrl_jax.datasets.cleaning import CleaningConfig, CleaningReport, PromptLimit, clean
from attnrl_jax.datasets.files import USUAL_FIELDS, FieldNames
from attnrl_jax.datasets.names import Resolved, read_held_out, resolve
from attnrl_jax.datasets.prepared import (
    FORMAT,
    is_prepared,
    read_metadata,
    read_report,
    to_record,
)
from attnrl_jax.tasks.problems import DataError, Problem

_VERSION = "1.0.0"  # of the builder: what changes with the content is the name of its config
_CLEAN_ALL = CleaningConfig()


@dataclass(frozen=True)
class Prepared:
    """Problems that are ready to be read.

    Attributes:
      folder: of this version, `OUT/problems/HASH/1.0.0`.
      report: of cleaning, when they were prepared.
      cached: whether they were there already.
    """

    folder: Path
    report: CleaningReport
    cached: bool


def prepare(
    names: Sequence[str],
    out: str | Path,
    *,
    fields: FieldNames = USUAL_FIELDS,
    cleaning: CleaningConfig = _CLEAN_ALL,
    benchmarks: Sequence[str] = (),
    prompt_limit: PromptLimit | None = None,
    prompt_version: str = "",
    held_out: int = 0,
) -> Prepared:
    """Cleans problems and writes them as ArrayRecord, unless that was done before.

    The folder is named by a hash of everything the result depends on: the contents and names of
    all files, and the arguments. The same input is therefore prepared once, another input becomes
    another folder beside it, and nothing is overwritten. The folder appears when all is written:
    a process that dies leaves nothing that counts as prepared, and of two that prepare the same
    problems at once one finds the other's folder.

    Splits: `train`, in the order of the sources, and, with `held_out`, `held_out`: the problems
    with the least hash of their text, whatever the order of the files. What overlaps with them, as
    with a benchmark, is removed from `train`.

    Args:
      names: of the sources, as `attnrl_jax.datasets.names.resolve` takes them; in this order.
      out: folder that holds every version.
      fields: names of the fields of `names`' files; benchmarks have the same or the usual ones.
      cleaning: which faults are removed.
      benchmarks: names of problems that training problems must not overlap.
      prompt_limit: longest prompt.
      prompt_version: identifies how `prompt_limit` measures (`tasks.prompts.prompt_version`).
      held_out: problems to set aside, at most a fifth of all.

    Raises:
      DataError: a source that cannot be used, no problems left, too few to set some aside, or a
        damaged version in `out`.
      ValueError: no names, a negative `held_out`, a `prompt_limit` without `prompt_version`.
    """
    if not names:
        raise ValueError("no names of problems to prepare were given")
    if held_out < 0:
        raise ValueError(f"held_out must not be negative, got {held_out}")
    if prompt_limit is not None and not prompt_version:
        raise ValueError("prompt_limit needs prompt_version, which tells its prompts from others")
    sources = [resolve(name) for name in names]
    against = [resolve(name) for name in benchmarks]
    settings = {
        "format": FORMAT,
        "fields": dataclasses.asdict(fields),
        "cleaning": dataclasses.asdict(cleaning),
        "prompt_tokens": prompt_limit.tokens if prompt_limit else None,
        "prompt_version": prompt_version if prompt_limit else "",
        "held_out": held_out,
    }
    described = {
        "sources": [_describe(source) for source in sources],
        "benchmarks": [_describe(source) for source in against],
    }
    folder = Path(out).absolute() / "problems" / _version_name(settings, described) / _VERSION
    if is_prepared(folder):
        return _cached(folder)
    problems = [problem for source in sources for problem in source.read(fields)]
    kept, report = clean(problems, cleaning, _benchmark_problems(against, fields), prompt_limit)
    if not kept:
        removed = ", ".join(f"{fault} {rows}" for fault, rows in report.removed.items() if rows)
        limit = f" (prompts may have {prompt_limit.tokens} tokens)" if prompt_limit else ""
        raise DataError(
            f"{', '.join(names)}: cleaning leaves none of {report.read} problems; "
            f"removed: {removed}{limit}"
        )
    splits = {"train": kept}
    if held_out:
        splits, report = _set_aside(kept, report, held_out, cleaning, ", ".join(names))
    metadata = {
        "attnrl_jax": FORMAT,
        "prepared": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        **described,
        "problems": {split: len(rows) for split, rows in splits.items()},
        "report": report.to_dict(),
    }
    try:
        written = _write(Path(out).absolute(), folder, splits, metadata)
    except OSError as error:
        if not is_prepared(folder):  # else another process was faster, and its result is the same
            raise DataError(f"{out}: cannot be prepared into: {error}") from error
        written = False
    return Prepared(folder, report, cached=False) if written else _cached(folder)


def _cached(folder: Path) -> Prepared:
    read_metadata(folder)  # refuses damaged files here, not in the middle of a run
    return Prepared(folder, read_report(folder), cached=True)


def _describe(source: Resolved) -> dict[str, Any]:
    """What a source is: its name and split, and each file with its size and hash."""
    files = [
        {"name": path.name, "bytes": path.stat().st_size, "blake2b": _file_hash(path)}
        for path in source.files
    ]
    return {"name": source.name, "split": source.split, "files": files}


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _version_name(settings: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    # A file's name is part of its problems' ids; where it lies, and by which name it was asked
    # for, is not part of the content.
    content = {
        role: [{**source, "name": ""} for source in sources] for role, sources in described.items()
    }
    text = json.dumps([settings, content], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _benchmark_problems(
    sources: Sequence[Resolved], fields: FieldNames
) -> dict[str, list[Problem]]:
    """Problems by benchmark: each local file is one, anything else goes by its name."""
    named: dict[str, list[Problem]] = {}
    for source in sources:
        for name, problems in read_held_out(source, fields):
            name = f"{source.name}: {name}" if name in named else name
            named.setdefault(name, []).extend(problems)
    return named


def _set_aside(
    problems: list[Problem],
    report: CleaningReport,
    held_out: int,
    cleaning: CleaningConfig,
    where: str,
) -> tuple[dict[str, list[Problem]], CleaningReport]:
    """Splits cleaned problems; what overlaps with those set aside is in neither split."""
    by_hash = sorted(problems, key=_text_hash)
    aside = by_hash[: min(held_out, len(problems) // 5)]
    if not aside:
        raise DataError(
            f"{where}: {len(problems)} problems are too few to set held-out ones "
            "aside; give held-out problems of their own"
        )
    chosen = set(map(id, aside))
    rest = [problem for problem in problems if id(problem) not in chosen]
    train, against = clean(rest, only_overlap(cleaning), {"held_out": aside})
    if not train:
        raise DataError(f"{where}: every problem overlaps with one that is set aside")
    overlapping = len(rest) - len(train)
    report = dataclasses.replace(
        report,
        kept=report.kept - overlapping,
        found=report.found | {"overlap": report.found.get("overlap", 0) + overlapping},
        removed=report.removed | {"overlap": report.removed.get("overlap", 0) + overlapping},
        benchmarks=report.benchmarks | against.benchmarks,
    )
    return {"train": train, "held_out": aside}, report


def only_overlap(cleaning: CleaningConfig) -> CleaningConfig:
    """The same check of overlap, and nothing else."""
    off = {name: False for name, value in dataclasses.asdict(cleaning).items() if value is True}
    return dataclasses.replace(cleaning, **off)


def _text_hash(problem: Problem) -> tuple[bytes, str]:
    text = problem.text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text).digest(), problem.id


def _write(
    out: Path, folder: Path, splits: Mapping[str, list[Problem]], metadata: dict[str, Any]
) -> bool:
    """Writes one version; `folder` appears, complete, at the end. False if it was there before."""
    import tensorflow_datasets as tfds

    class Problems(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Problems in the order given."""

        VERSION = tfds.core.Version(_VERSION)
        # Checksums of downloads, of which there are none: looking for the file that lists them
        # needs a package (importlib_resources) that is not always installed.
        url_infos = None
        written = False

        def _info(self) -> Any:
            text = tfds.features.Text
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "id": text(),
                        "problem": text(),
                        "answers": tfds.features.Sequence(text()),
                        "level": text(),
                    }
                ),
                metadata=tfds.core.MetadataDict(metadata),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {name: self._generate_examples(rows) for name, rows in splits.items()}

        def _generate_examples(self, problems: list[Problem]) -> Iterator[tuple[int, Any]]:
            for number, problem in enumerate(problems):
                yield number, to_record(problem)

        def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
            super()._download_and_prepare(*args, **kwargs)
            self.written = True
            # Written with the data, so that files cut short later are found when opened.
            self.info.metadata["files"] = {
                path.name: path.stat().st_size for path in sorted(Path(self.data_dir).iterdir())
            }

        def _log_download_bytes(self) -> None: ...

        def _log_download_done(self) -> None: ...

    with _quiet(), tempfile.TemporaryDirectory() as downloads:
        config = tfds.core.BuilderConfig(name=folder.parent.name, version=_VERSION)
        builder = Problems(data_dir=out, config=config)
        if Path(builder.data_dir) != folder:
            raise RuntimeError(f"tensorflow-datasets writes to {builder.data_dir}, not {folder}")
        builder.download_and_prepare(
            file_format="array_record",
            download_dir=downloads,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    return builder.written


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and log lines of tensorflow-datasets."""
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)
