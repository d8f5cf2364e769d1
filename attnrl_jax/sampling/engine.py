"""Functional core of the sampler: prefill, insert, generate over an explicit state.

A slot decodes one response. It is inserted with the keys and values of its prefix and starts by
decoding the prefix's *last* token again, at its own position. So prefill needs no logits, one
prefilled row serves every shorter cut of itself, and the first sampled token gets its noise and
its log-probability in the same place as all others.

Everything the functions here are compiled for is static and coarse (model, number of slots, length
of the cache, a few widths of prefixes); requests are arrays, so that new ones compile nothing.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import KeyValues, decode, forward, group_layers, unembed
from attnrl_jax.sampling.cache import Cache, append_token, constrain_cache, empty_cache, fork_rows
from attnrl_jax.sharding import BATCH, constrain
from attnrl_jax.types import ArrayLike


@struct.dataclass
class Sampling:
    """How each slot samples.

    Attributes:
      key: raw threefry key of the sample; noise of a token is `fold_in(key, position)`.
      temperature: 0 is greedy.
      top_p: nucleus probability; 1 keeps everything.
      top_k: number of best tokens kept; 0 keeps everything.
    """

    key: UInt32[Array, "slot 2"]
    temperature: Float[Array, "slot"]
    top_p: Float[Array, "slot"]
    top_k: Int[Array, "slot"]


@struct.dataclass
class DecodeState:
    """All decode slots.

    Attributes:
      cache: keys and values of the tokens before the last one.
      tokens: prefix and response.
      logprobs: behaviour log-probability of each response token, nats.
      length: tokens of prefix and response so far; 0 for a slot that was never used.
      limit: length at which the response is cut.
      active: whether the slot still decodes.
      ended: whether the response closed with an end token.
      sampling: how it samples.
    """

    cache: Cache
    tokens: Int[Array, "slot time"]
    logprobs: Float[Array, "slot time"]
    length: Int[Array, "slot"]
    limit: Int[Array, "slot"]
    active: Bool[Array, "slot"]
    ended: Bool[Array, "slot"]
    sampling: Sampling


@struct.dataclass
class Admissions:
    """What enters which slots; entries whose slot is out of range are padding.

    Attributes:
      slot: slots to take, all different.
      row: prefilled row of each.
      length: tokens of that row which are the prefix, at least 1.
      limit: length at which the response is cut.
      seed: raw threefry key of the request.
      sample: index of the sample in its request.
      temperature, top_p, top_k: as in `Sampling`.
    """

    slot: Int[ArrayLike, "fork"]
    row: Int[ArrayLike, "fork"]
    length: Int[ArrayLike, "fork"]
    limit: Int[ArrayLike, "fork"]
    seed: UInt32[ArrayLike, "fork 2"]
    sample: Int[ArrayLike, "fork"]
    temperature: Float[ArrayLike, "fork"]
    top_p: Float[ArrayLike, "fork"]
    top_k: Int[ArrayLike, "fork"]


def layer_groups(config: ModelConfig, unroll: bool | None = None) -> int:
    """Groups of layers that decode fastest, as compiled programs say: on a TPU slices of what is
    scanned are read in place, on other platforms copied. Only CPUs were measured. `unroll` decides
    instead where it is given."""
    unroll = jax.default_backend() != "tpu" if unroll is None else unroll
    return config.num_layers if unroll else 1


@partial(jax.jit, static_argnames=("dtype",))
def cast_params(params: Any, dtype: str) -> Any:
    """Parameters in the compute dtype, for callers that only sample."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def decode_params(params: Any, dtype: str, groups: int = 1) -> Any:
    """Parameters as `generate` takes them, made once per call of the sampler.

    Args:
      params: parameters; `prefill` takes these.
      dtype: of the computation.
      groups: of layers, as the cache has.

    Returns:
      the same arrays where they are in one group and of that dtype, copies otherwise.
    """
    if groups == 1 and all(x.dtype == dtype for x in jax.tree.leaves(params)):
        return group_layers(params, 1)
    return _grouped(params, dtype, groups)


@partial(jax.jit, static_argnames=("dtype", "groups"))
def _grouped(params: Any, dtype: str, groups: int) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), group_layers(params, groups))


@partial(jax.jit, static_argnames=("config", "slots", "length", "groups"))
def empty_state(config: ModelConfig, slots: int, length: int, groups: int = 1) -> DecodeState:
    """Idle slots whose sequences may hold `length` tokens; layers in so many groups."""
    zeros = partial(jnp.zeros, (slots,))
    state = DecodeState(
        cache=empty_cache(config, slots, length, groups),
        tokens=jnp.zeros((slots, length), jnp.int32),
        logprobs=jnp.zeros((slots, length), jnp.float32),
        length=zeros(jnp.int32),
        limit=zeros(jnp.int32),
        active=zeros(bool),
        ended=zeros(bool),
        sampling=Sampling(
            key=jnp.zeros((slots, 2), jnp.uint32),
            temperature=zeros(jnp.float32),
            top_p=zeros(jnp.float32),
            top_k=zeros(jnp.int32),
        ),
    )
    return _constrain_state(state)


