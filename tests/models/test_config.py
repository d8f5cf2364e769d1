"""Reading and writing config.json: both styles, and every way in which one can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from attnrl_jax.models.config import (
    ModelConfig,
    ModelError,
    RopeScaling,
    config_from_hf,
    config_to_hf,
    read_config,
)

RAW = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}


def write(folder, raw) -> None:
    (folder / "config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Version 5 style: rope_parameters.
        ("qwen2_tied", dict(family="qwen2", num_layers=2, head_dim=16, num_kv_heads=2,
                            rope_theta=1e4, tie_embeddings=True, qkv_bias=True, qk_norm=False)),
        ("qwen3", dict(family="qwen3", num_layers=2, head_dim=32, num_kv_heads=2,
                       rope_theta=1e6, tie_embeddings=True, qkv_bias=False, qk_norm=True)),
        # Version 4 style: rope_theta at the top level.
        ("qwen2_untied", dict(family="qwen2", num_layers=3, head_dim=16, num_kv_heads=2,
                              rope_theta=1e6, tie_embeddings=False, qkv_bias=True, o_bias=False)),
        ("llama", dict(family="llama", num_layers=2, head_dim=16, num_kv_heads=1,
                       rope_theta=5e5, norm_eps=1e-5, tie_embeddings=False, qkv_bias=False)),
    ],
)  # fmt: skip
def test_reads_golden_configs(golden_dir, name, expected):
    config = read_config(golden_dir / "models" / name, dtype="bfloat16")
    assert (config.vocab_size, config.width, config.mlp_width) == (256, 64, 128)
    assert (config.num_heads, config.max_length, config.dtype) == (4, 1024, "bfloat16")
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        (LLAMA3, RopeScaling("llama3", 8.0, 1.0, 4.0, 48)),
    ],
)
def test_both_styles_say_the_same(rope, scaling):
    new = config_from_hf(RAW | {"rope_parameters": rope | {"rope_theta": 5e5}})
    old = config_from_hf(RAW | {"rope_scaling": rope, "rope_theta": 5e5})
    oldest = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    assert new == old == config_from_hf(RAW | {"rope_scaling": oldest, "rope_theta": 5e5})
    assert new.rope_scaling == scaling
    assert new.rope_theta == 5e5


def test_original_length_defaults_to_max_length():
    rope = {key: value for key, value in LLAMA3.items() if not key.startswith("original")}
    scaling = config_from_hf(RAW | {"rope_scaling": rope}).rope_scaling
    assert scaling is not None
    assert scaling.original_max_length == 64


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False},
        {"model_type": "qwen3", "head_dim": 6, "rope_scaling": {"type": "linear", "factor": 4}},
    ],
)
def test_written_config_reads_back(tmp_path, changes):
    config = config_from_hf(RAW | changes)
    raw = config_to_hf(config, end_ids=(3, 5), dtype="float32")
    write(tmp_path, raw)
    assert read_config(tmp_path) == config
    assert raw["eos_token_id"] == [3, 5]
    assert config_to_hf(config, (3,), "float32")["eos_token_id"] == 3


def test_transformers_reads_the_written_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = config_from_hf(RAW | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}})
    write(tmp_path, config_to_hf(config, (3,), "float32"))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config_from_hf(json.loads(read.to_json_string(use_diff=False))) == config


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": "linear"}, "linear"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "rotary scaling factor"),
        ({"rope_scaling": LLAMA3 | {"factor": float("nan")}}, "rotary scaling factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": float("nan")}}, "high_freq_factor"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_key_value_heads": "two"}, "num_kv_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"max_position_embeddings": None}, "max_length"),
        ({"layer_types": 3}, "wrong type"),
    ],
)
def test_bad_setting_is_named(tmp_path, changes, culprit):
    write(tmp_path, RAW | changes)
    with pytest.raises(ModelError, match=culprit) as error:
        read_config(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "key",
    ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
     "num_attention_heads"],
)  # fmt: skip
def test_missing_key_is_named(tmp_path, key):
    write(tmp_path, {name: value for name, value in RAW.items() if name != key})
    with pytest.raises(ModelError, match=key):
        read_config(tmp_path)


def test_head_dim_of_qwen3_is_128_unless_given():
    assert config_from_hf(RAW | {"model_type": "qwen3"}).head_dim == 128
    assert config_from_hf(RAW | {"model_type": "qwen3", "head_dim": 6}).head_dim == 6
    assert config_from_hf(RAW | {"model_type": "qwen2"}).head_dim == 4


@pytest.mark.parametrize(
    "text", ["{", "", "\x00", "[1]", "3", '{"a":' * 10**5, "[" * 10**5, "9" * 5000]
)
def test_no_json_object(tmp_path, text):
    write(tmp_path, text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        read_config(tmp_path)


def test_dtype_and_family_of_config(tmp_path):
    config = config_from_hf(RAW)
    assert config.with_dtype("bfloat16") == replace(config, dtype="bfloat16")
    with pytest.raises(ModelError, match="float64"):
        config.with_dtype("float64")
    with pytest.raises(ModelError, match="gemma"):
        ModelConfig("gemma", 8, 8, 1, 1, 1, 8, 8)
    write(tmp_path, RAW)
    with pytest.raises(ModelError, match="int8"):
        read_config(tmp_path, dtype="int8")


@pytest.mark.parametrize("name", ["attention", "remat"])
def test_unknown_routes_and_policies_are_refused_by_name(golden_dir, name):
    config = read_config(golden_dir / "models" / "llama")
    with pytest.raises(ModelError, match=f"{name} 'fast' is not one of .*{getattr(config, name)}"):
        replace(config, **{name: "fast"})
