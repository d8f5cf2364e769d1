"""Whole runs: what they leave behind, how they continue, what they refuse."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnrl_jax.models.config import ModelError
from attnrl_jax.tasks.problems import DataError
from attnrl_jax.training.guards import GuardConfig
from experiments.configs import attnrl_graph, attnrl_hf
from experiments.folders import FolderError
from experiments.records import read_metrics
from experiments.reporting import draw_timeline
from experiments.run import result_line
from experiments.run_folder import claimed_run
from experiments.settings import SettingError, default_config
from tests.experiments.runs import crash, execute, small, without_clock

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = ROOT / "tests" / "data" / "golden" / "models" / "qwen2_tied"


def test_a_run_leaves_its_folder(finished):
    folder, history = finished
    assert [m["step"] for m in history] == [0, 1, 2, 3]
    assert history == read_metrics(folder / "metrics.jsonl")
    assert json.loads((folder / "config.json").read_text())["num_problems"] == 4
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events*"))
    assert any((folder / "checkpoints").iterdir())
    assert re.fullmatch(r"held-out accuracy: 0\.\d{3} -> 0\.\d{3} \(n=16\)", result_line(history))


def test_the_shipped_policy_branches_by_attention(finished):
    """At the default run's delta, distance and budgets, importance finds positions to spend."""
    _, history = finished
    positions = branched = 0
    for metrics in history[1:]:
        assert metrics["branching/by_importance"] >= 0.8
        positions += metrics["branching/positions"]
        branched += metrics["branching/responses_expanded"]
    assert positions >= 0.8 * 2 * branched > 0


def test_metrics_are_those_of_the_documents(finished):
    """Every metric that a run writes is in docs/metrics.md, once, and the other way round."""
    written = {name for metrics in finished[1] for name in metrics}
    documented = listed_metrics(ROOT / "docs" / "metrics.md")
    assert sorted(documented) == sorted(written)
    # The README's are some of these.
    assert len(listed_metrics(ROOT / "README.md")) == 5
    assert set(listed_metrics(ROOT / "README.md")) <= written


def listed_metrics(document: Path) -> list[str]:
    """Names in the first column of tables headed `metric`, in order."""
    names, is_inside = [], False
    for line in document.read_text().splitlines():
        is_inside = line.startswith("| metric |") or (is_inside and line.startswith("|"))
        if is_inside:
            names += re.findall(r"`([^`]+)`", line.split("|")[1])
    return names


