"""Faults that a run must live through, or end from with nothing lost. Each is injected."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
from rich.console import Console

from attnrl_jax.compilation.memory import DeviceMemoryError
from attnrl_jax.interruption import InterruptedRunError
from attnrl_jax.tasks.problems import DataError
from attnrl_jax.training.checkpoint import CheckpointError, SaveError
from attnrl_jax.training.loop import NotFiniteError
from experiments.configs import attnrl_graph
from experiments.folders import FolderError
from experiments.records import RunFolder, read_metrics
from experiments.run import run
from experiments.settings import SettingError
from tests.experiments.runs import CrashError, execute, execute_with, small, without_clock
from tests.experiments.test_run import hf_config


def config_of(steps=3, **changes):
    config = small(attnrl_graph.get_config(), steps)
    config.update(changes)
    return config


def said_by(config, folder, **options):
    """What a run prints."""
    with (folder.parent / "said").open("w+") as file:
        run(config, folder, Console(file=file, width=1000), **options)
        file.seek(0)
        return file.read()


def whole_checkpoints(folder):
    """Their steps. (What a failed save left has another name.)"""
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


# Checkpoints.


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished, tmp_path, damage):
    """Loudly: step 3 is done again, and is what it was. A bit that flips in the parameters is
    noticed too, which no file format does."""
    folder, expected = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    damage(largest_file(copy / "checkpoints" / "3"))
    said = said_by(config_of(), copy)
    assert re.search(
        r"warning: checkpoint \S*/checkpoints/3 .*; it was moved to \S*/damaged_checkpoints/3, "
        r"and step 2 takes its place",
        said,
    )
    assert "continuing after step 2" in said
    assert (copy / "damaged_checkpoints" / "3" / "train").is_dir()
    assert without_clock(read_metrics(copy / "metrics.jsonl")) == without_clock(expected)
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["2", "3"]


def test_without_a_whole_checkpoint_a_run_ends_and_nothing_is_moved(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    steps = sorted((copy / "checkpoints").iterdir())
    for step in steps:
        shutil.rmtree(step / "rows")
    with pytest.raises(CheckpointError, match=re.escape(str(steps[0]))) as error:
        execute(config_of(4), copy)
    assert str(steps[-1]) in str(error.value)
    assert sorted((copy / "checkpoints").iterdir()) == steps


def test_a_checkpoint_of_other_settings_is_refused(finished, tmp_path):
    """Even where it was put into a folder of its own."""
    copy = tmp_path / "run"
    (copy / "checkpoints").parent.mkdir()
    config = config_of()
    config.optimizer.learning_rate = 1e-4
    (copy / "config.json").write_text(config.to_json_best_effort())
    shutil.copytree(finished[0] / "checkpoints", copy / "checkpoints")
    with pytest.raises(
        CheckpointError,
        match=r"optimizer.learning_rate: 0.0003 there, 0.0001 here. "
        r"--allow_change=optimizer.learning_rate goes on",
    ):
        execute(config, copy)


def test_a_setting_that_is_named_may_change(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    config = config_of(4)
    config.optimizer.learning_rate = 1e-4
    with pytest.raises(FolderError, match=r"0.0003 there, 0.0001 here \(--allow_change=NAME"):
        execute(config, copy)
    with pytest.raises(SettingError, match="no setting stepz"):
        execute(config, copy, allowed=["stepz"])
    # Bug: those after the seed could, though responses in flight were shaped by them.
    for name in ("seed", "temperature", "top_p", "top_k", "num_responses", "branching.rule"):
        with pytest.raises(SettingError, match=f"{name} cannot change in a run"):
            execute(config, copy, allowed=[name])
    # Bug: a warm-up that ends was refused as another model.
    config.optimizer.warmup_updates = 0
    allowed = ["optimizer.learning_rate", "optimizer.warmup_updates"]
    history = execute(config, copy, allowed=allowed)
    assert [m["step"] for m in history] == [0, 1, 2, 3, 4]
    changes = [json.loads(line) for line in (copy / "changes.jsonl").read_text().splitlines()]
    rate = {"after_step": 3, "setting": "optimizer.learning_rate", "before": 3e-4, "now": 1e-4}
    assert rate in changes
    assert "optimizer.warmup_updates" in {change["setting"] for change in changes}
    # Those of the checkpoint are the new ones now.
    assert execute(config, copy) == history


@contextmanager
def full_disk(size):
    """No file may grow beyond so many bytes: what a write meets is an error of the system."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_disk_that_is_full_while_saving_ends_the_run_with_the_old_checkpoint(finished, tmp_path):
    _, expected = finished
    folder = tmp_path / "run"
    limits = resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY)
    with full_disk(resource.RLIM_INFINITY), pytest.raises(SaveError) as error:
        execute_with(config_of(), folder, "update", 1, lambda: resource.setrlimit(*limits))
    assert "whole are those of steps: 0, 1" in str(error.value)
    assert str(folder / "checkpoints") in str(error.value)
    history = execute(config_of(), folder)
    assert without_clock(history) == without_clock(expected)
    assert not list((folder / "checkpoints").glob("*tmp*"))


