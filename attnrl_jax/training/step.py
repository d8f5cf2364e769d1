"""The policy-gradient update: mini-batches of rows, packed, accumulated over micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from attnrl_jax import processes
from attnrl_jax.algorithms.losses import (
    LossConfig,
    LossMetrics,
    aggregation_weights,
    loss_denominator,
    policy_loss,
)
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.packing import Layout, Placement, deal_batches, place_paths, take_rows
from attnrl_jax.scoring import packed_forward, token_logprobs
from attnrl_jax.sharding import constrain_parameters
from attnrl_jax.training.state import (
    MiniBatchSplit,
    OptimizerConfig,
    TrainConfig,
    TrainState,
    make_optimizer,
)
from attnrl_jax.types import TrainBatch, TrainRows


def mini_batches(
    problem: np.ndarray,
    rows_per_batch: int,
    rng: np.random.Generator,
    split: MiniBatchSplit = "even",
) -> list[np.ndarray]:
    """Row indices of each optimizer update: whole problems, in random order.

    Args:
      problem: problem of each row.
      rows_per_batch: of a mini-batch, about (paper: 32 n).
      rng: for the order of problems.
      split: `even` makes as many mini-batches as so many rows go into all rows, rounded, of about
        the same size; `fill` closes one once it holds so many, and the last has what is left.
    """
    order = np.argsort(problem, kind="stable")
    _, first, sizes = np.unique(problem[order], return_index=True, return_counts=True)
    rows_of = np.split(order, first[1:])
    shuffled = rng.permutation(len(rows_of))
    batch_of = _shared_out if split == "even" else _filled
    numbers = batch_of(sizes[shuffled], rows_per_batch)
    return [
        np.concatenate([rows_of[k] for k in shuffled[numbers == number]])
        for number in np.unique(numbers)
    ]


def _shared_out(sizes: np.ndarray, rows_per_batch: int) -> np.ndarray:
    """Mini-batch of each problem, of these sizes: about as many rows in each."""
    rows = int(sizes.sum())
    # A half rounds up: smaller mini-batches rather than larger ones.
    count = max(1, (2 * rows + rows_per_batch) // (2 * rows_per_batch))
    # A problem goes where its middle row falls.
    return (2 * np.cumsum(sizes) - sizes) * count // (2 * rows)


def _filled(sizes: np.ndarray, rows_per_batch: int) -> np.ndarray:
    """Mini-batch of each problem: one closes once it holds so many rows."""
    numbers, number, held = np.empty(len(sizes), int), 0, 0
    for index, size in enumerate(sizes):
        numbers[index] = number
        held += size
        if held >= rows_per_batch:
            number, held = number + 1, 0
    return numbers


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences of a mini-batch.

    Attributes:
      batch: what this process makes of them: the sequences of its own devices.
      own: which of all they are.
      sequences: of all processes.
      denominator: what the loss divides by.
    """

    batch: TrainBatch
    own: np.ndarray
    sequences: int
    denominator: float


