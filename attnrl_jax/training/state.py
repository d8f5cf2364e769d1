"""What training changes: parameters, optimizer state and the settings that shape them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from attnrl_jax.algorithms.adaptive import (
    AdaptiveExpansionConfig,
    BatchSizeConfig,
    CumulativeMean,
)
from attnrl_jax.algorithms.advantages import AdvantageNorm
from attnrl_jax.algorithms.losses import LossConfig
from attnrl_jax.branching.positions import BranchingConfig
from attnrl_jax.sampling.requests import LEAST_TEMPERATURE
from attnrl_jax.sampling.sampler import SamplerConfig
from attnrl_jax.shapes import bucket_length
from attnrl_jax.sharding import parameter_shardings
from attnrl_jax.types import Leaves

# How the rows of a step are shared out to its updates; see `TrainConfig.mini_batch_split`.
MiniBatchSplit = Literal["even", "fill"]
# Tokens of a sequence into which several paths are packed, unless a setting says otherwise.
LONGEST_PACKED = 16384


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a constant learning rate (paper: 1e-6, no warm-up).

    Attributes:
      learning_rate: after warm-up.
      warmup_updates: updates over which the rate rises linearly, from one step above 0.
      b1, b2, eps, weight_decay: of AdamW; decay applies to every parameter.
      max_grad_norm: global norm above which gradients are scaled down.
    """

    learning_rate: float = 1e-6
    warmup_updates: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self):
        for name in ("learning_rate", "eps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} must be >= 0; got {getattr(self, name)}")
        if self.warmup_updates < 0:
            raise ValueError(f"optimizer.warmup_updates must be >= 0; got {self.warmup_updates}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm must be > 0; got {self.max_grad_norm}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1); got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run (defaults: the paper's).

    Attributes:
      steps: training steps.
      max_sampled_tokens: the run ends with the first step that has sampled so many tokens in
        all, so that methods can be compared at equal cost; 0 sets no limit.
      num_problems: nominal problems per step (B0).
      num_responses: initial responses per problem (n).
      prompt_budget, response_budget: tokens (P, R); longer prompts are skipped and counted.
      temperature, top_p, top_k: of sampling.
      schedule: `off_policy` (one round of generation per step) or `on_policy` (two rounds).
      overlap: what is sampled beside the update, on devices of its own where the mesh has some:
        `none`, `initial` (initial responses of the next step: nothing gets older) or `all` (the
        whole next round: everything is trained on one step later). `off_policy` only.
      behaviour: whose log-probabilities of sampled tokens count, `scorer` or `sampler`.
      importance_cap: truncated importance sampling, for a sampler whose precision is not the
        scorer's: a token's loss counts min(p_scorer / p_sampler, cap) times (Yao et al. 2025,
        "Your efficient RL framework secretly brings you off-policy RL training"; 2 there). 0
        leaves it out. `behaviour` must be `scorer`: the sampler's log-probabilities would be in
        the ratio of the loss already.
      judge: `full` judges prefix and continuation together, `continuation` its own text only (the
        released program).
      keep_unbranched: train on initial responses without a branch.
      advantage_norm: `none`, or `problem_std` to divide by the problem's reward deviation.
      permute_advantages: gives every problem's rows the advantages of another problem's, a
        control which must not learn.
      mini_batch_rows: rows per optimizer update, of whole problems.
      mini_batch_split: `even` shares a step's rows out evenly, to rows / `mini_batch_rows` updates,
        rounded; `fill` fills one update after the other, and what is left makes a small one, which
        moves the parameters as far.
      max_not_finite: the run ends when so many updates in a row were skipped because something
        was not finite; 0 never ends it.
      packing: `tree` lays the tokens that rows share out once in the update, `rows` every row on
        its own, `auto` shares where that gives the same loss (see `shares_prefixes`). Either way
        rows are packed into sequences.
      pack_length: tokens of a packed sequence, in updates and scoring; 0 chooses (see
        `packed_length`).
      micro_batch_tokens: padded tokens per forward and backward pass, over all devices; at least
        one sequence a device, so more where that is longer.
      score_batch_tokens: padded tokens per forward pass of scoring, likewise.
      length_multiple: widths of compiled programs are multiples of it.
      eval_every: steps between held-out evaluations; 0 only at the start and the end.
      eval_problems: held-out problems used (0: all).
      eval_temperature: 0 evaluates greedily.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: newest checkpoints that stay on disk.
      keep_best: checkpoints of the highest held-out accuracy that stay besides; an evaluation
        better than these is saved whenever it comes.
      seed: of everything random.
    """

    steps: int = 100
    max_sampled_tokens: int = 0
    num_problems: int = 64
    num_responses: int = 6
    prompt_budget: int = 1024
    response_budget: int = 8192
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    schedule: str = "off_policy"
    overlap: str = "none"
    behaviour: str = "scorer"
    importance_cap: float = 0.0
    judge: str = "full"
    keep_unbranched: bool = True
    advantage_norm: AdvantageNorm = "none"
    permute_advantages: bool = False
    mini_batch_rows: int = 192
    mini_batch_split: MiniBatchSplit = "even"
    max_not_finite: int = 10
    packing: str = "auto"
    pack_length: int = 0
    micro_batch_tokens: int = 16384
    score_batch_tokens: int = 32768
    length_multiple: int = 128
    eval_every: int = 10
    eval_problems: int = 0
    eval_temperature: float = 1.0
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    keep_best: int = 1
    seed: int = 0
    branching: BranchingConfig = field(default_factory=BranchingConfig)
    expansion: AdaptiveExpansionConfig = field(default_factory=AdaptiveExpansionConfig)
    batch_size: BatchSizeConfig = field(default_factory=BatchSizeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self):
        choices = {
            "schedule": ("off_policy", "on_policy"),
            "overlap": ("none", "initial", "all"),
            "behaviour": ("scorer", "sampler"),
            "judge": ("full", "continuation"),
            "advantage_norm": get_args(AdvantageNorm),
            "mini_batch_split": get_args(MiniBatchSplit),
            "packing": ("auto", "tree", "rows"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        for name in ("steps", "max_sampled_tokens", "eval_every", "eval_problems", "top_k",
                     "pack_length", "max_not_finite", "keep_best"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0; got {getattr(self, name)}")
        for name in ("num_problems", "num_responses", "prompt_budget", "response_budget",
                     "mini_batch_rows", "micro_batch_tokens", "score_batch_tokens",
                     "length_multiple", "checkpoint_every", "keep_checkpoints"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if self.overlap != "none" and self.schedule == "on_policy":
            raise ValueError(f"overlap {self.overlap!r} needs schedule 'off_policy'")
        if self.importance_cap != 0 and not 1 <= self.importance_cap < math.inf:
            raise ValueError(f"importance_cap must be 0 or at least 1; got {self.importance_cap}")
        if self.importance_cap and self.behaviour != "scorer":
            raise ValueError(f"importance_cap needs behaviour 'scorer'; got {self.behaviour!r}")
        if not LEAST_TEMPERATURE <= self.temperature < math.inf:
            # At temperature 0 the policy has no log-probabilities to train.
            raise ValueError(
                f"temperature must be at least {LEAST_TEMPERATURE} in training; "
                f"got {self.temperature}"
            )
        heat = self.eval_temperature
        if heat != 0 and not LEAST_TEMPERATURE <= heat < math.inf:
            raise ValueError(
                f"eval_temperature must be 0 or at least {LEAST_TEMPERATURE}; got {heat}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be within 0 .. 2**32 - 1; got {self.seed}")
        longest, held = self.prompt_budget + self.response_budget, self.sampler.cache_length
        if held is not None and held < longest:
            raise ValueError(
                f"sampler.cache_length {held} is below prompt_budget + response_budget = {longest}"
            )
        if 0 < self.pack_length < longest:
            raise ValueError(
                f"pack_length {self.pack_length} is below prompt_budget + response_budget = "
                f"{longest}; 0 chooses it"
            )
        if self.packing == "tree" and not self._sharing_is_exact():
            raise ValueError(
                "packing 'tree' needs loss.aggregation 'token-mean', loss.mean_over 'mini-batch' "
                f"and permute_advantages False; got {self.loss.aggregation!r}, "
                f"{self.loss.mean_over!r} and {self.permute_advantages}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}")

    def _sharing_is_exact(self) -> bool:
        token_mean = self.loss.aggregation == "token-mean" and self.loss.mean_over == "mini-batch"
        return token_mean and not self.permute_advantages

    @property
    def shares_prefixes(self) -> bool:
        """Whether the update lays shared tokens out once.

        The loss of a token then counts once for every row through it, which is the same only in a
        mean over tokens (means of sequences and of micro-batches weigh each row by its own length
        or company), and if all these rows give the token the same advantage (those of a tree do,
        permuted ones do not).
        """
        return self.packing != "rows" and self._sharing_is_exact()

    @property
    def width(self) -> int:
        """Tokens of the longest path there can be."""
        return self.prompt_budget + self.response_budget

    def packed_length(self, row_multiple: int = 1) -> int:
        """Tokens of a packed sequence, where `row_multiple` devices share the batch axis.

        What `pack_length` says; otherwise 1 to 4 of the longest paths there can be, as many as a
        device's micro-batch and `LONGEST_PACKED` hold. The longer, the more rows of a tree share
        its prefixes and the less is padding. But only a CPU computes just what is visible in
        attention; other devices compute about half of the square of the length. (Sequences as
        long as the micro-batch, six paths, were up to a fifth slower on a CPU.)
        """
        longest = bucket_length(self.prompt_budget + self.response_budget, self.length_multiple)
        room = min(self.micro_batch_tokens // row_multiple, LONGEST_PACKED)
        return self.pack_length or longest * min(max(room // longest, 1), 4)

    @property
    def sampler_shapes(self) -> SamplerConfig:
        """The sampler's settings; a cache length left open is that of the longest path."""
        longest = self.prompt_budget + self.response_budget
        return replace(self.sampler, cache_length=self.sampler.cache_length or longest)

    @property
    def needs_fci(self) -> bool:
        """Whether initial responses are scored with forward context influence."""
        return self.branching.rule in ("fci", "custom") or self.expansion.filter_easy

    @property
    def rows_per_problem(self) -> int:
        """Rows of a fully branched problem, n (1 + N C): the sampling budget of every method."""
        branches = self.branching.num_positions * self.branching.num_continuations
        return self.num_responses * (1 + branches)


@struct.dataclass
class TrainState:
    """Everything an update changes.

    Attributes:
      params: float32 parameters of the policy.
      opt_state: of optax.
      updates: optimizer updates applied.
      skipped: updates left out because loss or gradient was not finite.
      skipped_in_a_row: those since the last that was applied.
    """

    params: Any
    opt_state: Any
    updates: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


@struct.dataclass
class LoopState:
    """All that a run is made of between two steps; what a checkpoint holds.

    Attributes:
      train: parameters and optimizer.
      step: training steps done.
      batch: initial responses of the next step's problems, scored and judged (None until the
        first step of the on-policy schedule).
      continued: continuations of these, likewise; None where the next step samples them itself, or
        where nothing branched.
      following: initial responses of the problems after those; None where a step samples them
        later.
      batch_start, batch_count: where in the stream these problems begin, and how many they are.
      next_start, next_count: the same of the batch after it.
      cursor: where the next draw begins.
      batch_size: problems of the last draw.
      surviving_rows: rows that the last step trained on; 0 leaves the batch size as it is.
      easy_mean, easy_count: cumulative mean of the attention level of easy problems.
      sampled_tokens, trained_tokens, skipped_steps, skipped_prompts, lost_answers: totals.
    """

    train: TrainState
    step: int
    batch: Leaves | None
    continued: Leaves | None
    following: Leaves | None
    batch_start: int
    batch_count: int
    next_start: int
    next_count: int
    cursor: int
    batch_size: int
    surviving_rows: int
    easy_mean: float
    easy_count: int
    sampled_tokens: int
    trained_tokens: int
    skipped_steps: int
    skipped_prompts: int
    lost_answers: int

    @property
    def easy(self) -> CumulativeMean:
        """State of the easy filter."""
        return CumulativeMean(self.easy_mean, self.easy_count)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW.

    Its state has the same structure at all settings, so that they may change in a run.
    """
    rate = optax.constant_schedule(config.learning_rate)
    if config.warmup_updates:
        # Starts above 0, so that the first update is one.
        rate = optax.linear_schedule(
            config.learning_rate / (config.warmup_updates + 1),
            config.learning_rate,
            config.warmup_updates,
        )
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay),
    )


def init_state(params: Any, config: OptimizerConfig, mesh: Mesh | None) -> TrainState:
    """Fresh state with a copy of given parameters, laid out on the mesh if there is one."""
    build = functools.partial(_build, config=config)
    if mesh is None:
        return jax.jit(build)(params)
    shardings = state_shardings(jax.eval_shape(build, params), mesh)
    return jax.jit(build, out_shardings=shardings)(params)


def abstract_state(params: Any, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and layout of `init_state` without its arrays.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`.
      config: of the optimizer.
      mesh: the devices.
    """
    state = jax.eval_shape(functools.partial(_build, config=config), params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state, state_shardings(state, mesh),
    )  # fmt: skip


def _build(params: Any, config: OptimizerConfig) -> TrainState:
    params = jax.tree.map(jnp.copy, params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, make_optimizer(config).init(params), zero, zero, zero)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Optimizer moments follow the table of the parameters; scalars are replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf, sharding: sharding if leaf.ndim else replicated,
        state,
        parameter_shardings(state, mesh),
    )
