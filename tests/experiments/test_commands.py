"""How commands end when something goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from attnrl_jax.compilation.memory import DeviceMemoryError
from attnrl_jax.processes import ProcessError
from attnrl_jax.tasks.problems import DataError
from attnrl_jax.training.loop import NotFiniteError
from experiments.commands import readable, stop
from experiments.setting_list import setting_list, settings_of
from experiments.settings import SettingError, build, default_config
from tests.test_readme import ROOT
from tests.two_processes import SMALL_RUN, environment


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("no such setting"), 2, "error: no such setting\n"),
        (FileNotFoundError("no file"), 2, "error: no file\n"),
        (ProcessError("one died"), 1, "error: one died\n"),
        (RuntimeError("a bug"), 1, "error: RuntimeError: a bug (--debug shows the traceback)\n"),
    ],
)
def test_what_was_given_is_told_from_what_may_work_again(error, code, message, capsys):
    with pytest.raises(SystemExit) as ended:
        stop(error)
    assert ended.value.code == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("error", "options", "code", "message"),
    [
        # Bug: 2, which ends the loop of docs/running.md: the disk may have room again.
        (OSError(28, "No space left on device"), {}, 1, "OSError: [Errno 28] No space left"),
        (ValueError("a bug"), {}, 1, "ValueError: a bug (--debug shows"),
        (DataError("problem 3 of split 'train' cannot be read"), {}, 1, "problem 3 of split"),
        # Bug: 1, though a run that goes on exactly meets it again for ever.
        (NotFiniteError("no number"), {"told": True, "repeats": True}, 2, "no number\n"),
        (DeviceMemoryError("lower slots"), {"repeats": True}, 2, "lower slots\n"),
    ],
)
def test_in_the_middle_of_a_run_only_what_repeats_is_not_tried_again(
    error, options, code, message, capsys
):
    with pytest.raises(SystemExit) as ended:
        stop(error, begun=True, **options)
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.slow
def test_the_exit_code_of_a_run_tells_its_loop_whether_to_go_on(tmp_path):
    """A fault in a step is 1 and an update without numbers 2, of the command itself."""
    program = """
import sys
from attnrl_jax.training import loop
from experiments import run

FAULT, honest = sys.argv.pop(1), loop.train_step

def step(state, setup):
    if FAULT == "value":
        raise ValueError("a bug")
    state, report = honest(state, setup)
    return state, report.__class__(**vars(report) | {"metrics": report.metrics | {
        "train/not_finite": 1}})

loop.train_step = step
run.command()
"""
    (tmp_path / "program.py").write_text(program)
    for fault, code, message in (
        ("value", 1, "error: ValueError: a bug (--debug shows the traceback)"),
        ("numbers", 2, "error: no response of step 1 has log-probabilities that are finite"),
    ):
        ended = subprocess.run(
            [sys.executable, tmp_path / "program.py", fault, *SMALL_RUN[1:],
             "--config.steps=2", "--config.num_problems=2", f"--workdir={tmp_path / 'run'}"],
            cwd=ROOT, env=environment(1) | {"PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        assert ended.returncode == code, ended.stderr
        assert message in ended.stderr


def test_a_fault_of_a_library_or_of_the_system_says_what_it_is(capsys):
    """Bug: a full disk was `[Errno 28] ...`, and a library's words went for ours."""

    def fault(function):
        try:
            function()
        except Exception as error:
            with pytest.raises(SystemExit) as ended:
                stop(error)
        return ended.value.code, capsys.readouterr().err

    with open("/dev/full", "w") as full:
        code, said = fault(lambda: os.write(full.fileno(), b"x"))
    more = "(--debug shows the traceback)\n"
    assert (code, said) == (2, f"error: OSError: [Errno 28] No space left on device {more}")
    code, said = fault(lambda: {}["steps"])
    assert (code, said) == (1, f"error: KeyError: 'steps' {more}")
    code, said = fault(lambda: json.loads("{"))
    assert code == 2
    assert said.startswith("error: JSONDecodeError: Expecting property name")
    # Raised in a library: numpy knows nothing of settings.
    code, said = fault(lambda: np.random.default_rng(0).choice([]))
    assert said.startswith("error: ValueError: ")
    # One paragraph, whatever it says.
    code, said = fault(lambda: exec("raise RuntimeError('a\\n\\n  b')"))
    assert said == f"error: RuntimeError: a b {more}"

    def refuse():
        raise SettingError("steps must be at least 1")

    assert fault(refuse) == (2, "error: steps must be at least 1\n")