def pack_rows(
    rows: TrainRows,
    config: TrainConfig,
    row_multiple: int,
    chosen: np.ndarray | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> tuple[Placement, list[MicroBatch]]:
    """Packs the rows of one mini-batch into micro-batches of a few fixed shapes.

    Args:
      rows: of the step.
      config: of training.
      row_multiple: sequences of a micro-batch are a multiple of it (devices that share the batch
        axis); missing ones are empty and weigh nothing.
      chosen: rows of the mini-batch; all by default.
      sharding: of a micro-batch's sequences over devices.

    Returns:
      where the rows lie; the micro-batches.

    Raises:
      ValueError: prefixes are to be shared, but rows that share a token do not agree on its
        advantage or its log-probability.
    """
    chosen = np.arange(len(rows.paths.length)) if chosen is None else chosen
    paths, loss = take_rows(rows.paths, chosen), config.loss
    placement = place_paths(paths, config.packed_length(row_multiple), config.shares_prefixes)
    batches = deal_batches(placement, config.micro_batch_tokens, row_multiple)
    own = [processes.own_rows(len(batch), sharding) for batch in batches]
    here, layout = placement.lay_out(
        np.concatenate([batch[k] for batch, k in zip(batches, own, strict=True)])
    )
    tokens, advantages, behaviour = (
        x[chosen[here]] for x in (rows.tokens, rows.advantages, rows.behaviour_logprobs)
    )
    prompt_length, length = paths.prompt_length[here, None], paths.length[here, None]
    index = np.arange(tokens.shape[1])[None, :]
    mask = (index >= prompt_length) & (index < length)
    if config.shares_prefixes:
        for name, x in (("advantages", advantages), ("behaviour_logprobs", behaviour)):
            _check_agreement(layout, chosen[here], prompt_length[:, 0], mask, name, x)
    weights = np.asarray(aggregation_weights(mask.astype(np.float32), loss.aggregation))
    count = layout.count.astype(np.float32)
    whole = TrainBatch(
        packed=layout.packed_tokens(tokens),
        mask=layout.gather(mask) * count,
        weights=layout.gather(weights) * count,
        advantages=layout.gather(advantages),
        behaviour_logprobs=layout.gather(behaviour),
    )
    # Of each sequence, response tokens of its rows, and the rows that have some.
    response = paths.length - paths.prompt_length
    sequence, _ = placement.own_places()
    tokens_in = np.bincount(sequence, response, len(placement.used))
    rows_in = np.bincount(sequence, response > 0, len(placement.used))
    size = (float(response.sum()), int((response > 0).sum()))
    micro, begin = [], 0
    for batch, places in zip(batches, own, strict=True):
        part = slice(begin, begin + len(places))
        begin = part.stop
        there = batch[batch >= 0]
        members = (float(tokens_in[there].sum()), int(rows_in[there].sum()))
        denominator = loss_denominator(loss, size, members, config.mini_batch_rows)
        micro.append(MicroBatch(take_rows(whole, part), places, len(batch), denominator))
    return placement, micro


def _check_agreement(
    layout: Layout,
    rows: np.ndarray,
    prompt_length: np.ndarray,
    mask: np.ndarray,
    name: str,
    x: np.ndarray,
) -> None:
    """Rows that share a token must agree on what is said of it."""
    laid_out = layout.spread(layout.gather(x), x.shape[1])
    # A number that is none differs from every other; equal ones end in a skipped update.
    same = (np.abs(laid_out - x) <= 1e-5) | (np.isnan(laid_out) & np.isnan(x)) | (laid_out == x)
    differs = mask & ~same
    if differs.any():
        row, index = (int(k[0]) for k in np.nonzero(differs))
        raise ValueError(
            f"{name} of row {rows[row]}, response token {index - prompt_length[row]}: "
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
    state: TrainState, gradients: Any, loss: Float[Array, ""], optimizer: OptimizerConfig
) -> tuple[TrainState, Float[Array, ""]]:
    """One optimizer update; left out, and counted, when the loss or the gradient is not finite.

    Returns:
      the new state and the gradient's global norm before clipping.
    """
    norm = optax.tree.norm(gradients)
    # Nothing of the new parameters is asked: they would have to be held beside the old ones.
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    updates, opt_state = make_optimizer(optimizer).update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    state = TrainState(
        params=constrain_parameters(keep(params, state.params)),
        opt_state=constrain_parameters(keep(opt_state, state.opt_state)),
        updates=state.updates + finite.astype(jnp.int32),
        skipped=state.skipped + (~finite).astype(jnp.int32),
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    return state, norm


@dataclass(frozen=True)
class UpdateReport:
    """What the optimizer updates of one training step came to.

    Attributes:
      metrics: averaged over the updates that were applied.
      not_finite: rows of each mini-batch whose update was skipped.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    not_finite: list[np.ndarray] = field(default_factory=list)


def update(*args: Any, **kwargs: Any) -> tuple[TrainState, dict[str, float]]:
    """`launch_update`, all of it at once, and what it comes to."""
    parts = launch_update(*args, **kwargs)
    while True:
        try:
            next(parts)
        except StopIteration as launched:
            state, report = launched.value
            return state, report().metrics


def launch_update(
    state: TrainState,
    model: ModelConfig,
    config: TrainConfig,
    rows: TrainRows,
    rng: np.random.Generator,
    reference: Any = None,
    sharding: jax.sharding.Sharding | None = None,
    row_multiple: int = 1,
) -> Generator[jax.Array, None, tuple[TrainState, Callable[[], UpdateReport]]]:
    """All optimizer updates of one training step, launched a micro-batch at a time.

    Nothing here waits for the devices: while they compute one mini-batch, the next one is packed.

    Args:
      state: before; donated.
      model: the model.
      config: of training.
      rows: every training row of the step, on the host.
      rng: for the order of problems.
      reference: parameters of the reference policy; not used where `kl_beta` is 0.
      sharding: of a micro-batch's sequences over devices.
      row_multiple: sequences of a micro-batch are a multiple of it.

    Yields:
      after every launch a number that is there once the devices are done with it.

    Returns:
      the state after, and a function that waits for the report.
    """
    collected: list[dict[str, Any]] = []
    batches = mini_batches(rows.paths.problem, config.mini_batch_rows, rng, config.mini_batch_split)
    places = tokens = 0
    for chosen in batches:
        placement, micro_batches = pack_rows(rows, config, row_multiple, chosen, sharding)
        tokens += int(placement.used.sum())
        accumulated = no_gradients(state.params)
        for packed in micro_batches:
            places += packed.sequences * placement.capacity
            micro = processes.rows_to_devices(packed.batch, packed.own, packed.sequences, sharding)
            logprobs = None
            if config.loss.kl_beta > 0:
                logprobs = reference_logprobs(reference, model, micro, config.temperature)
            accumulated = accumulate(
                accumulated, state.params, model, config.loss, micro, logprobs,
                np.float32(packed.denominator), config.temperature,
            )  # fmt: skip
            # The sums are given to the next accumulation.
            yield jnp.copy(accumulated[1].tokens)
        gradients, sums = accumulated
        loss = sums.policy_loss + config.loss.kl_beta * sums.kl_loss
        state, norm = apply_gradients(state, gradients, loss, config.optimizer)
        # Before the next mini-batch has its own.
        del gradients, accumulated
        collected.append(
            {
                "gradient_norm": norm,
                "policy_loss": sums.policy_loss,
                "loss": loss,
            }
            | sums.per_token()
        )
        yield norm

    def report() -> UpdateReport:
        found = jax.device_get(collected)
        # Updates that were skipped have nothing finite to say.
        is_applied = [bool(np.isfinite([m["gradient_norm"], m["loss"]]).all()) for m in found]
        applied = [m for m, is_in in zip(found, is_applied, strict=True) if is_in]
        names = collected[0] if applied else ()
        averaged = {name: float(np.mean([m[name] for m in applied])) for name in names}
        metrics = averaged | {
            "updates": len(applied),
            "padding": 1 - tokens / max(places, 1),
            "sharing": float(rows.paths.length.sum()) / max(tokens, 1),
        }
        pairs = zip(batches, is_applied, strict=True)
        return UpdateReport(metrics, [chosen for chosen, is_in in pairs if not is_in])

    return state, report


@jax.jit
def no_gradients(params: Any) -> tuple[Any, LossMetrics]:
    """Where accumulation begins: zeros, laid out as the parameters are."""
    scalar = jnp.zeros(())
    zeros = constrain_parameters(jax.tree.map(jnp.zeros_like, params))
    return zeros, LossMetrics(*[scalar] * len(fields(LossMetrics)))
