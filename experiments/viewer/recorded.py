"""What a run folder has recorded, as far as the viewer shows it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.records import METRICS_FILE, read_metrics


class ViewError(ValueError):
    """A run folder that cannot be shown."""


@dataclass(frozen=True)
class Recorded:
    """A run folder.

    Attributes:
      folder: where it lies.
      config: its settings.
      history: its metrics, step by step.
      files: of the steps whose trees it has, ascending.
    """

    folder: Path
    config: dict[str, Any]
    history: list[dict[str, float]]
    files: dict[int, Path]

    @property
    def accuracies(self) -> list[tuple[int, float]]:
        """Step and accuracy of every held-out evaluation."""
        name = "held_out/accuracy"
        found = [(int(m["step"]), float(m[name])) for m in self.history if name in m]
        return [(step, accuracy) for step, accuracy in found if math.isfinite(accuracy)]


def open_run(folder: str | Path) -> Recorded:
    """Looks at what a run folder has; its trees are read later.

    Raises:
      ViewError: it is no run folder, or has no trees.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ViewError(f"{folder} is no run folder: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("no JSON object")
    except (ValueError, TypeError) as error:
        raise ViewError(f"{path} is not the configuration of a run: {error}") from error
    files = {}
    for file in sorted((folder / "trees").glob("step_*.json")):
        number = file.stem.removeprefix("step_")
        if number.isdecimal():
            files[int(number)] = file
    if not files:
        raise ViewError(
            f"{folder} has no trees yet: a run writes them after each training step, unless "
            "trees.per_step is 0"
        )
    return Recorded(folder, config, read_metrics(folder / METRICS_FILE), files)


def read_step(file: Path) -> list[dict[str, Any]]:
    """The problems of a step, as `experiments.trees` records them.

    Raises:
      ViewError: the file is damaged, or of an earlier version.
    """
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(recorded, dict) or not isinstance(recorded.get("problems"), list):
            raise TypeError("it has no list of problems; runs of earlier versions are not shown")
        for problem in recorded["problems"]:
            _check(problem)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ViewError(f"{file} cannot be shown: {_said(error)}") from error
    return recorded["problems"]


def _check(problem: dict[str, Any]) -> None:
    """Whether what the page reads is there; what it says is shown as text, whatever it is."""
    _ = problem["problem"]["id"], problem["problem"]["text"], problem["problem"]["answers"]
    roots = {leaf["row"] for leaf in problem["leaves"] if leaf["row"] == leaf["root"]}
    for leaf in problem["leaves"]:
        if leaf["root"] not in roots:
            raise ValueError(f"leaf {leaf['row']} continues leaf {leaf['root']}, which is none")
        for name in ("split", "length", "reward"):
            if not isinstance(leaf[name], int | float):
                raise TypeError(f"{name} of leaf {leaf['row']} is {leaf[name]!r}")
        for step in leaf["steps"]:
            _ = step["text"], step["start"], step["end"], step["fci"], step["version"]
        for segment in leaf["segments"]:
            _ = segment["start"], segment["end"], segment["value"], segment["leaves"]
            _ = segment["advantage"]


def _said(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
