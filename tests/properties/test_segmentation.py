"""Steps of any sequence, by a walk over its tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from attnrl_jax.branching.steps import (
    Separators,
    StepRule,
    count_steps,
    end_of_thinking,
    segment_steps,
    step_bounds,
)
from attnrl_jax.training.leaves import count_ranges
from attnrl_jax.types import Leaves
from tests.properties.strategies import cases

TEXTS = ("a", "b", "\n", "\n\n", "x.\n\n", " \n", "</think>")
IDS = st.integers(0, len(TEXTS) - 1)
# Texts that change, so that there are vocabularies without one kind of separator or the other.
VOCABULARIES = st.lists(st.sampled_from(TEXTS[:-1]), min_size=6, max_size=6).map(
    lambda texts: [*texts, TEXTS[-1]]
)
END_THINK = st.sampled_from([None, 6])
PROMPTS = st.lists(IDS, min_size=1, max_size=4)
RESPONSES = st.lists(IDS, max_size=12)
BATCHES = st.lists(st.tuples(PROMPTS, RESPONSES), min_size=1, max_size=4)


def laid_out(batch, padding):
    """Tokens, prompt lengths and lengths of the rows; `padding` fills what is left."""
    time = max(len(prompt) + len(response) for prompt, response in batch) + len(padding)
    tokens = np.resize(np.array(padding or [0], np.int32), (len(batch), time)).copy()
    for row, (prompt, response) in enumerate(batch):
        tokens[row, : len(prompt) + len(response)] = prompt + response
    prompt_length = np.array([len(prompt) for prompt, _ in batch])
    return tokens, prompt_length, np.array([len(p) + len(r) for p, r in batch])


def walk(response, texts):
    """The response's steps as lists of places, one token after the other."""
    for ending in ("\n\n", "\n", ""):
        if any(ending in texts[token] for token in response):
            break
    steps = [[]]
    for place, token in enumerate(response):
        steps[-1].append(place)
        if ending in texts[token]:
            steps.append([])
    return [step for step in steps if step]


@cases(900)
@given(BATCHES, st.lists(IDS, max_size=3), VOCABULARIES, END_THINK)
def test_steps_equal_a_walk(batch, padding, texts, end_think):
    separators = Separators.from_texts(texts, end_think)
    tokens, prompt_length, length = laid_out(batch, padding)
    step_ids = segment_steps(tokens, prompt_length, length, separators)
    starts, ends = step_bounds(step_ids)
    counts = count_steps(step_ids)
    thinking = end_of_thinking(tokens, step_ids, separators)
    for row, (prompt, response) in enumerate(batch):
        steps = walk(response, texts)
        wanted = np.full(tokens.shape[1], -1)
        wanted[: len(prompt)] = 0
        for number, step in enumerate(steps, start=1):
            wanted[len(prompt) + np.array(step)] = number
        np.testing.assert_array_equal(step_ids[row], wanted)
        assert counts[row] == len(steps)
        bounds = [(0, len(prompt))]
        bounds += [(len(prompt) + step[0], len(prompt) + step[-1] + 1) for step in steps]
        past = [(length[row], length[row])] * (tokens.shape[1] - len(bounds))
        assert list(zip(starts[row].tolist(), ends[row].tolist(), strict=True)) == bounds + past
        marked = [n for n, s in enumerate(steps, 1) if any(response[p] == end_think for p in s)]
        assert thinking[row] == (marked[-1] if marked else tokens.shape[1] + 1)


@cases(500)
@given(st.tuples(PROMPTS, RESPONSES), BATCHES, PROMPTS, VOCABULARIES)
def test_a_response_is_cut_by_its_own_tokens(row, others, prompt, texts):
    """Neither its neighbours nor its padding nor the prompt's separators change its steps."""
    separators = Separators.from_texts(texts, 6)
    alone = segment_steps(*laid_out([row], []), separators)[0, len(row[0]) :]
    tokens, prompt_length, length = laid_out([*others, (prompt, row[1])], prompt)
    beside = segment_steps(tokens, prompt_length, length, separators)[-1]
    np.testing.assert_array_equal(beside[len(prompt) : length[-1]], alone)
    assert (beside[: len(prompt)] == 0).all()
    assert (beside[length[-1] :] == -1).all()


@cases(500)
@given(st.lists(RESPONSES, max_size=4), VOCABULARIES)
def test_ranges_are_counted_without_laying_out(responses, texts):
    separators = Separators.from_texts(texts)
    none = np.zeros(len(responses), np.int32)
    leaves = Leaves(
        *(none,) * 9,
        prompts=[],
        tokens=[np.array(response, np.int32) for response in responses],
        logprobs=[],
        entropy=[],
        importance=[],
        fci=[],
    )
    counted = count_ranges(leaves, StepRule(separators))
    assert counted.tolist() == [1 + len(walk(response, texts)) for response in responses]
    if responses:
        batch = [([0], response) for response in responses]
        step_ids = segment_steps(*laid_out(batch, [3]), separators)
        np.testing.assert_array_equal(counted, 1 + count_steps(step_ids))


@cases(300)
@given(BATCHES, VOCABULARIES, st.integers(1, 20))
def test_bounds_of_any_number_of_ranges(batch, texts, num_ranges):
    tokens, prompt_length, length = laid_out(batch, [2])
    step_ids = segment_steps(tokens, prompt_length, length, Separators.from_texts(texts))
    starts, ends = step_bounds(step_ids, num_ranges)
    assert starts.shape == ends.shape == (len(batch), num_ranges)
    for row in range(len(batch)):
        for number in range(num_ranges):
            places = np.flatnonzero(step_ids[row] == number)
            if len(places):
                assert (starts[row, number], ends[row, number]) == (places[0], places[-1] + 1)
            else:
                assert starts[row, number] == ends[row, number] == length[row]
