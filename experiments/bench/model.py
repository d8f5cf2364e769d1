"""The model that every contender runs: one seed, one Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from attnrl_jax.models.weights import save_folder

# 30.9M parameters.
COMMON = ModelConfig(
    family="qwen2",
    vocab_size=8192,
    width=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=1408,
    qkv_bias=True,
    tie_embeddings=False,
    max_length=32768,
)
# Of an accelerator's benchmarks; 1.54 billion parameters.
QWEN2_1P5B = ModelConfig(
    family="qwen2",
    vocab_size=151936,
    width=1536,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    mlp_width=8960,
    rope_theta=1e6,
    qkv_bias=True,
    tie_embeddings=True,
    max_length=32768,
    dtype="bfloat16",
)


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Float32 parameters that show a mistake: no bias is 0 and no scale is 1."""
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, dtype=np.float32)
        name = path[-1].key
        if name == "scale":
            return 1 + np.float32(0.1) * noise
        if name == "bias":
            return np.float32(0.5) * noise
        # Kernels are [in, out]; a row of the embedding is one token.
        fan_in = leaf.shape[-2] if name == "kernel" else 1
        return noise / np.float32(np.sqrt(fan_in))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def write_model(folder: Path, config: ModelConfig = COMMON, seed: int = 0) -> Path:
    """Writes the folder (not the end token: none ends a response) and returns it."""
    save_folder(folder, random_params(config, seed), config, end_ids=())
    return folder


def num_parameters(params: Any) -> int:
    """How many numbers a parameter tree holds."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
