"""Model folders that somebody, or some disk, has changed: refused by name, or usable."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnrl_jax.models.config import ModelConfig, ModelError, config_to_hf, read_config
from attnrl_jax.models.transformer import init_params
from attnrl_jax.models.weights import INDEX_FILE, SINGLE_FILE, load_params
from tests.conftest import FAMILIES, GOLDEN
from tests.properties.strategies import JSON_VALUES, cases

FOLDERS = [GOLDEN / "models" / name for name in FAMILIES]
CONFIGS = [json.loads((folder / "config.json").read_text()) for folder in FOLDERS]
KEYS = sorted({key for config in CONFIGS for key in config})
COUNTS = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim",
          "mlp_width", "max_length")  # fmt: skip


def refusal_of(function, *arguments) -> tuple[object, str]:
    """What it returns, or the words of the `ModelError` that it raises."""
    try:
        return function(*arguments), ""
    except ModelError as error:
        return None, str(error)


def read(values) -> ModelConfig:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return read_config(folder)


def is_usable(config: ModelConfig) -> None:
    """Every field has its type, and is a size or a number that a model can have."""
    for name in COUNTS:
        assert type(getattr(config, name)) is int
        assert getattr(config, name) >= 1
    assert config.num_heads % config.num_kv_heads == 0
    for name in ("tie_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
        assert type(getattr(config, name)) is bool
    for value in (config.rope_theta, config.norm_eps):
        assert type(value) is float
        assert 0 < value < math.inf
    hash(config)


MUTATED = st.builds(
    lambda base, changes, lost: {
        key: value for key, value in (base | changes).items() if key not in lost
    },
    st.sampled_from(CONFIGS),
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), JSON_VALUES, max_size=3),
    st.sets(st.sampled_from(KEYS), max_size=2),
)


@given(MUTATED)
@cases(1500)
def test_a_mutated_config_is_refused_or_usable(values):
    config, refusal = refusal_of(read, values)
    if config is None:
        assert "config.json" in refusal
        return
    is_usable(config)
    # What is written of it is read as the same.
    if config.rope_scaling is None:
        again = read(config_to_hf(config, (2,), "float32"))
        assert dataclasses.replace(again, dtype=config.dtype) == config


@given(JSON_VALUES)
@cases(200)
def test_any_json_is_no_model(values):
    with pytest.raises(ModelError):
        read(values)


def test_the_configs_themselves_are_usable():
    for values in CONFIGS:
        is_usable(read(values))


def mutated_header(data: bytes, draw) -> bytes:
    """A safetensors file with another header: length, JSON or an entry of it."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = draw(st.sampled_from(["length", "byte", "entry", "name", "cut", "json"]))
    if kind == "length":
        lengths = st.sampled_from([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", draw(lengths)) + header + body
    if kind == "byte":
        place = draw(st.integers(0, size - 1))
        changed = header[:place] + bytes([draw(st.integers(0, 255))]) + header[place + 1 :]
        return struct.pack("<Q", size) + changed + body
    if kind == "cut":
        return data[: draw(st.integers(0, len(data) - 1))]
    values = json.loads(header)
    name = draw(st.sampled_from(sorted(set(values) - {"__metadata__"})))
    if kind == "entry":
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        begin, end = values[name]["data_offsets"]
        values[name][key] = draw(
            st.sampled_from(["F64", "BOOL", "U8", "F16", [0], [1, 1], [10**12, 10**12], []])
            | st.sampled_from([[0, 4], [begin, end + 4], [end, begin], [-1, 4], [0, 2**62]])
            | JSON_VALUES
        )
    elif kind == "name":
        values[draw(st.text(max_size=6))] = values.pop(name)
    else:
        values = draw(JSON_VALUES)
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture(scope="module")
def stored(golden_model):
    """Name to config, file, and what its parameters are like."""
    found = []
    for name in ("qwen2_tied", "llama"):
        golden = golden_model(name)
        shapes = jax.eval_shape(lambda c=golden.config: init_params(c, jax.random.key(0)))
        found.append((golden.config, (golden.folder / SINGLE_FILE).read_bytes(), shapes))
    return found


@given(data=st.data())
@cases(600)
def test_mutated_safetensors_are_refused_or_whole(stored, data):
    config, content, shapes = data.draw(st.sampled_from(stored))
    with TemporaryDirectory() as folder:
        (Path(folder) / SINGLE_FILE).write_bytes(mutated_header(content, data.draw))
        params, refusal = refusal_of(load_params, folder, config)
    if params is None:
        assert folder in refusal
        return
    # A change that means nothing, such as white space or the bytes of a value that stays finite.
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == np.float32


@given(index=JSON_VALUES | st.fixed_dictionaries({"weight_map": JSON_VALUES}))
@cases(300)
def test_any_index_is_refused(stored, index):
    config, content, _ = stored[0]
    with TemporaryDirectory() as folder:
        (Path(folder) / "part.safetensors").write_bytes(content)
        (Path(folder) / INDEX_FILE).write_text(json.dumps(index))
        with pytest.raises(ModelError):
            load_params(folder, config)


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size"])
def test_a_config_of_a_giant_asks_for_no_memory(tmp_path, key):
    """Its tensors are looked at first."""
    folder = tmp_path / "model"
    shutil.copytree(FOLDERS[0], folder)
    values = json.loads((folder / "config.json").read_text()) | {key: 2**40}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError):
        load_params(folder, read_config(folder))
