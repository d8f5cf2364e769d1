"""The policy-gradient loss: clipped ratio, dual clip, and a penalty towards the reference."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnrl_jax.types import ArrayLike

LOG_RATIO_BOUND = 20.0
KL_BOUND = 10.0
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def masked_mean(
    x: Float[ArrayLike, "*shape"],
    mask: Float[ArrayLike, "*shape"],
    denominator: Float[ArrayLike, ""] | float | None = None,
    axis: int | None = None,
) -> Float[Array, "*rest"]:
    """sum(x · mask) / denominator; the denominator is sum(mask) where none is given.

    With the denominator of a whole batch, the values of its parts add up to that of the whole.
    An empty mask gives 0, and what `x` holds where the mask is 0 does not matter. Sums are over
    `axis`, by default over everything.
    """
    total = jnp.sum(jnp.where(mask > 0, x * mask, 0.0), axis=axis)
    denominator = jnp.sum(mask, axis=axis) if denominator is None else denominator
    return total / jnp.maximum(denominator, 1e-8)


@dataclass(frozen=True)
class LossConfig:
    """Settings of the loss.

    Attributes:
      clip_low, clip_high: the ratio counts inside [1 - clip_low, 1 + clip_high].
      dual_clip: bound of the loss of a token of negative advantage, in units of -advantage.
      kl_beta: weight of the penalty towards the reference policy; 0 leaves it out.
      aggregation: "token-mean" over all tokens of the mini-batch; "seq-mean-token-sum" and
        "seq-mean-token-mean", the mean over sequences of their token sums or means.
      mean_over: "mini-batch", so that the result does not depend on how it is split; or
        "micro-batch", each one's own mean weighted by its rows (released program).

    Raises:
      ValueError: a setting outside of what it allows.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    kl_beta: float = 1e-3
    aggregation: str = "token-mean"
    mean_over: str = "mini-batch"

    def __post_init__(self) -> None:
        if self.mean_over not in ("mini-batch", "micro-batch"):
            raise ValueError(
                f"loss mean_over={self.mean_over!r}: allowed are mini-batch, micro-batch"
            )
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"loss aggregation={self.aggregation!r}: allowed are {', '.join(AGGREGATIONS)}"
            )
        if not 0.0 <= self.clip_low <= 1.0:
            raise ValueError(f"loss clip_low={self.clip_low!r}: between 0 and 1")
        if self.clip_high < 0.0:
            raise ValueError(f"loss clip_high={self.clip_high!r}: at least 0")
        if self.dual_clip <= 1.0:
            raise ValueError(f"loss dual_clip={self.dual_clip!r}: above 1")
        if not 0.0 <= self.kl_beta < float("inf"):
            raise ValueError(f"loss kl_beta={self.kl_beta!r}: at least 0 and finite")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossMetrics:
    """What the loss saw. Fields of micro-batches of one mini-batch add up to the mini-batch's.

    Attributes:
      policy_loss, kl_loss: the two terms, aggregated; the loss is policy_loss + beta · kl_loss.
      tokens: tokens trained on; one that rows share counts once a row, here and below.
      clipped, dual_clipped: how many of them met the clip or the dual clip.
      approx_kl: sum over tokens of log p_behaviour - log p, nats.
      reference_kl: sum over tokens of the k3 estimate of KL(policy, reference), nats.
    """

    policy_loss: Float[Array, ""]
    kl_loss: Float[Array, ""]
    tokens: Float[Array, ""]
    clipped: Float[Array, ""]
    dual_clipped: Float[Array, ""]
    approx_kl: Float[Array, ""]
    reference_kl: Float[Array, ""]

    def per_token(self) -> dict[str, Float[Array, ""]]:
        """Shares and means over the tokens: clip_fraction, dual_clip_fraction, approx_kl, kl."""
        tokens = jnp.maximum(self.tokens, 1.0)
        return {
            "clip_fraction": self.clipped / tokens,
            "dual_clip_fraction": self.dual_clipped / tokens,
            "approx_kl": self.approx_kl / tokens,
            "kl": self.reference_kl / tokens,
        }


