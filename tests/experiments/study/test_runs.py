"""The study's runs: each once, recorded as it ends, by one process."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from attnrl_jax.tasks.graph import GraphSource, GraphTaskConfig
from experiments.compass import open_policy
from experiments.plan import load_sweep, plan
from experiments.study import outcomes, signal
from experiments.study.__main__ import claimed, run_all
from experiments.study.policies import answers_of
from experiments.study.protocol import SECOND
from experiments.terminal import make_console

SWEEP = """
from experiments.study import protocol

CONFIG = protocol.CONFIG
COMMON = {"steps": 2, "eval_every": 1, "data.held_out_size": 11, "checkpoint_every": 1000,
          "num_responses": 2, "memory.check": False}


def get_sweep():
    return [protocol.FIRST.methods["random steps"] | {"optimizer.learning_rate": 2e-4, "seed": 0}]
"""
FEW = GraphSource(GraphTaskConfig(), "held_out", seed=5, size=11)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "sweep.py"
    path.write_text(SWEEP)
    return path


def test_a_run_is_recorded_once(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(
        outcomes, "answers_of", functools.partial(answers_of, problems=FEW, samples=2)
    )
    results, workdir, console = tmp_path / "results", tmp_path / "runs", make_console(quiet=True)
    [run] = plan(load_sweep(sweep), workdir)
    path = outcomes.file_of(run, results)
    assert path.name == "random-steps_0.0002_0.json"
    with claimed(run) as is_ours:
        assert is_ours
        # Another process has it: nothing is begun.
        assert run_all(sweep, results, workdir, True, console) == 0
    assert not path.exists()
    assert not run.folder.exists()

    assert run_all(sweep, results, workdir, True, console) == 0
    text = path.read_text()
    found = json.loads(text)
    assert found["overrides"] == run.overrides
    assert len(found["test"]["sampled"]) == len(FEW)
    one = outcomes.read(path)
    assert one.method == "random steps"
    assert [point.step for point in one.curve] == [0, 1, 2]
    assert one.curve[-1].sampled_tokens == one.per_step["tokens/sampled"].sum()
    distinct = one.per_step["tokens/trained_distinct"]
    assert (distinct <= one.per_step["tokens/trained"]).all()
    assert (distinct <= one.per_step["tokens/sampled"]).all()
    assert one.sampled.max() <= 2
    np.testing.assert_array_equal(np.isin(one.greedy, [0, 1]), True)

    assert run_all(sweep, results, workdir, True, console) == 0
    assert path.read_text() == text


def test_a_run_that_fails_is_counted(sweep, tmp_path, capsys):
    broken = tmp_path / "sweep.py"
    broken.write_text(SWEEP.replace('"memory.check": False', '"memory.bytes_per_device": 1000'))
    workdir = tmp_path / "runs"
    assert run_all(broken, tmp_path / "results", workdir, False, make_console(quiet=False)) == 1
    assert "says why" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_gradients_are_of_the_same_policy():
    """Two steps of a method: two samples of one gradient, which leave the parameters alone."""
    policy = open_policy()
    method = {**SECOND.methods["AttnRL"], "num_problems": 4, "memory.check": False}
    found = signal.gradients(policy, method, tokens=2500, seed=7)
    assert len(found.values) == len(found.tokens) >= 2
    assert found.tokens.sum() >= 2500
    assert found.values.shape[1] == sum(x.size for x in jax.tree.leaves(policy.params))
    assert (np.abs(found.values).max(axis=1) > 0).all()
    once = signal.gradients(policy, method, tokens=1, seed=7)
    # The second step's parameters are the first's: a run of one step has the same first gradient.
    np.testing.assert_array_equal(once.values[0], found.values[0])
    assert not np.array_equal(found.values[0], found.values[1])
