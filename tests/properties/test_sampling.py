"""Any requests at all: each comes back once, as long as it may be, whatever their order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnrl_jax.sampling.prefixes import share_prefixes
from attnrl_jax.sampling.sampler import Request, SamplerConfig, sample
from tests.properties.strategies import cases

CACHE = 32
# One cache, four slots and two widths of prefixes: a handful of programs for all cases.
CONFIG = SamplerConfig(
    slots=4,
    chunk=8,
    prefill_rows=4,
    refill=0.5,
    length_bucket=16,
    attend_parts=1,
    halvings=0,
    cache_length=CACHE,
)
# The golden models' logits are nearly flat: of so many end tokens a response meets one soon.
END = tuple(range(32))
VOCAB = 256


@pytest.fixture(scope="module")
def policy(golden_model):
    golden = golden_model("qwen2_tied")
    return golden.params, golden.config


@st.composite
def requests(draw, most=12):
    """Cuts of few sequences, so that prefixes are equal and begin with one another."""
    bases = draw(
        st.lists(
            st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CACHE - 1),
            min_size=1,
            max_size=3,
        )
    )
    asked = []
    for _ in range(draw(st.integers(0, most))):
        base = draw(st.sampled_from(bases))
        prefix = np.array(base[: draw(st.integers(1, len(base)))], np.int32)
        room = CACHE - len(prefix)
        asked.append(
            Request(
                prefix,
                num_samples=draw(st.integers(0, 3)),
                # Nothing, one token, a few, or all that the cache holds.
                budget=min(room, draw(st.sampled_from([0, 1, 2, 5, CACHE]))),
                seed=draw(st.integers(0, 2)),
                temperature=draw(st.sampled_from([1.0, 0.7, 0.0])),
                first_sample=draw(st.integers(0, 1)),
            )
        )
    return asked


def assert_answered(asked, responses, reported):
    """Each sample once, also in what was reported, and as long as its budget and end say."""
    assert [len(samples) for samples in responses] == [request.num_samples for request in asked]
    places = [(i, k) for i, request in enumerate(asked) for k in range(request.num_samples)]
    assert sorted((i, k) for i, k, _ in reported) == places
    for i, k, response in reported:
        assert response is responses[i][k]
        tokens, budget = response.tokens, asked[i].budget
        assert len(tokens) == len(response.logprobs) <= budget
        assert np.isfinite(response.logprobs).all()
        # Above 0 by what is rounded off logits over the temperature.
        assert (response.logprobs <= 1e-6 * 10 / (asked[i].temperature or 1)).all()
        assert ((tokens >= 0) & (tokens < VOCAB)).all()
        ends = np.isin(tokens, END)
        assert not ends[:-1].any()
        assert response.ended == bool(ends[-1:].any())
        assert response.ended or len(tokens) == budget


def answer(policy, asked, config=CONFIG):
    reported, counts = [], []
    responses, stats = sample(
        *policy,
        asked,
        END,
        config,
        lambda *count: counts.append(count),
        lambda *one: reported.append(one),
    )
    assert_answered(asked, responses, reported)
    tokens = [response.tokens.tolist() for samples in responses for response in samples]
    assert stats.useful_tokens == sum(map(len, tokens))
    decoded = sum(request.num_samples for request in asked if request.budget)
    assert counts[-1:] == ([(decoded, decoded)] if decoded else [])
    return responses


def differing(one, other):
    """Samples that are not the same tokens. Rounding differs with what a slot's neighbours are,
    and decides where the two best tokens tie: a response that went astray shows in more."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a.tokens.tolist() != b.tokens.tolist() for a, b in pairs)


@cases(70)
@given(requests(), st.randoms(use_true_random=False), st.sampled_from(["longest", "given"]))
def test_every_request_is_answered_once_in_any_order(policy, asked, random, order):
    wanted = answer(policy, asked)
    shuffled = list(range(len(asked)))
    random.shuffle(shuffled)
    found = answer(policy, [asked[i] for i in shuffled], replace(CONFIG, order=order))
    assert differing(found, [wanted[i] for i in shuffled]) <= 1
    # Equal prefix, seed and number of the sample, equal temperature: equal tokens, as far as the
    # shorter budget goes.
    known = {}
    for request, samples in zip(asked, wanted, strict=True):
        for k, response in enumerate(samples):
            of = (
                request.prefix.tobytes(),
                request.seed,
                request.first_sample + k,
                request.temperature,
            )
            twin = known.setdefault(of, response)
            least = min(len(twin.tokens), len(response.tokens))
            assert twin.tokens[:least].tolist() == response.tokens[:least].tolist()


@cases(6)
@given(st.integers(0, 2**32 - 1), st.integers(150, 400))
def test_hundreds_of_requests_on_four_slots(policy, seed, count):
    rng = np.random.default_rng(seed)
    bases = rng.integers(0, VOCAB, (5, CACHE - 1)).astype(np.int32)
    asked = [
        Request(
            rng.choice(bases)[: rng.integers(1, CACHE)],
            num_samples=int(rng.integers(0, 3)),
            budget=int(rng.integers(0, 2)),
            seed=i,
        )
        for i in range(count)
    ]
    forward = answer(policy, asked)
    backward = answer(policy, asked[::-1])[::-1]
    assert differing(forward, backward) <= 1


