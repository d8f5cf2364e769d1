"""From a sweep file to its runs: loaded, checked, named, each as a command line."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.commands import without_traceback
from experiments.folders import FolderError
from experiments.parts import Parts, load_parts, with_parts
from experiments.results import Result, log_path, read_result
from experiments.run_folder import check_same_run
from experiments.settings import build

ROOT = Path(__file__).resolve().parents[1]
LONGEST_NAME = 150


class SweepError(ValueError):
    """A sweep that cannot be run as it is written."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      overrides: what sets it apart, by name of the setting (without what all runs override).
      arguments: of `experiments.run`, without the folder.
      config: its whole configuration.
      folder: of the run; its name is made from the overrides.
    """

    overrides: dict[str, Any]
    arguments: tuple[str, ...]
    config: ConfigDict
    folder: Path

    @property
    def command(self) -> list[str]:
        """The command line, from the present folder."""
        program = shown(Path(sys.executable))
        folder = f"--workdir={shown(self.folder)}"
        return [program, "-m", "experiments.run", *self.arguments, folder]

    def result(self) -> Result:
        """What its folder says now."""
        limits = self.config.steps, self.config.max_sampled_tokens
        return read_result(self.folder, self.overrides, *limits)


def shown(path: Path) -> str:
    """Relative to the present folder if inside it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes:
      config: its configuration file as `experiments.run` takes it.
      common: what every run overrides.
      entries: what each run overrides besides.
    """

    config: str
    common: dict[str, Any]
    entries: list[dict[str, Any]]


def load_sweep(path: Path) -> Sweep:
    """Executes a sweep file.

    Args:
      path: of the Python file, with `CONFIG`, `get_sweep()` and, if it likes, `COMMON`.

    Raises:
      SweepError: it is no sweep, or fails.
    """
    if not path.is_file():
        raise SweepError(f"no sweep file at {path}")
    spec = importlib.util.spec_from_file_location("sweep_file", path)
    if spec is None or spec.loader is None:
        raise SweepError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config, common = module.CONFIG, getattr(module, "COMMON", {})
        entries = list(module.get_sweep())
    except Exception as error:
        raise SweepError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, str):
        raise SweepError(f"{path}: CONFIG must be a path; got {config!r}")
    if not entries:
        raise SweepError(f"{path}: get_sweep() yields no runs")
    file, colon, argument = config.partition(":")
    found = Path(file) if Path(file).is_absolute() else ROOT / file
    if not found.is_file():
        raise SweepError(f"{path}: CONFIG: no file at {found}")
    return Sweep(
        f"{shown(found)}{colon}{argument}",
        _overrides("COMMON", common),
        [_overrides(f"run {number}", entry) for number, entry in enumerate(entries, 1)],
    )


def _overrides(place: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise SweepError(f"{place} must be a dict from settings to values; got {given!r}")
    # np.logspace and the like.
    plain = {n: v.item() if isinstance(v, np.generic) else v for n, v in given.items()}
    for name, value in plain.items():
        parts = value if isinstance(value, tuple | list) else [value]
        if any(isinstance(part, float | np.floating) and math.isnan(part) for part in parts):
            raise SweepError(f"{place}: {name} must not be nan; got {value!r}")
    return plain


def plan(sweep: Sweep, workdir: Path) -> list[Run]:
    """Checks every run and makes its command line. Nothing is written.

    Args:
      sweep: as loaded.
      workdir: of the sweep.

    Returns:
      the runs, in the order of `sweep.entries`.

    Raises:
      SweepError: an override is unknown, wrong, contradicts another or cannot be written on a
        command line, or two runs are equal; with the number of the run (from 1) and the override.
    """
    runs: list[Run] = []
    settings: list[Any] = []
    parts = _parts(sweep.config)
    for number, overrides in enumerate(sweep.entries, 1):
        place = f"run {number} ({_words(overrides)})"
        if twice := sorted(sweep.common.keys() & overrides.keys()):
            raise SweepError(f"{place}: {', '.join(twice)} is also in COMMON")
        every = sweep.common | overrides
        made = _configured(sweep.config, every, place)
        arguments = _arguments(sweep.config, every, place)
        passed = _parsed(arguments, place)
        for name, value in every.items():
            if _get(passed, name) != _get(made, name):
                raise SweepError(
                    f"{place}: {name}={value!r} cannot be given on a command line (it would be "
                    f"{_get(passed, name)!r}); set it in a configuration file"
                )
        try:
            passed = with_parts(passed, parts)
            built = build(passed)
        except ValueError as error:
            raise SweepError(f"{place}: {error}") from error
        if built in settings:
            raise SweepError(f"{place} is the same run as run {settings.index(built) + 1}")
        folder = workdir / run_name(overrides)
        # What is called like another run with `.log` behind it would be in that one's place.
        taken = {path for run in runs for path in (run.folder, log_path(run.folder))}
        if clash := sorted({folder, log_path(folder)} & taken):
            raise SweepError(f"{place}: another run has the same folder or log, {clash[0]}")
        settings.append(built)
        runs.append(Run(dict(overrides), tuple(arguments), passed, folder))
    return runs


def _parts(file: str) -> Parts:
    try:
        return load_parts(file)
    except Exception as error:  # the file is the user's, and may raise anything
        raise SweepError(f"{file}: {without_traceback(str(error)) or error!r}") from error


def _words(overrides: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value!r}" for name, value in overrides.items()) or "no overrides"


def _parsed(arguments: Sequence[str], place: str) -> ConfigDict:
    """The configuration that `experiments.run` makes of its arguments, by the same library."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "", flag_values=values, sys_argv=["run", *arguments]
    )
    try:
        values(["run", *arguments])
        config = values["config"].value
        if not isinstance(config, ConfigDict):
            raise SweepError(f"{arguments[0]}: get_config() must return a ConfigDict")
    except Exception as error:
        raise SweepError(f"{place}: {without_traceback(str(error))}") from error
    return config


