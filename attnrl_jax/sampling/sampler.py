"""Requests in, responses out: shared prefills and continuous refill of the decode slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from attnrl_jax import processes
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import KeyValues
from attnrl_jax.sampling.engine import (
    Admissions,
    DecodeState,
    decode_params,
    empty_state,
    generate,
    insert,
    layer_groups,
    narrow,
    prefill,
)
from attnrl_jax.sampling.prefixes import ORDERS, Group, Sample, share_prefixes
from attnrl_jax.sampling.requests import Request, check_requests, request_key
from attnrl_jax.shapes import bucket_length, few_lengths
from attnrl_jax.sharding import constrain


@dataclass(frozen=True)
class SamplerConfig:
    """Shapes and rhythm of the sampler.

    Attributes:
      slots: responses decoded at a time (rounded up to a multiple of the devices they lie on).
      chunk: most tokens per slot between two looks of the host.
      prefill_rows: prefixes prefilled at once.
      refill: share of the slots that must be free before the host refills them.
      length_bucket: cache lengths are rounded up to multiples of this, prefix lengths to 1, 2, 3,
        4, 6, 8, 12, ... times it.
      attend_parts: attention reads the least number of these equal parts of the cache that holds
        the longest running sequence; 1 always reads all of it and compiles soonest.
      halvings: how often, when nothing waits and half of the slots suffice, the other half is
        given up; each compiles one program more.
      unroll: whether the decode step has its layers one by one instead of in a scan: faster, but on
        a TPU, and longer to compile. None unrolls but on a TPU.
      order: `longest` starts samples of long budgets first, so that few are left when the slots
        drain; `given` keeps the order of the requests.
      cache_length: tokens of prefix and response a slot can hold; None takes the longest request
        of each call, rounded up (training: its longest path). Another length compiles anew.
    """

    slots: int = 64
    chunk: int = 64
    prefill_rows: int = 16
    refill: float = 0.1
    length_bucket: int = 64
    attend_parts: int = 4
    halvings: int = 2
    unroll: bool | None = None
    order: str = "longest"
    cache_length: int | None = None

    def __post_init__(self):
        for name in ("slots", "chunk", "prefill_rows", "length_bucket", "attend_parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampler.{name} must be at least 1; got {getattr(self, name)}")
        if not 0.0 < self.refill <= 1.0:
            raise ValueError(f"sampler.refill must be in (0, 1]; got {self.refill}")
        if self.halvings < 0:
            raise ValueError(f"sampler.halvings must not be negative; got {self.halvings}")
        if self.order not in ORDERS:
            raise ValueError(f"sampler.order must be {' or '.join(ORDERS)}; got {self.order!r}")
        if self.cache_length is not None and self.cache_length < 2:
            raise ValueError(f"sampler.cache_length must be at least 2; got {self.cache_length}")


@dataclass(frozen=True)
class Response:
    """One sample.

    Attributes:
      tokens: ids after the prefix, the end token included; int32.
      logprobs: behaviour log-probability of each, nats, full softmax at the request's
        temperature (temperature 1 for greedy); float32.
      ended: whether it closed with an end token (False: cut at its budget).
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    ended: bool


@dataclass
class SampleStats:
    """What a call cost.

    Attributes:
      prefills: distinct prefixes that were prefilled.
      prefill_tokens: their tokens.
      prefill_places: tokens that were prefilled, padding included.
      decode_steps: steps of the decode loop.
      slot_steps: tokens those steps had room for.
      useful_tokens: tokens of the responses.
      dispatches: calls of the decode loop.
      cache_length: of each slot.
    """

    prefills: int = 0
    prefill_tokens: int = 0
    prefill_places: int = 0
    decode_steps: int = 0
    slot_steps: int = 0
    useful_tokens: int = 0
    dispatches: int = 0
    cache_length: int = 0


Progress = Callable[[int, int], None]
# Called with (index of the request, index of its response, the response).
OnResponse = Callable[[int, int, Response], None]


@dataclass
class _Block:
    """Groups prefilled together; dropped when the last of their samples has its slot."""

    key_values: KeyValues
    tokens: np.ndarray
    waiting: deque[tuple[int, Sample]]  # row, sample


