"""Generation beside the update: the same numbers as one after the other, at the same staleness."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.sampling import sampler
from attnrl_jax.sharding import MeshConfig, make_meshes, parameter_shardings
from attnrl_jax.training import step
from attnrl_jax.training.checkpoint import Checkpointer
from attnrl_jax.training.loop import start, train_step
from attnrl_jax.training.state import OptimizerConfig, init_state
from tests.training.tiny import run_steps, tiny_setup
from tests.trees import own_tokens, response_tokens


@pytest.fixture(scope="module")
def golden(golden_model):
    return golden_model("qwen2_tied")


def setup_of(golden, split: bool, **changes):
    """On two devices that do both, or one that updates and one that samples."""
    devices = jax.devices()[:2]
    config = MeshConfig(data=1, fsdp=-1, sampling_devices=int(split))
    mesh, sampling_mesh = make_meshes(config, devices)
    # With its usual epsilon Adam turns the rounding of gradients near 0 into whole steps.
    changes = {"optimizer": OptimizerConfig(learning_rate=1e-2, eps=1e-3)} | changes
    setup = tiny_setup(golden, **changes)
    return dataclasses.replace(setup, mesh=mesh, sampling_mesh=sampling_mesh)


def begin(golden, setup):
    params = jax.device_put(golden.params, parameter_shardings(golden.params, setup.mesh))
    with jax.set_mesh(setup.mesh):
        return start(setup, init_state(params, setup.config.optimizer, setup.mesh))


@pytest.fixture(scope="module")
def serial(golden):
    """Three steps of each overlap, one thing after the other."""
    runs = {}
    for overlap in ("none", "initial", "all"):
        setup = setup_of(golden, split=False, overlap=overlap, steps=3)
        runs[overlap] = run_steps(begin(golden, setup), setup)
    return runs


def same_steps(reports, expected):
    assert len(reports) == len(expected)
    for report, other in zip(reports, expected, strict=True):
        for name in ("tokens", "reward", "root", "split", "version", "step_ids"):
            np.testing.assert_array_equal(getattr(report.rows, name), getattr(other.rows, name))
        np.testing.assert_array_equal(report.trained, other.trained)
        np.testing.assert_allclose(report.advantages, other.advantages, atol=1e-6)
        np.testing.assert_allclose(report.rows.logprobs, other.rows.logprobs, atol=1e-4)
        for name in ("update/loss", "update/gradient_norm"):
            assert report.metrics[name] == pytest.approx(other.metrics[name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("overlap", ["initial", "all"])
def test_split_devices_give_the_numbers_of_the_serial_schedule(golden, serial, overlap):
    setup = setup_of(golden, split=True, overlap=overlap, steps=3)
    _, reports, params = run_steps(begin(golden, setup), setup)
    same_steps(reports, serial[overlap][1])
    for ours, other in zip(params, serial[overlap][2], strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), ours, other)


def test_initial_overlap_adds_no_staleness(serial):
    same_steps(serial["initial"][1], serial["none"][1])


def test_staleness_is_bounded_and_recorded(serial):
    for overlap, later in (("none", 0), ("initial", 0), ("all", 1)):
        for report in serial[overlap][1]:
            step, rows = int(report.metrics["step"]), report.rows
            own = own_tokens(rows) & (rows.root != np.arange(len(rows.root)))[:, None]
            assert np.all(rows.version[own] == max(step - 1 - later, 0))
            rest = response_tokens(rows) & ~own
            assert np.all(rows.version[rest] == max(step - 2 - later, 0))
            stale = step - 1 - rows.version[response_tokens(rows) & report.trained[:, None]]
            assert report.metrics["train/staleness_max"] == stale.max() <= 1 + later
            assert report.metrics["train/staleness"] == pytest.approx(stale.mean())


@jax.jit
def busy(x, rounds):
    return jax.lax.fori_loop(0, rounds, lambda _, y: jnp.tanh(y @ x), x).sum()


def test_generation_goes_on_while_programs_of_the_update_run(golden, monkeypatch):
    """The update is given a program that is much longer than a few decode steps, and the decode
    loop comes back from these before it ends."""
    setup = setup_of(golden, split=True, overlap="all", steps=1)
    state = begin(golden, setup)
    matrix = jax.device_put(np.eye(256, dtype=np.float32), setup.mesh.devices.flat[0])
    running, seen = [], []
    accumulate, generate = step.accumulate, sampler.generate

    def slow_accumulate(accumulated, *args):
        if not running:
            running.append(busy(matrix, 2000))
            gradients, sums = accumulated
            sums = dataclasses.replace(sums, tokens=sums.tokens + 0 * running[0])
            accumulated = gradients, sums
        return accumulate(accumulated, *args)

    def watched_generate(*args):
        seen.extend(array.is_ready() for array in running)
        return generate(*args)

    monkeypatch.setattr(step, "accumulate", slow_accumulate)
    monkeypatch.setattr(sampler, "generate", watched_generate)
    _, report = train_step(state, setup)
    assert seen[0] is False
    spans = {name: (begin, end) for name, begin, end in report.spans}
    assert spans["generate"][0] < spans["update"][0] < spans["generate"][1]
    assert report.metrics["seconds/overlapped"] > 0


def test_a_run_resumes_with_what_was_sampled_ahead(golden, serial, tmp_path):
    setup = setup_of(golden, split=False, overlap="all", steps=3)
    state, _ = train_step(begin(golden, setup), setup)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(state)
    fresh = init_state(golden.params, setup.config.optimizer, setup.mesh)
    restored, _ = checkpoints.restore(fresh)
    checkpoints.close()
    assert restored.following is not None
    _, reports, _ = run_steps(restored, setup)
    for report, other in zip(reports, serial["all"][1][1:], strict=True):
        np.testing.assert_array_equal(report.rows.tokens, other.rows.tokens)
        np.testing.assert_array_equal(report.rows.logprobs, other.rows.logprobs)
        assert report.metrics["update/loss"] == other.metrics["update/loss"]


def test_devices_that_only_sample_need_an_overlap(golden):
    with pytest.raises(ValueError, match="need an overlap"):
        setup_of(golden, split=True)
    with pytest.raises(ValueError, match="overlap 'all' needs schedule 'off_policy'"):
        tiny_setup(golden, overlap="all", schedule="on_policy")