def test_a_save_that_failed_ends_the_run_at_the_next_step(finished, tmp_path):
    """Bug: nothing was noticed before the next save, here two steps later."""
    folder = tmp_path / "run"
    limits = resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY)
    config = config_of(5, checkpoint_every=2, eval_every=0)
    with full_disk(resource.RLIM_INFINITY), pytest.raises(SaveError, match="those of steps: 0"):
        execute_with(config, folder, "update", 1, lambda: resource.setrlimit(*limits))
    assert [m["step"] for m in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    assert whole_checkpoints(folder) == [0]


def test_a_save_that_failed_keeps_no_signal_from_saving(finished, tmp_path, monkeypatch):
    """Bug: on SIGTERM the error of the save before ended the run, which had not tried again. The
    disk has room when it does."""
    from experiments.terminal import Terminal

    _, expected = finished
    folder, warnings, updates = tmp_path / "run", [], iter([1, 2, 3])
    no_room = resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY)
    stage = Terminal.stage

    def begin(self, name):
        stage(self, name)
        if name == "update" and (step := next(updates)) > 1:
            # In step 2, which is saved at its end; then in step 3.
            step == 2 and resource.setrlimit(*no_room)
            step == 3 and os.kill(os.getpid(), signal.SIGTERM)

    def warn(self, message):
        warnings.append(message)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    monkeypatch.setattr(Terminal, "stage", begin)
    monkeypatch.setattr(Terminal, "warn", warn)
    with full_disk(resource.RLIM_INFINITY), pytest.raises(InterruptedRunError):
        execute(config_of(checkpoint_every=2, steps=4), folder)
    assert len(warnings) == 1
    assert re.search(r"could not be written .*steps: 0\); step 3 is tried now", warnings[0])
    assert whole_checkpoints(folder) == [0, 3]
    monkeypatch.undo()
    history = execute(config_of(4), folder)
    # The last step is evaluated as well.
    assert without_clock(history[:3]) == without_clock(expected[:3])
    assert [m["step"] for m in history] == [0, 1, 2, 3, 4]


# Numbers.


def test_updates_that_are_not_finite_end_the_run_with_their_rows(tmp_path, monkeypatch):
    """Advantages that are not numbers, as a broken reward would give."""
    from attnrl_jax.training import loop

    honest = loop.tree_advantages

    def broken(leaves, dropped, config):
        segments, advantages, trained = honest(leaves, dropped, config)
        return segments, advantages.replace(value=advantages.value * np.float32(np.nan)), trained

    monkeypatch.setattr(loop, "tree_advantages", broken)
    folder = tmp_path / "run"
    with pytest.raises(NotFiniteError, match="last 2 updates, up to step 2, were skipped"):
        execute(config_of(5, max_not_finite=2), folder)
    history = read_metrics(folder / "metrics.jsonl")
    assert [m["update/not_finite_in_a_row"] for m in history[1:]] == [1, 2]
    assert [m["update/updates"] for m in history[1:]] == [0, 0]
    paths = sorted((folder / "post_mortem").iterdir())
    assert [p.name for p in paths] == [f"step_00000{k}_update_0000.npz" for k in (1, 2)]
    with np.load(paths[0]) as stored:
        rows = stored["rows"]
        assert len(rows) == history[1]["rows/trained"]
        assert np.isnan(stored["advantages"]).any()
        assert stored["tokens"].shape == stored["logprobs"].shape == stored["advantages"].shape
        problems = json.loads(str(stored["problems"]))
        assert {int(k) for k in problems} == {*stored["problem"].tolist()}
        assert all("?" in text for text in problems.values())


