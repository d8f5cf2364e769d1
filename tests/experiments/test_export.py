"""Exported folders: like the source in everything but the values."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from attnrl_jax.models.config import ModelError
from attnrl_jax.models.weights import SINGLE_FILE, load_params, save_folder
from attnrl_jax.tasks.tokenizer import load_tokenizer
from attnrl_jax.training.checkpoint import ROWS, Checkpointer, CheckpointError
from attnrl_jax.training.state import LoopState, OptimizerConfig, init_state
from experiments.configs import attnrl_graph
from experiments.export import ExportError, command, export
from experiments.tasks import shipped_policy
from tests.conftest import FAMILIES
from tests.experiments.test_run import execute, small

ROOT = Path(__file__).resolve().parents[2]


def config():
    made = small(attnrl_graph.get_config(), steps=1)
    made.eval_temperature = 0.0
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step on eight simulated devices, and its history."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    return folder, execute(config(), folder)


def stored(path):
    """Shape, dtype and bytes of every tensor of a file."""
    with safe_open(path, framework="numpy") as tensors:
        return {
            name: (
                tuple(tensors.get_slice(name).get_shape()),
                tensors.get_slice(name).get_dtype(),
                tensors.get_tensor(name).tobytes(),
            )
            for name in tensors.keys()  # noqa: SIM118
        }


def companions(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".safetensors"}


def fake_run(folder, golden, params, step=0, score=None):
    """A run folder with one checkpoint of given parameters."""
    zeros = {f.name: 0 for f in dataclasses.fields(LoopState)}
    train = init_state(jax.tree.map(np.array, params), OptimizerConfig(), None)
    checkpointer = Checkpointer(folder / "checkpoints", keep=1, keep_best=1)
    rows = dict.fromkeys(ROWS)
    checkpointer.save(LoopState(**zeros | rows | {"train": train, "step": step}), score=score)
    checkpointer.close()
    (folder / "config.json").write_text(json.dumps({"model": {"path": str(golden.folder)}}))
    return folder


def test_the_start_of_training_is_the_source(trained, tmp_path):
    assert export(trained[0], tmp_path / "out", step=0) == 0
    source = shipped_policy()
    assert stored(tmp_path / "out" / SINGLE_FILE) == stored(source / SINGLE_FILE)
    assert companions(tmp_path / "out") == companions(source)


def test_the_command_on_one_device(trained, tmp_path):
    """The run had eight. What it learnt is there, in the source's form."""
    out = tmp_path / "out"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.export", f"--workdir={trained[0]}", f"--out={out}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"the policy after step 1 is in {out}\n"
    old, new = stored(shipped_policy() / SINGLE_FILE), stored(out / SINGLE_FILE)
    assert {name: tensor[:2] for name, tensor in new.items()} == {
        name: tensor[:2] for name, tensor in old.items()
    }
    changed = [name for name in new if new[name] != old[name]]
    assert len(changed) > len(new) / 2
    assert companions(out) == companions(shipped_policy())


def test_the_best_checkpoint(tmp_path, golden_model):
    """By its score, wherever it is; of a run without evaluations there is none."""
    golden = golden_model("qwen2_tied")
    folder = tmp_path / "run"
    for step, score in ((1, 0.2), (2, 0.7), (3, 0.4)):
        params = jax.tree.map(lambda x, k=step: x + k, golden.params)
        fake_run(folder, golden, params, step, score)
    assert export(folder, tmp_path / "out", step="best") == 2
    other = fake_run(tmp_path / "other", golden, golden.params)
    with pytest.raises(ExportError, match="is of a step that was evaluated"):
        export(other, tmp_path / "none", step="best")


def test_a_new_run_starts_from_the_exported_folder(trained, tmp_path):
    """Greedy accuracy of the trained policy is that of the folder."""
    folder, history = trained
    export(folder, tmp_path / "out")
    again = config()
    again.steps = 0
    again.model.path = str(tmp_path / "out")
    [start] = execute(again, tmp_path / "run")
    for name in ("held_out/accuracy", "held_out/response_length"):
        assert start[name] == history[-1][name]


@pytest.mark.parametrize("name", FAMILIES)
def test_any_model_comes_back_bit_for_bit(golden_model, tmp_path, name):
    golden = golden_model(name)
    run = fake_run(tmp_path / "run", golden, golden.params)
    export(run, tmp_path / "out")
    assert stored(tmp_path / "out" / SINGLE_FILE) == stored(golden.folder / SINGLE_FILE)
    assert companions(tmp_path / "out") == companions(golden.folder)


