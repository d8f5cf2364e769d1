"""A run that was stopped and one that was not are the same run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from attnrl_jax.training.checkpoint import Checkpointer, CheckpointError, NotFiniteStateError
from attnrl_jax.training.checksums import array_checksums, text_checksum
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


def saved(tmp_path, state, steps, **options):
    """A checkpointer with the state at some steps."""
    writer = Checkpointer(tmp_path / "run", **options)
    for step in steps:
        writer.save(dataclasses.replace(state, step=step), {"step": step})
    writer.wait()
    return writer


@pytest.fixture(scope="module")
def begun(golden_model):
    golden = golden_model("qwen2_tied")
    setup = tiny_setup(golden, steps=0)
    return fresh_state(golden, setup), init_state(golden.params, setup.config.optimizer, None)


def test_what_is_saved_is_the_state_at_that_moment(begun, tmp_path):
    """Training goes on while it is written, in the same buffers."""
    state, template = begun
    train = jax.tree.map(jnp.copy, state.train)
    expected = jax.tree.map(np.array, train)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    with closing(Checkpointer(tmp_path / "run")) as writer:
        writer.save(dataclasses.replace(state, train=train))
        for _ in range(5):
            train = double(train)
        jax.block_until_ready(train)
        restored, _ = writer.restore(template)
    jax.tree.map(np.testing.assert_array_equal, restored.train, expected)


def test_the_best_stay_beside_the_newest(begun, tmp_path):
    state, _ = begun
    scores = [0.5, 0.9, None, 0.9, 0.2, None, 0.1]
    with closing(Checkpointer(tmp_path / "run", keep=2, keep_best=1)) as writer:
        for step, score in enumerate(scores):
            writer.save(dataclasses.replace(state, step=step), score=score)
        writer.wait()
        # Of equals the newer.
        assert writer.steps() == [3, 5, 6]
        assert writer.best_step() == 3
        assert [writer.would_be_best(score) for score in (0.9, 0.91)] == [False, True]
    with closing(Checkpointer(tmp_path / "run", keep=2, keep_best=1)) as again:
        assert again.best_step() == 3
        again.save(dataclasses.replace(state, step=7), score=0.95)
        again.wait()
        assert again.steps() == [6, 7]


def test_notes_come_back(begun, tmp_path):
    state, template = begun
    with closing(saved(tmp_path, state, [4])) as writer:
        seen = []
        assert writer.restore(template, check=seen.append)[1] == {"step": 4}
        assert seen == [{"step": 4}]


def test_notes_are_those_of_the_moment(begun, tmp_path):
    """A bug: they were written later, and a list that had changed meanwhile made the checkpoint
    look damaged."""
    state, template = begun
    pending = [{"step": k} for k in range(50)]
    with closing(Checkpointer(tmp_path / "run")) as writer:
        writer.save(state, {"pending": pending})
        pending.clear()
        assert writer.restore(template)[1] == {"pending": [{"step": k} for k in range(50)]}


def test_a_state_that_is_not_finite_is_not_saved(begun, tmp_path):
    state, _ = begun
    params = jax.tree.map(jnp.copy, state.train.params)
    params["norm"]["scale"] = params["norm"]["scale"].at[0].set(jnp.inf)
    bad = dataclasses.replace(state, step=2, train=state.train.replace(params=params))
    with closing(saved(tmp_path, state, [1])) as writer:
        with pytest.raises(
            NotFiniteStateError, match="not finite after step 2, which is therefore not"
        ):
            writer.save(bad)
        assert writer.steps() == [1]


FILES = ("loop/metadata", "train/manifest.ocdbt", "train/_METADATA", "rows/_METADATA")


@pytest.mark.parametrize("name", [*FILES, "_CHECKPOINT_METADATA"])
@pytest.mark.parametrize("content", [b"", b'{"x', b"\0" * 100], ids=["empty", "cut", "zeros"])
def test_any_damaged_file_is_passed_over_or_not_needed(begun, tmp_path, name, content):
    """A bug: Orbax could not even list the checkpoints where the scores of one were damaged."""
    state, template = begun
    saved(tmp_path, state, [1, 2]).close()
    path = tmp_path / "run" / "2" / name
    assert path.exists()
    path.write_bytes(content)
    told = []
    with closing(Checkpointer(tmp_path / "run")) as reader:
        restored, notes = reader.restore(template, on_damaged=told.append)
        assert restored.step == notes["step"] == 2 - len(told)
        assert reader.steps() == ([1] if told else [1, 2])
    assert len(told) == (name in FILES)
    assert all(str(tmp_path / "run" / "2") in message for message in told)
    jax.tree.map(np.testing.assert_array_equal, restored.train, state.train)


def test_numbers_that_were_changed_are_noticed(begun, tmp_path):
    """Of valid JSON too: a cursor that is another draws other problems."""
    state, template = begun
    saved(tmp_path, state, [1, 2]).close()
    path = tmp_path / "run" / "2" / "loop" / "metadata"
    values = json.loads(path.read_text())
    values["values"]["counters"]["cursor"] += 1
    path.write_text(json.dumps(values))
    told = []
    with closing(Checkpointer(tmp_path / "run")) as reader:
        assert reader.restore(template, on_damaged=told.append)[0].step == 1
    assert "its numbers are not those saved" in told[0]


@pytest.mark.parametrize("word", ["format", "values", "checksum"])
def test_a_bit_of_a_name_is_damage_and_no_other_version(begun, tmp_path, word):
    """Bug: "written by another version" ended the run, and no older checkpoint was taken."""
    state, template = begun
    saved(tmp_path, state, [1, 2]).close()
    path = tmp_path / "run" / "2" / "loop" / "metadata"
    text = path.read_text()
    assert text.count(f'"{word}"') == 1
    path.write_text(text.replace(f'"{word}"', f'"{chr(ord(word[0]) ^ 1)}{word[1:]}"'))
    told = []
    with closing(Checkpointer(tmp_path / "run")) as reader:
        assert reader.restore(template, on_damaged=told.append)[0].step == 1
    assert "run/2 is damaged" in told[0]


def test_of_damaged_checkpoints_the_newest_few_stay(begun, tmp_path):
    """A disk that damages again and again must not fill up."""
    state, template = begun
    for first in range(0, 4, 2):
        saved(tmp_path, state, range(first, first + 3), keep=3).close()
        for step in (first + 1, first + 2):
            (tmp_path / "run" / str(step) / "loop" / "metadata").write_text("")
        with closing(Checkpointer(tmp_path / "run", keep=3)) as reader:
            assert reader.restore(template)[0].step == first
        (tmp_path / "run" / str(first)).rename(tmp_path / f"aside{first}")
    # Moved in this order: 2, 1, 4, 3.
    kept = sorted(path.name for path in (tmp_path / "damaged_checkpoints").iterdir())
    assert kept == ["1", "3", "4"]


def test_a_checkpoint_is_given_its_score_later(begun, tmp_path):
    """Nothing else of it changes; it is the best at once, and after the folder was left."""
    state, template = begun
    with closing(saved(tmp_path, state, [1, 2], keep_best=1)) as writer:
        writer.amend(1, {"step": 1, "more": [0.5]}, 0.75)
        assert writer.best_step() == 1
        writer.save(dataclasses.replace(state, step=3))
        writer.save(dataclasses.replace(state, step=4))
        writer.wait()
        assert writer.steps() == [1, 3, 4]
    shutil.rmtree(tmp_path / "run" / "3")
    shutil.rmtree(tmp_path / "run" / "4")
    with closing(Checkpointer(tmp_path / "run")) as reader:
        assert reader.best_step() == 1
        restored, notes = reader.restore(template)
    assert notes == {"step": 1, "more": [0.5]}
    jax.tree.map(np.testing.assert_array_equal, restored.train, state.train)
    assert not list((tmp_path / "run" / "1").glob("*.tmp"))


def test_another_model_or_version_is_no_damage(begun, golden_model, tmp_path):
    """Nothing is moved, and no older checkpoint taken."""
    state, _ = begun
    saved(tmp_path, state, [1, 2]).close()
    other = golden_model("llama")
    template = init_state(other.params, tiny_setup(other).config.optimizer, None)
    with (
        closing(Checkpointer(tmp_path / "run")) as reader,
        pytest.raises(CheckpointError, match=r"run/2 is of another model: parameter \S+ is"),
    ):
        reader.restore(template)
    path = tmp_path / "run" / "2" / "loop" / "metadata"
    values = json.loads(path.read_text())["values"] | {"format": 1}
    path.write_text(json.dumps({"values": values, "checksum": text_checksum(values)}))
    with (
        closing(Checkpointer(tmp_path / "run")) as reader,
        pytest.raises(CheckpointError, match="another version of this program"),
    ):
        reader.restore(begun[1])
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["1", "2"]


def test_damaged_parameters_are_not_exported(begun, tmp_path):
    state, _ = begun
    saved(tmp_path, state, [1]).close()
    files = [p for p in (tmp_path / "run" / "1" / "train").rglob("*") if p.is_file()]
    # One bit of every large file: moments and parameters lie among them.
    for path in files:
        data = bytearray(path.read_bytes())
        if len(data) > 2000:
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    template = jax.eval_shape(lambda: state.train.params)
    with (
        closing(Checkpointer(tmp_path / "run", read_only=True)) as reader,
        pytest.raises(CheckpointError, match="run/1"),
    ):
        reader.restore_params(1, template)


def test_checksums_see_any_bit_and_no_layout():
    x = np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)
    tree = {"a": jnp.asarray(x), "b": jnp.arange(5), "c": jnp.ones(3, jnp.bfloat16)}
    sums, finite = array_checksums(tree, "t")
    assert finite
    assert set(sums) == {"t/a", "t/b", "t/c"}
    mesh = jax.make_mesh((4, 2), ("p", "q"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cut = jax.device_put(x, NamedSharding(mesh, PartitionSpec("p", "q")))
    assert array_checksums({"a": cut}, "t")[0]["t/a"] == sums["t/a"]
    assert array_checksums({"a": x}, "t")[0]["t/a"] == sums["t/a"]
    # Σ (2 i + 1) bits_i modulo 2^32, by hand.
    bits = x.reshape(-1).view(np.uint32).astype(object)
    assert sums["t/a"] == sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32
    for element in (0, 77, 191):
        for bit in (0, 13, 31):
            y = x.copy().reshape(-1)
            y.view(np.uint32)[element] ^= np.uint32(1 << bit)
            assert array_checksums({"a": y.reshape(x.shape)}, "t")[0]["t/a"] != sums["t/a"]
    assert not array_checksums({"a": jnp.array([1.0, jnp.nan])}, "t")[1]
