"""A run that is killed at random moments is the run that is not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.experiments.killing import KILLS
from tests.two_processes import environment


def lines_of(folder):
    """Metrics line by line, in their order, without those of clock and process."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clock = ("seconds/", "process/")
    return [[(k, v) for k, v in json.loads(m).items() if not k.startswith(clock)] for m in lines]


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_is_the_run_that_is_not(tmp_path):
    """While it starts, trains and saves; metrics, trees and all arrays of the last checkpoint."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.experiments.killing", str(tmp_path), "0"],
        cwd=ROOT, env=environment(1) | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["codes"] == [0, 0], logs
    assert said["kills"] == KILLS, said
    # Some of the kills came in the middle of saving.
    assert said["cut_off"] >= 3, said
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = lines_of(whole)
    assert [dict(line)["step"] for line in expected] == [*range(29)]
    assert lines_of(killed) == expected
    trees = sorted(path.name for path in (whole / "trees").iterdir())
    assert [path.name for path in sorted((killed / "trees").iterdir())] == trees
    for name in trees:
        assert (killed / "trees" / name).read_bytes() == (whole / "trees" / name).read_bytes()
    sums = [
        json.loads((folder / "checkpoints/28/loop/metadata").read_text())["values"]["checksums"]
        for folder in (whole, killed)
    ]
    assert len(sums[0]) > 50
    assert sums[0] == sums[1]
    assert not list((killed / "checkpoints").glob("*tmp*"))
    # No kill left a checkpoint that looked whole and was not.
    assert not (killed / "damaged_checkpoints").exists()
