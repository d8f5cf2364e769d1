"""Signals: what was begun is saved, and the run goes on as if it had not been stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from attnrl_jax.interruption import InterruptedRunError, Interruption
from attnrl_jax.training.checkpoint import Checkpointer
from experiments.configs import attnrl_graph
from experiments.records import read_metrics
from tests.conftest import ROOT
from tests.experiments.runs import execute, execute_with, small, without_clock
from tests.two_processes import SMALL_RUN, environment, run_processes, start_processes


def config_of(**changes):
    """As `finished`, but that nothing is saved in between."""
    config = small(attnrl_graph.get_config())
    config.update(checkpoint_every=100, **changes)
    return config


def saved_steps(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir())


def best_step(checkpoints):
    with closing(Checkpointer(checkpoints, read_only=True)) as reader:
        return reader.best_step()


@pytest.mark.parametrize(
    ("stage", "occurrence", "number", "step"),
    [
        # Stages of the warm-up come first. Sampling is given up at once, an update is not.
        ("generate", 2, signal.SIGTERM, 1),
        ("update", 0, signal.SIGTERM, 1),
        # The evaluation of step 2, after the two stages of that of step 0. Its metrics are saved
        # with it, and it is evaluated later.
        ("evaluate", 2, signal.SIGINT, 2),
    ],
)
def test_a_signal_saves_what_there_is(finished, tmp_path, stage, occurrence, number, step):
    _, expected = finished
    folder = tmp_path / "run"
    before = signal.getsignal(number)
    with pytest.raises(InterruptedRunError) as wish:
        execute_with(config_of(), folder, stage, occurrence, lambda: os.kill(os.getpid(), number))
    assert wish.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert saved_steps(folder) == [0, step]
    recorded = [m["step"] for m in read_metrics(folder / "metrics.jsonl")]
    assert recorded == [*range(step + (stage != "evaluate"))]
    history = execute(config_of(), folder)
    assert without_clock(history) == without_clock(expected)
    if stage == "evaluate":
        # Bug: this step was never the best, as its score came after it was saved.
        best = [best_step(run / "checkpoints") for run in (folder, finished[0])]
        assert best == [2, 2]


def test_an_evaluation_that_was_interrupted_is_done_once(tmp_path):
    """Bug: of the last step it was done again at every call, as its score was not saved."""
    folder = tmp_path / "run"

    def interrupt():
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        execute_with(config_of(steps=1), folder, "evaluate", 2, interrupt)
    assert saved_steps(folder) == [0, 1]
    history = execute(config_of(steps=1), folder)
    assert "held_out/accuracy" in history[1]
    evaluated = []
    again = execute_with(config_of(steps=1), folder, "evaluate", 0, lambda: evaluated.append(1))
    assert again == history
    assert not evaluated


def test_a_signal_before_there_is_anything_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InterruptedRunError):
        execute_with(
            config_of(), folder, "generate", 0, lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
    assert saved_steps(folder) == []
    assert not (folder / "metrics.jsonl").exists()


def test_a_second_ctrl_c_interrupts_at_once():
    with Interruption() as interruption:
        interruption.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(InterruptedRunError):
            interruption.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    # A scheduler may send SIGTERM again and again.
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(InterruptedRunError, match="SIGTERM"):
            interruption.check()


RUN = (
    "-m", *SMALL_RUN, "--config.num_problems=4", "--config.eval_every=0",
    "--config.checkpoint_every=1000",
)  # fmt: skip


def wait_for_lines(folder, number, running):
    """Until so many steps are recorded."""
    path, until = folder / "metrics.jsonl", time.monotonic() + 600
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert running.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_the_command_ends_as_schedulers_expect(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, *RUN, "--config.steps=1000", f"--workdir={folder}"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as started:  # fmt: skip
        wait_for_lines(folder, 3, started)
        started.send_signal(signal.SIGTERM)
        out, err = started.communicate(timeout=120)
    assert started.returncode == 143
    step = int(re.search(r"SIGTERM: saving what there is after step (\d+)", out)[1])
    assert f"stopped; continue with the same command and --workdir={folder}" in err
    assert "Traceback" not in err
    assert saved_steps(folder) == [0, step]
    assert [m["step"] for m in read_metrics(folder / "metrics.jsonl")] == [*range(step + 1)]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_the_run_of_all(tmp_path):
    """Any of them may be the one whose machine is taken; the run goes on as one process."""
    folder = tmp_path / "run"
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    command = [*RUN, *mesh, "--config.steps=1000", f"--workdir={folder}"]
    started = start_processes(command, 2, 4, tmp_path / "logs")
    try:
        wait_for_lines(folder, 3, started[0])
        started[1].send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=180) for process in started]
    finally:
        for process in started:
            process.kill()
    logs = [(tmp_path / "logs" / f"{k}.log").read_text() for k in range(2)]
    assert codes == [143, 143], "\n".join(logs)
    step = int(re.search(r"saving what there is after step (\d+)", logs[0])[1])
    assert saved_steps(folder) == [0, step]
    [said] = run_processes(
        [*RUN, *mesh, f"--workdir={folder}", f"--config.steps={step + 1}"], 1, 8,
        tmp_path / "again",
    )  # fmt: skip
    assert f"continuing after step {step}" in said
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(step + 2)]
