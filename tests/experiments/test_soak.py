"""What a long run is measured by, on made metrics."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from experiments.soak import SoakError, _wait, faults, measure


@pytest.fixture
def made(tmp_path):
    """Function that makes the folder of a run of 200 steps after step 0.

    Its resident set: 3 GiB in warm-up, then 1 GiB, from the step given on the size given.
    """

    def make(later=1.0, since=201, compiled=(1, 2), bytes_a_step=100, checkpoints=3):
        lines = []
        for step in range(201):
            metrics = {
                "step": step,
                "seconds/step": 0.5,
                "step/skipped_total": step // 50,
                "process/compilations": 3 if step in compiled else 0,
                "process/resident_gib": 3.0 if step <= 20 else later if step >= since else 1.0,
            }
            lines.append(json.dumps(metrics | {"filler": ""}))
            lines[-1] = lines[-1].replace('""', f'"{"x" * (bytes_a_step - len(lines[-1]) - 1)}"')
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        for name, size in (("tensorboard/events", 400), ("trees/step_000001.json", 70)):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(b"x" * size)
        for step in range(checkpoints):
            (tmp_path / "checkpoints" / str(step) / "train").mkdir(parents=True)
            (tmp_path / "checkpoints" / str(step) / "train" / "d").write_bytes(b"x" * 1000)
        return measure(tmp_path)

    return make


def test_what_is_measured(made):
    measured = made(later=1.5, since=141, bytes_a_step=250)
    assert measured["steps"] == 200
    assert measured["seconds"] == 100.0
    # Step 0 is none; a tenth is warm-up: step 21 is the first after it.
    assert measured["warm_up_steps"] == 20
    # Thirds of 180 steps: 21-80 and 141-200.
    assert measured["resident_gib_first_third"] == 1.0
    assert measured["resident_gib_last_third"] == 1.5
    assert measured["resident_growth"] == 0.5
    assert measured["resident_gib_largest"] == 1.5
    assert (measured["compilations_in_warm_up"], measured["compilations_after"]) == (6, 0)
    assert measured["last_step_that_compiled"] == 2
    assert measured["bytes"] == {
        "checkpoints": 3000, "trees": 70, "tensorboard": 400, "metrics.jsonl": 201 * 250,
    }  # fmt: skip
    assert measured["bytes_per_step"] == {"metrics.jsonl": 251, "tensorboard": 2}
    assert (measured["checkpoints"], measured["trees"]) == (3, 1)
    assert measured["skipped_steps"] == 4


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        # What it had in warm-up, and what it gives back, is no growth.
        ({"later": 0.5, "since": 100}, []),
        ({"later": 1.01, "since": 141}, []),
        ({"later": 1.03, "since": 141}, ["the resident set grew by 3.0 %"]),
        ({"compiled": (1, 20)}, []),
        ({"compiled": (1, 21)}, ["3 programs were compiled after warm-up"]),
        ({"bytes_a_step": 5000}, ["metrics.jsonl grew by 5025 bytes a step, more than 4096"]),
        ({"checkpoints": 5}, ["5 checkpoints are kept, more than 4"]),
    ],
)
def test_what_grows_is_found(made, changes, found):
    assert faults(made(**changes)) == found


def test_a_short_run_is_not_measured(tmp_path):
    lines = [json.dumps({"step": step}) for step in range(100)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(SoakError, match="has 99 steps; at least 100 are needed"):
        measure(tmp_path)


def test_a_run_that_does_not_end_is_killed(tmp_path):
    """Bug: it was left behind."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as running:
        with pytest.raises(SoakError, match="had not ended 0 s after SIGTERM, and was killed"):
            _wait(running, tmp_path / "log", patience=0.1)
        assert running.returncode == -signal.SIGKILL
