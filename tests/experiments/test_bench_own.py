"""Our own side of the benchmarks: sampling, scoring's memory, updates, whole steps."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest

from attnrl_jax.models.config import ModelConfig
from experiments.bench import ours, rollouts, scoring, step, update
from experiments.bench.branches import THIRDS, branched_rows
from experiments.bench.harness import Context
from experiments.bench.model import write_model
from experiments.bench.ours import StaticBatches
from experiments.bench.workloads import VOCAB, Rollouts
from tests.training.tiny import tiny_setup

TINY = ModelConfig(
    family="qwen2", vocab_size=VOCAB, width=16, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=8, mlp_width=16, qkv_bias=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """With a tiny model as the common one."""
    folder = tmp_path_factory.mktemp("bench")
    write_model(folder / "model", TINY)
    with ExitStack() as closing:
        yield Context(folder, 1, "cpu", folder, "", print, closing)


def test_both_of_our_own_sides_sample_every_token(context, monkeypatch):
    """Two prompts and a branch, longer than one bucket of the cache."""
    model = ours.load(context.folder / "model")
    rng = np.random.default_rng(0)
    prompt, other = rng.integers(1, VOCAB, (2, 8), dtype=np.int32)
    branch = np.concatenate([prompt, rng.integers(1, VOCAB, 60, dtype=np.int32)])
    work = Rollouts(
        prefixes=[prompt, prompt, other, branch],
        lengths=np.array([5, 1, 3, 9]),
        problem=np.array([0, 0, 1, 0]),
        total=77,
    )
    measured = ours.sample_rows(model, work, ours.sampler_config(work, 2))
    assert measured.amount == 18
    # The prompt is a cut of the branch's prefix.
    assert measured.detail["prefill_tokens"] == 68 + 8
    assert measured.detail["prefill_places"] >= 68 + 8
    static = ours.sample_static(model, work, StaticBatches(2, prefill_rows=2))
    assert static.amount == 18
    # Sorted: (9, 5), (3, 1); every prefix on its own.
    assert static.detail["slot_steps"] == 2 * 9 + 2 * 3
    assert static.detail["prefill_tokens"] == 68 + 8 + 8 + 8
    # The branch's prefix takes two buckets.
    assert static.detail["prefill_places"] == 2 * 128 + 2 * 64

    monkeypatch.setattr(rollouts, "SLOTS", 2)
    monkeypatch.setattr(rollouts, "STATIC_PREFILL_ROWS", (1, 2))
    contender = rollouts.static_batches(model, work)
    settings = contender.warm_up()
    assert "prefixes of like width at a time" in settings
    again = contender.run()
    assert again.amount == 18
    assert again.detail["prefill_places"] in (2 * 128 + 2 * 64, 128 + 3 * 64)
    facts = {fact.name: fact.value for fact in rollouts.slot_facts({"static": [again]}, work)}
    assert facts["static: slot-steps lost"] == 1 - 18 / 24
    assert facts["static: tokens prefilled"] == 92
    assert facts["static: places prefilled, with padding"] == again.detail["prefill_places"]


def test_trees_and_rows_are_one_update(context):
    """The same loss, for fewer tokens."""
    model = ours.load(context.folder / "model")
    rows = branched_rows(1, THIRDS, cut=64)
    by_row, tree = (ours.update_ours(model, rows, packing) for packing in ("rows", "tree"))
    responses = (rows.paths.length - rows.paths.prompt_length).sum()
    assert by_row.amount == tree.amount == responses
    assert tree.detail["loss"] == pytest.approx(by_row.detail["loss"], rel=1e-5)
    assert abs(by_row.detail["loss"]) > 1e-3
    assert by_row.detail["sharing"] == 1
    assert tree.detail["sharing"] > 2
    part = update.PARTS["early_longer"](context)
    assert "branches at 1/20 and 3/20, continuations as long as a response" in part.title
    assert part.title.endswith("times the distinct tokens")


def test_memory_of_scoring_by_length(context):
    part = scoring.part_memory(context, lengths=(1024, 2048))
    (table,) = part.tables({})
    assert [row[0] for row in table.rows] == ["tokens", "1024", "2048"]
    linear, whole = part.facts({})
    assert linear.at_most == 2.2
    # Maps of twice the length are four times as large, all else at most twice.
    assert 1 < linear.value <= 2.2 < whole.value <= 4


def test_a_step_is_split_into_its_stages(golden_model):
    """Steps go on from one measurement to the next, and their parts add up to the wall clock."""
    golden = golden_model("qwen2_tied")
    setup = tiny_setup(golden)
    schedule = step.Schedule(setup, golden.params, steps=1)
    first, second = schedule.run(), schedule.run()
    for measured in (first, second):
        detail = {name: measured.detail[f"seconds/{name}"] for name in (*step.STAGES, "other")}
        parts = list(detail.values())
        assert sum(parts) == pytest.approx(measured.seconds)
        assert min(parts) > 0
        # What is no stage of the table is in `other`, and shown too.
        assert detail["other"] > measured.detail["seconds/branch"] + measured.detail["seconds/tree"]
        assert measured.amount > 0
    assert sum(step.shares([first, second]).values()) == pytest.approx(1)
    table = step.split_table({"one": [first, second]}, steps=1)
    assert len(table.rows) == 2
    heading = table.rows[0]
    assert heading[1:6] == [*step.STAGES, "other"]
    assert {"branch", "tree"} <= set(heading[6:])
    assert len(set(heading)) == len(heading) == len(table.rows[1])
    assert "branch, tree" in table.title
    assert table.rows[1][0] == "one"
    assert float(table.rows[1][-1].replace(",", "")) > 0


def test_the_step_is_that_of_the_default_run_and_learns_nothing():
    settings = step.settings_of("on_policy", {"num_problems": 3})
    assert settings.train.optimizer.learning_rate == 0
    assert not settings.train.batch_size.adaptive
    assert (settings.train.num_problems, settings.train.num_responses) == (3, 6)
