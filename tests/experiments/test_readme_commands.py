"""The README's commands, run as they are printed, with small files and settings put in."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks
from tests.experiments.guessing import guessing_policy

BENCHMARKS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiad")


def printed(word: str) -> list[list[str]]:
    """The commands of the one block that has the word, each as its words; `$E` stays."""
    [block] = [block for block in blocks(ROOT / "README.md", "bash") if word in block]
    lines = block.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [words for words in commands if words and words[0].startswith(".venv")]


def run(words: list[str], *more: str, **names: str) -> str:
    """Runs a printed command on one device, with words replaced and added; its output."""
    assert words[:2] == [".venv/bin/python", "-m"]
    command = " ".join(words[2:])
    for old, new in sorted(names.items(), key=lambda pair: -len(pair[0])):
        command = re.sub(rf"(?<![\w./]){re.escape(old)}(?!\w)", new, command)
    assert "DIR" not in command, command
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax")
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command), *more],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def write(path: Path, count: int, start: int = 0) -> Path:
    """Problems whose answers have one digit, which the policy guesses now and then."""
    rows = [
        {"problem": f"Box {i} holds {i + 3} red and {i + 5} blue balls. Which?", "answer": i % 10}
        for i in range(start, start + count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    write(folder / "train.jsonl.gz", 60)
    for number, name in enumerate(BENCHMARKS):
        write(folder / "eval" / f"{name}.jsonl", 3, start=100 * number)
    return folder


def test_prepare_and_look_first(files, tmp_path):
    [words] = printed("experiments.data")
    names = {word: str(files / word) for word in words if word.endswith((".jsonl", ".gz"))}
    output = run(words, **names, data=str(tmp_path / "data"))
    # The first benchmark's three problems are among them.
    assert "| aime24 | 3 | 3 | 3 |" in output.replace("  ", " ").replace("  ", " ")
    assert re.search(rf"--config\.data\.train={tmp_path}/data/problems/\w+/1\.0\.0", output)


def test_the_sweep_lists_its_runs(tmp_path):
    [words] = printed("experiments.sweep")
    output = run(words, "--print", f"--workdir={tmp_path}")
    lines = output.strip().splitlines()
    assert len(lines) == 20
    assert all("-m experiments.run --config=" in line for line in lines)


@pytest.mark.slow
def test_the_papers_run_from_start_to_finish(files, tmp_path):
    """Trains, exports and evaluates: the paper's configuration, shrunk, with a small policy."""
    train, export, evaluate = printed("r1_distill")
    policy = guessing_policy(tmp_path / "policy")
    names = {
        "$E": str(files / "eval"),
        "runs/r1_1p5b": str(tmp_path / "run"),
        "models/r1_1p5b_attnrl": str(tmp_path / "exported"),
    }
    small = {
        "model.path": policy, "data.train": files / "train.jsonl.gz", "data.cache": tmp_path,
        "data.held_out_size": 8, "steps": 2, "num_problems": 6, "prompt_budget": 192,
        "response_budget": 64, "length_multiple": 256, "micro_batch_tokens": 8192,
        "score_batch_tokens": 8192, "branching.delta": 1, "branching.min_distance": 0,
        "sampler.slots": 32, "sampler.cache_length": 256, "sampler.length_bucket": 256,
    }  # fmt: skip
    output = run(train, *[f"--config.{name}={value}" for name, value in small.items()], **names)
    assert "held-out accuracy: 0." in output
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert max(m.get("update/updates", 0) for m in metrics) > 0

    run(export, **names)
    assert {p.name for p in policy.iterdir()} == {p.name for p in (tmp_path / "exported").iterdir()}

    output = run(evaluate, "--samples=2", "--slots=16", f"--out={tmp_path / 'results'}", **names)
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert set(results["benchmarks"]) == set(BENCHMARKS)
    assert all(numbers["unanswered"] < 1 for numbers in results["benchmarks"].values())
    assert "| average" in output
