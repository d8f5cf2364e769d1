import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.branching.steps import (
    Separators,
    StepRule,
    count_steps,
    end_of_thinking,
    segment_steps,
    step_bounds,
)
from tests.golden_data import load_json

TIME = 80


def golden_rows():
    """All golden rows in one batch: tokens, lengths, and what they must give."""
    data = load_json("segmentation")
    rows = [
        (row, "Qwen2.5" in case["model_path"]) for case in data["cases"] for row in case["rows"]
    ]
    tokens = np.full((len(rows), TIME), 10, np.int32)  # padding that looks like separators
    prompt_length = np.array([row["prompt_len"] for row, _ in rows], np.int32)
    length = prompt_length + np.array([len(row["response"]) for row, _ in rows], np.int32)
    for i, (row, _) in enumerate(rows):
        tokens[i, prompt_length[i] : length[i]] = row["response"]
    is_separator = {name: np.isin(np.arange(256), data[name]) for name in ("sep2", "sep1")}
    separators = Separators(is_separator["sep2"], is_separator["sep1"], data["stop_think"])
    return rows, tokens, prompt_length, length, separators


def all_of_steps(tokens, prompt_length, length, separators):
    step_ids = segment_steps(tokens, prompt_length, length, separators)
    starts, ends = step_bounds(step_ids)
    thinking = end_of_thinking(tokens, step_ids, separators)
    return step_ids, starts, ends, count_steps(step_ids), thinking


@pytest.mark.parametrize("mode", ["numpy", "jit"])
def test_golden_segmentation(mode):
    rows, tokens, prompt_length, length, separators = golden_rows()
    assert len(rows) == 23
    # The prompt of every row is made of separators and </think>, which must not matter.
    tokens = np.where(np.arange(TIME) < prompt_length[:, None], np.arange(TIME) % 6 + 10, tokens)
    arrays = (tokens, prompt_length, length)
    if mode != "numpy":
        arrays = tuple(jnp.asarray(x) for x in arrays)
        separators = jax.tree.map(jnp.asarray, separators)
    function = jax.jit(all_of_steps) if mode == "jit" else all_of_steps
    step_ids, starts, ends, num_steps, thinking = map(np.asarray, function(*arrays, separators))
    for i, (row, no_think) in enumerate(rows):
        count = len(row["token_ranges"])
        np.testing.assert_array_equal(
            np.stack([starts[i, :count], ends[i, :count]], axis=1), row["token_ranges"]
        )
        assert (starts[i, count:] == length[i]).all()
        assert (ends[i, count:] == length[i]).all()
        assert num_steps[i] == row["step_num"]
        for k, (start, end) in enumerate(row["token_ranges"]):
            assert (step_ids[i, start:end] == k).all()
        assert (step_ids[i, length[i] :] == -1).all()
        if not no_think:
            expected = row["stop_think_step"]
            assert thinking[i] == (TIME + 1 if expected == -1 else expected)


def test_no_end_of_thinking_where_it_is_not_one_token():
    rows, tokens, prompt_length, length, separators = golden_rows()
    separators = Separators(separators.blank_line, separators.newline)
    step_ids = segment_steps(tokens, prompt_length, length, separators)
    assert (end_of_thinking(tokens, step_ids, separators) == TIME + 1).all()
    ignored = [row["stop_think_step"] for row, no_think in rows if no_think]
    assert ignored == [-1]


def test_leading_axes_and_single_sequences_agree():
    _, tokens, prompt_length, length, separators = golden_rows()
    batched = all_of_steps(tokens, prompt_length, length, separators)
    one = all_of_steps(tokens[3], prompt_length[3], length[3], separators)
    grouped = all_of_steps(
        tokens[:22].reshape(2, 11, TIME),
        prompt_length[:22].reshape(2, 11),
        length[:22].reshape(2, 11),
        separators,
    )
    for whole, single, two in zip(batched, one, grouped, strict=True):
        np.testing.assert_array_equal(whole[3], single)
        np.testing.assert_array_equal(whole[:22].reshape(two.shape), two)


def test_bounds_of_fewer_ranges_than_tokens():
    step_ids = np.array([[0, 0, 1, 2, 2, -1], [0, 1, 2, 3, 4, 5]])
    starts, ends = step_bounds(step_ids, num_ranges=4)
    np.testing.assert_array_equal(starts, [[0, 2, 3, 5], [0, 1, 2, 3]])
    np.testing.assert_array_equal(ends, [[2, 3, 5, 5], [1, 2, 3, 4]])


def test_empty_response_has_no_step():
    separators = Separators(np.zeros(4, bool), np.zeros(4, bool))
    step_ids = segment_steps(np.array([1, 1, -7]), np.array(2), np.array(2), separators)
    np.testing.assert_array_equal(step_ids, [0, 0, -1])
    assert count_steps(step_ids) == 0


def test_separators_from_texts():
    texts = ["a", "\n", "\n\n", ".\n\n", "\n \n", "</think>"]
    separators = Separators.from_texts(texts, end_think=5)
    np.testing.assert_array_equal(separators.blank_line, [0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(separators.newline, [0, 1, 1, 1, 1, 0])
    with pytest.raises(ValueError, match="end_think=6"):
        Separators.from_texts(texts, end_think=6)


def every_third(response):
    ends = np.zeros(len(response), bool)
    ends[2::3] = True
    return ends


def test_a_segmenter_cuts_responses_its_own_way():
    rule = StepRule(Separators(np.zeros(9, bool), np.zeros(9, bool)), every_third)
    tokens = np.arange(14).reshape(2, 7) % 9
    step_ids = rule.step_ids(tokens, np.array([1, 0]), np.array([7, 5]))
    assert step_ids.tolist() == [[0, 1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, -1, -1]]
    assert [rule.count(tokens[0, :n]) for n in range(8)] == [0, 1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("wrong", [lambda r: np.ones(len(r)), lambda r: np.ones(3, bool)])
def test_what_a_segmenter_returns_is_checked(wrong):
    rule = StepRule(Separators(np.zeros(9, bool), np.zeros(9, bool)), wrong)
    with pytest.raises(ValueError, match=r"returned .* it must return bool\[7\]"):
        rule.step_ids(np.arange(7)[None], np.array([0]), np.array([7]))