def test_values_are_the_checkpoints_rounded_to_the_stored_dtype(golden_model, tmp_path):
    golden = golden_model("llama")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), golden.params)
    run = fake_run(tmp_path / "run", golden, params, step=7)
    assert export(run, tmp_path / "out", step=7) == 7
    dtypes = {dtype for _, dtype, _ in stored(tmp_path / "out" / SINGLE_FILE).values()}
    assert dtypes == {"BF16"}
    jax.tree.map(
        lambda loaded, x: np.testing.assert_array_equal(
            loaded, np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32)
        ),
        load_params(tmp_path / "out", golden.config),
        params,
    )


def test_the_tokenizer_is_the_sources(trained, tmp_path):
    export(trained[0], tmp_path / "out")
    text = "h= 9 j= 1 c: j + h ? c"
    ours, theirs = (load_tokenizer(f, 128) for f in (tmp_path / "out", shipped_policy()))
    assert ours.encode(text).tolist() == theirs.encode(text).tolist()
    assert ours.end_ids == theirs.end_ids


def test_a_run_under_way_is_left_as_it_is(trained, tmp_path):
    def content():
        return {p: p.stat().st_mtime_ns for p in trained[0].rglob("*")}

    before = content()
    export(trained[0], tmp_path / "out")
    assert content() == before


def test_a_source_folder_that_moved(golden_model, tmp_path):
    golden = golden_model("qwen3")
    run = fake_run(tmp_path / "run", golden, golden.params)
    (run / "config.json").write_text('{"model": {"path": "/gone"}}')
    with pytest.raises(ExportError, match=r"started from /gone, which is not there.*--source=DIR"):
        export(run, tmp_path / "out")
    with pytest.raises(ExportError, match="--source: there is no folder /also/gone"):
        export(run, tmp_path / "out", source="/also/gone")
    export(run, tmp_path / "out", source=golden.folder)
    assert stored(tmp_path / "out" / SINGLE_FILE) == stored(golden.folder / SINGLE_FILE)


def test_another_model_is_refused(golden_model, tmp_path):
    golden, other = golden_model("qwen2_tied"), golden_model("qwen2_untied")
    run = fake_run(tmp_path / "run", golden, golden.params)
    with pytest.raises(CheckpointError, match=r"of another model: parameter \S+ is .* there"):
        export(run, tmp_path / "out", source=other.folder)
    wider = jax.tree.map(lambda x: np.concatenate([x, x], axis=-1), golden.params)
    shutil.rmtree(run)
    run = fake_run(tmp_path / "run", golden, wider)
    with pytest.raises(CheckpointError, match=r"embed_tokens/embedding is \(256, 128\) there, "):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named(golden_model, tmp_path):
    golden = golden_model("llama")
    run = fake_run(tmp_path / "run", golden, golden.params, step=3)
    shutil.rmtree(run / "checkpoints" / "3" / "train")
    with pytest.raises(CheckpointError, match=re.escape(str(run / "checkpoints" / "3"))):
        export(run, tmp_path / "out")


def test_what_cannot_be_exported(trained, tmp_path):
    with pytest.raises(ExportError, match=r"has no checkpoint of step 9; there are: 0, 1"):
        export(trained[0], tmp_path / "out", step=9)
    with pytest.raises(ExportError, match="nowhere is no run folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model": {"path": ""}}')
    with pytest.raises(ExportError, match="has no checkpoint yet"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ExportError, match="is not the configuration of a run"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(ModelError, match="exists and is not an empty folder"):
        export(trained[0], tmp_path)


def test_the_present_folder_is_refused_before_the_work(tmp_path, monkeypatch):
    """Regression: `--out=.` in an empty folder failed after the work: Invalid argument: '.'."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"^\. is the present folder"):
        export(tmp_path / "no run at all", ".")
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_do_not_fit_are_named(golden_model, tmp_path):
    """Regression: parameters beyond float16 were written as infinite to a float16 folder."""
    golden = golden_model("qwen2_tied")
    source = tmp_path / "source"
    save_folder(source, golden.params, golden.config, dtype="float16")
    params = jax.tree.map(np.array, golden.params)
    params["layers"]["mlp"]["up_proj"]["kernel"][1, 0, 0] = 7e4
    run = fake_run(tmp_path / "run", golden, params)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight' .* float16: 70000 "):
        export(run, tmp_path / "out", source=source)
    assert sorted(tmp_path.iterdir()) == before


def test_errors_of_the_command_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command([f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is no run folder: it has no config.json\n"
