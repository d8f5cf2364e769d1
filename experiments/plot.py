"""Draws runs: held-out accuracy and what else tells how they went, means over seeds.

    python -m experiments.plot runs/mine
    python -m experiments.plot runs/mine runs/other --out=comparison
    python -m experiments.plot runs/sweeps/methods --out=DIR

Each argument is the folder of a run, or one that holds such folders, as that of a sweep does. Runs
that differ in nothing but their seed (or in what does not change a step, such as the mesh) are one
line, the mean, with a band: the 95 % bootstrap interval from 5 seeds on, otherwise lowest to
highest. Runs alike in their seed, too, are lines of their own.

Panels: held-out accuracy against steps, sampled tokens and time; share of rows with an advantage
and of problems kept; entropy, KL, response length; seconds of each stage of a step. Of long runs
what is measured at every step is averaged over windows. Writes plot.png and plot.svg beside the
run, or to --out: a folder, or the name of the pictures without its ending.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.commands import guarded, parser
from experiments.folders import flat
from experiments.records import METRICS_FILE, read_metrics
from experiments.run_folder import CONFIG_FILE, FREE_TO_CHANGE
from experiments.run_pictures import Runs, plot_runs

# These do not change a step, but the curve.
LENGTHS = ("steps", "max_sampled_tokens")
FORMATS = (".png", ".svg")


class PlotError(ValueError):
    """Folders that cannot be drawn."""


@dataclass(frozen=True)
class Found:
    """One run.

    Attributes:
      folder: of the run.
      seed: of the run.
      settings: all others that make a difference, by dotted name.
      history: metrics of its steps.
    """

    folder: Path
    seed: int
    settings: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]


def find(folders: Sequence[Path]) -> list[Found]:
    """The runs in folders, each once, in their order.

    Raises:
      PlotError: a folder without runs, or whose runs have no metrics yet.
    """
    found: dict[Path, Found] = {}
    for folder in folders:
        if (folder / CONFIG_FILE).is_file():
            runs = [folder]
        else:
            runs = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
        if not runs:
            raise PlotError(f"{folder} is neither the folder of a run nor one that holds some")
        read = {path.resolve(): _read(path) for path in runs}
        if not any(run.history for run in read.values()):
            raise PlotError(f"{folder} has no metrics yet ({METRICS_FILE})")
        found |= {path: run for path, run in read.items() if run.history}
    return [*found.values()]


def _read(folder: Path) -> Found:
    path = folder / CONFIG_FILE
    try:
        settings = flat(json.loads(path.read_text()))
    except ValueError as error:
        raise PlotError(f"{path} is not valid JSON: {error}") from error
    seed = settings.pop("seed", 0)
    for name in {*FREE_TO_CHANGE} - {*LENGTHS}:
        settings.pop(name, None)
    return Found(folder, seed, settings, read_metrics(folder / METRICS_FILE))


def grouped(runs: Sequence[Found]) -> list[Runs]:
    """Runs that differ in their seed alone, together; in the order of the first of each."""
    groups: dict[str, list[Found]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    lines = []
    for group in groups.values():
        if len({run.seed for run in group}) == len(group):
            lines.append(Runs(group[0].settings, [run.history for run in group]))
        else:
            # The same run again, of another version of the program or on another machine.
            lines += [
                Runs({**run.settings, "run": run.folder.resolve().name}, [run.history])
                for run in group
            ]
    return lines


def paths_of(out: Path) -> list[Path]:
    """The pictures' paths: in a folder `plot.png` and `plot.svg`, otherwise with these endings."""
    stem = out / "plot" if out.is_dir() else out
    # A name may have a dot that begins no ending.
    stem = stem.with_suffix("") if stem.suffix in FORMATS else stem
    return [stem.with_name(stem.name + ending) for ending in FORMATS]


def main(arguments: argparse.Namespace) -> None:
    runs = find(arguments.runs)
    paths = paths_of(arguments.out or arguments.runs[0])
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    names = ", ".join(folder.resolve().name for folder in arguments.runs)
    plot_runs(paths, names, grouped(runs))
    for path in paths:
        print(path)


if __name__ == "__main__":
    made = parser(__doc__, "plot", quiet=None)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or sweep")
    made.add_argument(
        "--out", type=Path, metavar="DIR_OR_STEM",
        help="folder, or name without its ending, of the pictures (default: the first RUN)",
    )  # fmt: skip
    guarded(main, made.parse_args(), "give the same command again")
