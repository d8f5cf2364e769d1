"""An accelerator at 1.5 billion parameters: how near to its own limits.

Qwen2 1.5B in shape, random weights, bfloat16. Limits are measured on the same device: bytes per
second of a copy, and bfloat16 operations per second of a large matrix product.

- decode: tokens per second over what the bandwidth allows, batch / (bytes / bandwidth); the bytes
  of a step are the weights and the live part of the cache, each read once;
- score, update: model FLOPs utilisation (MFU, arXiv 2204.02311): 2 and 6 operations per token and
  parameter of a matrix, and those of causal attention, whatever is computed twice, over the rate
  of the matrix product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnrl_jax.algorithms.losses import LossConfig
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from attnrl_jax.sampling.engine import cast_params, empty_state, generate
from attnrl_jax.scoring import score
from attnrl_jax.training.state import TrainConfig, TrainState, init_state
from attnrl_jax.training.step import update
from attnrl_jax.types import Paths, TrainRows
from experiments.bench.harness import Contender, Context, Fact, Measured, Part, Runs

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
# (sequences, tokens of each in the cache)
DECODE = ((64, 1024), (64, 4096), (128, 2048), (256, 1024), (256, 4096))
DECODE_STEPS = 128
# (rows, tokens of each)
SCORE = (16, 4096)
UPDATE = (16, 4096)
LEAST_DECODE = 0.6
LEAST_MFU = 0.45
GIBI = 2**30


def seconds_of(run: Callable[[], Any], rounds: int = 5) -> float:
    """Least wall clock of a run, compiled before."""
    jax.block_until_ready(run())
    taken = []
    for _ in range(rounds):
        began = perf_counter()
        jax.block_until_ready(run())
        taken.append(perf_counter() - began)
    return min(taken)


def copy_bandwidth(size: int = GIBI) -> float:
    """Bytes per second of a copy, read and written."""
    x = jnp.zeros(size // 4, jnp.float32)
    # A sum with a number that is not known when it is compiled: a plain copy might be left out.
    copy = jax.jit(lambda x, y: x + y)
    return 2 * x.nbytes / seconds_of(lambda: copy(x, np.float32(1)))


def matmul_rate(size: int = 8192) -> float:
    """Operations per second of a product of two square bfloat16 matrices."""
    x = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda x, y: x @ y)
    return 2 * size**3 / seconds_of(lambda: product(x, x))


def matrix_params(config: ModelConfig) -> int:
    """Parameters of matrices that every token is multiplied with, the unembedding included."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.width * (2 * heads + 2 * kv_heads + 3 * config.mlp_width)
    return config.num_layers * layer + config.width * config.vocab_size


def step_bytes(config: ModelConfig, batch: int, context: float) -> float:
    """Bytes that a decode step reads at least: weights, and keys and values of the context."""
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * batch * context
    return (matrix_params(config) + cache) * jnp.dtype(config.dtype).itemsize


def forward_flops(config: ModelConfig, rows: int, time: int) -> float:
    """Operations of a forward pass with logits for every token; attention is causal."""
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * time
    return rows * time * (2.0 * matrix_params(config) + attention)


def decoding(
    params: Any, config: ModelConfig, batch: int, context: int, steps: int
) -> Callable[[], Measured]:
    """`steps` decode steps of sequences that already hold `context` tokens."""
    state = empty_state(config, batch, context + steps)
    whole = jnp.full(batch, context, jnp.int32)
    state = dataclasses.replace(
        state,
        length=whole,
        limit=whole + 2 * steps,
        active=jnp.ones(batch, bool),
        sampling=dataclasses.replace(state.sampling, temperature=jnp.ones(batch)),
    )
    held = [state]

    def run() -> Measured:
        # The same cache again: only its lengths go back.
        state = dataclasses.replace(held.pop(), length=jnp.copy(whole))
        jax.block_until_ready(state)
        began = perf_counter()
        state, done = generate(
            params, config, state, np.zeros(0, np.int32), np.int32(steps), np.int32(batch + 1)
        )
        jax.block_until_ready(state)
        seconds = perf_counter() - began
        assert int(done) == steps
        held.append(state)
        return Measured(seconds, float(batch * steps))

    return run


def random_rows(config: ModelConfig, rows: int, time: int) -> np.ndarray:
    """Random ids `[rows, time]`."""
    rng = np.random.default_rng(0)
    return rng.integers(1, config.vocab_size, (rows, time), dtype=np.int32)


