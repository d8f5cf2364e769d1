"""Shape of a causal language model, read from and written to Hugging Face `config.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")
ATTENTION = ("auto", "blockwise", "splash", "cudnn", "plain")
REMAT = ("none", "attention", "dots", "full")
# What the key intervals of a forward pass can be, from the narrowest to the widest.
LAYOUTS = ("single", "packed", "tree")


class ModelError(ValueError):
    """A model folder that is missing, damaged, or of a kind this program does not know."""


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings (`linear`, or Llama 3.1's `llama3`).

    Raises:
      ModelError: a number for which the frequencies would be zero, infinite or undefined.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self):
        _check_positive("rotary scaling factor", self.factor)
        if not -math.inf < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ModelError(
                f"high_freq_factor {self.high_freq_factor} must be finite and above "
                f"low_freq_factor {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A model of one of the `FAMILIES`.

    Attributes:
      family: its name there.
      width: of the residual stream.
      head_dim: of one head; need not be width / num_heads.
      qkv_bias, o_bias, mlp_bias: which projections have biases.
      qk_norm: RMSNorm over head_dim on queries and keys (Qwen3).
      max_length: positions the model was trained for; longer sequences are refused by callers.
      dtype: of the computation; parameters are float32 always.
      block_length: rows of attention that are worked on at once (temporary memory is at most
        heads x block_length x time for each sequence); a CPU takes at most 256.
      attention: route of attention over whole sequences, as the table in `models.attention` has
        them. `auto` takes the kernel of the platform where it fits. `splash` and `cudnn` ask for
        that kernel wherever it fits, and for `blockwise` where it does not; they are refused where
        the platform lacks them, `cudnn` also where dtype or head_dim never let it run.
      remat: what the backward pass of a layer finds kept besides the layer's input; the rest is
        computed again. `none`: everything (no recomputation, most memory). `dots`: results of the
        projections and of attention. `attention`: results of attention, the one part whose cost
        grows with the square of time, for as much memory as the layer's input. `full`: nothing.
        Where cuDNN computes attention, only `none` keeps its results.
    """

    family: str
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_length: int = 32768
    dtype: str = "float32"
    block_length: int = 1024
    attention: str = "auto"
    remat: str = "attention"

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ModelError(f"unknown model family {self.family!r}; known: {', '.join(FAMILIES)}")
        for name, allowed in (("dtype", DTYPES), ("attention", ATTENTION), ("remat", REMAT)):
            if getattr(self, name) not in allowed:
                raise ModelError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                     "mlp_width", "max_length", "block_length"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name} must be a positive integer; got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        _check_positive("rope_theta", self.rope_theta)
        _check_positive("norm_eps (rms_norm_eps)", self.norm_eps)
        if self.head_dim % 2:
            raise ModelError(f"head_dim must be even for rotary embeddings; got {self.head_dim}")

    def with_dtype(self, dtype: str) -> ModelConfig:
        """The same model computing in `dtype`."""
        return replace(self, dtype=dtype)


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ModelError(f"{name} must be positive and finite; got {value!r}")


def read_config(folder: str | Path, dtype: str = "float32") -> ModelConfig:
    """Reads `config.json` of a Hugging Face model folder.

    Raises:
      ModelError: no such folder or file, unreadable JSON, unknown architecture or feature.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"no model at {folder}: {path} does not exist")
    try:
        raw = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds no JSON object")
    try:
        return replace(config_from_hf(raw), dtype=dtype)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(f"{path}: a setting has the wrong type: {error}") from error


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """Translates a Hugging Face configuration, in the transformers 4 or 5 style.

    Version 4 writes `rope_theta` and `rope_scaling` at the top level, version 5 puts both under
    `rope_parameters`.

    Raises:
      ModelError: unknown architecture, missing key, value of the wrong type, or a feature that
        would change the numbers and is not implemented (sliding windows, other rotary scalings,
        other activations).
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(
            f"unknown architecture {family!r} (model_type); known: {', '.join(FAMILIES)}"
        )
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "intermediate_size")  # fmt: skip
    for key in required:
        if key not in raw:
            raise ModelError(f"{key!r} is missing")
        value = raw[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{key!r} must be a positive integer; got {value!r}")
    layer_types = raw.get("layer_types") or []
    if raw.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        raise ModelError("sliding-window attention is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {raw['hidden_act']!r} is not supported; only 'silu'")
    heads = raw["num_attention_heads"]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"rotary settings must be an object; got {rope!r}")
    if {**raw, **rope}.get("partial_rotary_factor", 1) != 1:
        raise ModelError("'partial_rotary_factor' other than 1 is not supported")
    values: dict[str, Any] = {
        "vocab_size": raw["vocab_size"],
        "width": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "mlp_width": raw["intermediate_size"],
        "rope_theta": _number({**raw, **rope}, "rope_theta", 10000.0),
        "rope_scaling": _rope_scaling(rope, raw),
        "norm_eps": _number(raw, "rms_norm_eps", 1e-6),
        "tie_embeddings": _flag(raw, "tie_word_embeddings"),
        "max_length": raw.get("max_position_embeddings", 32768),
    }
    return ModelConfig(family=family, **(values | FAMILIES[family].read(raw)))


