"""Formulas for the least time of a training step: operations and bytes over the rates of a chip.

docs/scaling.md explains each of them; `experiments.scaling` prints what they come to.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from attnrl_jax.compilation.chips import Chip
from attnrl_jax.models.config import ModelConfig
from experiments.bench.limits import matrix_params

BF16, FLOAT32 = 2, 4
# Parameters, two moments and the reference lie on the devices all the time, gradients in the
# update; all are float32.
STATE_BYTES, GRADIENT_BYTES = 4 * FLOAT32, FLOAT32
# Of a chip's memory; the rest is for what is not counted here.
USABLE = 0.8
# Seconds between neighbouring chips (https://jax-ml.github.io/scaling-book).
HOP = 1e-6
TENSORS = (1, 2, 4, 8, 16)


def _qwen2p5(width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int):
    return ModelConfig(
        family="qwen2", vocab_size=vocab, width=width, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=128, mlp_width=mlp, qkv_bias=True, dtype="bfloat16",
    )  # fmt: skip


# R1-Distill-Qwen has these shapes; its embedding and unembedding are two matrices at every size.
MODELS = {
    "1.5B": _qwen2p5(1536, 28, 12, 2, 8960, 151936),
    "7B": _qwen2p5(3584, 28, 28, 4, 18944, 152064),
    "32B": _qwen2p5(5120, 64, 40, 8, 27648, 152064),
}


@dataclass(frozen=True)
class Workload:
    """What a step samples and trains on; every response branches.

    Attributes:
      problems: of the step.
      prompt, response: mean tokens.
      longest: tokens of prompt and response that a slot, and a packed sequence, has room for.
      budget: most tokens of a response.
      responses, positions, continuations: n, N, C.
      mini_batches: optimizer updates.
    """

    problems: int = 64
    prompt: int = 150
    response: int = 5000
    longest: int = 9216
    budget: int = 8192
    responses: int = 6
    positions: int = 2
    continuations: int = 2
    mini_batches: int = 10

    @property
    def initial(self) -> int:
        """Initial responses."""
        return self.problems * self.responses

    @property
    def rows(self) -> int:
        """All responses."""
        return self.initial * (1 + self.positions * self.continuations)

    @property
    def continued(self) -> float:
        """Tokens of continuations: they begin anywhere, so half of a response is left."""
        return self.initial * self.positions * self.continuations * self.response / 2

    @property
    def sampled(self) -> float:
        return self.initial * self.response + self.continued

    @property
    def prefixes(self) -> float:
        """Tokens of responses before the last of N branches, N / (N + 1) on average."""
        return self.initial * self.response * self.positions / (self.positions + 1)

    @property
    def prefilled(self) -> float:
        """Prompts of the new responses; the longest prefix of each that branches."""
        return (self.problems + self.initial) * self.prompt + self.prefixes

    @property
    def scored(self) -> tuple[float, float]:
        """Tokens of the two scoring passes: initial responses one by one, then continuations."""
        alone = self.initial * (self.prompt + self.response)
        return alone, self.problems * self.prompt + self.prefixes + self.continued

    @property
    def trained(self) -> float:
        """Tokens of the update, those that rows share once."""
        return self.problems * self.prompt + self.sampled


def all_params(model: ModelConfig) -> int:
    """Parameters of all matrices, the embedding included."""
    embedding = 0 if model.tie_embeddings else model.vocab_size * model.width
    return matrix_params(model) + embedding


def attention_flops(model: ModelConfig, context: float) -> float:
    """Operations of a token that sees `context` others, over all layers: QK' and AV."""
    return 4 * model.num_layers * model.num_heads * model.head_dim * context


def forward_flops(model: ModelConfig, work: Workload) -> float:
    """Operations of a token of a whole path: 2 a matrix parameter, and attention to half of it."""
    return 2 * matrix_params(model) + attention_flops(model, (work.prompt + work.response) / 2)


