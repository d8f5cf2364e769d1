"""A long run: does its memory grow, does it compile again, do its files grow?

    python -m experiments.soak --minutes=60 \\
        --out=experiments/soak_results/default.json

Runs the default task with small steps, so that there are many of them, ends it as a scheduler would
(SIGTERM), and reports what the run folder says. Exit code 1 where the resident set grew by more
than 2 % after warm-up, a program was compiled after it, or the files of the run are larger than so
many steps account for; what is wrong is the last line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import commands
from experiments.folders import write_atomically
from experiments.records import METRICS_FILE, MOST_TREES, read_metrics
from experiments.terminal import is_live, make_console, working

# Steps of a few seconds, evaluations and checkpoints between them.
SETTINGS = (
    "steps=1000000", "num_problems=4", "data.held_out_size=64", "eval_every=50",
    "checkpoint_every=20", "batch_size.bounds=(0.5,2.0)", "memory.every_size=True",
)  # fmt: skip
# Share of the steps that count as warm-up: programs are compiled, caches fill.
WARM_UP = 0.1
MOST_GROWTH = 0.02
# Of a step, in the files that grow with every one.
MOST_BYTES_PER_STEP = {METRICS_FILE: 4096, "tensorboard": 4096}
# The newest two, the best, and one that is being written.
MOST_CHECKPOINTS = 4
# Seconds that a run may take to end.
PATIENCE = 300.0


class SoakError(RuntimeError):
    """A run that did not get as far as to be measured."""


def soak(
    minutes: float, workdir: Path, console: Console, settings: Sequence[str] = SETTINGS
) -> None:
    """Runs for so long in a process of its own, and ends it by SIGTERM.

    Raises:
      SoakError: it ended otherwise.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.run", f"--workdir={workdir / 'run'}"]
    command += [f"--config.{setting}" for setting in settings]
    label = f"running for {minutes:g} minutes, output in {workdir / 'log'}"
    with (workdir / "log").open("w") as log, working(console, label) as say:
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + 60 * minutes
        while running.poll() is None and (left := end - time.monotonic()) > 0:
            # Only a display that is drawn anew has room for every step.
            if is_live(console):
                say(f"{label}, {len(read_metrics(workdir / 'run' / METRICS_FILE))} steps so far")
            with suppress(subprocess.TimeoutExpired):
                running.wait(timeout=min(left, 10.0))
        if running.poll() is None:
            running.send_signal(signal.SIGTERM)
        code = _wait(running, workdir / "log")
    if code != 128 + signal.SIGTERM:
        raise SoakError(f"the run ended with exit code {code}; its output is in {workdir / 'log'}")


def _wait(running: subprocess.Popen[bytes], log: Path, patience: float = PATIENCE) -> int:
    """Exit code of a run that is to end; one that does not is killed.

    Raises:
      SoakError: it had to be.
    """
    try:
        return running.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
        raise SoakError(
            f"the run had not ended {patience:.0f} s after SIGTERM, and was killed; its output is "
            f"in {log}"
        ) from None


def measure(folder: Path) -> dict[str, Any]:
    """What a run folder says of memory, compilations and files.

    Args:
      folder: of the run.

    Raises:
      SoakError: it has fewer than 100 steps.
    """
    history = read_metrics(folder / METRICS_FILE)[1:]
    if len(history) < 100:
        raise SoakError(f"{folder} has {len(history)} steps; at least 100 are needed")
    first = int(WARM_UP * len(history))
    after = history[first:]
    resident = np.array([m["process/resident_gib"] for m in after])
    third = len(resident) // 3
    begin, end = float(resident[:third].mean()), float(resident[-third:].mean())
    compiled = np.array([m["process/compilations"] for m in history])
    checkpoints = [path for path in (folder / "checkpoints").iterdir() if path.is_dir()]
    sizes = {name: _size(folder / name) for name in ("checkpoints", "trees", "tensorboard")}
    sizes[METRICS_FILE] = (folder / METRICS_FILE).stat().st_size
    return {
        "steps": len(history),
        "seconds": round(sum(m["seconds/step"] for m in history), 1),
        "warm_up_steps": first,
        "resident_gib_first_third": round(begin, 4),
        "resident_gib_last_third": round(end, 4),
        "resident_gib_largest": round(float(resident.max()), 4),
        "resident_growth": round(end / begin - 1, 4),
        "compilations_in_warm_up": int(compiled[:first].sum()),
        "compilations_after": int(compiled[first:].sum()),
        "last_step_that_compiled": int(np.flatnonzero(compiled).max(initial=-1)) + 1,
        "bytes": sizes,
        "bytes_per_step": {
            name: round(sizes[name] / len(history)) for name in (METRICS_FILE, "tensorboard")
        },
        "checkpoints": len(checkpoints),
        "trees": len(list((folder / "trees").iterdir())),
        "skipped_steps": int(history[-1]["step/skipped_total"]),
    }


def _size(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def faults(measured: dict[str, Any]) -> list[str]:
    """What grew that must not; empty where all is well."""
    found = []
    if (growth := measured["resident_growth"]) > MOST_GROWTH:
        found.append(f"the resident set grew by {100 * growth:.1f} %")
    if compiled := measured["compilations_after"]:
        found.append(f"{compiled} programs were compiled after warm-up")
    for name, most in MOST_BYTES_PER_STEP.items():
        if (per_step := measured["bytes_per_step"][name]) > most:
            found.append(f"{name} grew by {per_step} bytes a step, more than {most}")
    if (number := measured["checkpoints"]) > MOST_CHECKPOINTS:
        found.append(f"{number} checkpoints are kept, more than {MOST_CHECKPOINTS}")
    if (number := measured["trees"]) > MOST_TREES:
        found.append(f"{number} files of trees are kept, more than {MOST_TREES}")
    return found


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        workdir = arguments.workdir or Path(temporary)
        begin = time.monotonic()
        soak(arguments.minutes, workdir, make_console(arguments.quiet, stderr=True))
        measured = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "python": platform.python_version(),
            "minutes": round((time.monotonic() - begin) / 60, 1),
            "settings": list(SETTINGS),
        } | measure(workdir / "run")
    text = json.dumps(measured, indent=2)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.out, text + "\n")
    if found := faults(measured):
        print(f"error: {'; '.join(found)}", file=sys.stderr)
        sys.exit(1)


def command() -> None:
    """The command line."""
    parser = commands.parser(__doc__, "soak", "show nothing but errors and what was measured")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long the run goes on")
    parser.add_argument("--workdir", type=Path, help="keeps the run folder here")
    parser.add_argument("--out", type=Path, help="JSON file of what was measured")
    commands.guarded(main, parser.parse_args(), "give the same command again")


if __name__ == "__main__":
    command()
