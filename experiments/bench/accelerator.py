"""An accelerator at 1.5 billion parameters: how near to its own limits.

Qwen2 1.5B in shape, random weights, bfloat16. Limits are measured on the same device: bytes per
second of a copy, and bfloat16 operations per second of a large matrix product, of many in one
program, so that they hold no dispatch.

- decode: tokens per second over what the bandwidth allows, batch / (bytes / bandwidth); the bytes
  of a step are the weights and the live part of the cache, each read once;
- score, update: model FLOPs utilisation (MFU, arXiv 2204.02311): 2 and 6 operations per token and
  parameter of a matrix, and those of causal attention, whatever is computed twice, over the rate
  of the matrix product. The unembedding counts for tokens whose log-probability is asked for: all
  in scoring, those of responses in the update.

Memory is what XLA allots for each program: arguments, temporaries and outputs that are in no
argument's place.
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
from attnrl_jax.models import cudnn, splash
from attnrl_jax.models.attention import SHORT
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from attnrl_jax.sampling.engine import (
    cast_params,
    decode_params,
    empty_state,
    generate,
    layer_groups,
)
from attnrl_jax.scoring import score
from attnrl_jax.training.state import TrainConfig, TrainState, init_state
from attnrl_jax.training.step import (
    accumulate,
    apply_gradients,
    no_gradients,
    pack_rows,
    update,
)
from attnrl_jax.types import Paths, Scores, TrainRows
from experiments.bench.harness import Contender, Context, Fact, Measured, Part, Runs
from experiments.bench.limits import (
    GIBI,
    allotted_bytes,
    copy_bandwidth,
    forward_flops,
    matmul_rate,
    matrix_params,
    step_bytes,
    tree_bytes,
)
from experiments.bench.model import QWEN2_1P5B

# (sequences, tokens of each in the cache)
DECODE = ((64, 1024), (64, 4096), (128, 2048), (256, 1024), (256, 4096))
DECODE_STEPS = 128
# (rows, tokens of each)
SCORE = (16, 4096)
UPDATE = (16, 4096)
LEAST_DECODE = 0.6
LEAST_MFU = 0.45


def attention_route(config: ModelConfig, time: int, layout: str) -> str:
    """The route of `models.attention` that sequences of this layout take on these devices."""
    auto = config.attention == "auto"
    kernel = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "")
    kernel = kernel if auto else config.attention
    if kernel == "plain" or (auto and time <= SHORT):
        return "plain"
    dtype = jnp.dtype(config.dtype)
    if kernel == "cudnn" and cudnn.why_not(config.head_dim, dtype, layout) is None:
        return "cudnn"
    if kernel == "splash" and splash.why_not(time, layout) is None:
        return "splash"
    return "blockwise"


def decoding(
    params: Any, config: ModelConfig, batch: int, context: int, steps: int
) -> tuple[Callable[[], Measured], int]:
    """`steps` decode steps of sequences that already hold `context` tokens.

    Returns:
      a function that runs them, and the bytes that XLA allots for their program.
    """
    state = empty_state(config, batch, context + steps, layer_groups(config))
    whole = jnp.full(batch, context, jnp.int32)
    state = dataclasses.replace(
        state,
        length=whole,
        limit=whole + 2 * steps,
        active=jnp.ones(batch, bool),
        sampling=dataclasses.replace(state.sampling, temperature=jnp.ones(batch)),
    )
    held = [state]
    # No token ends a response, no refill ends the call.
    rest = (np.zeros(0, np.int32), np.int32(steps), np.int32(batch + 1))
    program = generate.lower(params, config, state, *rest).compile()

    def run() -> Measured:
        # The same cache again: only its lengths go back.
        state = dataclasses.replace(held.pop(), length=jnp.copy(whole))
        jax.block_until_ready(state)
        began = perf_counter()
        state, done = program(params, state, *rest)
        jax.block_until_ready(state)
        seconds = perf_counter() - began
        assert int(done) == steps
        held.append(state)
        return Measured(seconds, float(batch * steps))

    return run, allotted_bytes(program)


def random_rows(config: ModelConfig, rows: int, time: int) -> np.ndarray:
    """Random ids `[rows, time]`."""
    rng = np.random.default_rng(0)
    return rng.integers(1, config.vocab_size, (rows, time), dtype=np.int32)


def update_config(rows: int, time: int) -> TrainConfig:
    """One optimizer update of rows of full length, four of them a micro-batch."""
    return TrainConfig(
        prompt_budget=time // 8,
        response_budget=time - time // 8,
        mini_batch_rows=rows,
        micro_batch_tokens=4 * time,
        packing="rows",
        loss=LossConfig(kl_beta=0.0),
    )


def update_rows(config: ModelConfig, rows: int, time: int) -> TrainRows:
    """Rows of full length, the first eighth of each its prompt."""
    rng = np.random.default_rng(0)
    response = np.tile(np.arange(time) >= time // 8, (rows, 1))
    whole = np.full(rows, time, np.int32)
    return TrainRows(
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


def updating(
    state: TrainState, config: ModelConfig, train: TrainConfig, batch: TrainRows
) -> Callable[[], Measured]:
    """One optimizer update."""
    held = [state]

    def run() -> Measured:
        began = perf_counter()
        state, metrics = update(held.pop(), config, train, batch, np.random.default_rng(0))
        jax.block_until_ready(state)
        seconds = perf_counter() - began
        assert metrics["updates"] == 1
        held.append(state)
        return Measured(seconds, float(batch.paths.length.sum()))

    return run


def update_memory(
    state: TrainState, config: ModelConfig, train: TrainConfig, batch: TrainRows
) -> list[Fact]:
    """What XLA allots for the programs of an update, and what lies on the device beside them."""
    state = jax.eval_shape(lambda state: state, state)
    gradients = jax.eval_shape(no_gradients, state.params)
    micro = pack_rows(batch, train, 1)[1][0].batch
    gradient = accumulate.lower(
        gradients, state.params, config, train.loss, micro, None, np.float32(1), train.temperature
    ).compile()
    loss = jax.ShapeDtypeStruct((), np.float32)
    step = apply_gradients.lower(state, gradients[0], loss, train.optimizer).compile()
    beside = tree_bytes(state.opt_state)
    return [
        _memory(
            "gradient of a micro-batch, and the optimizer state", allotted_bytes(gradient) + beside
        ),
        Fact("of it the optimizer state", beside / GIBI, "GiB"),
        _memory("optimizer step", allotted_bytes(step)),
    ]


def _contender(name: str, run: Callable[[], Measured], settings: str) -> Contender:
    def warm_up() -> str:
        run()
        return settings

    return Contender(name, run, warm_up)


def _best(runs: Runs, name: str) -> float:
    """Amount per second of the median run."""
    return float(np.median([measured.amount / measured.seconds for measured in runs[name]]))


def _memory(name: str, size: float) -> Fact:
    return Fact(f"memory, {name}", size / GIBI, "GiB")


def _process_peak() -> list[Fact]:
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return [] if peak is None else [_memory("peak of this process so far, all parts", peak)]


def check_platform(platform: str) -> None:
    """Refuses the CPU.

    Raises:
      ValueError: it is one.
    """
    if platform == "cpu":
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
    groups = layer_groups(config)
    params = decode_params(init_params(config, jax.random.key(0)), config.dtype, groups)
    bandwidth = copy_bandwidth(copied)
    held: dict[str, Callable[[], Measured]] = {}
    memory: dict[str, int] = {}

    def name(batch: int, length: int) -> str:
        return f"batch {batch}, context {length}"

    def run(batch: int, length: int) -> Measured:
        # One cache at a time: the largest fill a good part of the memory.
        key = name(batch, length)
        if key not in held:
            held.clear()
            held[key], memory[key] = decoding(params, config, batch, length, steps)
            held[key]()
        return held[key]()

    def facts(runs: Runs) -> list[Fact]:
        found = [Fact("copy bandwidth", bandwidth / 1e9, "GB/s")]
        for batch, length in shapes:
            key = name(batch, length)
            limit = batch * bandwidth / step_bytes(config, batch, length + steps / 2)
            share = _best(runs, key) / limit
            found.append(Fact(f"of the limit, {key}", share, "", at_least=LEAST_DECODE))
        found += [_memory(key, size) for key, size in memory.items()]
        return found + _process_peak()

    return Part(
        title=f"Decoding, {_described(config)}",
        unit="tokens/s",
        contenders=[
            _contender(name(*shape), partial(run, *shape), f"{steps} steps in one program")
            for shape in shapes
        ],
        facts=facts,
    )


def score_part(
    context: Context,
    config: ModelConfig = QWEN2_1P5B,
    shape: tuple[int, int] = SCORE,
    product: int = 8192,
) -> Part:
    """Scoring against the rate of matrix products, with and without step importance.

    One row a sequence: the kernels of the platform. Training packs several into one.
    """
    rows, time = shape
    params = cast_params(init_params(config, jax.random.key(0)), config.dtype)
    tokens = jnp.asarray(random_rows(config, rows, time))
    lengths = jnp.full(rows, time)
    step_ids = jnp.broadcast_to(jnp.arange(time) // 32, tokens.shape)
    rate = matmul_rate(product)

    def compiled(with_fci: bool) -> jax.stages.Compiled:
        def program(params: Any, tokens: Any, lengths: Any, step_ids: Any) -> Scores:
            return score(params, config, tokens, lengths, step_ids, with_fci=with_fci)

        # What is not asked for is an argument all the same.
        made = jax.jit(program, keep_unused=True)
        return made.lower(params, tokens, lengths, step_ids).compile()

    programs = {"with FCI": compiled(True), "without": compiled(False)}

    def run(name: str) -> Measured:
        began = perf_counter()
        jax.block_until_ready(programs[name](params, tokens, lengths, step_ids))
        return Measured(perf_counter() - began, float(rows * time))

    def facts(runs: Runs) -> list[Fact]:
        flops = forward_flops(config, rows, time) / (rows * time)
        return [
            Fact("matrix product", rate / 1e12, "TFLOP/s"),
            *(Fact(f"MFU, {name}", _best(runs, name) * flops / rate) for name in runs),
            *(_memory(name, allotted_bytes(program)) for name, program in programs.items()),
            *_process_peak(),
        ]

    route = f"attention route {attention_route(config, time, 'single')}"
    return Part(
        title=f"Scoring, {_described(config)}, {rows} rows of {time} tokens",
        unit="tokens/s",
        contenders=[
            _contender("with FCI", partial(run, "with FCI"), f"steps of 32 tokens, {route}"),
            _contender("without", partial(run, "without"), route),
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
    train, batch = update_config(rows, time), update_rows(config, rows, time)
    state = init_state(init_params(config, jax.random.key(0)), train.optimizer, None)
    memory = update_memory(state, config, train, batch)
    rate = matmul_rate(product)
    length = train.packed_length()

    def facts(runs: Runs) -> list[Fact]:
        flops = 3 * forward_flops(config, rows, time, logits=time - time // 8) / (rows * time)
        share = _best(runs, "update") * flops / rate
        return [
            Fact("matrix product", rate / 1e12, "TFLOP/s"),
            Fact("MFU", share, "", at_least=LEAST_MFU),
            *memory,
            *_process_peak(),
        ]

    settings = (
        f"float32 parameters and AdamW, remat {config.remat!r}; rows packed without sharing, "
        f"{train.micro_batch_tokens // time} x {time} tokens a micro-batch, in sequences of "
        f"{length}, attention route {attention_route(config, length, 'packed')}; "
        f"{time - time // 8} of the {time} tokens of a row are of the response"
    )
    return Part(
        title=f"Update, {_described(config)}, {rows} rows of {time} tokens",
        unit="tokens/s",
        contenders=[_contender("update", updating(state, config, train, batch), settings)],
        facts=facts,
    )


def _described(config: ModelConfig) -> str:
    """Name of the shipped shape, or size of another."""
    name = "Qwen2 1.5B" if config == QWEN2_1P5B else f"{matrix_params(config)} parameters"
    return f"{name}, {config.dtype}"


PARTS = {"decode": decode_part, "score": score_part, "update": update_part}