def slot_bytes(model: ModelConfig, work: Workload) -> int:
    """Keys and values of the longest path."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * BF16 * work.longest


def update_temporaries(model: ModelConfig, work: Workload, tensor: int = 1) -> float:
    """Bytes of the backward pass of one packed sequence.

    Two arrays `[time, width]` a layer (its input and what attention gave), six of the wide axis of
    one layer's MLP, and the output matrix with its gradient, which are whole along the width.
    """
    kept = 2 * model.num_layers * model.width * work.longest * BF16
    inside = 6 * model.mlp_width * work.longest * BF16
    return kept + (inside + 2 * model.vocab_size * model.width * FLOAT32) / tensor


@dataclass(frozen=True)
class Stage:
    """Least seconds of a stage of one step.

    Attributes:
      compute, memory, interconnect: what each takes by itself.
      seconds: of all together.
      settings: that were chosen.
    """

    compute: float
    memory: float
    interconnect: float
    seconds: float
    settings: dict[str, int] = field(default_factory=dict)

    @property
    def bound(self) -> str:
        """What takes longest."""
        names = ("compute", "memory", "interconnect")
        return max(names, key=lambda name: getattr(self, name))

    @property
    def links(self) -> str:
        """Time of the interconnect over that of the stage."""
        return f"{self.interconnect / self.seconds:.0%}"


def generation(
    model: ModelConfig, chip: Chip, chips: int, work: Workload, tensor: int
) -> Stage | None:
    """Prefill and decode with parameters cut over `tensor` chips; None if they do not fit."""
    replicas = chips // tensor
    # Keys and values are cut by heads, or not at all.
    cut = tensor if model.num_kv_heads % tensor == 0 else 1
    params = all_params(model)
    room = USABLE * chip.hbm - STATE_BYTES * params / chips - BF16 * params / tensor
    # A response takes its tokens one after the other: more slots than this end no sooner.
    useful = math.ceil(work.sampled / work.budget / replicas)
    slots = min(int(room * cut / slot_bytes(model, work)), useful)
    if slots < 1:
        return None
    steps = max(work.sampled / (slots * replicas), work.budget)
    read = BF16 * matrix_params(model) / tensor + slots * slot_bytes(model, work) / cut
    # On average over initial responses and, with two times two branches, twice as many tokens of
    # continuations, which see half of a response more.
    seen = work.prompt + 2 / 3 * work.response
    token = 2 * matrix_params(model) + attention_flops(model, seen)
    prefill = work.prefilled * forward_flops(model, work) / (chips * chip.flops)
    compute = steps * slots * token / (tensor * chip.flops)
    memory = steps * read / chip.hbm_rate
    reduced = 2 * (tensor - 1) / tensor * slots * model.width * BF16
    each = reduced / chip.ici_rate + 2 * (tensor - 1) * HOP
    interconnect = steps * 2 * model.num_layers * each
    settings = {"tensor": tensor, "slots": slots * replicas, "steps": round(steps)}
    # A layer waits for what the one before it sends.
    seconds = prefill + max(compute, memory) + interconnect
    return Stage(prefill + compute, memory, interconnect, seconds, settings)


def passes(
    model: ModelConfig,
    chip: Chip,
    chips: int,
    work: Workload,
    tensor: int,
    tokens: float,
    flops: float,
    gathers: float,
    reduces: int,
) -> Stage:
    """Passes over packed tokens with parameters cut over all chips.

    Args:
      model, chip, chips, work: as above.
      tensor: chips that share a sequence.
      tokens: in one go; the last batch of it may leave chips idle.
      flops: per token.
      gathers: bytes per parameter that are gathered, and scattered, for a batch.
      reduces: all-reduces over `tensor` of `[time, width]` per layer.
    """
    groups = chips // tensor
    batches = math.ceil(tokens / (groups * work.longest))
    compute = batches * work.longest * flops / (tensor * chip.flops)
    memory = batches * BF16 * matrix_params(model) / tensor / chip.hbm_rate
    gathered = gathers * all_params(model) / tensor * (groups - 1) / groups
    wide = BF16 * work.longest * model.width
    reduced = 2 * (tensor - 1) / tensor * reduces * model.num_layers * wide
    gathering, reducing = (batches * sent / chip.ici_rate for sent in (gathered, reduced))
    # Parameters of the next layer come while one computes; what it sums over chips it waits for.
    seconds = max(compute, memory, gathering) + reducing
    settings = {"tensor": tensor, "batches": batches}
    return Stage(compute, memory, gathering + reducing, seconds, settings)


def scoring(model: ModelConfig, chip: Chip, chips: int, work: Workload, tensor: int) -> Stage:
    """Both scoring passes; FCI multiplies queries and keys once more."""
    forward = forward_flops(model, work)
    fci = attention_flops(model, (work.prompt + work.response) / 2) / 2
    alone, continued = work.scored
    rest = (model, chip, chips, work, tensor)
    one = passes(*rest, alone, forward + fci, BF16, 2)
    return _sum(one, passes(*rest, continued, forward, BF16, 2))


def updating(
    model: ModelConfig, chip: Chip, chips: int, work: Workload, tensor: int
) -> Stage | None:
    """All mini-batches; None if one packed sequence does not fit.

    A forward pass of the reference, one of the policy, the backward pass (twice a forward one) and
    the forward pass again, of which attention is kept.
    """
    params = all_params(model)
    held = (STATE_BYTES + GRADIENT_BYTES) * params / chips
    if held + update_temporaries(model, work, tensor) > USABLE * chip.hbm:
        return None
    flops = 10 * matrix_params(model) + 4 * (forward_flops(model, work) - 2 * matrix_params(model))
    tokens = work.trained / work.mini_batches
    # Gathered for the reference, forward and backward; gradients are scattered in float32.
    rest = (3 * BF16 + FLOAT32, 8)
    one = passes(model, chip, chips, work, tensor, tokens, flops, *rest)
    # AdamW reads parameters, gradients and moments, and writes all but the gradients.
    optimizer = 7 * FLOAT32 * params / chips / chip.hbm_rate
    times = work.mini_batches
    return Stage(
        times * one.compute, times * (one.memory + optimizer), times * one.interconnect,
        times * (one.seconds + optimizer), one.settings,
    )  # fmt: skip


def _sum(one: Stage, other: Stage) -> Stage:
    return Stage(
        one.compute + other.compute, one.memory + other.memory,
        one.interconnect + other.interconnect, one.seconds + other.seconds, one.settings,
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """The stages of a step, each with the settings that take least time."""

    generate: Stage
    score: Stage
    update: Stage

    @property
    def seconds(self) -> float:
        return self.generate.seconds + self.score.seconds + self.update.seconds


@functools.cache
def step_time(model: ModelConfig, chip: Chip, chips: int, work: Workload) -> Step | None:
    """The fastest step on so many chips; None if none fits."""
    tensors = [tensor for tensor in TENSORS if tensor <= chips]
    generated = [s for t in tensors if (s := generation(model, chip, chips, work, t))]
    updates = [s for t in tensors if (s := updating(model, chip, chips, work, t))]
    if not generated or not updates:
        return None
    update = min(updates, key=lambda stage: stage.seconds)
    score = scoring(model, chip, chips, work, update.settings["tensor"])
    return Step(min(generated, key=lambda stage: stage.seconds), score, update)
