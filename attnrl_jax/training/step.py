"""The policy-gradient update: mini-batches of rows, packed, accumulated over micro-batches."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from attnrl_jax.algorithms.losses import (
    LossConfig,
    LossMetrics,
    aggregation_weights,
    loss_denominator,
    policy_loss,
)
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.packing import Layout, batch_slices, pack_paths, take_rows, take_sequences
from attnrl_jax.scoring import packed_forward, token_logprobs
from attnrl_jax.sharding import constrain_parameters
from attnrl_jax.training.state import OptimizerConfig, TrainConfig, TrainState, make_optimizer
from attnrl_jax.types import Paths, TrainBatch, TrainRows


def mini_batches(
    problem: np.ndarray, rows_per_batch: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Row indices of each optimizer update: whole problems, in random order, until it is full.

    Args:
      problem: problem of each row.
      rows_per_batch: a mini-batch closes once it holds this many rows (paper: 32 n).
      rng: for the order of problems.
    """
    batches: list[np.ndarray] = []
    current: list[np.ndarray] = []
    for chosen in rng.permutation(np.unique(problem)):
        current.append(np.flatnonzero(problem == chosen))
        if sum(map(len, current)) >= rows_per_batch:
            batches.append(np.concatenate(current))
            current = []
    if current:
        batches.append(np.concatenate(current))
    return batches


def pack_rows(
    rows: TrainRows, config: TrainConfig, row_multiple: int
) -> tuple[Layout, list[tuple[TrainBatch, float]]]:
    """Packs the rows of one mini-batch into micro-batches of a few fixed shapes.

    Args:
      rows: of the mini-batch.
      config: of training.
      row_multiple: sequences of a micro-batch are a multiple of it (devices that share the batch
        axis); missing ones are empty and weigh nothing.

    Returns:
      where the tokens lie; each micro-batch, with what its loss divides by.

    Raises:
      ValueError: prefixes are to be shared, but rows that share a token do not agree on its
        advantage or its log-probability.
    """
    paths, loss = rows.paths, config.loss
    capacity = config.packed_length(row_multiple)
    layout = pack_paths(paths, capacity, config.shares_prefixes)
    index = np.arange(rows.tokens.shape[1])[None, :]
    mask = (index >= paths.prompt_length[:, None]) & (index < paths.length[:, None])
    if config.shares_prefixes:
        _check_agreement(layout, paths, mask, "advantages", rows.advantages)
        _check_agreement(layout, paths, mask, "behaviour_logprobs", rows.behaviour_logprobs)
    weights = np.asarray(aggregation_weights(mask.astype(np.float32), loss.aggregation))
    count = layout.count.astype(np.float32)
    whole = TrainBatch(
        packed=layout.packed_tokens(rows.tokens),
        mask=layout.gather(mask) * count,
        weights=layout.gather(weights) * count,
        advantages=layout.gather(rows.advantages),
        behaviour_logprobs=layout.gather(rows.behaviour_logprobs),
    )
    trained = mask.any(axis=1)
    size = (float(mask.sum()), int(trained.sum()))
    batches = []
    for part in batch_slices(len(layout.row), capacity, config.micro_batch_tokens, row_multiple):
        batch = take_sequences(whole, part)
        members = np.unique(layout.row[part[0]][batch.mask[: part[0].stop - part[0].start] > 0])
        own = (float(batch.mask.sum()), len(members))
        batches.append((batch, loss_denominator(loss, size, own, config.mini_batch_rows)))
    return layout, batches


def _check_agreement(
    layout: Layout, paths: Paths, mask: np.ndarray, name: str, x: np.ndarray
) -> None:
    """Rows that share a token must agree on what is said of it."""
    laid_out = layout.spread(layout.gather(x), x.shape[1])
    # A number that is none differs from every other; equal ones end in a skipped update.
    same = (np.abs(laid_out - x) <= 1e-5) | (np.isnan(laid_out) & np.isnan(x)) | (laid_out == x)
    differs = mask & ~same
    if differs.any():
        row, index = (int(k[0]) for k in np.nonzero(differs))
        raise ValueError(
            f"{name} of row {row}, response token {index - paths.prompt_length[row]}: "
            f"{x[row, index]}, but {laid_out[row, index]} in a row that shares the token. "
            "Rows that disagree need packing='rows'"
        )


@functools.partial(jax.jit, static_argnames=("config", "temperature"))
def reference_logprobs(
    params: Any, config: ModelConfig, batch: TrainBatch, temperature: float
) -> Float[Array, "batch time"]:
    """Log-probabilities of a micro-batch under the reference policy."""
    hidden = packed_forward(params, config, batch.packed).hidden
    return token_logprobs(
        params, config, hidden, batch.packed, jnp.asarray(batch.mask) > 0, temperature
    )[0]