def updating(
    state: TrainState, config: ModelConfig, rows: int, time: int
) -> Callable[[], Measured]:
    """One optimizer update of rows of full length."""
    train = TrainConfig(
        prompt_budget=time // 8,
        response_budget=time - time // 8,
        mini_batch_rows=rows,
        micro_batch_tokens=4 * time,
        packing="rows",
        loss=LossConfig(kl_beta=0.0),
    )
    rng = np.random.default_rng(0)
    response = np.tile(np.arange(time) >= time // 8, (rows, 1))
    whole = np.full(rows, time, np.int32)
    batch = TrainRows(
        tokens=random_rows(config, rows, time),
        paths=Paths(
            prompt_length=whole // 8,
            length=whole,
            problem=np.arange(rows),
            root=np.arange(rows),
            shared=whole,
        ),
        advantages=(rng.normal(size=(rows, 1)) * response).astype(np.float32),
        behaviour_logprobs=np.where(response, -np.log(config.vocab_size), 0.0).astype(np.float32),
    )
    held = [state]

    def run() -> Measured:
        began = perf_counter()
        state, metrics = update(held.pop(), config, train, batch, np.random.default_rng(0))
        jax.block_until_ready(state)
        seconds = perf_counter() - began
        assert metrics["updates"] == 1
        held.append(state)
        return Measured(seconds, float(rows * time))

    return run


def _contender(name: str, run: Callable[[], Measured], settings: str) -> Contender:
    def warm_up() -> str:
        run()
        return settings

    return Contender(name, run, warm_up)


def _best(runs: Runs, name: str) -> float:
    """Amount per second of the median run."""
    return float(np.median([measured.amount / measured.seconds for measured in runs[name]]))


def _peak_memory() -> list[Fact]:
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return [] if peak is None else [Fact("peak memory so far", peak / GIBI, "GiB")]


def _needs_accelerator(context: Context) -> None:
    if context.platform == "cpu":
        raise ValueError(
            "accelerator: absolute numbers of a CPU say nothing; give --platform=cuda or tpu"
        )


def decode_part(
    context: Context,
    config: ModelConfig = QWEN2_1P5B,
    shapes: tuple[tuple[int, int], ...] = DECODE,
    steps: int = DECODE_STEPS,
    copied: int = GIBI,
) -> Part:
    """Decoding against the bandwidth of memory."""
    params = cast_params(init_params(config, jax.random.key(0)), config.dtype)
    bandwidth = copy_bandwidth(copied)
    held: dict[str, Callable[[], Measured]] = {}

    def name(batch: int, length: int) -> str:
        return f"batch {batch}, context {length}"

    def run(batch: int, length: int) -> Measured:
        # One cache at a time: the largest fill a good part of the memory.
        key = name(batch, length)
        if key not in held:
            held.clear()
            held[key] = decoding(params, config, batch, length, steps)
            held[key]()
        return held[key]()

    def facts(runs: Runs) -> list[Fact]:
        shares = []
        for batch, length in shapes:
            limit = batch * bandwidth / step_bytes(config, batch, length + steps / 2)
            share = _best(runs, name(batch, length)) / limit
            shares.append(
                Fact(f"of the limit, {name(batch, length)}", share, "", at_least=LEAST_DECODE)
            )
        return [Fact("copy bandwidth", bandwidth / 1e9, "GB/s"), *shares, *_peak_memory()]

    return Part(
        title="Decoding, Qwen2 1.5B, bfloat16",
        unit="tokens/s",
        contenders=[
            _contender(name(*shape), partial(run, *shape), f"{steps} steps") for shape in shapes
        ],
        facts=facts,
    )


def score_part(
    context: Context,
    config: ModelConfig = QWEN2_1P5B,
    shape: tuple[int, int] = SCORE,
    product: int = 8192,
) -> Part:
    """Scoring against the rate of matrix products, with and without step importance."""
    rows, time = shape
    params = cast_params(init_params(config, jax.random.key(0)), config.dtype)
    tokens = jnp.asarray(random_rows(config, rows, time))
    lengths = jnp.full(rows, time)
    step_ids = jnp.broadcast_to(jnp.arange(time) // 32, tokens.shape)
    rate = matmul_rate(product)

    def run(with_fci: bool) -> Measured:
        began = perf_counter()
        jax.block_until_ready(score(params, config, tokens, lengths, step_ids, with_fci=with_fci))
        return Measured(perf_counter() - began, float(rows * time))

    def facts(runs: Runs) -> list[Fact]:
        flops = forward_flops(config, rows, time) / (rows * time)
        utilised = [Fact(f"MFU, {name}", _best(runs, name) * flops / rate) for name in runs]
        return [Fact("matrix product", rate / 1e12, "TFLOP/s"), *utilised, *_peak_memory()]

    return Part(
        title=f"Scoring, Qwen2 1.5B, bfloat16, {rows} rows of {time} tokens",
        unit="tokens/s",
        contenders=[
            _contender("with FCI", partial(run, True), "steps of 32 tokens"),
            _contender("without", partial(run, False), ""),
        ],
        facts=facts,
    )


def update_part(
    context: Context,
    config: ModelConfig = QWEN2_1P5B,
    shape: tuple[int, int] = UPDATE,
    product: int = 8192,
) -> Part:
    """The update against the rate of matrix products."""
    rows, time = shape
    optimizer = TrainConfig().optimizer
    state = init_state(init_params(config, jax.random.key(0)), optimizer, None)
    rate = matmul_rate(product)
    run = updating(state, config, rows, time)

    def facts(runs: Runs) -> list[Fact]:
        flops = 3 * forward_flops(config, rows, time) / (rows * time)
        share = _best(runs, "update") * flops / rate
        return [
            Fact("matrix product", rate / 1e12, "TFLOP/s"),
            Fact("MFU", share, "", at_least=LEAST_MFU),
            *_peak_memory(),
        ]

    return Part(
        title=f"Update, Qwen2 1.5B, bfloat16, {rows} rows of {time} tokens",
        unit="tokens/s",
        contenders=[_contender("update", run, "float32 parameters and AdamW")],
        facts=facts,
    )


def _on_accelerator(part: Callable[[Context], Part]) -> Callable[[Context], Part]:
    def checked(context: Context) -> Part:
        _needs_accelerator(context)
        return part(context)

    return checked


PARTS = {
    "decode": _on_accelerator(decode_part),
    "score": _on_accelerator(score_part),
    "update": _on_accelerator(update_part),
}
