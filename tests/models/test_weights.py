"""Checkpoints: round trips bit for bit, and every damaged folder refused by name."""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from attnrl_jax.models.config import ModelError, read_config
from attnrl_jax.models.weights import INDEX_FILE, SINGLE_FILE, load_params, save_folder

ROOT = Path(__file__).resolve().parents[2]
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tensors(path: Path) -> dict[str, tuple]:
    with safe_open(path, framework="numpy") as stored:
        return {
            name: (
                stored.get_slice(name).get_dtype(),
                tuple(stored.get_slice(name).get_shape()),
                stored.get_tensor(name).tobytes(),
            )
            for name in stored.keys()  # noqa: SIM118
        }


def same_params(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def split(source: Path, out: Path) -> Path:
    """The same checkpoint in two files and an index; layers alternate between the files."""
    out.mkdir()
    shutil.copyfile(source / "config.json", out / "config.json")
    files: dict[str, dict] = {"part-1.safetensors": {}, "part-2.safetensors": {}}
    where = {}
    for i, (name, tensor) in enumerate(load_file(source / SINGLE_FILE).items()):
        where[name] = f"part-{1 + i % 2}.safetensors"
        files[where[name]][name] = tensor
    for file, content in files.items():
        save_file(content, out / file, metadata={"format": "pt"})
    (out / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return out


@pytest.fixture
def damaged(tmp_path, golden_model):
    """A copy of a golden folder to damage, and its config."""
    model = golden_model("qwen3")
    shutil.copytree(model.folder, tmp_path / "model")
    return tmp_path / "model", model.config


def test_float32_whatever_was_stored(model):
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}
    embedding = load_file(model.folder / SINGLE_FILE)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(
        model.params["embed_tokens"]["embedding"], embedding.astype(np.float32)
    )


def test_round_trip_equals_source(tmp_path, model):
    (tmp_path / "model").mkdir()  # empty folders are taken
    save_folder(tmp_path / "model", model.params, model.config, source=model.folder)
    assert tensors(tmp_path / "model" / SINGLE_FILE) == tensors(model.folder / SINGLE_FILE)
    same = (model.folder / "config.json").read_bytes()
    assert (tmp_path / "model" / "config.json").read_bytes() == same
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_sharded_checkpoint(tmp_path, model):
    source = split(model.folder, tmp_path / "source")
    params = load_params(source, model.config)
    same_params(params, model.params)
    save_folder(tmp_path / "out", params, model.config, source=source)
    for file in ("part-1.safetensors", "part-2.safetensors"):
        assert tensors(tmp_path / "out" / file) == tensors(source / file)
    assert (tmp_path / "out" / INDEX_FILE).read_text() == (source / INDEX_FILE).read_text()


@pytest.mark.parametrize("dtype", STORED)
def test_new_folder_in_each_dtype(tmp_path, model, dtype):
    save_folder(tmp_path / "out", model.params, model.config, end_ids=(2,), dtype=dtype)
    assert read_config(tmp_path / "out") == model.config
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    assert set(stored) == set(load_file(model.folder / SINGLE_FILE))
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(STORED[dtype])}
    loaded = load_params(tmp_path / "out", model.config)
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(STORED[dtype]).astype(np.float32), model.params
    )
    same_params(loaded, rounded)


def test_tied_checkpoint_may_repeat_lm_head(damaged, tmp_path):
    folder, config = damaged
    stored = load_file(folder / SINGLE_FILE)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].copy()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(stored, folder / SINGLE_FILE)
    params = load_params(folder, config)
    save_folder(tmp_path / "out", params, config, source=folder)
    assert tensors(tmp_path / "out" / SINGLE_FILE) == tensors(folder / SINGLE_FILE)


def edit(folder: Path, change) -> None:
    stored = load_file(folder / SINGLE_FILE)
    change(stored)
    save_file(stored, folder / SINGLE_FILE)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj"),
        (lambda t: t.update({"model.norm.weight": np.ones(5, np.float32)}), r"model\.norm.*\(5,\)"),
        (lambda t: t.update({"model.norm.bias": np.ones(64, np.float32)}), r"model\.norm\.bias"),
        (lambda t: t.update({"model.norm.weight": np.ones(64, np.int32)}), r"model\.norm.*I32"),
    ],
)
def test_tensors_that_do_not_fit(damaged, change, culprit):
    folder, config = damaged
    edit(folder, change)
    with pytest.raises(ModelError, match=culprit):
        load_params(folder, config)