MODULES = ("run", "evaluate", "sweep", "pretrain", "data", "soak", "export", "aot", "plot", "view",
           "bench", "scaling", "aot_table")  # fmt: skip
# Help of each command in one process: what takes the time is importing jax.
HELP = """
import contextlib, importlib, io, json, runpy, sys
from absl import flags
said = {}
for name in sys.argv[1:]:
    module = "experiments." + name
    file = module + ".__main__" if name == "bench" else module
    sys.argv[:] = ["python -m " + module, "--help"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code
    said[name] = [code, out.getvalue(), importlib.import_module(file).__doc__]
print(json.dumps(said))
"""


def test_help_of_every_command_is_readable():
    # absl's flags are of a process: its two commands have one each.
    for names in (MODULES[:1], [m for m in MODULES[1:] if m != "aot"], ["aot"]):
        done = subprocess.run(
            [sys.executable, "-c", HELP, *names], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "COLUMNS": "80"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for name, (code, said, docstring) in json.loads(done.stdout).items():
            assert code == 0, name
            assert f"python -m experiments.{name}" in said, name
            assert "--debug" in said or "--[no]debug" in said, name
            # The docstring from its begin to its end, laid out anew.
            assert " ".join(docstring.split()) in " ".join(said.split()), name
            # Only a path of this machine may be longer, as the default of a flag.
            lines = [line for line in said.splitlines() if str(ROOT) not in line]
            assert max(map(len, lines)) <= 80, name


ERRORS = {
    "evaluate": (["--model=nowhere"], 2, "nowhere"),
    "sweep": (["--config=nowhere.py"], 2, "nowhere.py"),
    "export": (["--workdir=nowhere", "--out=there"], 2, "nowhere is no run folder"),
    "data": (["nowhere.jsonl", "--out=there"], 2, "nowhere.jsonl"),
    "view": (["--workdir=nowhere"], 2, "nowhere is no run folder: it has no config.json"),
    "plot": (["nowhere"], 2, "nowhere is neither the folder of a run nor one that holds some"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_a_paragraph_and_with_debug_a_traceback(name, tmp_path):
    arguments, code, message = ERRORS[name]
    command = [sys.executable, "-m", f"experiments.{name}", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for debug in (False, True):
        done = subprocess.run(
            [*command, *(["--debug"] if debug else [])], cwd=tmp_path, env=env,
            capture_output=True, text=True,
        )  # fmt: skip
        assert message in done.stderr
        assert ("Traceback" in done.stderr) == debug
        if not debug:
            assert done.returncode == code
            [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert line == done.stderr.splitlines()[-1]


def test_paragraphs_are_laid_out_anew_and_examples_are_not():
    text = "A b c d e f g.\n\n    python -m a very long example\n\nh i j\nk l m\n"
    assert readable(text, 10) == (
        "A b c d e\nf g.\n\n    python -m a very long example\n\nh i j k l\nm"
    )


def test_every_setting_has_a_meaning():
    """A field that its docstring forgets would be listed without one."""
    listed = [*settings_of(build(default_config()))]
    assert [name for name, _, meaning in listed if not meaning] == []
    values = {name: (value, meaning) for name, value, meaning in listed}
    assert values["optimizer.b1"] == (
        0.9, "of AdamW; decay applies to every parameter.",
    )  # fmt: skip
    assert values["branching.rule"][0] == "fci"
    assert values["logging.wandb"][1].startswith("project of Weights & Biases")
    assert len(values) == len(listed) > 100
    text = setting_list(build(default_config()))
    assert "--config.optimizer.b2=0.999\n      of AdamW; decay applies" in text
