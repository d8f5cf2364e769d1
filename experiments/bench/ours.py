"""Our own side of the benchmarks: every call to the measured code, thin, by public functions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attnrl_jax.algorithms.losses import LossConfig
from attnrl_jax.models.config import ModelConfig, read_config
from attnrl_jax.models.transformer import forward, unembed
from attnrl_jax.models.weights import load_params
from attnrl_jax.sampling.engine import (
    Admissions,
    decode_params,
    empty_state,
    generate,
    insert,
    layer_groups,
    prefill,
)
from attnrl_jax.sampling.requests import request_key
from attnrl_jax.sampling.sampler import Request, SamplerConfig, sample
from attnrl_jax.shapes import bucket_length
from attnrl_jax.training.state import TrainConfig, init_state
from attnrl_jax.training.step import update
from attnrl_jax.types import Paths, TrainRows
from experiments.bench.harness import Measured
from experiments.bench.workloads import PROMPT, Rollouts, batches_of

BUCKET = 64


@dataclass(frozen=True)
class Model:
    """Configuration and parameters, on the device."""

    config: ModelConfig
    params: Any


def load(folder: Path) -> Model:
    """Reads a Hugging Face folder."""
    config = read_config(folder)
    return Model(config, jax.device_put(load_params(folder, config)))


def logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits `[time, vocab]` of one row of tokens."""
    length = np.array([len(tokens)])
    hidden = forward(model.params, model.config, tokens[None], length).hidden
    return np.asarray(unembed(model.params, model.config, hidden)[0])


def sampler_config(workload: Rollouts, slots: int) -> SamplerConfig:
    """Settings of the sampler; it may not order requests by lengths that nobody else knows."""
    length = bucket_length(workload.total, BUCKET)
    return SamplerConfig(slots=slots, cache_length=length, order="given")


def sample_rows(model: Model, workload: Rollouts, config: SamplerConfig) -> Measured:
    """All rows by the sampler: continuous batching, shared prefixes."""
    requests = [
        Request(prefix=prefix, num_samples=1, budget=int(length), seed=0, first_sample=row)
        for row, (prefix, length) in enumerate(
            zip(workload.prefixes, workload.lengths, strict=True)
        )
    ]
    began = time.perf_counter()
    responses, stats = sample(model.params, model.config, requests, (), config)
    seconds = time.perf_counter() - began
    taken = np.array([len(response.tokens) for (response,) in responses])
    assert np.array_equal(taken, workload.lengths)
    detail = {f.name: getattr(stats, f.name) for f in fields(stats)}
    numbers = {k: float(v) for k, v in detail.items() if isinstance(v, int | float)}
    return Measured(seconds, float(taken.sum()), numbers)


@dataclass(frozen=True)
class StaticBatches:
    """How static batches are made.

    Attributes:
      slots: rows of a batch.
      prefill_rows: prefixes of a batch are prefilled so many at a time, those of like width
        together.
      order: rows are sorted by the tokens of the `response`, or of prefix and response (`total`).
    """

    slots: int
    prefill_rows: int = 8
    order: str = "response"

    def sorted(self, workload: Rollouts) -> np.ndarray:
        """Numbers of the rows, the longest first."""
        prefixes = np.array([len(prefix) for prefix in workload.prefixes])
        before = {"response": 0, "total": prefixes}[self.order]
        return np.argsort(-(workload.lengths + before), kind="stable")


