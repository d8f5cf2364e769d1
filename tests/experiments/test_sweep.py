"""What becomes of the runs of a sweep."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.plan import SweepError, load_sweep, plan
from experiments.records import read_metrics
from experiments.results import EXIT_CODE, log_path
from experiments.sweep import _reason, in_use, main
from experiments.sweep import execute as executed
from tests.experiments.test_plan import planned, sweep_file
from tests.experiments.test_results import write_run

ROOT = Path(__file__).resolve().parents[2]


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return kept | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")} | more


def command(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "experiments.sweep", *arguments],
        cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def execute(capsys, **given):
    """The command in this process; `(exit code, output, errors)`."""
    flags = {"index": None, "stop_on_error": False, "print": False, "gather": False, "quiet": False}
    capsys.readouterr()
    try:
        main(argparse.Namespace(**flags | given))
        code = 0
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_commands_are_printed_for_a_cluster(tmp_path, capsys):
    """Without touching a device: on a cluster's entry node there is none."""
    path = sweep_file(tmp_path, [{"seed": 0, "prompt.instruction": "it's"}, {"seed": 1}])
    workdir = tmp_path / "out"
    arguments = [f"--config={path}", f"--workdir={workdir}", "--print"]
    done = command(*arguments, JAX_PLATFORMS="none_such")
    assert done.returncode == 0, done.stderr
    runs = plan(load_sweep(path), workdir)
    lines = done.stdout.splitlines()
    assert [shlex.split(line)[1:] for line in lines] == [run.command[1:] for run in runs]
    assert not workdir.exists()
    _, output, _ = execute(capsys, config=path, workdir=workdir, print=True, index=2)
    assert output.splitlines() == lines[1:]
    for index in (0, 3):
        with pytest.raises(SweepError, match=rf"--index must be within 1 \.\. 2; got {index}"):
            execute(capsys, config=path, workdir=workdir, index=index)
    with pytest.raises(SweepError, match="leave out --index"):
        execute(capsys, config=path, workdir=workdir, index=1, gather=True)


def as_finished(run, accuracies):
    write_run(run.folder, accuracies)
    (run.folder / "config.json").write_text(run.config.to_json_best_effort())


def test_a_failed_run_costs_that_run(tmp_path, capsys, monkeypatch):
    """A run that fails is reported, and the next one begins; what has finished is skipped."""
    monkeypatch.chdir(ROOT)
    given = {
        "config": sweep_file(tmp_path, [{"model.path": "/nowhere"}, {"seed": 5}], {"steps": 2}),
        "workdir": tmp_path / "out",
    }
    bad, good = plan(load_sweep(given["config"]), given["workdir"])
    as_finished(good, [0.25, None, 0.75])
    code, output, errors = execute(capsys, **given)
    assert code == 1
    assert errors == "error: 1 of 2 runs failed\n"
    lines = output.splitlines()
    assert re.fullmatch(r"1/2 model.path=-nowhere-\w+  running, output in \S+\.log", lines[0])
    assert re.fullmatch(r"1/2 model.path=-nowhere-\w+  failed  -  \d+ s", lines[1])
    assert lines[2].strip().startswith("exit code 2; error: no model at /nowhere")
    assert lines[3] == "2/2 seed=5  finished  0.250 -> 0.750  skipped"
    rows = json.loads((given["workdir"] / "results.json").read_text())
    assert [row["state"] for row in rows] == ["failed", "finished"]
    assert [row["last_accuracy"] for row in rows] == [None, 0.75]
    assert "Not finished, 1 of 2 runs:" in output
    # Gathering alone says the same, and runs nothing.
    log = log_path(bad.folder)
    attempts = log.read_text()
    code, gathered, _ = execute(capsys, **given, gather=True)
    assert code == 0
    assert gathered == output[output.index("\n# mine") :]
    assert log.read_text() == attempts
    code, output, _ = execute(capsys, **given, stop_on_error=True)
    assert code == 1
    assert "2/2" not in output
    assert log.read_text().count("$ ") == 2
    # One job of an array leaves the table to --gather.
    (given["workdir"] / "results.json").unlink()
    code, output, _ = execute(capsys, **given, index=2)
    assert (code, output) == (0, "2/2 seed=5  finished  0.250 -> 0.750  skipped\n")
    assert not (given["workdir"] / "results.json").exists()


