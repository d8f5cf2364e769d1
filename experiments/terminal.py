"""What commands show while they work: a live display in a terminal, otherwise plain lines.

A pipe, a file, CI and the workers of a pod get a line for each thing that happened, at once and
without control characters.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# What is printed of a step, in 80 columns: metric, heading, format.
COLUMNS = (
    ("step", "step", "{:.0f}"),
    ("held_out/accuracy", "heldout", "{:.3f}"),
    ("train/accuracy", "train", "{:.3f}"),
    ("rows/with_advantage", "adv", "{:.2f}"),
    ("problems/kept", "kept", "{:.0f}"),
    ("branching/by_importance", "by FCI", "{:.2f}"),
    ("train/entropy", "entropy", "{:.3f}"),
    ("train/response_length", "length", "{:.0f}"),
    ("tokens/sampled", "tokens", "{:.0f}"),
    ("seconds/step", "seconds", "{:.1f}"),
)
# Nobody said how wide a file is; the usual guess of 80 columns cuts trees short.
FILE_WIDTH = 120
# The time left is judged by so many of the newest steps.
STEPS_THAT_TELL = 20


def make_console(quiet: bool = False, stderr: bool = False) -> Console:
    """Where a command prints its progress.

    Args:
      quiet: nothing is shown.
      stderr: for commands whose standard output is their result.
    """
    stream = sys.stderr if stderr else sys.stdout
    # Variables such as FORCE_COLOR would have control characters in files.
    is_terminal = stream.isatty()
    console = Console(quiet=quiet, stderr=stderr, force_terminal=is_terminal)
    if not is_terminal:
        console.width = FILE_WIDTH
    return console


def notebook_console() -> Console:
    """Plain lines as a notebook's cell keeps them: no bars that redraw, one output for a cell."""
    return Console(width=100, force_jupyter=False, force_terminal=False)


def is_live(console: Console) -> bool:
    """Whether what is shown can be drawn anew."""
    return console.is_terminal and not console.is_dumb_terminal and not console.quiet


def bars(console: Console, unit: str) -> Progress:
    """Bars of counted work: done, in all, time so far and left. Without a terminal nothing.

    Args:
      console: to draw on.
      unit: of what is counted, in the plural.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn(f"{{task.completed}}/{{task.total}} {unit}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not is_live(console),
    )


@contextmanager
def working(
    console: Console, doing: str, only_live: bool = False
) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, in a terminal with the time it has taken so far.

    Args:
      console: to show it on.
      doing: what is begun.
      only_live: nothing is printed elsewhere, of commands that are soon done.

    Yields:
      function that says what is being done now.
    """

    def plain(text: str) -> None:
        if not only_live:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    if not is_live(console):
        plain(doing)
        yield plain
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda text: progress.update(task, description=text)


class Terminal:
    """Progress of a run: a table of metrics that scrolls by, and in a terminal below it where the
    run is and when it will end.

    Args:
      steps: of the run.
      console: to print to. Where it is quiet, warnings go to standard error.
      max_sampled_tokens: that end the run earlier; 0 for none.

    Attributes:
      console: to print to.
      doing: the stage the run is in.
    """

    def __init__(self, steps: int, console: Console, max_sampled_tokens: int = 0):
        self.console, self.doing = console, "starting"
        if not console.is_terminal:
            console.width = FILE_WIDTH
        self._steps, self._max_tokens = steps, max_sampled_tokens
        self._warnings = console
        if console.quiet:
            # Here, as jax comes with it, which the other displays do without.
            from attnrl_jax import processes

            if processes.is_first():
                self._warnings = make_console(stderr=True)
        self._begin = time.monotonic()
        self._last: dict[str, float] = {}
        # When the newest steps ended, and the tokens sampled by then.
        self._ends: deque[tuple[float, float]] = deque(maxlen=STEPS_THAT_TELL + 1)
        self._printed = 0
        self._lasting: set[str] = set()
        self._live = Live(
            get_renderable=self._display, console=console, transient=True, refresh_per_second=4
        )

    def __enter__(self) -> Terminal:
        if is_live(self.console):
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._live.stop()

    def stage(self, name: str) -> None:
        """Shows what the run is doing."""
        self.doing = name

    def warn(self, message: str) -> None:
        """Prints a warning."""
        self._warnings.print(f"warning: {message}", style="bold", markup=False, soft_wrap=True)

    def warn_of(self, found: Mapping[str, str]) -> None:
        """Prints warnings by name, each when it begins and not while it lasts."""
        for name, message in found.items():
            if name not in self._lasting:
                self.warn(message)
        self._lasting = set(found)

    def step(self, metrics: dict[str, float]) -> None:
        """Prints one row of metrics."""
        if self._printed % 20 == 0:
            heading = " ".join(f"{heading:>7}" for _, heading, _ in COLUMNS)
            self.console.print(heading, style="bold", soft_wrap=True)
        cells = (form.format(metrics[name]) if name in metrics else "" for name, _, form in COLUMNS)
        row = " ".join(f"{cell:>7}" for cell in cells)
        self.console.print(row, highlight=False, soft_wrap=True)
        if metrics.get("step/skipped"):
            self.console.print(
                "        skipped: no problem had both right and wrong responses; "
                f"{metrics['judge/unanswered']:.0f} responses without an answer, "
                f"{metrics['train/truncated']:.0%} cut at their budget",
                soft_wrap=True,
            )
        self._printed += 1
        if self._printed == 3:
            # Before the first step programs were compiled, which takes no time again.
            self._ends.popleft()
        self._ends.append((time.monotonic(), metrics.get("tokens/sampled_total", 0.0)))
        self._last |= metrics

    def seconds_left(self) -> float | None:
        """Until the last step, by the newest ones; None before there are two."""
        if len(self._ends) < 2:
            return None
        (begin, tokens_before), (end, tokens) = self._ends[0], self._ends[-1]
        per_step = (end - begin) / (len(self._ends) - 1)
        left = per_step * (self._steps - self._last["step"])
        if self._max_tokens and tokens > tokens_before:
            per_token = (end - begin) / (tokens - tokens_before)
            left = min(left, per_token * (self._max_tokens - tokens))
        return max(0.0, left - (time.monotonic() - end))

    def _display(self) -> Table:
        done = int(self._last.get("step", 0))
        parts = [f"step {min(done + bool(self._last), self._steps)} of {self._steps}", self.doing]
        if self._last.get("seconds/step") and "tokens/sampled" in self._last:
            rate = self._last["tokens/sampled"] / self._last["seconds/step"]
            parts.append(f"{rate:,.0f} tokens/s")
        if "held_out/accuracy" in self._last:
            parts.append(f"held-out {self._last['held_out/accuracy']:.3f}")
        left, passed = self.seconds_left(), _clock(time.monotonic() - self._begin)
        parts.append(passed if left is None else f"{passed}, {_clock(left)} left")
        line = Text(" | ".join(parts), no_wrap=True, overflow="ellipsis")
        shown = Table.grid(expand=True)
        shown.add_row(ProgressBar(total=max(1, self._steps), completed=done))
        shown.add_row(line)
        return shown


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
