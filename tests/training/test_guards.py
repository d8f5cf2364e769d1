"""Warnings of a policy that collapses, and what they are made from."""

from __future__ import annotations

import os

import numpy as np
import pytest
from rich.console import Console

from attnrl_jax.training.guards import GuardConfig, collapse_warnings
from attnrl_jax.training.metrics import repetition
from attnrl_jax.training.process_metrics import compilations, process_metrics
from experiments.terminal import Terminal

HEALTHY = {
    "train/entropy": 0.5, "train/response_length": 100.0, "train/truncated": 0.1,
    "train/repetition": 0.1, "judge/lost": 1, "rows/sampled": 100, "sampler/mismatch_mean": 1e-3,
}  # fmt: skip


def test_a_healthy_step_is_silent():
    assert collapse_warnings(HEALTHY, HEALTHY, GuardConfig()) == {}
    assert collapse_warnings({"step": 0}, {}, GuardConfig()) == {}


@pytest.mark.parametrize(
    ("guard", "metric", "value"),
    [
        ("min_entropy", "train/entropy", 0.001),
        ("max_entropy", "train/entropy", 7.0),
        ("length_drop", "train/response_length", 24.0),
        ("max_truncated", "train/truncated", 0.9),
        ("max_repetition", "train/repetition", 0.6),
        ("max_lost_answers", "judge/lost", 11),
        ("max_mismatch", "sampler/mismatch_mean", 0.2),
    ],
)
def test_each_guard_names_its_metric_and_setting(guard, metric, value):
    found = collapse_warnings(HEALTHY | {metric: value}, HEALTHY, GuardConfig())
    assert list(found) == [guard]
    assert metric in found[guard]
    assert f"guards.{guard}" in found[guard]
    # The limit itself is allowed.
    limit = {"length_drop": 25.0, "max_lost_answers": 10}.get(guard, vars(GuardConfig())[guard])
    assert collapse_warnings(HEALTHY | {metric: limit}, HEALTHY, GuardConfig()) == {}


def test_limits_are_numbers():
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="min_entropy must be at least 0"):
            GuardConfig(min_entropy=value)


def test_a_warning_is_printed_when_it_begins(tmp_path):
    with (tmp_path / "said").open("w+") as file:
        terminal = Terminal(3, Console(file=file, width=200))
        for found in ({"a": "first"}, {"a": "again"}, {}, {"a": "second", "b": "[other]"}):
            terminal.warn_of(found)
        file.seek(0)
        lines = file.read().splitlines()
    assert lines == ["warning: first", "warning: second", "warning: [other]"]


def test_repetition_is_the_share_of_8_grams_that_came_before():
    rng = np.random.default_rng(0)
    fresh = rng.permutation(1000)[:50].astype(np.int32)
    twice = np.concatenate([fresh, fresh])
    loop = np.tile(np.arange(4, dtype=np.int32), 30)
    short = fresh[:7]
    assert repetition([fresh, short], np.arange(2)) == 0.0
    # Of 93 windows the 43 of the second half that do not cross the middle came before.
    assert repetition([twice], np.arange(1)) == pytest.approx(43 / 93)
    assert repetition([loop], np.arange(1)) == pytest.approx(1 - 4 / 113)
    assert repetition([fresh, loop], np.array([1])) == pytest.approx(1 - 4 / 113)
    assert repetition([fresh] * 3 + [loop], np.arange(4), most=2) == 0.0
    assert repetition([short], np.arange(1)) == 0.0


def test_compilations_are_counted():
    import jax
    import jax.numpy as jnp

    compilations()
    x = jnp.arange(7.0)
    function = jax.jit(lambda x: jnp.sin(x) * 1.25 + 7)
    process_metrics()
    function(x).block_until_ready()
    assert process_metrics()["process/compilations"] == 1
    function(x).block_until_ready()
    measured = process_metrics()
    assert measured["process/compilations"] == 0
    assert 0.05 < measured["process/resident_gib"] < 64 or os.name != "posix"
