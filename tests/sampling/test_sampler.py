"""Requests to responses: equal to one-by-one sampling, budgets, sharing, bad requests."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain, takewhile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.models.transformer import forward, unembed
from attnrl_jax.sampling.engine import (
    Sampling,
    cast_params,
    generate,
    insert,
    perturbed_logits,
    prefill,
)
from attnrl_jax.sampling.sampler import Request, SamplerConfig, request_key, sample
from attnrl_jax.scoring import score
from attnrl_jax.sharding import MeshConfig, make_mesh, parameter_shardings

SMALL = SamplerConfig(slots=8, chunk=16, prefill_rows=8, refill=0.25, length_bucket=64, halvings=0)
END = (2, 5)
# The golden models' logits are nearly flat; scaled up, responses end and differ in probability.
SHARPER = 4.0


@pytest.fixture(scope="module")
def policy(golden_model):
    golden = golden_model("qwen2_untied")
    params = jax.tree.map(lambda x: x, golden.params)
    params["lm_head"]["kernel"] = SHARPER * params["lm_head"]["kernel"]
    return params, golden.config


def _prefixes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(6, 256, size=rng.integers(1, 20)).astype(np.int32) for _ in range(count)]


def _mixed_requests(count=9):
    return [
        Request(prefix, 1 + i % 3, 5 + 4 * (i % 9), seed=(7, i), temperature=(1.0, 0.7, 1.3)[i % 3])
        for i, prefix in enumerate(_prefixes(count))
    ]


@partial(jax.jit, static_argnums=1)
def _forward_logits(params, config, tokens, length):
    return unembed(params, config, forward(params, config, tokens, length).hidden)


def _response_logits(policy, prefix, tokens):
    """Logits of every response token by one full forward pass, `[time, vocab]`."""
    row = np.zeros((1, 64), np.int32)
    total = len(prefix) + len(tokens)
    row[0, :total] = np.concatenate([prefix, tokens])
    logits = _forward_logits(*policy, row, np.array([total], np.int32))
    return np.asarray(logits[0, len(prefix) - 1 : total - 1])


def _recomputed(policy, request, response):
    """Log-probability of every response token under the full softmax."""
    logits = _response_logits(policy, request.prefix, response.tokens)
    scaled = jax.nn.log_softmax(logits / (request.temperature or 1.0))
    return np.asarray(scaled)[np.arange(len(response.tokens)), response.tokens]


def test_logprobs_equal_a_full_forward_pass(policy):
    greedy = Request(_prefixes(1)[0], 2, 30, seed=3, temperature=0.0)
    cut = Request(_prefixes(2)[1], 3, 30, seed=4, temperature=0.7, top_p=0.5, top_k=9)
    requests = [*_mixed_requests(), greedy, cut]
    responses, _ = sample(*policy, requests, END, SMALL)
    for request, samples in zip(requests, responses, strict=True):
        assert len(samples) == request.num_samples
        for response in samples:
            wanted = _recomputed(policy, request, response)
            np.testing.assert_allclose(response.logprobs, wanted, atol=1e-4)
    logprobs = np.concatenate([r.logprobs for samples in responses for r in samples])
    assert logprobs.std() > 0.5  # Not the flat softmax, for which a wrong prefix would pass.


def _first_tie(policy, request, index, response):
    """First response position at which the two best perturbed logits are within 1e-3."""
    logits = _response_logits(policy, request.prefix, response.tokens)
    logits = np.pad(logits, ((0, 64 - len(logits)), (0, 0)))
    key = jax.random.wrap_key_data(jnp.asarray(request_key(request.seed)), impl="threefry2x32")
    key = jax.random.key_data(jax.random.fold_in(key, index))
    sampling = Sampling(
        key=jnp.tile(key, (64, 1)),
        temperature=jnp.full(64, request.temperature),
        top_p=jnp.ones(64),
        top_k=jnp.zeros(64, jnp.int32),
    )
    positions = len(request.prefix) + jnp.arange(64)
    perturbed = jax.jit(perturbed_logits, static_argnums=3)(logits, sampling, positions, False)
    perturbed = np.asarray(perturbed)[: len(response.tokens)]
    best = np.sort(perturbed, axis=-1)
    ties = np.flatnonzero(best[:, -1] - best[:, -2] <= 1e-3)
    tie = int(ties[0]) if len(ties) else None
    np.testing.assert_array_equal(perturbed.argmax(axis=-1)[:tie], response.tokens[:tie])
    return tie


def _assert_equal_up_to_ties(policy, requests, responses, wanted):
    """Tokens agree up to a sample's first tie, log-probabilities of the same tokens to 1e-4.

    Rounding, which differs with the shapes, may decide a tie and with it all that follows.
    Returns how many samples met one, and how many there are.
    """
    ties = []
    for request, samples, others in zip(requests, responses, wanted, strict=True):
        for index, (one, other) in enumerate(zip(samples, others, strict=True)):
            tie = _first_tie(policy, request, index, other)
            ties.append(tie is not None)
            np.testing.assert_array_equal(one.tokens[:tie], other.tokens[:tie])
            assert tie is not None or one.ended == other.ended
            pairs = zip(one.tokens, other.tokens, strict=tie is None)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            np.testing.assert_allclose(one.logprobs[:same], other.logprobs[:same], atol=1e-4)
    return sum(ties), len(ties)


def test_equals_one_by_one_sampling_up_to_ties(policy):
    """Also checks each token against noise made outside the sampler.

    Together, the cache is read up to 16, 32, 48 or 64 entries; one prefix ends where 16 do.
    """
    requests = _mixed_requests(51)
    requests[0] = replace(requests[0], prefix=np.resize(requests[0].prefix, 16))
    levels = replace(SMALL, length_bucket=16, cache_length=64)
    together, stats = sample(*policy, requests, END, levels)
    assert stats.cache_length == 64
    alone = replace(SMALL, slots=1, prefill_rows=1, attend_parts=1)
    singles = [sample(*policy, [request], END, alone)[0][0] for request in requests]
    tied, count = _assert_equal_up_to_ties(policy, requests, together, singles)
    assert count >= 100
    assert tied <= 0.05 * count


def test_order_and_shapes_change_nothing(policy):
    requests = _mixed_requests()
    wanted, _ = sample(*policy, requests, END, SMALL)
    order = np.random.default_rng(1).permutation(len(requests))
    config = replace(
        SMALL, slots=3, chunk=7, prefill_rows=2, attend_parts=3, unroll=False, cache_length=100
    )
    shuffled, stats = sample(*policy, [requests[i] for i in order], END, config)
    assert stats.cache_length == 128
    back = [shuffled[place] for place in np.argsort(order)]
    tied, _ = _assert_equal_up_to_ties(policy, requests, back, wanted)
    assert tied <= 1


def test_slots_are_given_up_as_they_drain(policy):
    """And started in the order asked for: with three slots three samples finish first."""
    requests = [Request(p, 1, 4 + 3 * i, seed=i) for i, p in enumerate(_prefixes(9, seed=11))]
    wanted, full = sample(*policy, requests, (), SMALL)
    narrowed, stats = sample(*policy, requests, (), replace(SMALL, halvings=1))
    assert full.slot_steps == 8 * full.decode_steps
    # Budgets 4, 7, ..., 28: the first goes last, and after 16 steps four of nine still run.
    assert stats.slot_steps == 16 * 8 + 12 * 4
    tied, _ = _assert_equal_up_to_ties(policy, requests, narrowed, wanted)
    assert tied <= 1
    for order, first in (("given", {0, 1, 2}), ("longest", {8, 7, 6})):
        seen = []
        config = replace(SMALL, slots=3, refill=1.0, order=order)
        sample(*policy, requests, (), config, on_response=lambda i, *_, seen=seen: seen.append(i))
        assert set(seen[:3]) == first


def test_greedy_continuations_are_those_of_transformers(model):
    cases = model.about["greedy"]
    requests = [
        Request(np.array(case["prompt"]), 1, len(case["continuation"]), seed=0, temperature=0.0)
        for case in cases
    ]
    responses, _ = sample(model.params, model.config, requests, (), SMALL)
    for case, (response,) in zip(cases, responses, strict=True):
        assert response.tokens.tolist() == case["continuation"]
        assert not response.ended


def test_budgets_and_end_tokens(policy):
    requests = [Request(p, 2, b, seed=b) for b, p in enumerate(_prefixes(12, seed=4))]
    free, _ = sample(*policy, requests, (), SMALL)
    for request, samples in zip(requests, free, strict=True):
        for response in samples:
            assert len(response.tokens) == len(response.logprobs) == request.budget
            assert response.tokens.dtype == np.int32
            assert response.logprobs.dtype == np.float32
            assert not response.ended
    # The tokens most often seen become end tokens: the same responses, cut after the first.
    seen = np.concatenate([r.tokens for samples in free for r in samples])
    ends = tuple(int(token) for token in np.argsort(-np.bincount(seen))[:2])
    closed, _ = sample(*policy, requests, ends, SMALL)
    lasts = []
    for whole, part in zip(chain(*free), chain(*closed), strict=True):
        hits = np.flatnonzero(np.isin(whole.tokens, ends))
        wanted = whole.tokens[: hits[0] + 1] if len(hits) else whole.tokens
        np.testing.assert_array_equal(part.tokens, wanted)
        assert part.ended == bool(len(hits))
        lasts.append(part.ended and len(part.tokens) == len(whole.tokens))
    assert any(lasts), "no end token fell on the last token of a budget"


def test_prefixes_are_prefilled_once(policy):
    (stem,) = _prefixes(1, seed=9)
    stem = np.resize(stem, 30)
    other = np.resize(stem[::-1], 12)
    requests = [
        Request(stem[:10], 6, 20, seed=0),
        Request(other, 6, 20, seed=1),
        Request(stem, 2, 9, seed=2),
        Request(stem[:17], 2, 13, seed=3),
        Request(stem[:10], 1, 20, seed=4, temperature=0.5),
        Request(other[:5], 0, 20, seed=5),
        Request(stem[:29], 2, 0, seed=6),
    ]
    together, stats = sample(*policy, requests, END, SMALL)
    assert stats.prefills == 2
    assert stats.prefill_tokens == len(stem) + len(other)
    singles = []
    for request in requests:
        (samples,), alone = sample(*policy, [request], END, SMALL)
        assert alone.prefills == (request.budget * request.num_samples > 0)
        singles.append(samples)
    tied, _ = _assert_equal_up_to_ties(policy, requests, together, singles)
    assert tied <= 1


def test_any_token_may_be_sampled_in_the_middle(policy):
    """Also the one that pads: positions and masks come from lengths alone."""
    params, config = policy
    kernel = params["lm_head"]["kernel"]
    requests = [Request(p, 2, 30, seed=i) for i, p in enumerate(_prefixes(4, seed=5))]
    requests.append(Request(np.zeros(5, np.int32), 2, 30, seed=9))
    params = {**params, "lm_head": {"kernel": kernel.at[:, 0].set(2 * kernel[:, 7])}}
    responses, _ = sample(params, config, requests, END, SMALL)
    zeros = 0
    for request, samples in zip(requests, responses, strict=True):
        for response in samples:
            zeros += (response.tokens[:-1] == 0).sum()
            wanted = _recomputed((params, config), request, response)
            np.testing.assert_allclose(response.logprobs, wanted, atol=1e-4)
    assert zeros > 5


def test_every_response_comes_back_once(policy):
    calls = []
    prefixes = _prefixes(40, seed=6)
    requests = [
        Request(p, 1 + i % 4, 1 + i % 17, seed=i, temperature=4.0) for i, p in enumerate(prefixes)
    ]
    responses, stats = sample(
        *policy, requests, END, replace(SMALL, slots=3), lambda *counts: calls.append(counts)
    )
    total = sum(request.num_samples for request in requests)
    assert [len(samples) for samples in responses] == [r.num_samples for r in requests]
    assert all(len(r.tokens) and (r.logprobs <= 0).all() for s in responses for r in s)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert stats.useful_tokens == sum(len(r.tokens) for s in responses for r in s)
    assert stats.useful_tokens <= stats.slot_steps == 3 * stats.decode_steps
    distinct = {tuple(r.tokens) for s in responses for r in s if len(r.tokens) > 5}
    assert len(distinct) == sum(len(r.tokens) > 5 for s in responses for r in s)


def test_responses_are_reported_once_as_they_finish(policy):
    """Also empty ones; and before the call ends, so that the caller can work on them meanwhile."""
    prefixes = _prefixes(12, seed=8)
    requests = [Request(p, 1 + i % 3, i % 9, seed=i) for i, p in enumerate(prefixes)]
    events = []
    responses, _ = sample(
        *policy, requests, END, replace(SMALL, slots=3),
        lambda done, total: events.append(done),
        lambda index, k, response: events.append((index, k, response)),
    )  # fmt: skip
    reported = [event for event in events if isinstance(event, tuple)]
    assert sorted((index, k) for index, k, _ in reported) == [
        (i, k) for i, request in enumerate(requests) for k in range(request.num_samples)
    ]
    for index, k, response in reported:
        assert response is responses[index][k]
    last = max(i for i, event in enumerate(events) if isinstance(event, int))
    assert sum(isinstance(event, tuple) for event in events[:last]) > len(reported) / 2


def test_samples_can_be_asked_for_one_by_one(policy):
    (prefix,) = _prefixes(1, seed=9)
    [together], _ = sample(*policy, [Request(prefix, 4, 20, seed=3)], (), SMALL)
    order = (2, 0, 3, 1)
    requests = [Request(prefix, 1, 20, seed=3, first_sample=k) for k in order]
    apart, stats = sample(*policy, requests, (), SMALL)
    assert stats.prefills == 1
    for k, [response] in zip(order, apart, strict=True):
        np.testing.assert_array_equal(response.tokens, together[k].tokens)


def test_seeds(policy):
    (prefix,) = _prefixes(1)
    seeds = [7, (7,), (7, 0), (0, 7), 0, (0,), 2**40]
    requests = [Request(prefix, 2, 20, seed=seed) for seed in seeds]
    responses, _ = sample(*policy, requests, (), SMALL)
    rows = [tuple(r.tokens) for samples in responses for r in samples]
    assert rows[:2] == rows[2:4]
    assert len(set(rows)) == len(rows) - 4


def test_bfloat16(policy):
    """Measured: 0.035 on average and 0.48 at most, half as far as both are from float32."""
    params, config = policy
    config = config.with_dtype("bfloat16")
    requests = [Request(prefix, 2, 40, seed=i) for i, prefix in enumerate(_prefixes(16))]
    responses, _ = sample(params, config, requests, END, SMALL)
    params = cast_params(params, "bfloat16")
    differences = []
    for request, samples in zip(requests, responses, strict=True):
        for response in samples:
            tokens = np.zeros((1, 64), np.int32)
            total = len(request.prefix) + len(response.tokens)
            tokens[0, :total] = np.concatenate([request.prefix, response.tokens])
            scores = score(
                params, config, tokens, np.array([total]), np.zeros_like(tokens), with_fci=False
            )
            scored = np.asarray(scores.logprobs)[0, len(request.prefix) : total]
            differences.append(response.logprobs - scored)
    differences = np.concatenate(differences)
    assert len(differences) > 500
    assert abs(differences).max() <= 0.75
    assert abs(differences).mean() <= 0.05
    assert abs(differences.mean()) <= 0.01


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prefix": np.zeros(0, np.int32)}, "non-empty"),
        ({"prefix": np.array([256])}, "vocabulary"),
        ({"prefix": np.array([-1])}, "vocabulary"),
        ({"prefix": np.array([0.5])}, "token ids"),
        ({"budget": -1}, "budget -1"),
        ({"budget": 1024}, "max_length 1024"),
        ({"budget": 70}, "cache_length 64"),
        ({"num_samples": -1}, "num_samples"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -3}, "seed"),
        ({"first_sample": -1}, "first_sample"),
    ],
)
def test_bad_requests_are_refused(policy, change, said):
    good = Request(np.array([7, 8]), 1, 4, seed=0)
    with pytest.raises(ValueError, match=f"request 1: .*{said}"):
        sample(*policy, [good, replace(good, **change)], END, replace(SMALL, cache_length=64))


def test_bad_settings_are_refused(policy):
    with pytest.raises(ValueError, match="end token 256"):
        sample(*policy, [], (256,), SMALL)
    for change in (
        {"slots": 0},
        {"refill": 0.0},
        {"attend_parts": 0},
        {"order": "any"},
        {"halvings": -1},
        {"cache_length": 0},
    ):
        with pytest.raises(ValueError, match=f"sampler.{next(iter(change))}"):
            replace(SMALL, **change)


def test_nothing_to_sample(policy):
    responses, stats = sample(*policy, [], END, SMALL)
    assert responses == []
    assert stats.decode_steps == 0
    (empty,), _ = sample(*policy, [Request(np.array([7]), 2, 0, seed=0)], END, SMALL)
    assert [len(response.tokens) for response in empty] == [0, 0]


@pytest.mark.parametrize(
    "mesh_config", [MeshConfig(data=-1), MeshConfig(data=-1, fsdp=2, tensor=2)], ids=str
)
def test_sharded_equals_one_device(policy, mesh_config):
    """On the 8 simulated devices that conftest asks for; slots are given up on each of them."""
    params, config = policy
    assert jax.device_count() == 8
    requests = _mixed_requests()
    wanted, _ = sample(params, config, requests, END, SMALL)
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, parameter_shardings(params, mesh))
        halved = replace(SMALL, slots=16, halvings=1)
        sharded, stats = sample(spread, config, requests, END, halved)
    assert stats.slot_steps < 16 * stats.decode_steps
    tied, _ = _assert_equal_up_to_ties(policy, requests, sharded, wanted)
    assert tied <= 1


def test_new_lengths_compile_nothing(policy):
    """Prefixes of any length up to 64 share four widths, whatever their number and budgets."""
    config = replace(SMALL, length_bucket=16, cache_length=80, attend_parts=1)
    functions = (prefill, insert, generate)
    counts = []
    for lengths in ((10, 30, 40, 60), (1, 17, 33, 49, 50, 64), (63, 48, 31, 15, 5)):
        for length in lengths:
            sample(*policy, [Request(np.full(length, 9), 2, 1 + length % 16, seed=0)], (), config)
        counts.append([function._cache_size() for function in functions])
    assert counts[0] == counts[1] == counts[2]