def policy_loss(
    logprobs: Float[ArrayLike, "batch time"],
    behaviour_logprobs: Float[ArrayLike, "batch time"],
    reference_logprobs: Float[ArrayLike, "batch time"] | None,
    advantages: Float[ArrayLike, "batch time"],
    mask: Float[ArrayLike, "batch time"],
    config: LossConfig,
    denominator: Float[ArrayLike, ""] | float | None = None,
    weights: Float[ArrayLike, "batch time"] | None = None,
) -> tuple[Float[Array, ""], LossMetrics]:
    """Loss of a (micro-)batch. Per token, with r = exp(clip(logp - logp_behaviour, ±20)),

        max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), for A < 0 at most -dual_clip A

    plus beta · k3 with k3 = exp(d) - d - 1, d = clip(logp_reference - logp, ±20), k3 clipped to
    ±10 (PPO, Schulman et al. 2017; upper clip of DAPO, Yu et al. 2025; bounds of the released
    program). All log-probabilities are at the sampling temperature, in nats.

    Args:
      logprobs: of the policy that is trained; the gradient flows through them alone.
      behaviour_logprobs: under the parameters that sampled each token.
      reference_logprobs: under the reference policy; None, or `kl_beta` 0, leaves out the penalty.
      advantages: of each token.
      mask: 1 for tokens that are trained on, or the number of rows that share the token.
      config: settings.
      denominator: what the aggregation divides by: tokens of the whole mini-batch for
        "token-mean", its sequences for the sequence means. By default those of this batch.
      weights: of each token in the sum that is divided. By default `aggregation_weights`, for
        sequences that lie in one row each; what lies in a row is then one sequence.

    Returns:
      The loss, and metrics that add up over micro-batches.
    """
    log_ratio = jnp.clip(logprobs - behaviour_logprobs, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = jnp.exp(log_ratio)
    unclipped = -advantages * ratio
    at_bound = -advantages * jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    clipped = jnp.maximum(unclipped, at_bound)
    ceiling = -advantages * config.dual_clip
    is_negative = advantages < 0
    token_loss = jnp.where(is_negative, jnp.minimum(clipped, ceiling), clipped)

    token_kl = jnp.zeros_like(logprobs)
    if reference_logprobs is not None and config.kl_beta > 0:
        token_kl = k3(logprobs, reference_logprobs)

    if weights is None:
        weights = aggregation_weights(mask, config.aggregation)
    if denominator is None and config.aggregation == "token-mean":
        denominator = jnp.sum(mask)
    elif denominator is None:
        # Rows without a token are padding and no sequences.
        denominator = jnp.sum(jnp.any(mask > 0, axis=-1))
    policy_term = masked_mean(token_loss, weights, denominator)
    kl_term = masked_mean(token_kl, weights, denominator)

    def token_sum(x: ArrayLike) -> Float[Array, ""]:
        return jax.lax.stop_gradient(masked_mean(jnp.asarray(x, mask.dtype), mask, 1.0))

    metrics = LossMetrics(
        policy_loss=jax.lax.stop_gradient(policy_term),
        kl_loss=jax.lax.stop_gradient(kl_term),
        tokens=jnp.sum(mask),
        clipped=token_sum(at_bound > unclipped),
        dual_clipped=token_sum((clipped > ceiling) & is_negative),
        approx_kl=token_sum(-log_ratio),
        reference_kl=token_sum(token_kl),
    )
    return policy_term + config.kl_beta * kl_term, metrics


def aggregation_weights(
    mask: Float[ArrayLike, "row time"], aggregation: str
) -> Float[ArrayLike, "row time"]:
    """Weight of each token, so that every aggregation is one weighted sum over a denominator:

        token-mean          sum over tokens / tokens
        seq-mean-token-sum  sum over tokens / sequences
        seq-mean-token-mean sum over tokens of 1 / (tokens of its sequence) / sequences

    Args:
      mask: 1 for tokens that are trained on; a sequence a row.
      aggregation: of `LossConfig`.
    """
    if aggregation != "seq-mean-token-mean":
        return mask
    xp = mask.__array_namespace__()
    return mask / xp.maximum(xp.sum(mask, axis=-1, keepdims=True), 1e-8)


def loss_denominator(
    config: LossConfig,
    mini_batch: tuple[float, int],
    micro_batch: tuple[float, int],
    nominal_rows: int,
) -> float:
    """What `policy_loss` of a micro-batch divides by, so that micro-batches add up as they should.

    The tokens or sequences of the mini-batch; with `mean_over` "micro-batch" those of the
    micro-batch, times the inverse of its weight, rows / nominal rows of a mini-batch.

    Args:
      config: settings.
      mini_batch: tokens trained on in all rows of the optimizer update, and rows that have any.
      micro_batch: the same of the rows at hand.
      nominal_rows: rows a mini-batch is meant to have.
    """
    own = config.mean_over == "micro-batch"
    tokens, rows = micro_batch if own else mini_batch
    counted = float(tokens) if config.aggregation == "token-mean" else float(rows)
    return counted * nominal_rows / max(rows, 1) if own else counted


def k3(
    logprobs: Float[ArrayLike, "batch time"], reference_logprobs: Float[ArrayLike, "batch time"]
) -> Float[Array, "batch time"]:
    """exp(d) - d - 1 with d = log p_reference - log p: an estimate of KL(policy, reference).

    d is clipped to ±20 and the result to ±10 (released program). Schulman 2020, "Approximating KL
    divergence".
    """
    d = jnp.clip(reference_logprobs - logprobs, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return jnp.clip(jnp.exp(d) - d - 1.0, -KL_BOUND, KL_BOUND)
