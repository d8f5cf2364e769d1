"""A run that is killed again and again, and one that is not: `python -m tests.experiments.killing`.

Every attempt is a process of its own with the same command line, ended by SIGKILL. They are forked
from one that has imported the program, before it has any device, so that they need not import it
each time. What came of it is printed as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import experiments.run
from tests.two_processes import SMALL_RUN

COMMAND = (
    *SMALL_RUN, "--config.steps=28", "--config.num_problems=3", "--config.eval_every=7",
    "--config.checkpoint_every=2",
)  # fmt: skip
KILLS = 20
PATIENCE = 120.0


def start(folder: Path, log: Path) -> int:
    """Process id of an attempt."""
    child = os.fork()
    if child:
        return child
    # Nothing of this process but the imports goes on in there.
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [*COMMAND, f"--workdir={folder}"]
    code = 1
    try:
        experiments.run.command()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def written_anew(folder: Path) -> int:
    """Another number whenever the metrics file is another one."""
    path = folder / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def unfinished_saves(folder: Path) -> list[Path]:
    """Checkpoints that are being written, or whose writing was cut off."""
    return list((folder / "checkpoints").glob("*tmp*"))


def wait_for(child: int, moment: object) -> bool:
    """Until something holds; whether it did before the process ended."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        if moment():
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    raise TimeoutError(f"the moment for a kill did not come within {PATIENCE:.0f} s")


def kill_at_some_moment(folder: Path, log: Path, kind: int, rng: random.Random) -> bool:
    """One attempt that is killed: while it starts (0), trains (1) or saves (2)."""
    before, left = written_anew(folder), {path.name for path in unfinished_saves(folder)}
    child = start(folder, log)
    if kind == 0:
        until = time.monotonic() + rng.uniform(0.0, 5.0)
        alive = wait_for(child, lambda: time.monotonic() > until)
    elif kind == 1:
        # The file is written anew when the run goes on, and then grows by a line a step.
        alive = wait_for(child, lambda: written_anew(folder) != before)
        steps = lines(folder) + rng.randint(1, 3)
        alive = alive and wait_for(child, lambda: lines(folder) >= steps)
        until = time.monotonic() + rng.uniform(0.0, 0.5)
        alive = alive and wait_for(child, lambda: time.monotonic() > until)
    else:
        saves = len(left) + rng.randint(1, 2)

        def is_saving() -> bool:
            left.update(path.name for path in unfinished_saves(folder))
            return len(left) >= saves

        alive = wait_for(child, is_saving)
        time.sleep(rng.uniform(0.0, 0.03))
    if alive:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return alive


def run_to_its_end(folder: Path, log: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(start(folder, log), 0)[1])


def main(workdir: Path, seed: int) -> None:
    rng = random.Random(seed)
    whole, killed = workdir / "whole", workdir / "killed"
    codes = [run_to_its_end(whole, workdir / "whole.log")]
    moments, kills, cut_off = [], 0, 0
    for attempt in range(KILLS):
        kills += kill_at_some_moment(killed, workdir / "killed.log", attempt % 3, rng)
        cut_off += bool(unfinished_saves(killed))
        moments.append(lines(killed))
    codes.append(run_to_its_end(killed, workdir / "killed.log"))
    print(json.dumps({"codes": codes, "kills": kills, "cut_off": cut_off, "lines": moments}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
