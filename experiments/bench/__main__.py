"""Measures speed as ratios, side by side in one run on one machine.

    python -m experiments.bench rollouts
    python -m experiments.bench rollouts --only A,B --rounds 5 --check

Prints tables and writes NAME.json and NAME.md to --out (NAME-A-B.json with --only=A,B). All
contenders run in turn in every round, the others idle meanwhile, and each round begins with another
one; ratios are of medians over rounds.

Files are written anew after every part. A part that fails is in them with its error, the others
still run, and the exit code is 2; otherwise, with --check, it is 1 when a ratio that is wanted is
missed. Absolute numbers mean little on a machine that does other work; the load average is in the
report. XLA_FLAGS must not be set: all contenders run with the defaults of XLA.

What we compare with (google-tunix, transformers on torch) lives in a virtual environment of its
own, which is made on first use. torch's CPU build comes from download.pytorch.org; where that
cannot be reached, --find-links=DIR (or the environment variable PIP_FIND_LINKS) names a folder that
holds its wheel.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments.bench import accelerator, host, rollouts, scoring, step, update
from experiments.bench.harness import Context, missed, run_part
from experiments.bench.processes import check_environment
from experiments.bench.report import machine, markdown, own_versions, write
from experiments.bench.venv import DEFAULT
from experiments.commands import guarded, parser
from experiments.terminal import make_console

# Name to the parts of its table. See harness.py for how a benchmark is written.
BENCHMARKS = {
    "rollouts": rollouts.PARTS,
    "scoring": scoring.PARTS,
    "update": update.PARTS,
    "step": step.PARTS,
    "accelerator": accelerator.PARTS,
    "host": host.PARTS,
}
RESULTS = Path(__file__).parent / "results"


def bench(
    arguments: argparse.Namespace, command: Sequence[str], console: Console
) -> tuple[list[str], list[str]]:
    """Runs a benchmark and writes its results, after every part.

    Args:
      arguments: of the command line.
      command: it, for the report.
      console: shows progress and tables.

    Returns:
      a line for every ratio that was missed, and one for every part that failed.

    Raises:
      ValueError: a setting that cannot be.
      RuntimeError: there is no device of the platform.
    """
    parts = BENCHMARKS[arguments.name]
    chosen = chosen_parts(arguments.only, parts)
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {arguments.rounds}")
    use_cores(arguments.threads)
    jax.config.update("jax_platforms", arguments.platform)
    if arguments.name == "accelerator":
        accelerator.check_platform(arguments.platform)
    # Of one line each, and not cut at the width of the terminal.
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    results: dict[str, Any] = {}
    result: dict[str, Any] = {
        "benchmark": arguments.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m experiments.bench {shlex.join(command)}",
        "platform": arguments.platform,
        "machine": machine(arguments.threads),
        "versions": own_versions(),
    }
    stem = "-".join([arguments.name, *(chosen if arguments.only else ())])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        context = Context(
            folder=Path(folder),
            threads=arguments.threads,
            platform=arguments.platform,
            peers=Path(arguments.peers).expanduser().absolute(),
            find_links=arguments.find_links,
            say=say,
            closing=closing,
        )
        for name in chosen:
            say(f"{arguments.name}, part {name}")
            try:
                results[name] = run_part(parts[name](context), arguments.rounds, say)
            except Exception as error:
                # Hours of other parts are not lost to one.
                results[name] = {"title": name, "failed": f"{type(error).__name__}: {error}"}
                say(f"part {name} failed: {results[name]['failed']}")
                if arguments.debug:
                    traceback.print_exc()
            # What a part held on the device is free for the next.
            gc.collect()
            result |= {
                "peers_versions": context.versions, "notes": context.notes, "parts": results,
            }  # fmt: skip
            paths = write(result, Path(arguments.out), stem)
    say("\n" + markdown(result))
    say(f"written: {', '.join(map(str, paths))}")
    failed = [f"{name}: {part['failed']}" for name, part in results.items() if "failed" in part]
    return missed(results), failed


def chosen_parts(only: str, parts: Mapping[str, Any]) -> list[str]:
    """Names of parts to run, in the order of the table.

    Raises:
      ValueError: a name that is not there.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in parts]
    if unknown:
        raise ValueError(f"--only: there is no part {unknown[0]!r}; known: {', '.join(parts)}")
    return [name for name in parts if name in names] if names else list(parts)


def use_cores(threads: int) -> None:
    """Confines this process, and those that it starts, to so many cores.

    XLA takes as many threads as there are cores, so this comes before its first computation.

    Raises:
      ValueError: there are fewer cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise ValueError(f"--threads must be within 1 .. {len(cores)} here; got {threads}")
    os.sched_setaffinity(0, cores[:threads])


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__, "bench", "show nothing but errors and what was missed")
    add = made.add_argument
    names = ", ".join(BENCHMARKS)
    add("name", metavar="NAME", choices=tuple(BENCHMARKS), help=f"what is measured: {names}")
    add("--only", default="", metavar="PART,...", help="parts of the table (default: all)")
    add("--rounds", type=int, default=3, help="runs of each contender (default: 3)")
    add("--check", action="store_true", help="exit code 1 when a wanted ratio is missed")
    add(
        "--out",
        default=str(RESULTS),
        metavar="DIR",
        help="folder of the results (default: experiments/bench/results)",
    )
    add("--threads", type=int, default=2, help="cores of every contender (default: 2)")
    add(
        "--platform",
        choices=("cpu", "cuda", "tpu"),
        default="cpu",
        help="where our side computes; the peers' is the CPU (default: cpu)",
    )
    add(
        "--peers",
        default=str(DEFAULT),
        metavar="DIR",
        help="virtual environment of what we compare with (default: %(default)s)",
    )
    add(
        "--find-links",
        default="",
        metavar="DIR",
        help="folder of wheels for that environment, where torch's index cannot be reached",
    )
    return made


def main(arguments: argparse.Namespace) -> None:
    check_environment()
    missing, failed = bench(arguments, sys.argv[1:], make_console(arguments.quiet))
    for line in missing:
        print(f"missed: {line}", file=sys.stderr)
    for line in failed:
        print(f"failed: part {line}", file=sys.stderr)
    if failed:
        sys.exit(2)
    if missing and arguments.check:
        sys.exit(1)


if __name__ == "__main__":
    guarded(main, make_parser().parse_args(), "parts that had ended are written")