def test_guards_are_those_of_the_documents():
    """The page on metrics gives every guard's limit as it is."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    given = {
        name: float(limit) for name, limit in re.findall(r"`guards\.(\w+)` \(([\d.]+)\)", page)
    }
    assert given == dataclasses.asdict(GuardConfig())


def test_trees_hold_text_values_and_importance(finished):
    folder, _ = finished
    trees = sorted((folder / "trees").glob("*.json"))
    assert [t.name for t in trees] == [f"step_00000{s}.json" for s in (1, 2, 3)]
    recorded = json.loads(trees[0].read_text())
    assert recorded["step"] == 1
    ids = [tree["problem"]["id"] for tree in recorded["problems"]]
    # All four problems of the step; behind the most telling one in an order of their own.
    assert len({*ids}) == 4
    assert ids[1:] == sorted(ids[1:], key=lambda name: hashlib.sha256(name.encode()).digest())
    for tree in recorded["problems"]:
        check_tree(tree)


def check_tree(tree):
    leaves = tree["leaves"]
    assert 0 <= tree["value"] <= 1
    assert abs(tree["value"] - sum(leaf["reward"] for leaf in leaves) / len(leaves)) < 1e-6
    roots = {leaf["row"]: leaf for leaf in leaves if leaf["row"] == leaf["root"]}
    for leaf in leaves:
        assert leaf["root"] in roots
        if leaf["row"] != leaf["root"]:
            root = roots[leaf["root"]]
            # Branches by FCI are at the start of a step.
            assert leaf["steps"][0]["start"] == leaf["split"]
            assert all(step["fci"] is None for step in leaf["steps"])
            branched = [s for s in root["steps"] if s["start"] == leaf["split"]]
            assert branched
            assert branched[0]["fci"] > 0
        own = [*(s for s in roots[leaf["root"]]["steps"] if s["end"] <= leaf["split"])]
        path = leaf["steps"] if leaf["root"] == leaf["row"] else own + leaf["steps"]
        ends = [step["end"] for step in path]
        assert [step["start"] for step in path] == [0, *ends[:-1]]
        assert ends[-1] == leaf["length"]
        assert leaf["segments"][-1]["end"] == leaf["length"]


@pytest.mark.parametrize(("stage", "occurrence"), [("generate", 2), ("update", 1)])
def test_a_run_that_was_stopped_continues_as_if_it_had_not(finished, tmp_path, stage, occurrence):
    _, expected = finished
    folder = tmp_path / "stopped"
    crash(small(attnrl_graph.get_config()), folder, stage, occurrence)
    assert 0 < len(read_metrics(folder / "metrics.jsonl")) < len(expected)
    history = execute(small(attnrl_graph.get_config()), folder)
    assert without_clock(history) == without_clock(expected)
    assert without_clock(read_metrics(folder / "metrics.jsonl")) == without_clock(expected)


def test_metrics_after_the_last_checkpoint_are_written_again(finished, tmp_path):
    """A line for a step that is not in a checkpoint, or half a line, is not kept."""
    _, expected = finished
    folder = tmp_path / "stopped"
    crash(small(attnrl_graph.get_config()), folder, "generate", 2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/accuracy": 9.0}\n{"step": 3, "tra')
    history = execute(small(attnrl_graph.get_config()), folder)
    assert without_clock(history) == without_clock(expected)


def test_a_run_may_be_given_more_steps(finished, tmp_path):
    """All but the evaluation of what was its last step is as in one longer run."""
    folder = tmp_path / "longer"
    shutil.copytree(finished[0], folder)
    history = execute(small(attnrl_graph.get_config(), steps=4), folder)
    assert [m["step"] for m in history] == [0, 1, 2, 3, 4]
    assert without_clock(history[:4]) == without_clock(finished[1])


def test_a_run_may_be_given_a_budget_of_tokens(finished, tmp_path):
    _, expected = finished
    config = small(attnrl_graph.get_config(), steps=100)
    config.max_sampled_tokens = int(expected[1]["tokens/sampled_total"]) + 1
    history = execute(config, tmp_path / "budget")
    assert [m["step"] for m in history] == [0, 1, 2]
    assert history[-1]["tokens/sampled_total"] == expected[2]["tokens/sampled_total"]


def test_a_finished_run_only_reports(finished):
    folder, history = finished
    assert execute(small(attnrl_graph.get_config()), folder) == history


def hf_config(**data):
    config = small(attnrl_hf.get_config(), steps=1)
    config.model.path = str(TINY_MODEL)
    config.prompt_budget = 256
    config.response_budget = 64
    config.data.update(data)
    return config


def test_a_model_folder_and_a_file_of_problems(tmp_path):
    """Bytes as tokens, answers by math-verify; over-long prompts are removed and counted."""
    path = tmp_path / "problems.jsonl"
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(60)]
    rows += [{"problem": "x" * 300 + str(i), "answer": "1"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = execute(hf_config(train=str(path)), tmp_path / "run")
    # A random model boxes nothing: the step is healthy, and skipped.
    assert history[1]["step/skipped"] == 1.0
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert report["removed"]["long_prompts"] == 60
    assert history[1]["problems/skipped_prompts_total"] == 0
    assert history[1]["tokens/sampled"] > 0

    # Its checkpoint holds responses to these problems: other problems are another run.
    path.write_text(path.read_text().replace("What is", "How much is"))
    config = hf_config(train=str(path))
    config.steps = 2
    with pytest.raises(FolderError, match=r"the problems .* have changed since the run began"):
        execute(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.model.update(path="/nowhere"), ModelError, "no model at /nowhere"),
        (lambda c: c.data.update(train="/nowhere.jsonl"), DataError, "/nowhere.jsonl"),
        (lambda c: c.update(response_budget=4096), SettingError, "has only 1024 positions"),
        (lambda c: c.update(prompt_budget=2), DataError, "long_prompts 50 (prompts may have 2 "),
        (lambda c: c.mesh.update(data=3), ValueError, "does not fit 8 devices"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, change, error, message):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(f'{{"problem": "p{i}", "answer": "{i}"}}\n' for i in range(50)))
    config = hf_config(train=str(path))
    change(config)
    with pytest.raises(error, match=re.escape(message)):
        execute(config, tmp_path / "run")
    # Nothing half-written: the mended command may use the same folder.
    assert not (tmp_path / "run").exists()


def test_the_folder_of_another_run_is_refused(finished):
    folder, _ = finished
    before = (folder / "config.json").read_text()
    config = small(attnrl_graph.get_config())
    config.optimizer.learning_rate = 1.0
    with pytest.raises(
        FolderError, match=r"another run; optimizer.learning_rate: 0.0003 there, 1.0"
    ):
        execute(config, folder)
    assert (folder / "config.json").read_text() == before


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FolderError, match="no run folder"), claimed_run(tmp_path, default_config()):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_cannot_share_a_folder(tmp_path):
    again = claimed_run(tmp_path / "run", default_config())
    with (
        claimed_run(tmp_path / "run", default_config()),
        pytest.raises(FolderError, match="in use by another process"),
        again,
    ):
        pass
    with claimed_run(tmp_path / "run", default_config()):
        pass


def command(*arguments):
    """The run command as a user types it, on one device."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax")
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command(tmp_path):
    done = command(
        "--config.steps=1", "--config.num_problems=8", "--config.data.held_out_size=16",
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"held-out accuracy: [01]\.\d{3} -> [01]\.\d{3} \(n=16\)", last)
    # The example tree, with the FCI of its steps and the verdict of its branches.
    printed = " ".join(done.stdout.split())
    assert "FCI before each step" in printed
    assert "branch, advantage" in printed


