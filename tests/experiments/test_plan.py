"""Sweep files become runs: configurations, command lines, folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.plan import SweepError, check_folders, load_sweep, plan, run_name
from experiments.sweeps import learning_rate, methods

ROOT = Path(__file__).resolve().parents[2]


def sweep_file(folder, entries, common=None, config="experiments/configs/attnrl_graph.py"):
    path = folder / "mine.py"
    path.write_text(
        "from math import inf, nan\n"
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
    with pytest.raises(SweepError, match=r"another run; num_problems: 6 there, 3 here; optim"):
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
    assert {run.config.max_sampled_tokens for run in runs} == {200_000}
    rest = [json.loads(run.config.to_json()) | {"method": "", "seed": 0} for run in runs]
    assert all(values == rest[0] for values in rest)
    assert len(plan(load_sweep(Path(learning_rate.__file__)), Path("runs"))) == 16


def test_nan_is_refused_by_name(tmp_path):
    """Bug: nan "cannot be given on a command line (it would be nan)"."""
    nan = float("nan")
    for entry in ({"optimizer.b1": nan}, {"optimizer.b1": np.float32(nan)}):
        path = sweep_file(tmp_path, [])
        path.write_text(path.read_text() + f"    yield {{'seed': 0}}\n    yield {entry!r}\n")
        path.write_text("import numpy as np\n" + path.read_text())
        with pytest.raises(SweepError, match=r"run 2: optimizer\.b1 must not be nan; got nan"):
            load_sweep(path)
    with pytest.raises(SweepError, match=r"run 1: batch_size.bounds must not be nan; got \(nan, 1"):
        planned(tmp_path, [{"batch_size.bounds": (nan, 1.0)}])
    with pytest.raises(SweepError, match="COMMON: temperature must not be nan"):
        planned(tmp_path, [{}], {"temperature": nan})


def test_an_error_of_the_configuration_file_is_one_line(tmp_path):
    """Bug: `error:` of a sweep held the traceback that ml_collections makes of it."""
    config = f"{ROOT}/experiments/configs/r1_distill_qwen_1p5b.py:ppo"
    with pytest.raises(
        SweepError, match=r"run 1 .*SettingError: the paper compares .*'ppo'"
    ) as found:
        planned(tmp_path, [{"seed": 0}], config=config)
    assert "\n" not in str(found.value)
    assert "File" not in str(found.value)
    # What the error says is kept, whatever its number of lines.
    path = tmp_path / "config.py"
    path.write_text("def get_config():\n    raise ValueError('first\\nsecond')\n")
    with pytest.raises(SweepError, match=r"ValueError: first second$"):
        planned(tmp_path, [{"seed": 0}], config=str(path))


@pytest.mark.parametrize("order", [1, -1])
def test_a_folder_is_not_the_log_of_another_run(tmp_path, order):
    """Bug: the folder of one run and the log of another could be one path."""
    values = ["x", "x.log"][::order]
    with pytest.raises(SweepError, match=r"run 2 .*same folder or log, \S+/model.path=x.log$"):
        planned(tmp_path, [{"model.path": value} for value in values])
