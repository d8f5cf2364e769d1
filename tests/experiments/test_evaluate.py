"""Whole evaluations: what they write, how they continue, what they refuse, and that their numbers
are the training loop's."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from rich.console import Console

from attnrl_jax.algorithms.losses import LossConfig
from attnrl_jax.datasets.stream import ProblemStream
from attnrl_jax.models.config import read_config
from attnrl_jax.models.weights import load_params
from attnrl_jax.sampling.sampler import SamplerConfig
from attnrl_jax.sharding import MeshConfig, make_mesh, parameter_shardings
from attnrl_jax.tasks.graph import GraphSource, GraphTaskConfig
from attnrl_jax.tasks.judging import ExactJudge
from attnrl_jax.tasks.problems import DataError, Problem
from attnrl_jax.tasks.prompts import PromptConfig, build_prompt
from attnrl_jax.tasks.tokenizer import Tokenizer, load_tokenizer
from attnrl_jax.training import loop
from attnrl_jax.training.setup import Setup, Task
from attnrl_jax.training.state import OptimizerConfig, TrainConfig, init_state
from experiments.benchmarks import BENCHMARKS, Benchmark, load_problems, prepare
from experiments.evaluate import evaluate, main, make_parser, read_mesh
from experiments.evaluation_files import markdown
from experiments.folders import FolderError
from experiments.settings import SettingError
from experiments.tasks import shipped_policy

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = ROOT / "tests" / "data" / "golden" / "models" / "qwen2_tied"
SHARED = ROOT.parent / "shared" / "data"


class StoppedError(Exception):
    """Stands in for whatever ends a process."""


def run(out, *flags, on_progress=None):
    with open(os.devnull, "w") as nowhere:
        arguments = make_parser().parse_args([f"--out={out}", *flags])
        return evaluate(arguments, Console(file=nowhere), on_progress)


def records(folder):
    """All responses without the clock, in the order of problems and samples."""
    found = []
    for path in sorted((folder / "responses").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            assert record.pop("elapsed") >= 0
            found.append(record)
    return sorted(found, key=lambda r: (r["benchmark"], r["problem"], r["sample"]))


def without_clock(results):
    timed = ("seconds", "tokens_per_second")
    benchmarks = {
        name: {key: value for key, value in numbers.items() if key not in timed}
        for name, numbers in results["benchmarks"].items()
    }
    return results | {"benchmarks": benchmarks}


GRAPH = ("--benchmarks=graph", "--limit=16", "--samples=3", "--temperature=0.8", "--slots=16")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and results of an evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("evaluations") / "finished"
    return folder, run(folder, *GRAPH)


def test_an_evaluation_leaves_its_folder(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results
    assert json.loads((folder / "settings.json").read_text()) == results["settings"]
    assert (folder / "results.md").read_text() == markdown(results) + "\n"
    responses = records(folder)
    assert [(r["problem"], r["sample"]) for r in responses] == [
        (problem, sample) for problem in range(16) for sample in range(3)
    ]
    assert responses[3]["id"] == "graph/held_out/0/1"
    numbers = results["benchmarks"]["graph"]
    assert numbers["avg@3"]["value"] == pytest.approx(sum(r["right"] for r in responses) / 48)
    assert numbers["pass@3"]["value"] == pytest.approx(
        sum(any(r["right"] for r in responses[i : i + 3]) for i in range(0, 48, 3)) / 16
    )
    assert 0.2 < numbers["avg@3"]["value"] < numbers["pass@3"]["value"] <= 1
    assert numbers["tokens"] == sum(r["tokens"] for r in responses)
    assert numbers["response_length"] == numbers["tokens"] / 48
    assert numbers["skipped"] == []
    assert numbers["judge_lost"] == 0
    # At temperature 0.8 the samples of a problem are not all the same.
    assert len({r["text"] for r in responses}) > 16
    for response in responses:
        assert response["answer"] is None or response["answer"] in response["text"]


def test_an_evaluation_goes_on_where_it_was_stopped(finished, tmp_path):
    """Twice, the second time with a last line that was cut off as it was written."""
    whole, results = finished
    folder = tmp_path / "stopped"
    kept = 0
    for limit in (10, 30):

        def stop(done, total, limit=limit):
            assert total == 48
            if done >= limit:
                raise StoppedError

        with pytest.raises(StoppedError):
            run(folder, *GRAPH, on_progress=stop)
        assert kept < len(records(folder)) < 48
        kept = len(records(folder))
        assert not (folder / "results.json").exists()
    path = folder / "responses" / "graph.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    sampled = []
    assert without_clock(run(folder, *GRAPH, on_progress=lambda *n: sampled.append(n))) == (
        without_clock(results)
    )
    assert sampled[0] == (kept - 1, 48)
    assert records(folder) == records(whole)


def test_a_finished_evaluation_samples_nothing(finished):
    folder, results = finished
    before = (folder / "responses" / "graph.jsonl").read_bytes()
    progress = []
    assert run(folder, *GRAPH, on_progress=lambda *n: progress.append(n)) == results
    assert progress == [(48, 48)]
    assert (folder / "responses" / "graph.jsonl").read_bytes() == before


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_evaluation_is_that_of_the_training_loop(tmp_path, temperature):
    """One response each of the shipped policy's held-out problems."""
    flags = ("--limit=64", "--samples=1", "--slots=16", f"--temperature={temperature}")
    results = run(tmp_path / "graph", *flags)["benchmarks"]["graph"]
    source = GraphSource(GraphTaskConfig(), "held_out", 0, 1024)
    problems = [source[index] for index in range(64)]
    folder = shipped_policy()
    model = read_config(folder)
    tokenizer = load_tokenizer(folder, model.vocab_size)
    task = Task(
        stream=ProblemStream(problems, 0),
        held_out=problems,
        tokenizer=tokenizer,
        prompt=lambda problem: build_prompt(problem.text, tokenizer, PromptConfig("")),
        judge=ExactJudge(),
    )
    config = TrainConfig(
        prompt_budget=64,
        response_budget=160,
        schedule="on_policy",
        eval_temperature=temperature,
        loss=LossConfig(kl_beta=0.0),
        sampler=SamplerConfig(slots=16, cache_length=256),
    )
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        params = load_params(folder, model)
        params = jax.device_put(params, parameter_shardings(params, mesh))
        setup = Setup(task, model, config, mesh)
        state = loop.start(setup, init_state(params, OptimizerConfig(), mesh))
        metrics = loop.evaluate(state, setup)
    assert results["avg@1"]["value"] == metrics["held_out/accuracy"]
    assert results["response_length"] == metrics["held_out/response_length"]
    assert results["problems"] == metrics["held_out/problems"] == 64
    assert 0.2 < metrics["held_out/accuracy"] < 0.9