def _number(raw: dict[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelError(f"{key!r} must be a number; got {value!r}")
    return float(value)


def _flag(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise ModelError(f"{key!r} must be true or false; got {value!r}")
    return value


def _rope_scaling(rope: dict[str, Any], raw: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in (None, "default"):
        return None
    if kind == "linear":
        return RopeScaling("linear", _number(rope, "factor"))
    if kind == "llama3":
        original = "original_max_position_embeddings"
        if original not in rope:
            rope = rope | {original: _number(raw, "max_position_embeddings")}
        return RopeScaling(
            "llama3",
            _number(rope, "factor"),
            _number(rope, "low_freq_factor"),
            _number(rope, "high_freq_factor"),
            int(_number(rope, original)),
        )
    raise ModelError(f"rotary scaling {kind!r} is not supported; known: default, linear, llama3")


def config_to_hf(config: ModelConfig, end_ids: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """Hugging Face `config.json` (transformers 5 style) of a model made here.

    Args:
      config: the model; rotary scaling is written as it was read.
      end_ids: ids that end a response.
      dtype: of the stored weights.
    """
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_length,
            }
    raw: dict[str, Any] = {
        "architectures": [FAMILIES[config.family].architecture],
        "attention_dropout": 0.0,
        "dtype": dtype,
        "eos_token_id": end_ids[0] if len(end_ids) == 1 else list(end_ids),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_length,
        "model_type": config.family,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    return raw | FAMILIES[config.family].write(config)


@dataclass(frozen=True)
class Family:
    """What tells a family of models from others of the same architecture: pre-norm layers of
    grouped-query attention with rotary positions and SwiGLU, tensors named as Llama's.

    Attributes:
      architecture: its class in Hugging Face transformers.
      read: from `config.json` to the fields of `ModelConfig` that all families do not read alike;
        raises `ModelError` for a feature that would change the numbers and is not implemented.
      write: from a model to the keys of `config.json` that all families do not have alike.
    """

    architecture: str
    read: Callable[[dict[str, Any]], dict[str, Any]] = lambda raw: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


_FULL_ATTENTION = {"sliding_window": None, "use_sliding_window": False}


def _read_qwen3(raw: dict[str, Any]) -> dict[str, Any]:
    bias = _flag(raw, "attention_bias")
    # What transformers takes where `head_dim` is missing.
    head_dim = raw.get("head_dim") or 128
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "head_dim": head_dim}


def _read_llama(raw: dict[str, Any]) -> dict[str, Any]:
    bias = _flag(raw, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": _flag(raw, "mlp_bias")}


# By `model_type`. Another family of this architecture is another entry: docs/extending.md.
FAMILIES: dict[str, Family] = {
    "qwen2": Family(
        "Qwen2ForCausalLM", lambda raw: {"qkv_bias": True}, lambda config: _FULL_ATTENTION
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _read_qwen3,
        lambda config: {"attention_bias": config.qkv_bias, **_FULL_ATTENTION},
    ),
    "llama": Family(
        "LlamaForCausalLM",
        _read_llama,
        lambda config: {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias},
    ),
}