def test_a_policy_that_gives_no_numbers_ends_the_run(tmp_path):
    """A learning rate beyond reason: update and parameters are finite, probabilities are not.
    Initial responses of step 2 are still those of the policy before; those of step 3 are not."""
    folder, config = tmp_path / "run", config_of()
    config.optimizer.learning_rate = 3e38
    config.optimizer.warmup_updates = 0
    with pytest.raises(NotFiniteError, match="no response of step 3 has log-probabilities that"):
        execute(config, folder)
    history = read_metrics(folder / "metrics.jsonl")
    assert [m["train/not_finite"] for m in history[1:]] == [0.0, pytest.approx(0.5, abs=0.4), 1.0]
    assert [m["update/not_finite_total"] for m in history[1:]] == [0, 1, 1]
    # Bug: step 3 was saved, and took the place of step 1. The best stays beside the newest.
    assert whole_checkpoints(folder) == [0, 1, 2]


# The run folder.


@pytest.mark.parametrize("crashes", [False, True])
def test_metrics_wait_for_a_disk_that_is_gone(finished, tmp_path, crashes):
    """Not a line is lost, though the run saves, and is killed, before the disk comes back."""
    _, expected = finished
    folder = tmp_path / "run"
    path, aside = folder / "metrics.jsonl", folder / "aside"
    stages = iter(["lose", "keep", "return"])

    def act():
        stage = next(stages)
        if stage == "lose":
            path.rename(aside)
            path.symlink_to("/dev/full")
        elif stage == "return":
            if crashes:
                raise CrashError
            path.unlink()
            aside.rename(path)

    def run_on():
        # In the updates of steps 1, 2 and 3.
        with pytest.MonkeyPatch.context() as patch:
            from experiments.terminal import Terminal

            before = Terminal.stage

            def stage(self, name):
                before(self, name)
                if name == "update":
                    act()

            patch.setattr(Terminal, "stage", stage)
            said = said_by(config_of(), folder)
            assert said.count("metrics cannot be written") == 1

    if crashes:
        with pytest.raises(CrashError):
            run_on()
        path.unlink()
        aside.rename(path)
        assert [m["step"] for m in read_metrics(path)] == [0]
        execute(config_of(), folder)
    else:
        run_on()
    assert without_clock(read_metrics(path)) == without_clock(expected)


def test_half_a_line_is_written_again(tmp_path):
    """A disk that is full in the middle of a line. (TensorBoard's own thread would have hung.)"""
    warnings = []
    files = RunFolder(tmp_path, warn=warnings.append)
    files.write_metrics({"step": 0, "a": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with full_disk(size + 5):
        for step in (1, 2):
            files.write_metrics({"step": step, "a": 2.0})
    assert [m["step"] for m in files.pending] == [1, 2]
    files.write_metrics({"step": 3, "a": float("nan")})
    files.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 0, "a": 1.0}, {"step": 1, "a": 2.0}, {"step": 2, "a": 2.0}, {"step": 3},
    ]  # fmt: skip
    assert len(warnings) == 3
    assert "metrics cannot be written" in warnings[0]
    assert "TensorBoard events cannot be written" in warnings[1]
    assert "step 3: not finite, not written: a" in warnings[2]


@pytest.mark.parametrize("left", [None, 0, 1])
def test_a_metrics_file_that_lost_its_end_is_written_anew(tmp_path, left):
    """Bug: a hole of zeros came where lines had been, or the file that was gone stayed away."""
    warnings, path = [], tmp_path / "metrics.jsonl"
    files = RunFolder(tmp_path, warn=warnings.append)
    for step in range(3):
        files.write_metrics({"step": step})
    if left is None:
        path.unlink()
    else:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:left]))
    files.write_metrics({"step": 3})
    files.write_metrics({"step": 4})
    files.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(5)]
    assert warnings == [f"{path} had lost lines; 3 were written again"]


def test_a_line_that_is_damaged_costs_no_other(tmp_path):
    """Bug: all after it were dropped when the run went on."""
    path, warnings = tmp_path / "metrics.jsonl", []
    lines = [json.dumps({"step": step}) for step in range(5)]
    lines[2] = "\0" * 20
    path.write_text("\n".join([*lines, '{"st']))
    RunFolder(tmp_path, 4, warn=warnings.append).close()
    assert [m["step"] for m in read_metrics(path)] == [0, 1, 3, 4]
    assert "has lost the metrics of steps 2" in warnings[0]


