"""The policy-gradient update: mini-batches of rows, accumulated over micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from attnrl_jax.algorithms.losses import LossConfig, LossMetrics, loss_denominator, policy_loss
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import forward
from attnrl_jax.scoring import token_logprobs
from attnrl_jax.shapes import pad_rows
from attnrl_jax.sharding import constrain_parameters
from attnrl_jax.training.state import OptimizerConfig, TrainConfig, TrainState, make_optimizer
from attnrl_jax.types import TrainRows


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


def micro_batches(
    rows: TrainRows, tokens: int, length_multiple: int, row_multiple: int
) -> Iterator[TrainRows]:
    """Cuts host rows into padded batches of about `tokens` tokens, of a few fixed shapes.

    Args:
      rows: host arrays.
      tokens: padded tokens of one micro-batch, at most (one row at least).
      length_multiple: widths are multiples of it.
      row_multiple: row counts are multiples of it (devices that share the batch axis); missing
        rows are empty and weigh nothing.
    """
    lengths = np.asarray(rows.length)
    widths = -(-np.maximum(lengths, 1) // length_multiple) * length_multiple
    for width in np.unique(widths):
        members = np.flatnonzero(widths == width)
        size = max(tokens // int(width) // row_multiple, 1) * row_multiple
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            yield jax.tree.map(
                lambda x, chosen=chosen, size=size, width=width: pad_rows(
                    x[chosen], size, int(width) if x.ndim > 1 else None, 0
                ),
                rows,
            )


@functools.partial(
    jax.jit, static_argnames=("config", "loss", "temperature"), donate_argnames=("accumulated",)
)
def accumulate(
    accumulated: tuple[Any, LossMetrics],
    params: Any,
    config: ModelConfig,
    loss: LossConfig,
    rows: TrainRows,
    denominator: Float[Array, ""],
    temperature: float,
) -> tuple[Any, LossMetrics]:
    """Adds the gradient and metric sums of one micro-batch.

    Args:
      accumulated: gradients and metric sums so far; donated.
      params: parameters of the policy.
      config: the model.
      loss: settings of the loss.
      rows: one micro-batch.
      denominator: of the whole mini-batch, so that the sum over micro-batches is its mean.
      temperature: of sampling; divides the logits.
    """

    def objective(params):
        hidden = forward(params, config, rows.tokens, rows.length).hidden
        logprobs, _ = token_logprobs(params, config, hidden, rows.tokens, temperature)
        return policy_loss(
            logprobs, rows.behaviour_logprobs, rows.reference_logprobs, rows.advantages,
            rows.mask, loss, denominator,
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
    problem: np.ndarray,
    rng: np.random.Generator,
    sharding: jax.sharding.Sharding | None = None,
    row_multiple: int = 1,
) -> tuple[TrainState, dict[str, float]]:
    """All optimizer updates of one training step.

    Args:
      state: before; donated.
      model: the model.
      config: of training.
      rows: every training row of the step, on the host.
      problem: problem of each row; a problem's rows stay in one mini-batch.
      rng: for the order of problems.
      sharding: of a micro-batch's rows over devices.
      row_multiple: rows of a micro-batch are a multiple of it.

    Returns:
      the state after, and metrics averaged over the updates that were applied.
    """
    collected: list[dict[str, float]] = []
    for chosen in mini_batches(problem, config.mini_batch_rows, rng):
        batch = jax.tree.map(lambda x, chosen=chosen: x[chosen], rows)
        accumulated = no_gradients(state.params)
        for micro in micro_batches(
            batch, config.micro_batch_tokens, config.length_multiple, row_multiple
        ):
            denominator = np.float32(
                loss_denominator(
                    config.loss,
                    np.asarray(batch.mask),
                    np.asarray(micro.mask),
                    config.mini_batch_rows,
                )
            )
            micro = jax.device_put(micro, sharding)
            accumulated = accumulate(
                accumulated, state.params, model, config.loss, micro, denominator,
                config.temperature,
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
    return state, averaged | {"updates": len(applied)}


@jax.jit
def no_gradients(params: Any) -> tuple[Any, LossMetrics]:
    """Where accumulation begins: zeros, laid out as the parameters are."""
    scalar = jnp.zeros(())
    zeros = constrain_parameters(jax.tree.map(jnp.zeros_like, params))
    return zeros, LossMetrics(*[scalar] * len(fields(LossMetrics)))
