"""Tunix's Qwen2 model from a Hugging Face folder, and what its versions are."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.models.qwen2.params import create_model_from_safe_tensors


def load_model(folder: str) -> Qwen2:
    """The model in float32; the folder's `config.json` says its shape."""
    raw = json.loads((Path(folder) / "config.json").read_text())
    config = ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["head_dim"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=raw["rope_parameters"]["rope_theta"],
        norm_eps=raw["rms_norm_eps"],
        use_tied_embedding=raw["tie_word_embeddings"],
    )
    mesh = jax.make_mesh(
        (1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )  # fmt: skip
    return create_model_from_safe_tensors(folder, config, mesh, dtype=jnp.float32)


def versions() -> dict[str, str]:
    """Of Tunix and what it computes with."""
    return {name: version(name) for name in ("google-tunix", "jax", "jaxlib", "flax")}


def logits(model: Qwen2, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits `[time, vocab]` of one row of tokens."""
    time = len(tokens)
    positions = jnp.arange(time)[None]
    mask = jnp.tril(jnp.ones((time, time), bool))[None]
    result, _ = model(jnp.asarray(tokens)[None], positions, None, mask)
    return np.asarray(result[0])


def answer_logits(model: Qwen2, tokens: str, out: str) -> dict[str, Any]:
    """The command `logits`; both are files of numpy."""
    np.save(out, logits(model, np.load(tokens)))
    return {}
