"""Runs a sweep, one run after the other, and gathers a table and curves of its results.

    python -m experiments.sweep --config=experiments/sweeps/methods.py
    python -m experiments.sweep --config=experiments/sweeps/methods.py --print
    python -m experiments.sweep --config=experiments/sweeps/methods.py --index=3
    python -m experiments.sweep --config=experiments/sweeps/methods.py --gather

The same command continues a sweep that was stopped: what has finished is skipped, what was stopped
goes on in its folder. A run that fails costs that run; its output is in the `.log` beside its
folder. Exit code 1 says that some failed; a run that is going on in another process is left to it.
`--print` writes the commands for a cluster, `--index` runs one of them (array jobs), `--gather`
then makes the table. With the environment variable JAX_COMPILATION_CACHE_DIR=DIR all runs share
their compiled programs.

A sweep is a Python file with `CONFIG`, a configuration file (a relative path is one in the
project; `FILE.py:ARGUMENT` as for experiments.run), `get_sweep()`, which yields what each run
overrides, and if need be `COMMON`, what all of them override:

    CONFIG = "experiments/configs/attnrl_graph.py"
    COMMON = {"steps": 20}

    def get_sweep():
        return grid(method=["attnrl", "grpo"], seed=range(5))

Runs that differ in `seed` alone are repetitions: their mean and spread are shown.
"""

from __future__ import annotations

import argparse
import fcntl
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from experiments.commands import guarded, parser
from experiments.plan import Run, SweepError, check_folders, load_sweep, plan, shown
from experiments.results import EXIT_CODE, Result, log_path, write_results
from experiments.terminal import make_console, working


def execute(run: Run) -> int:
    """Runs, or continues, one run in a process of its own; its output goes to its log.

    Args:
      run: to execute.

    Returns:
      exit code of the process, negative if a signal killed it.

    Raises:
      KeyboardInterrupt: after the process has ended as well.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with log_path(run.folder).open("a") as log:
        log.write(f"$ {shlex.join(run.command)}\n")
        log.flush()
        process = subprocess.Popen(
            run.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait()
        except KeyboardInterrupt as stopped:
            try:
                _end(process, at_once=isinstance(stopped, Terminated))
            finally:
                # A second Ctrl-C does not wait.
                process.kill()
            raise
        # One that found its folder in use has not failed: the log is of the process that holds it.
        if code == 0 or not in_use(run.folder):
            log.write(EXIT_CODE.format(code) + "\n")
    return code


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send to the sweep alone."""


def _end(process: subprocess.Popen, at_once: bool) -> None:
    """Ends a run as Ctrl-C does; then, should it not, by force."""
    if at_once:
        process.terminate()
    # A terminal has sent Ctrl-C to the run as well. A second one would disturb its saving.
    for seconds, send in ((60, process.send_signal), (30, lambda _: process.kill())):
        try:
            process.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            send(signal.SIGINT)
    process.wait()


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds the folder of a sweep: two sweeps would run, and write, the same.

    Raises:
      SweepError: another sweep holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SweepError(
                f"another sweep is going on in {workdir}; --gather shows what it has so far, "
                "--index runs one run beside it"
            ) from error
        yield


def in_use(folder: Path) -> bool:
    """Whether a process holds a run folder, as `experiments.run` does while it runs."""
    path = folder / ".lock"
    if not path.exists():
        return False
    with path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def execute_all(
    runs: Sequence[Run], numbers: Sequence[int], console: Console, stop_on_error: bool
) -> tuple[list[int], list[int]]:
    """Executes runs in turn and prints a line for each.

    Args:
      runs: of the sweep.
      numbers: which of them, from 1.
      console: shows the lines.
      stop_on_error: do nothing more after a run that failed.

    Returns:
      numbers of the runs that failed, and of those that another process is running.
    """
    failed: list[int] = []
    running: list[int] = []
    for number in numbers:
        run = runs[number - 1]
        label = f"{number:>{len(str(len(runs)))}}/{len(runs)} {run.folder.name}"
        begin = time.monotonic()
        code, took = 0, "skipped"
        if run.result().state != "finished" and not in_use(run.folder):
            with working(console, f"{label}  running, output in {shown(log_path(run.folder))}"):
                code = execute(run)
            took = _duration(time.monotonic() - begin)
        result = run.result()
        if result.state != "finished" and in_use(run.folder):
            running.append(number)
            result, took = replace(result, state="running"), "in another process"
        line = f"{label}  {result.state}  {_outcome(result)}  {took}"
        if result.state != "running" and (code != 0 or result.state != "finished"):
            failed.append(number)
            line += f"\n    {_reason(run, code)}"
            if console.quiet:
                print(line, file=sys.stderr)
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        if failed and stop_on_error:
            break
    return failed, running


