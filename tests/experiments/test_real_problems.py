"""Runs on real problems: from files to updates, with every stage in between, from a cold start."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from attnrl_jax.sharding import make_mesh
from experiments.configs import attnrl_hf
from experiments.settings import build
from experiments.tasks import build_task, load_policy
from tests.experiments.guessing import guessing_policy
from tests.experiments.test_run import execute, small

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="problem files are not here")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return guessing_policy(tmp_path_factory.mktemp("models") / "guessing")


def one_digit_rows(name: str, count: int) -> list[str]:
    """Lines of a real file whose answer a guess can hit."""
    with gzip.open(SHARED / "train" / name, "rt") as lines:
        chosen = [line for line in lines if len(str(json.loads(line)["answer"])) == 1]
    return chosen[:count]


def guess(policy: Path, train: Path, cache: Path):
    config = small(attnrl_hf.get_config(), steps=2)
    config.checkpoint_every = 10
    config.eval_every = 0
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.num_problems = 8
    config.num_responses = 6
    config.model.path = str(policy)
    config.prompt_budget = 448
    config.response_budget = 64
    # One width for everything: few programs to compile.
    config.length_multiple = 512
    config.sampler.length_bucket = 512
    config.micro_batch_tokens = 8192
    config.branching.delta = 1
    config.branching.min_distance = 0
    config.data.train = str(train)
    config.data.cache = str(cache)
    return config


@needs_shared
@pytest.mark.parametrize("name", ["gsm8k_train.jsonl.gz", "dapo_math_train.jsonl.gz"])
def test_every_stage_from_a_cold_start(policy, tmp_path, name):
    lines = one_digit_rows(name, 60)
    train = tmp_path / name.removesuffix(".gz")
    train.write_text("".join([*lines, *lines[:5]]))
    config = guess(policy, train, tmp_path / "cache")
    config.data.benchmarks = f"{SHARED / 'eval' / 'amc23.jsonl'},{SHARED / 'eval' / 'aime24.jsonl'}"
    history = execute(config, tmp_path / "run")

    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert report["read"] == 65
    assert report["found"]["duplicates"] >= 5
    assert report["read"] - report["kept"] == sum(report["removed"].values())
    assert set(report["benchmarks"]) == {"amc23", "aime24", "held_out"}
    assert any((tmp_path / "cache" / "problems").iterdir())

    # Sampled, judged, branched at steps of high attention, trained with a reference.
    assert sum(m["train/accuracy"] for m in history[1:]) > 0
    assert sum(m["branching/positions"] for m in history[1:]) > 0
    updated = [m for m in history[1:] if not m["step/skipped"]]
    assert updated
    for metrics in updated:
        assert metrics["update/updates"] >= 1
        assert metrics["update/gradient_norm"] > 0
        assert metrics["judge/lost"] == 0
    assert {"seconds/generate", "seconds/judge", "seconds/score", "seconds/branch",
            "seconds/tree", "seconds/update"} <= set(updated[-1])  # fmt: skip

    # The second time the problems are there already.
    [prepared] = (tmp_path / "cache" / "problems").iterdir()
    settings = build(config)
    again = build_task(settings, load_policy(settings, make_mesh(settings.mesh)))
    again.task.judge.close()
    assert again.prepared.cached
    assert again.prepared.report.to_dict() == {k: v for k, v in report.items() if k != "version"}
    assert [prepared] == list((tmp_path / "cache" / "problems").iterdir())
    texts = {json.loads(line)["problem"] for line in lines}
    drawn = again.task.stream.take(0, 30).problems
    assert {problem.text for problem in [*drawn, *again.task.held_out]} <= texts
    assert not {p.text for p in drawn} & {p.text for p in again.task.held_out}
