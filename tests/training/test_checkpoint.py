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
        restored, _ = checkpointer.restore(template)
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


def test_the_newest_checkpoints_stay_and_give_their_parameters(golden_model, tmp_path):
    """A reader gets the parameters of any step in host memory, and changes nothing."""
    golden = golden_model("qwen2_tied")
    setup = tiny_setup(golden, steps=0)
    state = fresh_state(golden, setup)
    writer = Checkpointer(tmp_path / "run", keep=2)
    params = []
    for step in range(3):
        params.append(jax.tree.map(lambda x, k=step: np.array(x) + k, golden.params))
        train = init_state(params[step], setup.config.optimizer, None)
        writer.save(dataclasses.replace(state, step=step, train=train))
    writer.wait()
    assert writer.steps() == [1, 2]
    writer.close()

    template = jax.eval_shape(lambda: golden.params)
    reader = Checkpointer(tmp_path / "run", keep=1, read_only=True)
    assert reader.steps() == [1, 2]
    for step in (1, 2):
        restored = reader.restore_params(step, template)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
        jax.tree.map(np.testing.assert_array_equal, restored, params[step])
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 0"):
        reader.restore_params(0, template)
    reader.close()
    reader = Checkpointer(tmp_path / "nowhere", read_only=True)
    assert reader.steps() == []
    reader.close()
    assert not (tmp_path / "nowhere").exists()