def test_config_of_another_model(damaged, golden_model):
    folder, config = damaged
    with pytest.raises(ModelError, match=r"layers\.2"):
        load_params(folder, replace(config, num_layers=3))
    with pytest.raises(ModelError, match=r"layers\.1"):
        load_params(folder, replace(config, num_layers=1))
    with pytest.raises(ModelError, match="lm_head"):
        load_params(folder, replace(config, tie_embeddings=False))


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file(damaged, kept):
    folder, config = damaged
    whole = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(whole[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        load_params(folder, config)


def test_missing_folder_and_file(tmp_path, damaged):
    folder, config = damaged
    with pytest.raises(ModelError, match="nowhere"):
        load_params(tmp_path / "nowhere", config)
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(ModelError, match=r"no weights at .*model"):
        load_params(folder, config)


@pytest.mark.parametrize(
    ("index", "culprit"),
    [
        ("{", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ('{"weight_map": []}', "not a safetensors index"),
        ({"../part-1.safetensors": "part-1.safetensors"}, "outside its folder"),
        ({"..": "part-1.safetensors"}, "does not exist"),
        ({"/etc/passwd": "part-1.safetensors"}, "outside its folder"),
        ({"part-3.safetensors": "part-1.safetensors"}, "part-3"),
        # The index promises a tensor to the wrong file.
        ({"part-2.safetensors": "part-1.safetensors"}, "cannot read"),
    ],
)
def test_bad_index(tmp_path, golden_model, index, culprit):
    model = golden_model("qwen2_tied")
    folder = split(model.folder, tmp_path / "model")
    if isinstance(index, dict):
        # A real file to be reached from outside, so that only the check stands in the way.
        shutil.copyfile(folder / "part-1.safetensors", tmp_path / "part-1.safetensors")
        names = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
        swap = {old: new for new, old in index.items()}
        names = {name: swap.get(file, file) for name, file in names.items()}
        index = json.dumps({"weight_map": names})
    (folder / INDEX_FILE).write_text(index)
    with pytest.raises(ModelError, match=culprit):
        load_params(folder, model.config)


def test_full_folder_is_left_alone(tmp_path, golden_model):
    model = golden_model("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="out exists and is not an empty folder"):
        save_folder(tmp_path / "out", model.params, model.config)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match="file exists"):
        save_folder(tmp_path / "file", model.params, model.config)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine.txt", "out"]


def test_failure_leaves_nothing(tmp_path, damaged, golden_model):
    folder, config = damaged
    params = golden_model("qwen3").params
    saved = tmp_path / "saved"
    saved.mkdir()
    with pytest.raises(ModelError, match="float64"):
        save_folder(saved / "out", params, config, dtype="float64")
    # Each is noticed only after the folder was begun.
    edit(folder, lambda t: t.update({"model.norm.bias": np.ones(64, np.float32)}))
    with pytest.raises(ModelError, match=r"model\.norm\.bias"):
        save_folder(saved / "out", params, config, source=folder)
    edit(folder, lambda t: (t.pop("model.norm.bias"), t.pop("model.norm.weight")))
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        save_folder(saved / "out", params, config, source=folder)
    edit(folder, lambda t: t.update({"model.norm.weight": np.ones(5, np.float32)}))
    with pytest.raises(ModelError, match=r"\(5,\)"):
        save_folder(saved / "out", params, config, source=folder)
    assert not list(saved.iterdir())


def test_nothing_imports_torch():
    """But for what the benchmarks run in a virtual environment of its own."""
    peers = ROOT / "experiments" / "bench" / "peers"
    files = [path for name in ("attnrl_jax", "experiments") for path in (ROOT / name).rglob("*.py")]
    files = [path for path in files if peers not in path.parents]
    assert len(files) > 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "torch" for name in names), path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("like_a_source", [False, True])
def test_values_that_would_become_infinite_are_refused(
    tmp_path, golden_model, dtype, like_a_source
):
    """Regression: 7e4 became infinite in a float16 file, and nothing was said."""
    golden = golden_model("qwen2_tied")
    source = None
    if like_a_source:
        source = tmp_path / "source"
        save_folder(source, golden.params, golden.config, dtype=dtype)
    params = jax.tree.map(np.array, golden.params)
    largest = float(ml_dtypes.finfo(STORED[dtype]).max)
    params["norm"]["scale"][:2] = [largest, np.inf]
    out = tmp_path / "out"
    # The largest value fits, and what was infinite stays so.
    save_folder(out, params, golden.config, source=source, dtype=dtype)
    loaded = load_params(out, golden.config)["norm"]["scale"]
    np.testing.assert_array_equal(loaded[:2], params["norm"]["scale"][:2])
    shutil.rmtree(out)
    there = sorted(tmp_path.iterdir())
    params["norm"]["scale"][3] = largest * 1.003
    with pytest.raises(
        ModelError, match=rf"'model\.norm\.weight' does not fit {dtype}: .* \(1 of \d+ values\)"
    ):
        save_folder(out, params, golden.config, source=source, dtype=dtype)
    assert sorted(tmp_path.iterdir()) == there


def test_folders_that_cannot_be_replaced_are_refused(tmp_path, golden_model, monkeypatch):
    """Regression: an empty present folder, or a link to one, was an error after the work."""
    golden = golden_model("qwen2_tied")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(empty)
    for out in (".", empty, tmp_path / "link", tmp_path / "dangling"):
        with pytest.raises(ModelError, match=rf"^{out} is the present folder, a link or a mount"):
            save_folder(out, golden.params, golden.config)
    assert list(empty.iterdir()) == []
