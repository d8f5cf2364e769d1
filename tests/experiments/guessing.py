r"""A Qwen2 folder that guesses: steps of random length, then `\boxed{}` with a random number.

Its residual stream is the embedding alone (the blocks write nothing yet), so that the next token
depends on the last one only, by a table written here. Everything else is a whole Qwen2 model: its
attention attends, and training changes all of its parameters. Bytes are its tokens.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from attnrl_jax.models.weights import save_folder

END = 0
MODEL = ModelConfig(
    family="qwen2", vocab_size=256, width=256, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, mlp_width=64, qkv_bias=True, max_length=2048,
)  # fmt: skip


def next_byte_table() -> np.ndarray:
    """Probability of each byte after each, `[byte, next byte]`."""
    table = np.zeros((256, 256))

    def after(byte: str, **chances: float) -> None:
        for name, chance in chances.items():
            table[ord(byte), ord({"newline": "\n", "backslash": "\\"}.get(name, name))] = chance

    table[:, ord("a")] = 1.0  # what ends a prompt
    for byte in "a\n\\boxed{":
        table[ord(byte)] = 0.0
    after("a", a=0.5, newline=0.5)
    after("\n", newline=0.4, a=0.3, backslash=0.3)
    for byte, following in zip("\\boxed", "boxed{", strict=True):
        table[ord(byte), ord(following)] = 1.0
    for digit in range(10):
        table[ord("{"), ord(str(digit))] = 0.1
        table[ord(str(digit))] = 0.0
        table[ord(str(digit)), ord("}")] = 1.0
    table[ord("}")] = 0.0
    table[ord("}"), END] = 1.0
    return table


def guessing_policy(folder: Path) -> Path:
    """Writes the folder; it has no tokenizer files, so bytes serve as tokens."""
    params = init_params(MODEL, jax.random.key(0))
    layers = params["layers"]
    for group, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        layers[group][name]["kernel"] = jnp.zeros_like(layers[group][name]["kernel"])
    params["embed_tokens"]["embedding"] = jnp.eye(256, dtype=jnp.float32)
    # The norm scales a one-hot vector to sqrt(width).
    logits = np.log(next_byte_table() + 1e-6) / np.sqrt(MODEL.width)
    params["lm_head"]["kernel"] = jnp.asarray(logits, jnp.float32)
    save_folder(folder, params, MODEL, end_ids=(END,))
    return folder
