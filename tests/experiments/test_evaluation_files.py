"""The folder of an evaluation: what joins it, what it refuses, and its tables."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from attnrl_jax.tasks.problems import DataError
from experiments.benchmarks import BENCHMARKS
from experiments.evaluate import evaluate, make_parser
from experiments.evaluation_files import Terminal, markdown
from experiments.folders import FolderError
from experiments.tasks import shipped_policy
from tests.experiments.test_evaluate import StoppedError, records, run, without_clock

SMALL = ("--limit=4", "--samples=2", "--temperature=0.8", "--slots=8", "--max-tokens=160")


@pytest.fixture
def three(tmp_path):
    """The names of three benchmarks: the graph's, and files of some of its problems."""
    source = BENCHMARKS["graph"].generated()
    for name, first in (("a", 10), ("z", 20)):
        rows = [{"problem": source[i].text, "answer": source[i].answers[0]}
                for i in range(first, first + 4)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "z.jsonl"), "graph", str(tmp_path / "a.jsonl")]


def test_benchmarks_are_added_to_a_folder(tmp_path, three):
    """Regression: another list of benchmarks was refused, so that all were sampled anew.

    One by one, the second stopped and finished last, they have the results of all at once.
    """
    flags = (*SMALL, "--samples=4", "--instruction=")
    together = run(tmp_path / "together", *flags, f"--benchmarks={','.join(three)}")
    assert list(together["benchmarks"]) == ["graph", "a", "z"]
    assert together["incomplete"] == []
    folder = tmp_path / "one by one"

    def stop(done, _):
        if done >= 10:
            raise StoppedError

    first = run(folder, *flags, f"--benchmarks={three[0]}")
    assert list(first["benchmarks"]) == ["z"]
    assert "average" not in first
    with pytest.raises(StoppedError):
        run(folder, *flags, f"--benchmarks={three[1]}", on_progress=stop)
    second = run(folder, *flags, f"--benchmarks={three[2]}")
    assert list(second["benchmarks"]) == ["a", "z"]
    assert second["incomplete"] == ["graph"]
    assert "not complete, and not part of this: graph" in (folder / "results.md").read_text()
    assert second["average"]["avg@n"]["value"] == pytest.approx(
        sum(numbers["avg@4"]["value"] for numbers in second["benchmarks"].values()) / 2
    )
    sampled = []
    last = run(folder, *flags, "--benchmarks=graph", on_progress=lambda *n: sampled.append(n))
    assert 0 < sampled[0][0] < 16
    assert without_clock(last) == without_clock(together)
    assert records(folder) == records(tmp_path / "together")
    # A benchmark stays what it was, whatever is evaluated beside it.
    before = (folder / "settings.json").read_text()
    with pytest.raises(FolderError, match=r"benchmarks.graph.count: 4 there, 3 here"):
        run(folder, *flags, "--limit=3", "--benchmarks=graph")
    with pytest.raises(FolderError, match=r"temperature: 0.8 there, 0.5 here"):
        run(folder, *flags, "--temperature=0.5", f"--benchmarks={three[0]}")
    assert (folder / "settings.json").read_text() == before


def test_damage_of_a_benchmark_beside_is_found_before_the_work(tmp_path, three):
    flags = (*SMALL, "--instruction=")
    run(tmp_path / "out", *flags, "--benchmarks=graph")
    path = tmp_path / "out" / "responses" / "graph.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match=r"graph.jsonl:9: problem, sample .* is there twice"):
        run(tmp_path / "out", *flags, f"--benchmarks={three[0]}")
    assert not (tmp_path / "out" / "responses" / "z.jsonl").exists()


def test_the_model_may_be_moved(tmp_path):
    """Regression: settings held the absolute path of the model, so that a moved folder was
    refused."""
    shutil.copytree(shipped_policy(), tmp_path / "here")
    first = run(tmp_path / "out", *SMALL, f"--model={tmp_path / 'here'}")
    assert first["settings"]["model"] == str(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    progress = []
    moved = f"--model={tmp_path / 'there'}"
    second = run(tmp_path / "out", *SMALL, moved, on_progress=lambda *n: progress.append(n))
    assert progress == [(8, 8)]
    assert second["benchmarks"] == first["benchmarks"]
    assert second["settings"] == first["settings"] | {"model": str(tmp_path / "there")}
    # Another model at the same place is another evaluation.
    (tmp_path / "there" / "more.json").write_text("{}")
    with pytest.raises(FolderError, match="model_files: "):
        run(tmp_path / "out", *SMALL, moved)


def test_the_default_folder_depends_on_the_settings(tmp_path, monkeypatch, three):
    """But not on the list of benchmarks (a regression: each list had its own)."""
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--samples=1"]
    with open(os.devnull, "w") as nowhere:
        for more in ([], [], ["--seed=1"], [f"--benchmarks={three[0]}"]):
            evaluate(make_parser().parse_args([*flags, *more]), Console(file=nowhere))
    folders = sorted(path.name for path in Path("evaluations").iterdir())
    assert len(folders) == 2
    assert all(name.startswith("policy-") for name in folders)


def test_tables_fit_a_terminal():
    """The widest numbers there can be, in 100 columns."""
    wide = {"value": 1.0, "low": 1.0, "high": 1.0}
    numbers = {
        "problems": 10000, "samples": 64, "skipped": [],
        "avg@64": wide, "pass@64": wide, "maj@64": wide,
        "response_length": 32768.0, "truncated": 1.0, "unanswered": 1.0, "judge_lost": 10000,
        "tokens_per_second": 123456.0,
    }  # fmt: skip
    results = {
        "incomplete": [],
        "benchmarks": {name: numbers for name in BENCHMARKS},
        "average": {name: wide for name in ("avg@n", "pass@n", "maj@n")},
    }
    table = markdown(results)
    assert max(map(len, table.splitlines())) <= 100
    first = table.splitlines()
    assert [cell.strip() for cell in first[0].split("|")[1:3]] == ["benchmark", "problems"]
    assert "100.0 (100.0-100.0)" in first[2]
    assert len({len(line) for line in first[: len(BENCHMARKS) + 3]}) == 1


def test_progress_of_a_file_is_a_line_a_tenth(tmp_path):
    with (tmp_path / "log").open("w") as log, Terminal("b", Console(file=log), None) as terminal:
        for finished_responses in range(41):
            terminal.show(finished_responses, 40)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == [f"b: {4 * tenth} of 40 responses" for tenth in range(11)]