def test_a_file_is_judged_by_math_verify(finished, tmp_path):
    """The graph's problems in a file, with golds that only math-verify reads.

    Number 5 has no room for a response: it is skipped and named, and the others keep their numbers,
    so that their responses are those of the graph.
    """
    rows = [
        {"problem": p.text, "answer": rf"\sqrt{{{int(p.answers[0]) ** 2}}}", "id": p.id}
        for p in map(BENCHMARKS["graph"].generated().__getitem__, range(16))
    ]
    rows[5] = {"problem": "h= 9 " * 200, "answer": 1, "id": "long"}
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [flag for flag in GRAPH if "benchmarks" not in flag]
    flags += [f"--benchmarks={path}", "--max-tokens=160", "--instruction="]
    results = run(tmp_path / "out", *flags)
    expected = [r | {"benchmark": "mine"} for r in records(finished[0]) if r["problem"] != 5]
    assert records(tmp_path / "out") == expected
    assert results["benchmarks"]["mine"]["skipped"] == ["long"]
    assert results["benchmarks"]["mine"]["problems"] == 15
    assert results["benchmarks"]["mine"]["judge_lost"] == 0
    assert "mine: 1 skipped" in markdown(results)
    path.write_text(json.dumps(rows[5]))
    with pytest.raises(DataError, match=r"none of its 1 prompts leaves room .* 256 positions"):
        run(tmp_path / "other", *flags)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not in this checkout")
def test_the_benchmark_files_are_read():
    """All of their problems, from the folder above eval/ and from eval/ itself."""
    counts = {
        "aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "minerva": 272, "olympiad": 674,
        "gsm8k": 1319,
    }  # fmt: skip
    files = {name: benchmark for name, benchmark in BENCHMARKS.items() if benchmark.file}
    assert set(files) == set(counts)
    for name, benchmark in files.items():
        problems = load_problems(name, benchmark, SHARED)
        assert len(problems) == counts[name]
        assert all(problem.id.startswith(name) for problem in problems)
        assert load_problems(name, benchmark, SHARED / "eval", limit=3) == problems[:3]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not in this checkout")