def _configured(file: str, overrides: Mapping[str, Any], place: str) -> ConfigDict:
    """The configuration with the overrides put in as they are."""
    config = _parsed([f"--config={file}"], place)
    for name, value in overrides.items():
        *groups, leaf = name.split(".")
        section: Any = config
        for group in groups:
            section = section.get(group) if isinstance(section, ConfigDict) else None
        if not isinstance(section, ConfigDict) or leaf not in section:
            near = section if isinstance(section, ConfigDict) else None
            known = [".".join([*groups, key]) for key in near] if near else [*config]
            raise SweepError(f"{place}: unknown setting {name}; known: {', '.join(sorted(known))}")
        if isinstance(section[leaf], ConfigDict):
            inner = next(iter(section[leaf]), "...")
            raise SweepError(
                f"{place}: {name} is a group of settings, override each: {name}.{inner}=..."
            )
        try:
            section[leaf] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError) as error:
            raise SweepError(
                f"{place}: {name} must be {section.get_type(leaf).__name__}; got {value!r}"
            ) from error
    return config


def _get(config: ConfigDict, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value[part]
    return value


def _arguments(config: str, overrides: Mapping[str, Any], place: str) -> list[str]:
    """Overrides as flags. There is no flag for None: it is left to the configuration file."""
    made = [f"--config={config}"]
    for name, value in overrides.items():
        if value is not None:
            text = str(tuple(value) if isinstance(value, list) else value)
            if "\0" in text:
                raise SweepError(f"{place}: {name} has a zero byte, which no command line can hold")
            made.append(f"--config.{name}={text}")
    return made


def run_name(overrides: Mapping[str, Any]) -> str:
    """Name of a run's folder: its overrides in alphabetical order, the seed last.

    It depends on the run alone, so that a sweep may be reordered and extended. Values that are no
    numbers or plain words, and names that are too long, are shortened and told apart by a digest.

    Args:
      overrides: of the run.
    """
    order = sorted(overrides, key=lambda name: (name == "seed", name))
    name = ",".join(f"{name}={_value_name(overrides[name])}" for name in order)
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{_digest(name)}"
    return name or "default"


def _value_name(value: Any) -> str:
    numbers = isinstance(value, tuple | list) and all(type(v) in (int, float) for v in value)
    text = "_".join(map(str, value)) if numbers else str(value)
    safe = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
    return safe if safe == text and len(text) <= 60 else f"{safe[:60]}-{_digest(repr(value))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def check_folders(runs: Iterable[Run]) -> None:
    """Folders of these names must be of these runs: results are never mixed.

    Raises:
      SweepError: the sweep or its configuration file has changed since; with the differences.
    """
    for run in runs:
        try:
            check_same_run(run.folder, run.config)
        except FolderError as error:
            raise SweepError(f"{error}. Give the changed sweep another --workdir") from error