@partial(jax.jit, static_argnames=("config",))
def prefill(
    params: Any,
    config: ModelConfig,
    tokens: Int[ArrayLike, "row time"],
    lengths: Int[ArrayLike, "row"],
) -> KeyValues:
    """Keys and values of right-padded prefixes (entries at and beyond `lengths` mean nothing)."""
    rows = constrain(jnp.asarray(tokens), BATCH, None)
    output = forward(params, config, rows, jnp.asarray(lengths), keep_key_values=True)
    assert output.key_values is not None
    [key_values] = constrain_cache((output.key_values,))
    return key_values


@partial(jax.jit, donate_argnames=("state",))
def insert(
    state: DecodeState,
    prefix: KeyValues,
    prefix_tokens: Int[ArrayLike, "row time"],
    admissions: Admissions,
) -> DecodeState:
    """Gives slots to new samples, each with a copy of its prefilled prefix.

    Args:
      state: donated.
      prefix: of `prefill`.
      prefix_tokens: what it was called with.
      admissions: which sample goes where.
    """
    entering: Any = jax.tree.map(jnp.asarray, admissions)
    slot = entering.slot

    def put(target: Array, value: Array) -> Array:
        return target.at[slot].set(value, mode="drop")

    seeds = jax.random.wrap_key_data(entering.seed, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(seeds, entering.sample)
    rows = jnp.take(prefix_tokens, entering.row, axis=0)
    padding = state.tokens.shape[1] - rows.shape[1]
    sampling = Sampling(
        key=jax.random.key_data(keys),
        temperature=entering.temperature,
        top_p=entering.top_p,
        top_k=entering.top_k,
    )
    return _constrain_state(
        DecodeState(
            cache=fork_rows(state.cache, prefix, entering.row, slot),
            tokens=put(state.tokens, jnp.pad(rows, ((0, 0), (0, padding)))),
            logprobs=put(state.logprobs, jnp.zeros((len(slot), state.tokens.shape[1]))),
            length=put(state.length, entering.length),
            limit=put(state.limit, entering.limit),
            active=put(state.active, entering.limit > entering.length),
            ended=put(state.ended, jnp.zeros(slot.shape, bool)),
            sampling=jax.tree.map(put, state.sampling, sampling),
        )
    )


@jax.jit
def narrow(state: DecodeState, kept: Int[ArrayLike, "device slot"]) -> DecodeState:
    """The state of fewer slots, once there are no more samples than those.

    Args:
      state: of all slots; slots are cut over devices in blocks of equal size.
      kept: for each such block its slots that stay, as indices within the block: no slot leaves
        its device.
    """
    kept = jnp.asarray(kept)
    devices = kept.shape[0]

    def take(x: Array, axis: int) -> Array:
        blocks = x.reshape(*x.shape[:axis], devices, -1, *x.shape[axis + 1 :])
        stays = jax.vmap(
            lambda block, slots: jnp.take(block, slots, axis=axis), in_axes=(axis, 0), out_axes=axis
        )(blocks, kept)
        return stays.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    parts = {f.name: getattr(state, f.name) for f in fields(state) if f.name != "cache"}
    parts = jax.tree.map(lambda x: take(x, 0), parts)
    cache = jax.tree.map(lambda x: take(x, 1), state.cache)
    return _constrain_state(DecodeState(cache=cache, **parts))


@partial(
    jax.jit,
    static_argnames=("config", "truncated", "attend_lengths"),
    donate_argnames=("state",),
)
def generate(
    params: Any,
    config: ModelConfig,
    state: DecodeState,
    end_ids: Int[ArrayLike, "end"],
    max_steps: Int[ArrayLike, ""],
    refill_at: Int[ArrayLike, ""],
    truncated: bool = False,
    attend_lengths: tuple[int, ...] = (),
) -> tuple[DecodeState, Int[Array, ""]]:
    """Decodes on the device until the host is needed.

    It is needed when no slot is active, when `refill_at` slots have finished during this call, or
    after `max_steps` tokens per slot.

    Args:
      params: of `decode_params`.
      config: the model.
      state: donated.
      end_ids: tokens that close a response; they belong to it.
      max_steps: most tokens per slot.
      refill_at: finished slots at which to stop; more than there are slots means never.
      truncated: whether any slot has a top-p or top-k (a sort per step).
      attend_lengths: numbers of cache entries, ascending: attention reads the least that hold the
        longest running sequence, or else the whole cache. One program holds a decode step for
        each, so that longer sequences compile nothing.

    Returns:
      the state and the number of steps done.
    """
    ends = jnp.asarray(end_ids)
    began = state.active.sum()

    def wanted(carry: tuple[DecodeState, Array]) -> Array:
        state, step = carry
        running = state.active.sum()
        return (step < max_steps) & (running > 0) & (began - running < refill_at)

    def body(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, step = carry
        return _decode_step(params, config, state, ends, truncated, attend_lengths), step + 1

    return jax.lax.while_loop(wanted, body, (state, jnp.zeros((), jnp.int32)))


def _decode_step(
    params: Any,
    config: ModelConfig,
    state: DecodeState,
    end_ids: Array,
    truncated: bool,
    attend_lengths: tuple[int, ...],
) -> DecodeState:
    time = state.tokens.shape[1]
    position = jnp.maximum(state.length - 1, 0)
    last = jnp.take_along_axis(state.tokens, position[:, None], axis=1)

    def read(entries: int, cache: Cache) -> tuple[Array, Cache]:
        return decode(params, config, last, position[:, None], cache, position, entries)

    entries = [*(length for length in attend_lengths if length < time), time]
    longest = jnp.max(jnp.where(state.active, position, 0))
    level = (longest > jnp.asarray(entries[:-1])).sum()
    hidden, new = jax.lax.switch(level, [partial(read, count) for count in entries], state.cache)
    logits = unembed(params, config, hidden[:, 0])
    token, logprob = sample_tokens(logits, state.sampling, state.length, truncated)

    # A slot at rest writes nothing that anyone reads: out of range here, beyond its length there.
    where = jnp.where(state.active, state.length, time)
    slots = jnp.arange(len(where))
    closed = (token[:, None] == end_ids[None, :]).any(axis=1)
    length = state.length + state.active
    return _constrain_state(
        replace(
            state,
            cache=append_token(state.cache, new, position),
            tokens=state.tokens.at[slots, where].set(token, mode="drop"),
            logprobs=state.logprobs.at[slots, where].set(logprob, mode="drop"),
            length=length,
            active=state.active & ~closed & (length < state.limit),
            ended=state.ended | (state.active & closed),
        )
    )


def sample_tokens(
    logits: Float[Array, "slot vocab"],
    sampling: Sampling,
    position: Int[Array, "slot"],
    truncated: bool,
) -> tuple[Int[Array, "slot"], Float[Array, "slot"]]:
    """Draws the token at `position` of each slot, with its behaviour log-probability.

    The log-probability is that of the full softmax at the sampling temperature, also where top-p
    or top-k cut the support (the paper's ratio is between full distributions), and at
    temperature 1 for greedy slots.
    """
    token = jnp.argmax(perturbed_logits(logits, sampling, position, truncated), axis=-1)
    scaled = logits / _divisor(sampling)[:, None]
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=1)[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, axis=-1)


def perturbed_logits(
    logits: Float[Array, "slot vocab"],
    sampling: Sampling,
    position: Int[Array, "slot"],
    truncated: bool,
) -> Float[Array, "slot vocab"]:
    """Logits over temperature plus Gumbel noise; their argmax is the sample.

    The noise depends on the sample's key and the token's position in prefix and response alone,
    never on the slot or its neighbours. Greedy slots get no noise.
    """
    scaled = logits / _divisor(sampling)[:, None]
    if truncated:
        scaled = truncate_logits(scaled, sampling.top_p, sampling.top_k)
    keys = jax.random.wrap_key_data(sampling.key, impl="threefry2x32")

    def draw(key: Array, index: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, index), logits.shape[-1:])

    noise = jax.vmap(draw)(keys, position)
    return scaled + jnp.where(sampling.temperature[:, None] > 0, noise, 0.0)


def _divisor(sampling: Sampling) -> Float[Array, "slot"]:
    return jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)


def truncate_logits(
    logits: Float[Array, "slot vocab"], top_p: Float[Array, "slot"], top_k: Int[Array, "slot"]
) -> Float[Array, "slot vocab"]:
    """Sets logits outside top-k, then outside the nucleus of what is left, to minus infinity.

    The nucleus (arXiv 1904.09751) is the least set of best tokens whose probability reaches
    `top_p`. Tokens that tie with the last one kept are kept too.
    """
    vocab = logits.shape[-1]
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    kept = jnp.arange(vocab)[None, :] < count[:, None]
    probabilities = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The comparison would lose the tail to rounding where nothing is to be cut.
    kept &= (before < top_p[:, None]) | (top_p[:, None] >= 1.0)
    last = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1)
    return jnp.where(logits >= last[:, None], logits, -jnp.inf)


def _constrain_state(state: DecodeState) -> DecodeState:
    def over_slots(x: Array) -> Array:
        return constrain(x, BATCH, *(None,) * (x.ndim - 1))

    parts = {f.name: getattr(state, f.name) for f in fields(state) if f.name != "cache"}
    return DecodeState(cache=constrain_cache(state.cache), **jax.tree.map(over_slots, parts))
