"""The study of docs/study.md: its runs, their outcomes, its figure and tables.

    python -m experiments.study tune
    python -m experiments.study compare
    python -m experiments.study attention
    python -m experiments.study signal
    python -m experiments.study report

There are three comparisons; `--comparison=third` asks for the last. `tune` runs every method at
every learning rate, `compare` every method at its own with all seeds, one run after the other;
`attention` asks where attention points, `signal` how far gradients point uphill. Each goes on where
it was stopped and skips what has its outcome in experiments/results/study already: `--results=DIR`
begins anew in another folder. `tune` or `compare` given twice at the same time shares the runs out
(and makes their wall clock worthless). `report` writes tables and figure from the outcomes.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from absl import logging
from rich.console import Console

from experiments.commands import guarded, parser
from experiments.compass import open_policy
from experiments.plan import ROOT, Run, load_sweep, plan, shown
from experiments.results import log_path
from experiments.study import attention, report, signal
from experiments.study.outcomes import file_of, record
from experiments.study.policies import policy_of
from experiments.study.protocol import COMPARISONS, RESULTS, Protocol, name_of
from experiments.sweep import execute
from experiments.tasks import Policy
from experiments.terminal import make_console, working

# Of each comparison: what tunes, what compares.
SWEEPS = {
    "first": ("study_tuning.py", "study.py"),
    "second": ("study_second_tuning.py", "study_second.py"),
    "third": ("study_third_tuning.py", "study_third.py"),
}
PARTS = ("tune", "compare", "attention", "signal", "report")
CACHE = "JAX_COMPILATION_CACHE_DIR"


def run_all(sweep: Path, results: Path, workdir: Path, with_test: bool, console: Console) -> int:
    """Executes the runs of a sweep that have no outcome yet, and records each as it ends.

    Args:
      sweep: file of the sweep.
      results: folder of the outcomes.
      workdir: of the run folders.
      with_test: whether policies are asked the test's problems.
      console: shows a line for each run.

    Returns:
      how many runs failed.
    """
    runs = plan(load_sweep(sweep), workdir)
    failed = 0
    for number, run in enumerate(runs, 1):
        path = file_of(run, results)
        label = f"{number}/{len(runs)} {path.stem}"
        with claimed(run) as is_ours:
            # Another process may have recorded it in between.
            if not is_ours or path.exists():
                continue
            with working(console, f"{label}, output in {shown(log_path(run.folder))}"):
                if run.result().state != "finished":
                    execute(run)
                result = run.result()
                if result.state == "finished":
                    record(run, path, with_test)
        if result.state != "finished":
            failed += 1
            line = f"{label}  {result.state}; {shown(log_path(run.folder))} says why"
        else:
            first, last = result.points[0].accuracy, result.points[-1].accuracy
            tokens, seconds = result.sampled_tokens, result.seconds
            line = f"{label}  {first:.3f} -> {last:.3f}  {tokens:,} tokens, {seconds:.0f} s"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return failed


@contextmanager
def claimed(run: Run) -> Iterator[bool]:
    """Whether the run, and its recording, is this process's: one process of the study has it."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with run.folder.with_name(f".{run.folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def policies(workdir: Path, protocol: Protocol) -> dict[str, Callable[[], Policy]]:
    """What opens the policies that questions are asked: the pretrained one, and the one that AttnRL
    made of it with the comparison's first seed, once that run has ended.

    Args:
      workdir: of the comparison's runs.
      protocol: of the comparison.
    """
    found: dict[str, Callable[[], Policy]] = {"pretrained": open_policy}
    [which] = [name for name, one in COMPARISONS.items() if one is protocol]
    for run in plan(load_sweep(_sweep(SWEEPS[which][1])), workdir / "compare"):
        ours = name_of(run.overrides) == report.OURS
        first = run.overrides["seed"] == protocol.seeds[0]
        if ours and first and run.result().state == "finished":
            found["after AttnRL"] = functools.partial(policy_of, run.folder)
    return found


def _sweep(name: str) -> Path:
    return ROOT / "experiments" / "sweeps" / name


def main(arguments: argparse.Namespace) -> None:
    console = make_console(arguments.quiet)
    protocol = COMPARISONS[arguments.comparison]
    results, workdir = arguments.results, arguments.workdir.absolute()
    own, runs = results / protocol.folder, workdir / protocol.folder
    # Of the runs, which are processes of their own.
    os.environ.setdefault(CACHE, str(workdir / "compiled"))
    if arguments.part == "report":
        text = report.write(own, protocol)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif arguments.part == "attention":
        attention.write(own, policies(runs, protocol), console)
    elif arguments.part == "signal":
        signal.write(own, policies(runs, protocol), console)
    else:
        tuned = arguments.part == "tune"
        tuning, comparison = SWEEPS[arguments.comparison]
        sweep = _sweep(tuning if tuned else comparison)
        folder = own / ("tuning" if tuned else "comparison")
        failed = run_all(sweep, folder, runs / arguments.part, not tuned, console)
        if failed:
            print(f"error: {failed} runs failed", file=sys.stderr)
            sys.exit(1)


def command() -> None:
    """The command line."""
    made = parser(__doc__, "study")
    made.add_argument("part", choices=PARTS)
    made.add_argument(
        "--comparison", choices=(*COMPARISONS,), default="first", help="which of them"
    )
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the outcomes")
    made.add_argument(
        "--workdir", type=Path, default=Path("runs") / "study", help="folder of the runs"
    )
    # Orbax warns of what is meant here, folders that are only read.
    logging.set_verbosity(logging.ERROR)
    guarded(main, made.parse_args(), "the same command continues the study")


if __name__ == "__main__":
    command()