def sample(
    params: Any,
    model: ModelConfig,
    requests: Sequence[Request],
    end_ids: Sequence[int],
    config: SamplerConfig,
    progress: Progress | None = None,
    on_response: OnResponse | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[list[list[Response]], SampleStats]:
    """Samples every request, on the mesh that is set, or on one device.

    A prefix is prefilled once and forked into all its samples, and so is every prefix that
    another one begins with (branches of one response at several offsets). When slots come free
    the next samples take them. Results depend on neither: the noise of a token is a function of
    request seed, sample index and position.

    Args:
      params: parameters; cast and laid out once for decoding.
      model: the model; its `max_length` bounds prefix plus budget.
      requests: what to sample.
      end_ids: tokens that close a response.
      config: shapes and rhythm; no result depends on it.
      progress: called with (responses finished, responses in all).
      on_response: called with every response once, soon after it is finished and while the devices
        decode the others; those that need no decoding come first.
      meanwhile: called whenever the devices have been given work, before they are waited for.

    Returns:
      for each request its responses, in order; and what the call cost.

    Raises:
      ValueError: a request that cannot be sampled (its index is named), or an end token outside
        the vocabulary.
    """
    check_requests(requests, end_ids, model, config.cache_length)
    responses = [[_EMPTY] * request.num_samples for request in requests]
    if on_response is not None:
        for index, request in enumerate(requests):
            for k in range(request.num_samples if request.budget == 0 else 0):
                on_response(index, k, _EMPTY)
    groups = share_prefixes(requests, config.order)
    total = sum(len(group.samples) for group in groups)
    stats = SampleStats()
    if total == 0:
        return responses, stats

    longest = max(len(r.prefix) + r.budget for r in requests if r.budget and r.num_samples)
    length = bucket_length(config.cache_length or longest, config.length_bucket)
    devices = _batch_devices()
    slots = bucket_length(config.slots, devices)
    least_slots = -(-slots // 2**config.halvings)
    refill_rows = max(1, int(config.refill * slots))
    prefill_rows = bucket_length(config.prefill_rows, devices)
    part = bucket_length(-(-length // config.attend_parts), config.length_bucket)
    attend_lengths = tuple(range(part, length, part))
    stats.cache_length = length
    layers = layer_groups(model, config.unroll)
    decoding = decode_params(params, model.dtype, layers)

    ends = np.asarray(end_ids, np.int32)
    truncated = any(r.top_p < 1.0 or r.top_k > 0 for r in requests)
    blocks = _prefilled(params, model, groups, prefill_rows, config.length_bucket, length, stats)
    state = empty_state(model, slots, length, layers)
    running: list[Sample | None] = [None] * slots
    busy = np.zeros(slots, bool)
    block = next(blocks)
    waiting, finished = total, 0
    news: list[Sample] = []
    while finished < total:
        # Device by device, so that long samples, which follow each other, do not share one.
        idle = np.flatnonzero(~busy)
        free = deque(idle[np.argsort(idle % (slots // devices), kind="stable")].tolist())
        while free and waiting:
            if not block.waiting:
                block = next(blocks)
            taken = min(len(free), refill_rows, len(block.waiting))
            places = [(free.popleft(), *block.waiting.popleft()) for _ in range(taken)]
            admissions = _admissions(places, requests, refill_rows, slots)
            state = insert(state, block.key_values, block.tokens, admissions)
            for slot, _, entered in places:
                running[slot], busy[slot] = entered, True
            waiting -= taken
        if waiting:
            patience = min(refill_rows, waiting)
        else:
            state, running, patience = _narrowed(state, running, devices, least_slots)
            busy = np.array([sampled is not None for sampled in running])
        state, steps = generate(
            decoding,
            model,
            state,
            ends,
            np.int32(config.chunk),
            np.int32(patience),
            truncated,
            attend_lengths,
        )
        # The devices are at work now: time for the caller's own.
        _report(news, responses, on_response)
        if meanwhile is not None:
            meanwhile()
        still_active, lengths, ended, steps = processes.to_host(
            (state.active, state.length, state.ended, steps)
        )
        stats.dispatches += 1
        stats.decode_steps += int(steps)
        stats.slot_steps += int(steps) * len(running)
        done = np.flatnonzero(busy & ~still_active).tolist()
        busy &= still_active
        news = [sampled for slot in done if (sampled := running[slot])]
        if done:
            _collect(state, lengths, ended, done, refill_rows, running, requests, responses)
            stats.useful_tokens += sum(
                len(responses[sampled.request][sampled.index].tokens) for sampled in news
            )
            finished += len(done)
            if progress is not None:
                progress(finished, total)
    _report(news, responses, on_response)
    return responses, stats


def _report(
    news: list[Sample], responses: list[list[Response]], on_response: OnResponse | None
) -> None:
    if on_response is not None:
        for done in news:
            on_response(done.request, done.index, responses[done.request][done.index])


_EMPTY = Response(np.zeros(0, np.int32), np.zeros(0, np.float32), False)


def _narrowed(
    state: DecodeState, running: list[Sample | None], devices: int, least_slots: int
) -> tuple[DecodeState, list[Sample | None], int]:
    """Halves the slots as often as those that are left hold what is running, on every device.

    Returns:
      the state, what runs in its slots, and how many samples must finish before it is worth
      looking again.
    """
    while len(running) % (2 * devices) == 0 and len(running) // 2 >= least_slots:
        busy = np.array([sampled is not None for sampled in running]).reshape(devices, -1)
        half = busy.shape[1] // 2
        excess = int(np.maximum(busy.sum(axis=1) - half, 0).sum())
        if excess:
            return state, running, excess
        kept = np.argsort(~busy, axis=1, kind="stable")[:, :half]
        state = narrow(state, kept)
        first = 2 * half * np.arange(devices)[:, None]
        running = [running[slot] for slot in (first + kept).reshape(-1)]
    return state, running, len(running) + 1


def _prefilled(
    params: Any,
    model: ModelConfig,
    groups: list[Group],
    rows: int,
    length_bucket: int,
    cache_length: int,
    stats: SampleStats,
) -> Iterator[_Block]:
    """Prefills the groups, `rows` at a time, when their samples are about to be inserted.

    Widths are few, since every one is a program of its own.
    """
    for first in range(0, len(groups), rows):
        batch = groups[first : first + rows]
        lengths = np.ones(rows, np.int32)
        lengths[: len(batch)] = [len(group.prefix) for group in batch]
        width = min(few_lengths(int(lengths.max()), length_bucket), cache_length)
        tokens = np.zeros((rows, width), np.int32)
        for row, group in enumerate(batch):
            tokens[row, : len(group.prefix)] = group.prefix
        stats.prefills += len(batch)
        stats.prefill_tokens += sum(len(group.prefix) for group in batch)
        stats.prefill_places += tokens.size
        waiting = deque((row, s) for row, group in enumerate(batch) for s in group.samples)
        yield _Block(prefill(params, model, tokens, lengths), tokens, waiting)


def _admissions(
    places: list[tuple[int, int, Sample]],
    requests: Sequence[Request],
    rows: int,
    slots: int,
) -> Admissions:
    """Arrays of fixed size `rows` for (slot, prefilled row, sample) triples."""
    entering = Admissions(
        slot=np.full(rows, slots, np.int32),
        row=np.zeros(rows, np.int32),
        length=np.ones(rows, np.int32),
        limit=np.zeros(rows, np.int32),
        seed=np.zeros((rows, 2), np.uint32),
        sample=np.zeros(rows, np.int32),
        temperature=np.zeros(rows, np.float32),
        top_p=np.ones(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
    )
    for entry, (slot, row, entered) in enumerate(places):
        request = requests[entered.request]
        entering.slot[entry] = slot
        entering.row[entry] = row
        entering.length[entry] = len(request.prefix)
        entering.limit[entry] = len(request.prefix) + request.budget
        entering.seed[entry] = request_key(request.seed)
        entering.sample[entry] = request.first_sample + entered.index
        # Bounds of what the arrays hold: a top-p that is rounded to 0 would keep no token.
        entering.temperature[entry] = min(request.temperature, float(np.finfo(np.float32).max))
        entering.top_p[entry] = max(request.top_p, float(np.finfo(np.float32).tiny))
        entering.top_k[entry] = min(request.top_k, np.iinfo(np.int32).max)
    return entering


def _collect(
    state: DecodeState,
    lengths: np.ndarray,
    ended: np.ndarray,
    done: list[int],
    at_once: int,
    running: list[Sample | None],
    requests: Sequence[Request],
    responses: list[list[Response]],
) -> None:
    """Takes finished responses out of their slots, `at_once` at a time, or a quarter of that: each
    number is a program of its own."""
    few = -(-at_once // 4)
    at_once = few if len(done) <= few else at_once
    for first in range(0, len(done), at_once):
        part = done[first : first + at_once]
        slots = np.array(part + part[:1] * (at_once - len(part)), np.int32)
        tokens, logprobs = processes.to_host(take_slots(state, slots))
        for row, slot in enumerate(part):
            finished = running[slot]
            assert finished is not None
            running[slot] = None
            own = slice(len(requests[finished.request].prefix), int(lengths[slot]))
            responses[finished.request][finished.index] = Response(
                tokens[row, own].copy(), logprobs[row, own].copy(), bool(ended[slot])
            )


@jax.jit
def take_slots(state: DecodeState, slots: Int[np.ndarray, "taken"]) -> list[jax.Array]:
    """Tokens and log-probabilities of some slots, whole on every device."""
    whole = (state.tokens, state.logprobs)
    return [constrain(jnp.take(x, slots, axis=0), None, None) for x in whole]


def _batch_devices() -> int:
    """Devices over which slots are cut under the current mesh."""
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    return shape.get("data", 1) * shape.get("fsdp", 1)
