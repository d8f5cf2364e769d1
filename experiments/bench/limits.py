"""Limits of a device, measured, and what a model asks of it, counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnrl_jax.models.config import ModelConfig

GIBI = 2**30
# Copies, and pairs of products, of one program.
COPIES = 40
PAIRS = 10


def seconds_of(run: Callable[[], Any], rounds: int = 5) -> float:
    """Least wall clock of a run, compiled before."""
    jax.block_until_ready(run())
    taken = []
    for _ in range(rounds):
        began = perf_counter()
        jax.block_until_ready(run())
        taken.append(perf_counter() - began)
    return min(taken)


# In the following two loops every pass needs the one before, and how many there are is an argument:
# nothing can be folded, or joined with the next pass.


@jax.jit
def _copied(x: jax.Array, y: jax.Array, count: jax.Array) -> jax.Array:
    """`count` times reads and writes all of `x`."""
    return jax.lax.fori_loop(0, count, lambda _, x: x + y, x)


@jax.jit
def _multiplied(x: jax.Array, y: jax.Array, z: jax.Array, count: jax.Array) -> jax.Array:
    """`count` times two products; the second may be written where `x` was."""
    return jax.lax.fori_loop(0, count, lambda _, x: (x @ y) @ z, x)


def copy_bandwidth(size: int = GIBI) -> float:
    """Bytes per second of a copy, read and written."""
    x = jnp.zeros(size // 4, jnp.float32)
    seconds = seconds_of(lambda: _copied(x, np.float32(1), np.int32(COPIES)))
    return COPIES * 2 * x.nbytes / seconds


def matmul_rate(size: int = 8192) -> float:
    """Operations per second of a product of two square bfloat16 matrices."""
    # Entries stay of the size of 1: what is multiplied decides how much power it takes.
    keys = jax.random.split(jax.random.key(0), 3)
    x, y, z = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    scale = jnp.bfloat16(1 / math.sqrt(size))
    y, z = y * scale, z * scale
    seconds = seconds_of(lambda: _multiplied(x, y, z, np.int32(PAIRS)))
    return PAIRS * 2 * 2 * size**3 / seconds


def allotted_bytes(compiled: jax.stages.Compiled) -> int:
    """What XLA allots for a program: arguments, temporaries, and outputs in no argument's place."""
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def matrix_params(config: ModelConfig) -> int:
    """Parameters of matrices that every token is multiplied with, the unembedding included."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.width * (2 * heads + 2 * kv_heads + 3 * config.mlp_width)
    return config.num_layers * layer + config.width * config.vocab_size


def step_bytes(config: ModelConfig, batch: int, context: float) -> float:
    """Bytes that a decode step reads at least: weights, and keys and values of the context."""
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * batch * context
    return (matrix_params(config) + cache) * jnp.dtype(config.dtype).itemsize


def forward_flops(config: ModelConfig, rows: int, time: int, logits: int | None = None) -> float:
    """Operations of a forward pass; attention is causal.

    Args:
      config: the model.
      rows, time: rows, and tokens of each.
      logits: tokens of a row that have any; None: all.
    """
    unembedding = config.width * config.vocab_size
    layers = 2.0 * (matrix_params(config) - unembedding)
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * time
    asked = time if logits is None else logits
    return rows * (time * (layers + attention) + asked * 2.0 * unembedding)
