"""What commands show: in a terminal, without one, and when they are to be quiet."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from experiments.terminal import Terminal, bars, is_live, make_console, working
from tests.test_readme import ROOT

SMALL = (
    "--config.steps=2", "--config.num_problems=2", "--config.num_responses=4",
    "--config.data.held_out_size=16", "--config.sampler.slots=16",
)  # fmt: skip
# Two steps, the second of which is 30 s after the first by a clock of its own.
SHOW = """
import experiments.terminal as terminal
from unittest.mock import patch
console = terminal.make_console()
now = [0.0]
with patch.object(terminal.time, "monotonic", lambda: now[0]):
    with terminal.Terminal(10, console) as shown:
        for step, accuracy in ((1, {"held_out/accuracy": 0.25}), (2, {}), (3, {})):
            now[0] += 30
            shown.stage("generate")
            shown.step({"step": step, "tokens/sampled": 6000, "seconds/step": 5.0} | accuracy)
        shown.stage("score")
        shown._live.refresh()
    with terminal.working(console, "one thing") as say:
        say("another thing")
    with terminal.bars(console, "steps") as progress:
        progress.update(progress.add_task("[training]", total=4), completed=3)
print("result")
"""


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "COLUMNS", "NO_COLOR")}
    return kept | {"TERM": "xterm-256color"} | more


def in_a_terminal(*command: str) -> tuple[int, str]:
    """Exit code, and all that a command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        env=environment(COLUMNS="80", LINES="24"),
    )  # fmt: skip
    os.close(theirs)
    written = b""
    while True:
        try:
            read = os.read(ours, 65536)
        # Linux says so when the last process has closed its end.
        except OSError:
            break
        if not read:
            break
        written += read
    os.close(ours)
    return process.wait(), written.decode(errors="replace")


def run(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "experiments.run", *SMALL, *arguments)


def test_a_terminal_has_a_live_display():
    code, shown = in_a_terminal(sys.executable, "-c", SHOW)
    assert code == 0, shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    # The first two steps took 30 s each, as the third did: 7 are left.
    wanted = "step 4 of 10 | score | 1,200 tokens/s | held-out 0.250 | 0:01:30, 0:03:30 left"
    assert wanted in plain
    assert all(len(line) <= 80 for line in plain.replace("\r", "\n").splitlines())
    # It is drawn over: the cursor goes up and lines are erased, and at its end it is gone.
    assert "\x1b[1A" in shown
    assert "\x1b[2K" in shown
    assert "another thing" in plain
    assert "[training]" in plain
    assert "3/4 steps" in plain
    assert "result" in plain.splitlines()[-1]


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}])
def test_without_a_terminal_there_are_plain_lines(variables):
    """In CI FORCE_COLOR is often set: rich alone would draw its bars into the log."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW], cwd=ROOT, env=environment(**variables),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["step", "heldout"]
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert lines[4:] == ["one thing", "another thing", "result"]


def test_a_run_in_a_terminal_and_a_quiet_one_in_a_pipe(tmp_path):
    code, shown = in_a_terminal(*run(f"--workdir={tmp_path / 'a'}"))
    assert code == 0, shown
    assert re.search(r"step 1 of 2 \| generate", shown)
    assert re.search(r"step 2 of 2 \| [a-z]+ \| [\d,]+ tokens/s \| held-out 0\.\d{3}", shown)
    assert "held-out accuracy:" in shown.splitlines()[-1]
    # The same folder: nothing is left to do, which a quiet run does not even say.
    done = subprocess.run(
        run(f"--workdir={tmp_path / 'a'}", "--quiet"), cwd=ROOT, env=environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"held-out accuracy: 0\.\d+ -> 0\.\d+ \(n=16\)\n", done.stdout)


def test_a_line_is_written_at_once():
    """Bug that would be: a worker's log that is empty for hours."""

    class Counting(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed = len(self.getvalue())

    file = Counting()
    terminal = Terminal(3, Console(file=file))
    for step in range(3):
        terminal.step({"step": step})
        assert file.flushed == len(file.getvalue())
        assert len(file.getvalue().splitlines()) == step + 2


def test_quiet_shows_warnings_and_nothing_else(capsys):
    console = make_console(quiet=True)
    with Terminal(3, console) as terminal, working(console, "doing"), bars(console, "steps"):
        terminal.step({"step": 1})
        terminal.warn("entropy is 0")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "warning: entropy is 0\n"
    assert not is_live(console)


@pytest.mark.parametrize(
    ("tokens", "limit", "left"),
    # 10 s and 100 tokens a step: 7 steps are left, or 150 tokens.
    [(0, 0, 70.0), (100, 450, 15.0), (100, 10_000, 70.0)],
)
def test_the_time_left_is_that_of_the_earlier_end(monkeypatch, tokens, limit, left):
    now = [0.0]
    monkeypatch.setattr("experiments.terminal.time.monotonic", lambda: now[0])
    terminal = Terminal(10, Console(file=io.StringIO()), limit)
    assert terminal.seconds_left() is None
    # The first step compiles.
    for step, when in enumerate([0.0, 500.0, 510.0, 520.0]):
        now[0] = when
        terminal.step({"step": step, "tokens/sampled_total": tokens * step})
    assert terminal.seconds_left() == pytest.approx(left)
    now[0] += 4
    assert terminal.seconds_left() == pytest.approx(left - 4)