# What a request cannot be, and what is said of it.
FAULTS = st.one_of(
    st.tuples(st.just("prefix"), st.sampled_from([[], [VOCAB], [-1], [0.5], [[1]], [2**40], True])),
    st.tuples(st.just("prefix"), st.just([1] * CACHE)),
    st.tuples(st.just("budget"), st.integers(-(2**70), -1) | st.integers(CACHE, 2**70)),
    st.tuples(st.just("num_samples"), st.integers(-(2**70), -1)),
    st.tuples(st.just("first_sample"), st.integers(-(2**70), -1) | st.integers(2**31, 2**70)),
    st.tuples(
        st.just("temperature"),
        st.floats(max_value=9e-5).filter(bool) | st.sampled_from([float("nan"), float("inf")]),
    ),
    st.tuples(
        st.just("top_p"),
        st.floats(max_value=0) | st.floats(min_value=1.0001) | st.just(float("nan")),
    ),
    st.tuples(st.just("top_k"), st.integers(-(2**70), -1)),
    st.tuples(st.just("seed"), st.integers(-(2**70), -1) | st.sampled_from([(), (1, -1)])),
)


@cases(300)
@given(requests(most=4), FAULTS, st.integers(0, 4))
def test_what_cannot_be_sampled_is_named(policy, good, fault, place):
    """And nothing else is sampled, or said to be, before it is."""
    place = min(place, len(good))
    name, value = fault
    value = np.array(value) if name == "prefix" else value
    bad = replace(Request(np.array([7]), 1, 1, seed=0), **{name: value})
    with pytest.raises(ValueError, match=f"^request {place}: ") as refused:
        sample(
            *policy,
            [*good[:place], bad, *good[place:]],
            END,
            CONFIG,
            on_response=lambda *_: pytest.fail("sampled all the same"),
        )
    assert name in str(refused.value) or name in ("seed", "prefix")


@cases(60)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    st.floats(0, 1, exclude_min=True),
    st.integers(0, 2**70),
    st.sampled_from([0, 3, 2**70]),
    st.sampled_from([1e-4, 1.0, 1e30, 1e300]),
)
def test_extremes_of_what_is_allowed(policy, prefix, top_p, top_k, seed, temperature):
    request = Request(np.array(prefix), 2, 4, seed, temperature, top_p, top_k)
    drawn = answer(policy, [request])
    if temperature > 1e20:
        flat = [response.logprobs for response in drawn[0]]
        np.testing.assert_allclose(np.concatenate(flat), -np.log(VOCAB), rtol=1e-5)
        return
    if top_p < 1e-6 or top_k == 1:
        greedy = answer(policy, [replace(request, temperature=0.0)])
        assert differing(drawn, greedy) == 0
    if top_p == 1.0 and (top_k == 0 or top_k >= VOCAB):
        free = answer(policy, [replace(request, top_p=1.0, top_k=0)])
        assert differing(drawn, free) == 0


def test_what_32_bits_do_not_hold(policy):
    """Bugs: a top-k of 2**31 ended the call by an OverflowError; a top-p that is 0 in 32 bits gave
    token 0, however improbable; a temperature of 1e-10 gave infinite log-probabilities."""
    request = Request(np.array([7, 8]), 1, 4, seed=0)
    wanted = answer(policy, [request, replace(request, temperature=0.0)])
    found = answer(policy, [replace(request, top_k=2**31), replace(request, top_p=1e-60)])
    assert differing(found, wanted) == 0
    with pytest.raises(ValueError, match=r"^request 0: temperature must be 0, or .* at least"):
        answer(policy, [replace(request, temperature=1e-10)])


@cases(500)
@given(requests(), st.sampled_from(["longest", "given"]))
def test_prefixes_are_shared_as_far_as_they_can_be(asked, order):
    groups = share_prefixes(asked, order)
    work = [i for i, request in enumerate(asked) if request.num_samples and request.budget]
    samples = [(s.request, s.index) for group in groups for s in group.samples]
    assert sorted(samples) == [(i, k) for i in work for k in range(asked[i].num_samples)]
    for group in groups:
        for s in group.samples:
            prefix = asked[s.request].prefix
            assert group.prefix[: len(prefix)].tolist() == prefix.tolist()
    # As few as there are prefixes that no other begins with.
    prefixes = {tuple(asked[i].prefix.tolist()) for i in work}
    longest = [p for p in prefixes if not any(q != p and q[: len(p)] == p for q in prefixes)]
    assert sorted(tuple(group.prefix.tolist()) for group in groups) == sorted(longest)
    if order == "longest":
        budgets = [max(asked[s.request].budget for s in group.samples) for group in groups]
        assert budgets == sorted(budgets, reverse=True)
    else:
        firsts = [min(s.request for s in group.samples) for group in groups]
        assert firsts == sorted(firsts)
