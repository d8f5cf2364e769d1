"""Scoring: what forward context influence adds to a pass for log-probabilities and entropy.

One sequence of random tokens on the common model, with influence and without. The steps of a
sequence are data: steps of 32 tokens and a step for each token run the same program. Memory is what
XLA allots for temporaries, read from the compiled programs; nothing of it is run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.scoring import score
from experiments.bench import ours
from experiments.bench.common import common_folder
from experiments.bench.harness import Contender, Context, Fact, Measured, Part, Ratio, Runs, Table
from experiments.bench.workloads import random_tokens

DELTA = 4
STEP_LENGTH = 32
AT_MOST = 1.3
MEMORY_LENGTHS = (1024, 2048, 4096, 8192, 16384)
# From one length to the next, which is twice as long; what does not grow makes it less.
LINEAR = 2.2
WITHOUT = "log-probabilities, entropy"
STEPS = {f"with FCI, steps of {STEP_LENGTH}": STEP_LENGTH, "with FCI, every token a step": 1}


def part_time(length: int, context: Context) -> Part:
    """The pass with influence over the pass without it."""
    model = ours.load(common_folder(context))
    tokens = random_tokens(np.random.default_rng(0), 1, length)

    def contender(name: str, step_length: int, with_fci: bool) -> Contender:
        step_ids = (np.arange(length, dtype=np.int32) // step_length)[None]

        def run() -> Measured:
            began = time.perf_counter()
            scores = score(
                model.params, model.config, tokens, np.array([length]), step_ids,
                delta=DELTA, with_fci=with_fci,
            )  # fmt: skip
            jax.device_get(scores)
            return Measured(time.perf_counter() - began, float(length))

        def warm_up() -> str:
            run()
            return f"{model.config.dtype}, attention {model.config.attention}"

        return Contender(name, run, warm_up)

    return Part(
        title=f"one sequence of {length} tokens, delta {DELTA}",
        unit="s",
        contenders=[
            contender(WITHOUT, STEP_LENGTH, False),
            *(contender(name, step_length, True) for name, step_length in STEPS.items()),
        ],
        ratios=[Ratio(name, (WITHOUT,), at_most=AT_MOST) for name in STEPS],
        quantity="seconds",
    )


def temporary_bytes(config: ModelConfig, params: Any, length: int) -> int:
    """What XLA allots beside inputs and outputs for one pass with influence."""

    def program(params: Any, tokens: jax.Array, step_ids: jax.Array) -> Any:
        return score(params, config, tokens, jnp.array([length]), step_ids, delta=DELTA)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(program).lower(shapes, tokens, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def part_memory(context: Context, lengths: Sequence[int] = MEMORY_LENGTHS) -> Part:
    """Peak temporary memory by length, and that of the route that holds whole maps."""
    model = ours.load(common_folder(context))
    plain = replace(model.config, attention="plain")
    rows = [
        (length, *(temporary_bytes(c, model.params, length) for c in (model.config, plain)))
        for length in lengths
    ]

    def growth(column: int) -> float:
        return max(large[column] / small[column] for small, large in itertools.pairwise(rows))

    def facts(_: Runs) -> list[Fact]:
        doubled = "largest factor of memory from one length to the next"
        return [
            Fact(doubled, growth(1), at_most=LINEAR),
            Fact(f"{doubled}, whole maps", growth(2)),
        ]

    def tables(_: Runs) -> list[Table]:
        head = ("tokens", f"{model.config.attention}, MiB", "whole maps, MiB")
        body = [
            (str(length), *(f"{size / 2**20:.0f}" for size in sizes)) for length, *sizes in rows
        ]
        return [Table("Temporary memory of one pass with FCI", [head, *body])]

    return Part(
        title="temporary memory, from compiled.memory_analysis()",
        unit="bytes",
        facts=facts,
        tables=tables,
    )


PARTS: dict[str, Callable[[Context], Part]] = {
    "2048": partial(part_time, 2048),
    "8192": partial(part_time, 8192),
    "memory": part_memory,
}