def test_a_changed_sweep_does_not_skip_what_has_finished_before(tmp_path, capsys):
    path = sweep_file(tmp_path, [{"seed": 0}], {"steps": 2})
    [run] = plan(load_sweep(path), tmp_path / "out")
    as_finished(run, [0.25, None, 0.75])
    sweep_file(tmp_path, [{"seed": 0}], {"steps": 2, "num_problems": 3})
    with pytest.raises(SweepError, match="another run; num_problems: 6 there, 3 here"):
        execute(capsys, config=path, workdir=tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_reason_of_a_failure_is_of_the_last_attempt(tmp_path):
    """Bug: a run that was killed was said to have failed as it had in an attempt before."""
    [run] = planned(tmp_path, [{"seed": 0}])
    run.folder.parent.mkdir(parents=True)
    log = log_path(run.folder)
    before = "$ python -m experiments.run\nerror: no model at /nowhere\n[sweep] exit code 2\n"
    for output, reason in (("step\nKilled\n", "Killed"), ("", "no output"),
                           ("error: a\nb\n", "error: a")):  # fmt: skip
        log.write_text(before + "$ python\n" + output + EXIT_CODE.format(-9) + "\n")
        assert _reason(run, -9) == f"killed by signal 9; {reason} ({log})"


def test_values_with_line_breaks_are_not_printed(tmp_path, capsys):
    """Bug: a command of two lines, where job N of an array reads line N."""
    path = sweep_file(tmp_path, [{"seed": 0}, {"prompt.instruction": "a\nb"}])
    given = {"config": path, "workdir": tmp_path / "out", "print": True}
    with pytest.raises(SweepError, match=r"run 2 .*line break.*; --index=2 runs it"):
        execute(capsys, **given)
    assert capsys.readouterr().out == ""
    code, output, _ = execute(capsys, **given, index=1)
    assert (code, output.count("\n")) == (0, 1)


@contextmanager
def lock(folder):
    """Holds a folder as another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_two_sweeps_do_not_share_a_folder(tmp_path, capsys):
    """Bug: two sweeps of one folder ran the same runs, and each called the other's failed."""
    path = sweep_file(tmp_path, [{"seed": 0}], {"steps": 2})
    workdir = tmp_path / "out"
    [run] = plan(load_sweep(path), workdir)
    as_finished(run, [0.25, None, 0.75])
    given = {"config": path, "workdir": workdir}
    with lock(workdir):
        with pytest.raises(SweepError, match=f"another sweep is going on in {workdir}; --gather"):
            execute(capsys, **given)
        assert not (workdir / "results.md").exists()
        for more in ({"index": 1}, {"gather": True}, {"print": True}):
            assert execute(capsys, **given, **more)[0] == 0
    code, output, _ = execute(capsys, **given)
    assert code == 0
    assert "1/1 seed=0  finished  0.250 -> 0.750  skipped" in output


def test_a_run_in_another_process_is_left_to_it(tmp_path, capsys, monkeypatch):
    """Bug: a run that had outlived its sweep was said to have failed, in its own log as well."""
    monkeypatch.chdir(ROOT)
    path = sweep_file(tmp_path, [{"seed": 0}, {"model.path": "/nowhere"}], {"steps": 2})
    given = {"config": path, "workdir": tmp_path / "out"}
    run, _ = plan(load_sweep(path), given["workdir"])
    write_run(run.folder, [0.25, 0.5])
    (run.folder / "config.json").write_text(run.config.to_json_best_effort())
    log_path(run.folder).write_text("$ python\nas before\n")
    with lock(run.folder):
        code, output, errors = execute(capsys, **given)
        assert (code, errors) == (1, "error: 1 of 2 runs failed\n")
        lines = output.splitlines()
        assert lines[0] == "1/2 seed=0  running  0.250 -> 0.500  in another process"
        assert lines[1].startswith("2/2 model.path=-nowhere")
        states = [row["state"] for row in json.loads((tmp_path / "out/results.json").read_text())]
        assert states == ["running", "failed"]
        assert execute(capsys, **given, index=1)[:2] == (0, lines[0] + "\n")
        # Claimed after the sweep had looked: its own process found the folder in use.
        assert executed(run) == 2
        text = log_path(run.folder).read_text()
        assert "is in use by another process" in text
        assert EXIT_CODE.format(2) not in text
    # Free again: the sweep looks without leaving a lock of its own.
    assert not in_use(run.folder)


@pytest.mark.slow
def test_a_sweep_that_was_stopped_continues(tmp_path):
    """Two real runs; the second is ended with the sweep, by the signal of a scheduler."""
    common = {
        "method": "grpo", "steps": 1, "num_problems": 2, "num_responses": 2,
        "data.held_out_size": 16, "score_batch_tokens": 8192, "micro_batch_tokens": 4096,
        "length_multiple": 256, "sampler.slots": 32, "batch_size.bounds": (0.5, 2.0),
        "batch_size.adaptive": False, "prompt.instruction": " it's = \"so\" ",
    }  # fmt: skip
    path = sweep_file(tmp_path, [{"seed": 0}, {"seed": 1}], common)
    workdir = tmp_path / "out"
    arguments = [f"--config={path}", f"--workdir={workdir}"]
    first, second = plan(load_sweep(path), workdir)
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *arguments],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not (second.folder / "config.json").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 130, output + errors
    assert "the same command continues the sweep" in errors
    assert output.splitlines()[1].startswith("1/2 seed=0  finished")
    assert [run.result().state for run in (first, second)] == ["finished", "unfinished"]
    # The run that was going on has ended with it: its folder is free.
    before = (first.folder / "metrics.jsonl").read_text()
    done = command(*arguments)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"1/2 seed=0  finished  [\d.]+ -> [\d.]+  skipped", lines[0])
    assert re.fullmatch(r"2/2 seed=1  finished  [\d.]+ -> [\d.]+  \d+.*", lines[2])
    assert (first.folder / "metrics.jsonl").read_text() == before
    assert [m["step"] for m in read_metrics(second.folder / "metrics.jsonl")] == [0, 1]
    # The run command has read what the sweep meant.
    for run in (first, second):
        stored = json.loads((run.folder / "config.json").read_text())
        assert stored == json.loads(run.config.to_json_best_effort())
        assert stored["batch_size"]["bounds"] == [0.5, 2.0]
        assert stored["prompt"]["instruction"] == ' it\'s = "so" '
    rows = json.loads((workdir / "results.json").read_text())
    assert [row["steps"] for row in rows] == [1, 1]
    assert rows[0]["held_out"] != rows[1]["held_out"]
