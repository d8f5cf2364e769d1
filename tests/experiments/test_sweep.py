"""Sweeps: from a file to runs, and what becomes of them."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.plan import SweepError, check_folders, load_sweep, plan, run_name
from experiments.reporting import read_metrics
from experiments.results import log_path
from experiments.sweep import main
from experiments.sweeps import learning_rate, methods
from tests.experiments.test_results import write_run

ROOT = Path(__file__).resolve().parents[2]


def sweep_file(folder, entries, common=None, config="experiments/configs/attnrl_graph.py"):
    path = folder / "mine.py"
    path.write_text(
        "from math import inf\n"
        f"CONFIG = {config!r}\n"
        f"COMMON = {common or {}!r}\n"
        "def get_sweep():\n"
        f"    yield from {entries!r}\n"
    )
    return path


def planned(folder, entries, common=None, **more):
    return plan(load_sweep(sweep_file(folder, entries, common, **more)), folder / "runs")


def test_overrides_become_configurations(tmp_path):
    entries = [{"method": "grpo", "seed": 1}, {"optimizer.learning_rate": 1, "seed": 0}]
    first, second = planned(tmp_path, entries, {"steps": 7})
    assert (first.config.method, first.config.seed, first.config.steps) == ("grpo", 1, 7)
    assert first.overrides == entries[0]
    assert first.folder == tmp_path / "runs" / "method=grpo,seed=1"
    assert second.config.method == "attnrl"
    assert second.config.optimizer.learning_rate == 1.0
    assert first.command[1:3] == ["-m", "experiments.run"]
    assert first.command[-1] == f"--workdir={first.folder}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size.bounds", (0.25, 2.5)),
        ("batch_size.bounds", [0.25, 2.5]),
        ("batch_size.adaptive", False),
        ("permute_advantages", True),
        ("optimizer.learning_rate", 1.2345678901234567e-05),
        ("optimizer.max_grad_norm", float("inf")),
        ("max_sampled_tokens", 10**12),
        ("branching.rule", None),
        ("branching.rule", "random"),
        ("expansion.filter_easy", False),
        ("prompt.instruction", ""),
        ("prompt.instruction", "None"),
        ("prompt.instruction", '  it\'s "so": a=b, $HOME \\n\n(1, 2) --x [ü] '),
    ],
)
def test_values_survive_the_command_line(tmp_path, name, value):
    [run] = planned(tmp_path, [{name: value}])
    section, _, leaf = name.rpartition(".")
    found = (run.config[section] if section else run.config)[leaf]
    expected = tuple(value) if isinstance(value, list) else value
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{}, {"stepz": 3}], "run 2 (stepz=3): unknown setting stepz; known: "),
        ([{"optimizer.rate": 1.0}], "run 1 (optimizer.rate=1.0): unknown setting optimizer.rate; "
         "known: optimizer.b1, optimizer.b2"),
        ([{"steps.x": 1}], "unknown setting steps.x; known: advantage_norm, batch"),
        ([{"seed": 0}, {"method": "ppo"}], "run 2 (method='ppo'): method must be one of attnrl"),
        ([{"method": "grpo", "branching.rule": "fci"}],
         "run 1 (method='grpo' branching.rule='fci'): branching.rule is 'fci', but method grpo"),
        ([{"steps": 1.5}], "run 1 (steps=1.5): steps must be int; got 1.5"),
        ([{"steps": "many"}], "steps must be int; got 'many'"),
        ([{"num_problems": 0}], "num_problems must be >= 1"),
        ([{"branching": {"rule": "fci"}}], "branching is a group of settings, override each"),
        ([{"sampler.cache_length": None}], "sampler.cache_length=None cannot be given on a command "
         "line (it would be 256); set it in a configuration file"),
        ([{"prompt.instruction": "a\0b"}], "prompt.instruction has a zero byte, which no command"),
        ([{"seed": 1}, {"seed": 2}, {"seed": 1}], "run 3 (seed=1) is the same run as run 1"),
        # The default of a setting, and the same number as an integer.
        ([{}, {"seed": 0}], "run 2 (seed=0) is the same run as run 1"),
        ([{"temperature": 1}, {"temperature": 1.0}], "is the same run as run 1"),
        ([{"eval_every": 3, "steps": 2}], "run 1 (eval_every=3 steps=2): steps is also in COMMON"),
        ([3], "run 1 must be a dict from settings to values; got 3"),
        ([], "get_sweep() yields no runs"),
    ],
)  # fmt: skip
def test_bad_sweeps_are_refused_before_anything_runs(tmp_path, entries, message):
    common = {"steps": 4} if "COMMON" in message else None
    with pytest.raises(SweepError, match=re.escape(message)):
        planned(tmp_path, entries, common)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_sweep():\n    yield {}", "has no attribute 'CONFIG'"),
        ("CONFIG = 'x.py'", "has no attribute 'get_sweep'"),
        ("CONFIG = 'x.py'\ndef get_sweep():\n    yield {}", f"no file at {ROOT / 'x.py'}"),
        ("CONFIG = 3\ndef get_sweep():\n    yield {}", "CONFIG must be a path; got 3"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("CONFIG = (", "SyntaxError"),
    ],
)
def test_files_that_are_no_sweep_are_refused(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(SweepError, match=re.escape(message)):
        load_sweep(path)
    with pytest.raises(SweepError, match="no sweep file at"):
        load_sweep(tmp_path / "missing.py")


def test_a_configuration_file_may_be_anywhere_and_take_an_argument(tmp_path):
    (tmp_path / "config.py").write_text(
        "from experiments.settings import default_config\n"
        "def get_config(method):\n"
        "    config = default_config()\n"
        "    config.method = method\n"
        "    return config\n"
    )
    [run] = planned(tmp_path, [{"seed": 3}], config=f"{tmp_path}/config.py:treerl")
    assert run.config.method == "treerl"
    assert run.arguments[0].endswith("config.py:treerl")


def test_names_are_readable_safe_and_depend_on_the_run_alone():
    assert run_name({"seed": 1, "optimizer.learning_rate": 3e-05, "method": "grpo"}) == (
        "method=grpo,optimizer.learning_rate=3e-05,seed=1"
    )
    assert run_name({"method": "grpo", "seed": 1}) == run_name({"seed": 1, "method": "grpo"})
    assert run_name({"batch_size.bounds": (0.5, 2.0)}) == "batch_size.bounds=0.5_2.0"
    assert run_name({}) == "default"
    odd = ["a/b", "a b", "a,b", "a\nb", "../x", "", "é", "x" * 300, "x" * 301]
    names = [run_name({"prompt.instruction": value}) for value in odd]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.=,+-]{1,200}", name, re.ASCII) for name in names)
    long = [run_name({f"setting_{i}": i for i in range(60)} | {"seed": s}) for s in range(3)]
    assert len(set(long)) == 3
    assert all(len(name) < 200 for name in long)


def test_folders_of_another_sweep_are_refused(tmp_path):
    [run] = planned(tmp_path, [{"seed": 1}])
    run.folder.mkdir(parents=True)
    path = run.folder / "config.json"
    path.write_text(run.config.to_json_best_effort())
    check_folders([run])
    # More steps may be given to a run.
    check_folders(planned(tmp_path, [{"seed": 1}], {"steps": 99, "max_sampled_tokens": 7}))
    changed = planned(tmp_path, [{"seed": 1}], {"optimizer.b1": 0.5, "num_problems": 3})
    with pytest.raises(SweepError, match=r"another run; num_problems: 24 there, 3 here; optim"):
        check_folders(changed)
    path.write_text("{")
    with pytest.raises(SweepError, match=r"config\.json is not valid JSON"):
        check_folders([run])


def test_the_projects_sweeps():
    runs = plan(load_sweep(Path(methods.__file__)), Path("runs"))
    assert [run.folder.name for run in runs[:5]] == [
        "method=attnrl,seed=0", "method=treerl,seed=0", "method=random,seed=0",
        "method=grpo,seed=0", "method=attnrl,seed=1",
    ]  # fmt: skip
    assert len(runs) == 20
    # Equal cost, and equal in all but the method and the seed.
    assert {run.config.max_sampled_tokens for run in runs} == {400_000}
    rest = [json.loads(run.config.to_json()) | {"method": "", "seed": 0} for run in runs]
    assert all(values == rest[0] for values in rest)
    assert len(plan(load_sweep(Path(learning_rate.__file__)), Path("runs"))) == 16


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
    flags = {"index": None, "stop_on_error": False, "print": False, "gather": False}
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
    assert re.fullmatch(r"1/2 model.path=-nowhere-\w+  failed  -  \d+ s", lines[0])
    assert lines[1].strip().startswith("exit code 2; error: no model at /nowhere")
    assert lines[2] == "2/2 seed=5  finished  0.250 -> 0.750  skipped"
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
    with pytest.raises(SweepError, match="another run; num_problems: 24 there, 3 here"):
        execute(capsys, config=path, workdir=tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_a_sweep_that_was_stopped_continues(tmp_path):
    """Two real runs; the second is ended with the sweep, by the signal of a scheduler."""
    common = {
        "method": "grpo", "steps": 1, "num_problems": 2, "num_responses": 2,
        "data.held_out_size": 16, "score_batch_rows": 16, "micro_batch_tokens": 4096,
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
    assert output.startswith("1/2 seed=0  finished")
    assert [run.result().state for run in (first, second)] == ["finished", "unfinished"]
    # The run that was going on has ended with it: its folder is free.
    before = (first.folder / "metrics.jsonl").read_text()
    done = command(*arguments)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"1/2 seed=0  finished  [\d.]+ -> [\d.]+  skipped", lines[0])
    assert re.fullmatch(r"2/2 seed=1  finished  [\d.]+ -> [\d.]+  \d+.*", lines[1])
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