def test_a_tensorboard_folder_that_cannot_be_written_costs_the_events_alone(tmp_path):
    (tmp_path / "tensorboard").write_text("in its place")
    warnings = []
    files = RunFolder(tmp_path, warn=warnings.append)
    files.write_metrics({"step": 0})
    files.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0}]
    assert len(warnings) == 1
    assert "TensorBoard events cannot be written" in warnings[0]


def test_lost_metrics_are_missed(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (0, 1, 4, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    warnings = []
    RunFolder(tmp_path, 7, warn=warnings.append).close()
    assert "has lost the metrics of steps 2-3, 5-6" in warnings[0]


def test_trees_of_a_long_run_are_few(tmp_path):
    """Every 2nd, 4th, ... stays, and the newest."""
    files = RunFolder(tmp_path)
    for step in range(1, 1001):
        files.write_trees(step, [])
    files.close()
    steps = sorted(int(p.stem[5:]) for p in (tmp_path / "trees").iterdir())
    assert len(steps) <= 200
    assert steps[-1] == 1000
    assert max(np.diff(steps)) <= 16


# Problems and devices.


def test_problems_that_vanish_end_the_run_after_what_it_has(tmp_path):
    """The step that cannot draw its problems is not begun; what there is is saved, and the same
    command goes on once they are back."""
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(f'{{"problem": "p{i}", "answer": "{i}"}}\n' for i in range(60)))
    config = hf_config(train=str(path), cache=str(tmp_path / "cache"))
    config.update(steps=4, checkpoint_every=100, eval_every=0)
    folder = tmp_path / "run"

    def lose():
        (tmp_path / "cache").rename(tmp_path / "lost")
        for records in (tmp_path / "lost").rglob("*array_record*"):
            records.write_bytes(b"")

    with pytest.raises(DataError, match=r"problem \d+ of split 'train' cannot be read"):
        execute_with(config, folder, "branch", 1, lose)
    saved = max(int(p.name) for p in (folder / "checkpoints").iterdir())
    assert saved >= 1
    # Prepared anew from the file, they are the same problems.
    history = execute(config, folder)
    assert [m["step"] for m in history] == [0, 1, 2, 3, 4]


def test_what_does_not_fit_the_devices_is_refused_before_the_first_step(tmp_path):
    config = config_of()
    config.memory.bytes_per_device = 12 * 2**20
    with pytest.raises(DeviceMemoryError, match=r"Lower .* from \d+ to \d+"):
        execute(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_running_out_of_memory_names_the_setting(tmp_path):
    """An allocation that no machine has, in the middle of a step; the step before is saved."""
    import jax.numpy as jnp

    folder = tmp_path / "run"
    with pytest.raises(DeviceMemoryError, match=r"generate: lower sampler.slots from 32 to 16"):
        execute_with(
            config_of(checkpoint_every=100), folder, "generate", 2, lambda: jnp.zeros(1 << 46)
        )
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["0", "1"]


def test_a_fault_in_an_update_that_has_begun_says_where_the_run_will_go_on(tmp_path, monkeypatch):
    """Bug: nothing was said; the state before is gone."""
    from attnrl_jax.training import loop

    launch = loop.launch_update

    def fail(train, *arguments, **options):
        # As an update that donates its buffers, and then runs out of memory.
        yield from launch(train, *arguments, **options)
        raise RuntimeError("anything")

    monkeypatch.setattr(loop, "launch_update", fail)
    folder, warnings = tmp_path / "run", []
    monkeypatch.setattr(
        "experiments.terminal.Terminal.warn", lambda self, text: warnings.append(text)
    )
    with pytest.raises(RuntimeError, match="anything"):
        execute(config_of(), folder)
    assert warnings == [
        "step 0 could not be saved: the update had begun to change it; the newest is of step 0"
    ]
    assert whole_checkpoints(folder) == [0]


def test_a_fault_in_the_middle_of_a_step_saves_the_step_before(finished, tmp_path):
    _, expected = finished
    folder = tmp_path / "run"

    def fail():
        raise RuntimeError("anything")

    with pytest.raises(RuntimeError, match="anything"):
        execute_with(config_of(checkpoint_every=100), folder, "generate", 3, fail)
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [0, 2]
    history = execute(config_of(), folder)
    assert without_clock(history) == without_clock(expected)