def sample_static(
    model: Model, workload: Rollouts, config: StaticBatches, most_steps: int | None = None
) -> Measured:
    """All rows in static batches of the same model code, at its best.

    Rows are sorted by length. Each prefix is prefilled on its own, and a batch runs until its
    longest row is done; attention reads the filled part of the cache.

    Args:
      model: the model.
      workload: the rows.
      config: how batches are made.
      most_steps: decode steps of each batch at most; None decodes all tokens.
    """
    order = config.sorted(workload)
    ends = np.zeros(0, np.int32)
    steps_done, slot_steps, prefill_tokens, prefill_places, useful = 0, 0, 0, 0, 0
    began = time.perf_counter()
    groups = layer_groups(model.config)
    decoding = decode_params(model.params, model.config.dtype, groups)
    for batch in batches_of(len(order), config.slots):
        rows = order[batch]
        # Prefixes of like width are prefilled together.
        rows = rows[np.argsort([len(workload.prefixes[row]) for row in rows], kind="stable")]
        prefix_lengths = np.array([len(workload.prefixes[row]) for row in rows], np.int32)
        limits = (prefix_lengths + workload.lengths[rows]).astype(np.int32)
        length = bucket_length(int(limits.max()), BUCKET)
        state = empty_state(model.config, len(rows), length, groups)
        for group in batches_of(len(rows), config.prefill_rows):
            prefixes = [workload.prefixes[row] for row in rows[group]]
            tokens, lengths = _padded(prefixes, config.prefill_rows)
            state = insert(
                state,
                prefill(model.params, model.config, tokens, lengths),
                tokens,
                _admissions(rows, lengths, limits[group], group, config.prefill_rows),
            )
            prefill_tokens += sum(map(len, prefixes))
            prefill_places += tokens.size
        part = bucket_length(-(-length // SamplerConfig().attend_parts), BUCKET)
        state, steps = generate(
            decoding, model.config, state, ends, np.int32(most_steps or length),
            np.int32(len(rows) + 1), False, tuple(range(part, length, part)),
        )  # fmt: skip
        sampled, _, now, steps = jax.device_get((state.tokens, state.logprobs, state.length, steps))
        steps_done += int(steps)
        slot_steps += int(steps) * len(rows)
        useful += int((now - prefix_lengths).sum())
        assert sampled.shape == (len(rows), length)
    seconds = time.perf_counter() - began
    assert most_steps or useful == workload.lengths.sum()
    detail = {
        "decode_steps": float(steps_done),
        "slot_steps": float(slot_steps),
        "prefill_tokens": float(prefill_tokens),
        "prefill_places": float(prefill_places),
    }
    return Measured(seconds, float(useful), detail)


def _padded(prefixes: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens of `rows` prefixes and their lengths; missing ones have length 1."""
    lengths = np.ones(rows, np.int32)
    lengths[: len(prefixes)] = [len(prefix) for prefix in prefixes]
    tokens = np.zeros((rows, bucket_length(int(lengths.max()), BUCKET)), np.int32)
    for entry, prefix in enumerate(prefixes):
        tokens[entry, : len(prefix)] = prefix
    return tokens, lengths


def _admissions(
    rows: np.ndarray, lengths: np.ndarray, limits: np.ndarray, group: slice, size: int
) -> Admissions:
    """Row i of the batch to slot i, for a group of them; `size` entries, the last are padding."""
    taken = np.arange(len(rows))[group]

    def padded(values: np.ndarray, fill: int) -> np.ndarray:
        return np.concatenate([values, np.full(size - len(taken), fill)]).astype(np.int32)

    return Admissions(
        slot=padded(taken, len(rows)),
        row=np.arange(size, dtype=np.int32),
        length=lengths,
        limit=padded(limits, 0),
        seed=np.tile(request_key(0), (size, 1)),
        sample=padded(rows[group], 0),
        temperature=np.ones(size, np.float32),
        top_p=np.ones(size, np.float32),
        top_k=np.zeros(size, np.int32),
    )


def train_rows(
    workload: Rollouts, tokens: np.ndarray, advantages: np.ndarray, behaviour: np.ndarray
) -> TrainRows:
    """Rows of prompt and response, as the training step gives them to the update.

    Args:
      workload: rows of equal prompt length, none a branch of another.
      tokens: prompt and response, right padded; `[row, time]`.
      advantages: of each row.
      behaviour: log-probability of each token under the parameters that sampled it, nats.
    """
    count = len(workload.lengths)
    length = (PROMPT + workload.lengths).astype(np.int32)
    index = np.arange(tokens.shape[1])[None]
    response = (index >= PROMPT) & (index < length[:, None])
    return TrainRows(
        tokens=tokens,
        paths=Paths(
            prompt_length=np.full(count, PROMPT, np.int32),
            length=length,
            problem=workload.problem,
            root=np.arange(count),
            shared=length,
        ),
        advantages=np.where(response, advantages[:, None], 0).astype(np.float32),
        behaviour_logprobs=np.where(response, behaviour, 0).astype(np.float32),
    )


def update_config(rows: int, packing: str, response_budget: int = 256) -> TrainConfig:
    """One optimizer update of so many rows, without a reference."""
    return TrainConfig(
        prompt_budget=PROMPT,
        response_budget=response_budget,
        mini_batch_rows=rows,
        packing=packing,
        micro_batch_tokens=4096,
        loss=LossConfig(kl_beta=0.0),
    )


def update_ours(model: Model, rows: TrainRows, packing: str) -> Measured:
    """One training step's update of all rows, from fresh state; response tokens."""
    config = update_config(len(rows.tokens), packing, rows.tokens.shape[1] - PROMPT)
    shape = replace(model.config, remat="none")
    params = jax.tree.map(lambda x: x.copy(), model.params)
    state = jax.block_until_ready(init_state(params, config.optimizer, None))
    began = time.perf_counter()
    state, metrics = update(state, shape, config, rows, np.random.default_rng(0))
    jax.block_until_ready(state.params)
    seconds = time.perf_counter() - began
    assert metrics["updates"] == 1
    responses = rows.paths.length - rows.paths.prompt_length
    detail = {name: metrics[name] for name in ("loss", "padding", "sharing")}
    return Measured(seconds, float(responses.sum()), detail)