@functools.partial(
    jax.jit, static_argnames=("config", "loss", "temperature"), donate_argnames=("accumulated",)
)
def accumulate(
    accumulated: tuple[Any, LossMetrics],
    params: Any,
    config: ModelConfig,
    loss: LossConfig,
    batch: TrainBatch,
    reference: Float[Array, "batch time"] | None,
    denominator: Float[Array, ""],
    temperature: float,
) -> tuple[Any, LossMetrics]:
    """Adds the gradient and metric sums of one micro-batch.

    Args:
      accumulated: gradients and metric sums so far; donated.
      params: parameters of the policy.
      config: the model.
      loss: settings of the loss.
      batch: one micro-batch.
      reference: its log-probabilities under the reference policy; None where `kl_beta` is 0.
      denominator: of the whole mini-batch, so that the sum over micro-batches is its mean.
      temperature: of sampling; divides the logits.
    """

    def objective(params):
        hidden = packed_forward(params, config, batch.packed).hidden
        logprobs, _ = token_logprobs(
            params, config, hidden, batch.packed, jnp.asarray(batch.mask) > 0, temperature
        )
        return policy_loss(
            logprobs, batch.behaviour_logprobs, reference, batch.advantages, batch.mask, loss,
            denominator, batch.weights,
        )  # fmt: skip

    gradients, metrics = jax.grad(objective, has_aux=True)(params)
    total, sums = jax.tree.map(jnp.add, accumulated, (gradients, metrics))
    return constrain_parameters(total), sums


@functools.partial(jax.jit, static_argnames=("optimizer",), donate_argnames=("state",))
def apply_gradients(
    state: TrainState, gradients: Any, optimizer: OptimizerConfig
) -> tuple[TrainState, Float[Array, ""]]:
    """One optimizer update; left out, and counted, when the gradient is not finite.

    Returns:
      the new state and the gradient's global norm before clipping.
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm)
    updates, opt_state = make_optimizer(optimizer).update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    state = TrainState(
        params=constrain_parameters(keep(params, state.params)),
        opt_state=constrain_parameters(keep(opt_state, state.opt_state)),
        updates=state.updates + finite.astype(jnp.int32),
        skipped=state.skipped + (~finite).astype(jnp.int32),
    )
    return state, norm


def update(
    state: TrainState,
    model: ModelConfig,
    config: TrainConfig,
    rows: TrainRows,
    rng: np.random.Generator,
    reference: Any = None,
    sharding: jax.sharding.Sharding | None = None,
    row_multiple: int = 1,
) -> tuple[TrainState, dict[str, float]]:
    """All optimizer updates of one training step.

    Nothing waits for the device before the last update: while it computes one mini-batch, the next
    one is packed.

    Args:
      state: before; donated.
      model: the model.
      config: of training.
      rows: every training row of the step, on the host.
      rng: for the order of problems.
      reference: parameters of the reference policy; not used where `kl_beta` is 0.
      sharding: of a micro-batch's sequences over devices.
      row_multiple: sequences of a micro-batch are a multiple of it.

    Returns:
      the state after, and metrics averaged over the updates that were applied.
    """
    collected: list[dict[str, Any]] = []
    places = tokens = 0
    for chosen in mini_batches(rows.paths.problem, config.mini_batch_rows, rng):
        batch = take_rows(rows, chosen)
        layout, micro_batches = pack_rows(batch, config, row_multiple)
        tokens += int((layout.row >= 0).sum())
        accumulated = no_gradients(state.params)
        for micro, denominator in micro_batches:
            places += micro.mask.size
            micro = jax.device_put(micro, sharding)
            logprobs = None
            if config.loss.kl_beta > 0:
                logprobs = reference_logprobs(reference, model, micro, config.temperature)
            accumulated = accumulate(
                accumulated, state.params, model, config.loss, micro, logprobs,
                np.float32(denominator), config.temperature,
            )  # fmt: skip
        gradients, sums = accumulated
        state, norm = apply_gradients(state, gradients, config.optimizer)
        collected.append(
            {
                "gradient_norm": norm,
                "policy_loss": sums.policy_loss,
                "loss": sums.policy_loss + config.loss.kl_beta * sums.kl_loss,
            }
            | sums.per_token()
        )
    # Updates that were skipped have nothing finite to say.
    applied = [m for m in jax.device_get(collected) if np.isfinite(m["gradient_norm"])]
    names = collected[0] if applied else ()
    averaged = {name: float(np.mean([m[name] for m in applied])) for name in names}
    return state, averaged | {
        "updates": len(applied),
        "padding": 1 - tokens / max(places, 1),
        "sharing": float(rows.paths.length.sum()) / max(tokens, 1),
    }


@jax.jit
def no_gradients(params: Any) -> tuple[Any, LossMetrics]:
    """Where accumulation begins: zeros, laid out as the parameters are."""
    scalar = jnp.zeros(())
    zeros = constrain_parameters(jax.tree.map(jnp.zeros_like, params))
    return zeros, LossMetrics(*[scalar] * len(fields(LossMetrics)))
