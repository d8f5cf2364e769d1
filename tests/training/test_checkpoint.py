"""A run that was stopped and one that was not are the same run."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from attnrl_jax.training.checkpoint import Checkpointer
from attnrl_jax.training.state import init_state
from tests.training.tiny import fresh_state, run_steps, tiny_setup


def without_clock(report):
    return {k: v for k, v in report.metrics.items() if not k.startswith("seconds/")}


@pytest.mark.parametrize("schedule", ["off_policy", "on_policy"])
def test_resumed_equals_uninterrupted_at_any_step(golden_model, tmp_path, schedule):
    golden = golden_model("qwen2_tied")
    setup = tiny_setup(golden, schedule=schedule, steps=4)
    _, reports, params = run_steps(fresh_state(golden, setup), setup)
    expected = [without_clock(report) for report in reports]

    for stop in range(4):
        checkpointer = Checkpointer(tmp_path / f"{schedule}{stop}")
        first = dataclasses.replace(setup, config=dataclasses.replace(setup.config, steps=stop))
        state, _, _ = run_steps(fresh_state(golden, first), first)
        checkpointer.save(state)
        checkpointer.close()

        checkpointer = Checkpointer(tmp_path / f"{schedule}{stop}")
        template = init_state(jax.tree.map(np.array, golden.params), setup.config.optimizer, None)
        restored = checkpointer.restore(template)
        checkpointer.close()
        assert restored.step == stop
        _, resumed, resumed_params = run_steps(restored, setup)
        assert [without_clock(report) for report in resumed] == expected[stop:]
        jax.tree.map(np.testing.assert_array_equal, resumed_params[-1], params[-1])


def test_restore_without_a_checkpoint_says_so(golden_model, tmp_path):
    golden = golden_model("qwen2_tied")
    setup = tiny_setup(golden)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpointer.restore(init_state(golden.params, setup.config.optimizer, None))
    checkpointer.close()