def test_the_benchmark_files_are_evaluated(tmp_path):
    """First problems of several, by a random model that is cut at 16 tokens."""
    names = ["amc23", "minerva", "gsm8k"]
    results = run(
        tmp_path / "out", f"--model={TINY_MODEL}", f"--data={SHARED}", "--limit=1", "--samples=2",
        "--max-tokens=16", "--slots=8", f"--benchmarks={','.join(names)}",
    )  # fmt: skip
    assert list(results["benchmarks"]) == names
    responses = records(tmp_path / "out")
    assert len(responses) == 6
    for name in names:
        numbers = results["benchmarks"][name]
        own = [r for r in responses if r["benchmark"] == name]
        assert numbers["problems"] == 1
        assert [r["sample"] for r in own] == [0, 1]
        assert own[0]["text"] != own[1]["text"]
        assert all(r["ended"] or r["tokens"] == 16 for r in own)
        assert numbers["truncated"] == sum(not r["ended"] for r in own) / 2
        assert numbers["unanswered"] == 1.0
    assert results["average"]["avg@n"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_budget_that_the_model_cannot_hold_is_said():
    """A bug: it was cut without a word."""
    problems = [Problem("a", "x" * 20, ("1",)), Problem("b", "x" * 90, ("1",))]
    tokenizer = Tokenizer(None, 256, (0,))
    model = replace(read_config(TINY_MODEL), max_length=100)
    part = prepare(
        "own", Benchmark("", instruction=""), problems, tokenizer, model, PromptConfig(""), 50, 1
    )
    assert part.budgets == {0: 50, 1: 10}
    assert part.cut().endswith("50 tokens; responses to 1 of 2 problems have fewer, down to 10")
    assert replace(part, max_tokens=10).cut() == ""


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--samples=4"], FolderError, r"samples: 3 there, 4 here"),
        (["--limit=8"], FolderError, r"benchmarks.graph.count: 16 there, 8 here"),
        (["--temperature=0.5", "--top-k=3"], FolderError, r"temperature: 0.8 .* top_k: 0 there"),
        (["--temperature=0"], SettingError, r"all samples are equal: give --samples=1"),
        (["--top-p=0"], SettingError, r"--top-p must be in \(0, 1\]; got 0.0"),
        (["--max-tokens=0"], SettingError, r"--max-tokens must be at least 1; got 0"),
        (["--benchmarks=aime"], SettingError, r"unknown benchmark 'aime'; known: aime24, .*jsonl"),
        (["--benchmarks=,"], SettingError, r"names none; known: aime24"),
        (["--benchmarks=graph,graph"], SettingError, r"two benchmarks are called 'graph'"),
        (["--benchmarks=graph,a/graph.jsonl"], SettingError, r"two benchmarks are called 'graph'"),
        (["--benchmarks=gsm8k"], DataError, r"gsm8k_test.jsonl: give the folder .* --data=DIR"),
        (["--benchmarks=gsm8k", "--data=/no"], DataError,
         r"no file /no/gsm8k_test.jsonl or /no/eval/gsm8k_test.jsonl"),
        (["--mesh=data:x"], SettingError, r"--mesh is written data:-1,fsdp:1,tensor:1"),
        (["--mesh=rows:1"], SettingError, r"got 'rows:1'"),
        (["--judge-workers=0"], ValueError, r"workers must be positive"),
        (["--judge-timeout=inf"], ValueError, r"timeout_seconds must be positive and finite"),
        (["--judge-timeout=nan"], ValueError, r"timeout_seconds must be positive and finite"),
        (["--system=S"], ValueError, r"a system message needs a chat template"),
    ],
)  # fmt: skip
def test_refusals(finished, flags, error, message):
    folder, _ = finished
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=message):
        run(folder, *GRAPH, *flags)
    assert sorted(folder.rglob("*")) == before


def test_settings_of_speed_may_change(finished):
    folder, results = finished
    assert run(folder, *GRAPH, "--slots=8", "--mesh=fsdp:-1,data:1", "--judge-workers=1") == results


def test_only_one_process_uses_a_folder(finished):
    folder, _ = finished
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FolderError, match="in use by another process"):
            run(folder, *GRAPH)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FolderError, match=r"has no settings.json: it is no evaluation folder"):
        run(tmp_path, *GRAPH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["{}", *lines], r"graph.jsonl:1: not a response"),
        (lambda lines: [lines[0], "???", *lines[1:]], r"graph.jsonl:2: not a response"),
        (lambda lines: [*lines, lines[4]], r"graph.jsonl:49: problem, sample .* is there twice"),
        (lambda lines: [lines[0].replace('"sample": ', '"sample": 9')], r"is not asked for"),
    ],
)
def test_damaged_responses_are_refused(finished, tmp_path, change, message):
    whole, _ = finished
    folder = tmp_path / "damaged"
    (folder / "responses").mkdir(parents=True)
    (folder / "settings.json").write_text((whole / "settings.json").read_text())
    lines = (whole / "responses" / "graph.jsonl").read_text().splitlines()
    path = folder / "responses" / "graph.jsonl"
    path.write_text("\n".join(change(lines)) + "\n")
    content = path.read_bytes()
    with pytest.raises(DataError, match=message):
        run(folder, *GRAPH)
    assert path.read_bytes() == content


def test_the_table_of_benchmarks(capsys):
    main(make_parser().parse_args(["--list"]))
    printed = capsys.readouterr().out
    for name, benchmark in BENCHMARKS.items():
        assert f"| {name} | " in printed
        assert benchmark.file in printed


def test_meshes():
    assert read_mesh("data:2,fsdp:4") == MeshConfig(2, 4, 1)
    assert read_mesh("") == MeshConfig()