@pytest.mark.slow
def test_the_readmes_command_for_other_models(tmp_path):
    """As printed, with a folder and a file put in."""
    text = (ROOT / "README.md").read_text()
    printed = re.search(
        r"experiments\.run (--config=experiments.configs.attnrl_hf[^`]*?)\n```", text
    )[1]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f'{{"problem": "p{i}", "answer": "{i}"}}\n' for i in range(50)))
    words = shlex.split(printed.replace("\\\n", " "))
    given = {"DIR": str(TINY_MODEL), "FILE.jsonl": str(problems), "runs/mine": str(tmp_path / "r")}
    words = [
        f"{name}={given.get(value, value)}" for name, value in (w.split("=", 1) for w in words)
    ]
    small_enough = ["steps=1", "num_problems=2", "response_budget=32", "data.held_out_size=4"]
    done = command(*words, *[f"--config.{s}" for s in small_enough])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "held-out accuracy: 0.000 -> 0.000 (n=4)"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.method=ppo", "error: method must be one of attnrl, treerl, random, grpo"),
        ("--config.stepz=3", "stepz"),
        ("--config.steps=many", "steps"),
        ("--config=/nowhere.py", "/nowhere.py"),
        ("--config=experiments/configs/r1_distill_qwen_1p5b.py:ppo", "error: the paper compares"),
        ("--config=experiments/configs/paper.py", "error: the file of --config has no get_config"),
        ("--config={}/broken.py", "no_such_module"),
        ("--config={}/empty.py", "get_config"),
        ("unexpected", "unexpected"),
    ],
)
def test_errors_are_a_line_and_not_a_traceback(tmp_path, argument, message):
    (tmp_path / "broken.py").write_text("import no_such_module")
    (tmp_path / "empty.py").write_text("")
    done = command(argument.format(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_explains():
    done = command("--help")
    assert "python -m experiments.run" in done.stdout
    assert "--workdir" in done.stdout
    assert "Traceback" not in done.stderr


def test_timeline_of_a_step():
    """Two stages side by side, one that comes twice, one too short for a column."""
    spans = [("update", 104.0, 108.0), ("generate", 100.0, 106.0), ("score", 106.0, 106.001)]
    drawn = draw_timeline([*spans, ("generate", 109.0, 110.0)], width=10)
    assert drawn.splitlines() == [
        " generate    7.00 s |######   #|",
        "   update    4.00 s |    ####  |",
        "    score    0.00 s |      #   |",
    ]