def _outcome(result: Result) -> str:
    if not result.points:
        return "-"
    return f"{result.points[0].accuracy:.3f} -> {result.points[-1].accuracy:.3f}"


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left} s" if minutes else f"{left} s"


def _reason(run: Run, code: int) -> str:
    """Why a run failed, in a line, and where the rest is."""
    log = log_path(run.folder)
    lines: list[str] = []
    for line in log.read_text(errors="replace").splitlines()[:-1] if log.exists() else ():
        if line.startswith("$ "):
            # Earlier attempts failed for reasons of their own.
            lines.clear()
        elif line.strip():
            lines.append(line)
    errors = [line for line in lines if line.startswith("error:")]
    last = (errors or lines or ["no output"])[-1]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    if code == 0:
        how = "it ended before its last step"
    return f"{how}; {last.strip()[:300]} ({shown(log)})"


def _write(workdir: Path, name: str, results: Sequence[Result], console: Console) -> None:
    text = write_results(workdir, name, results)
    console.print(f"\n{text}", markup=False, highlight=False, soft_wrap=True, end="")
    print(f"results are in {shown(workdir)}")


def run_all(
    runs: Sequence[Run],
    workdir: Path,
    name: str,
    console: Console,
    stop_on_error: bool = False,
) -> list[int]:
    """Executes the runs of a sweep that have not finished, and writes table and figure.

    Args:
      runs: of `experiments.plan.plan`.
      workdir: of the sweep.
      name: of the sweep.
      console: shows a line for each run, then the table.
      stop_on_error: do nothing more after a run that failed.

    Returns:
      numbers of the runs that failed, from 1.

    Raises:
      SweepError: another sweep is going on in the folder.
    """
    with held(workdir):
        failed, running = execute_all(runs, range(1, len(runs) + 1), console, stop_on_error)
        results = [run.result() for run in runs]
        for number in running:
            if results[number - 1].state != "finished":
                results[number - 1] = replace(results[number - 1], state="running")
        _write(workdir, name, results, console)
    return failed


def main(arguments: argparse.Namespace) -> None:
    console = make_console(arguments.quiet)
    name = arguments.config.stem
    workdir = (arguments.workdir or Path("runs") / "sweeps" / name).absolute()
    runs = plan(load_sweep(arguments.config), workdir)
    numbers: Sequence[int] = range(1, len(runs) + 1)
    if arguments.index is not None:
        if arguments.index not in numbers:
            raise SweepError(f"--index must be within 1 .. {len(runs)}; got {arguments.index}")
        if arguments.gather:
            raise SweepError("--gather is of all runs: leave out --index")
        numbers = [arguments.index]
    if arguments.print:
        commands = {number: shlex.join(runs[number - 1].command) for number in numbers}
        for number, line in commands.items():
            # The jobs of an array read a line each.
            if len(line.splitlines()) > 1:
                raise SweepError(
                    f"run {number} cannot be printed: a value has a line break, and a command "
                    f"must be one line; --index={number} runs it"
                )
        print("\n".join(commands.values()))
        return
    check_folders(runs[number - 1] for number in numbers)
    if arguments.index is not None:
        # Several jobs of an array would write over each other: the table is left to --gather.
        failed, _ = execute_all(runs, numbers, console, arguments.stop_on_error)
    elif arguments.gather:
        failed = []
        _write(workdir, name, [run.result() for run in runs], console)
    else:
        failed = run_all(runs, workdir, name, console, arguments.stop_on_error)
    if failed:
        print(f"error: {len(failed)} of {len(numbers)} runs failed", file=sys.stderr)
        sys.exit(1)


def _terminated(*_: Any) -> NoReturn:
    raise Terminated


def command() -> None:
    """The command line."""
    made = parser(__doc__, "sweep")
    made.add_argument("--config", type=Path, required=True, help="the sweep file")
    made.add_argument(
        "--workdir", type=Path, help="folder of the sweep (default: runs/sweeps/NAME)"
    )
    made.add_argument("--index", type=int, help="only the run of this number, from 1")
    made.add_argument("--stop-on-error", action="store_true", help="stop after a run that failed")
    mode = made.add_mutually_exclusive_group()
    mode.add_argument("--print", action="store_true", help="write the commands, run nothing")
    mode.add_argument("--gather", action="store_true", help="write the results, run nothing")
    arguments = made.parse_args()
    # A scheduler ends a job with SIGTERM: the run must not be left behind.
    signal.signal(signal.SIGTERM, _terminated)
    guarded(main, arguments, "the same command continues the sweep")


if __name__ == "__main__":
    command()
