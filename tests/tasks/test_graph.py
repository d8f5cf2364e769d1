"""The generated task: hand-checked problems, named wrong steps, disjoint splits, tokenizer."""

import dataclasses

import numpy as np
import pytest

from attnrl_jax.models.config import read_config
from attnrl_jax.models.weights import load_params
from attnrl_jax.tasks import graph
from attnrl_jax.tasks.graph import Definition, GraphProblem, GraphSource, GraphTaskConfig
from attnrl_jax.tasks.tokenizer import load_tokenizer
from experiments import pretrain
from experiments.tasks import shipped_policy

CONFIG = GraphTaskConfig()
# c = 1 + 9 = 0, f = 0 - 4 = 6, o = 6 * 9 = 4; f does not matter to p, p = 0 - 1 = 9.
PROBLEM = GraphProblem(
    given=(("h", 9), ("j", 1), ("i", 4)),
    definitions=(
        Definition("c", "j", "+", "h"),
        Definition("f", "c", "-", "i"),
        Definition("o", "f", "*", "h"),
        Definition("p", "c", "-", "j"),
    ),
    asked="p",
)
CAREFUL = (
    "? p \n\n c: j + h j= 1 h= 9 c= 0 \n\n f: c - i c= 0 i= 4 f= 6 \n\n "
    "o: f * h f= 6 h= 9 o= 4 \n\n p: c - j c= 0 j= 1 p= 9 \n\n \\boxed{ 9 }"
)


def draw_problem(seed, index):
    return GraphSource(CONFIG, "train", seed).graph(index)


def test_text_values_and_demonstrations_of_a_problem_worked_by_hand():
    assert PROBLEM.text == "h= 9 j= 1 i= 4 c: j + h f: c - i o: f * h p: c - j ? p"
    assert PROBLEM.values == {"h": 9, "j": 1, "i": 4, "c": 0, "f": 6, "o": 4, "p": 9}
    assert PROBLEM.answer == "9"
    assert graph.demonstration(PROBLEM, np.random.default_rng(0)) == CAREFUL
    hasty = graph.demonstration(PROBLEM, np.random.default_rng(0), 1.0, 1.0)
    assert hasty == (
        "? p \n\n c: j + h c= 0 \n\n f: c - i f= 6 \n\n o: f * h o= 4 \n\n p: c - j p= 9 \n\n "
        "\\boxed{ 9 }"
    )


def test_dependency_graph():
    assert PROBLEM.depends_on["f"] == ("c", "i")
    assert PROBLEM.ancestors("p") == {"c", "j", "h"}
    assert PROBLEM.ancestors("o") == {"f", "h", "c", "i", "j"}
    assert PROBLEM.ancestors("h") == set()


@pytest.mark.parametrize("index", range(30))
def test_drawn_problems_can_be_solved_in_order(index):
    problem = draw_problem(5, index)
    assert problem == draw_problem(5, index)
    assert problem != draw_problem(6, index)
    known = [name for name, _ in problem.given]
    for definition in problem.definitions:
        assert {definition.left, definition.right} <= set(known)  # so the graph has no cycle
        assert definition.name not in known
        known.append(definition.name)
    assert problem.asked == known[-1]
    assert 2 <= len(problem.definitions) <= 12


def test_demonstrations_have_4_to_15_steps_and_known_words():
    source = GraphSource(CONFIG, "pretrain", seed=1, size=220)
    words = set(graph.vocabulary())
    assert len(words) == len(graph.vocabulary())
    counts = set()
    for index in range(len(source)):
        problem = source.graph(index)
        text = graph.demonstration(problem, np.random.default_rng(index), 0.4, 0.6)
        counts.add(len(text.split(graph.BLANK_LINE)))
        assert set(f"{problem.text} {text}".split(" ")) <= words
        assert len(f"{problem.text} {text}".split(" ")) < 200
    assert counts == set(range(4, 15))


@pytest.mark.parametrize("hasty", [0.0, 0.5, 1.0])
def test_first_wrong_step_is_none_when_every_value_is_right(hasty):
    rng = np.random.default_rng(3)
    for index in range(50):
        problem = draw_problem(1, index)
        text = graph.demonstration(problem, rng, hasty, 1.0)
        assert graph.first_wrong_step(problem, text) is None
        assert graph.first_wrong_step(problem, f"{text} {graph.END} {graph.PAD}") is None


@pytest.mark.parametrize(
    ("step", "right", "wrong"),
    [
        (1, "? p", "? o"),
        (2, "j= 1 h= 9 c= 0", "j= 1 h= 9 c= 1"),
        (3, "f: c - i", "f: c + i"),
        (3, "i= 4 f= 6", "i= 5 f= 6"),
        (3, "c= 0 i= 4 f= 6", "c= 0 h= 9 f= 6"),
        (4, "f= 6 h= 9 o= 4", "f= 6 h= 9 o="),
        (4, "f= 6 h= 9 o= 4", "f= 6 h= 9"),
        (4, "o= 4", "p= 9"),
        (5, "p: c - j", "q: c - j"),
        (5, "p: c - j c= 0", "p: c - j c 0"),
        (6, "\\boxed{ 9 }", "\\boxed{ 8 }"),
        (6, "\\boxed{ 9 }", "\\boxed{ 9"),
    ],
)
def test_first_wrong_step_names_the_corrupted_step(step, right, wrong):
    head, tail = CAREFUL.split(right)
    assert graph.first_wrong_step(PROBLEM, head + wrong + tail) == step


def test_first_wrong_step_of_hasty_demonstrations_is_the_first_wrong_value():
    for index in range(100):
        problem = draw_problem(2, index)
        text = graph.demonstration(problem, np.random.default_rng(index), 1.0, 0.6)
        steps = text.split(" \n\n ")
        wrong = [
            number
            for number, step in enumerate(steps[1:-1], start=2)
            if int(step.split()[-1]) != problem.values[step.split()[-2].removesuffix("=")]
        ]
        assert graph.first_wrong_step(problem, text) == (wrong[0] if wrong else None)


def test_demonstration_habits_have_the_asked_shares():
    rng = np.random.default_rng(0)
    hasty = right = steps = 0
    for index in range(300):
        problem = draw_problem(3, index)
        found = dict(problem.given)
        text = graph.demonstration(problem, rng, 0.3, 0.6)
        for definition, step in zip(problem.definitions, text.split("\n\n")[1:-1], strict=True):
            words = step.split()
            value, steps = definition.value(found), steps + 1
            found[definition.name] = int(words[-1])
            if len(words) == 6:
                hasty, right = hasty + 1, right + (value == found[definition.name])
            else:
                assert value == found[definition.name]
    assert abs(hasty / steps - 0.3) < 0.04
    assert abs(right / hasty - 0.6) < 0.06


def test_hasty_probability_grows_with_the_operations():
    config = GraphTaskConfig(hasty_min=0.1, hasty_max=0.5)
    assert config.hasty_probability(2) == pytest.approx(0.1)
    assert config.hasty_probability(7) == pytest.approx(0.3)
    assert config.hasty_probability(12) == pytest.approx(0.5)


def test_splits_are_disjoint_and_held_out_problems_distinct_and_stratified():
    texts = {}
    for split in ("held_out", "pretrain", "train"):
        source = GraphSource(CONFIG, split, seed=0, size=1024)
        problems = [source[index] for index in range(len(source))]
        assert all(graph.split_of(problem.text) == split for problem in problems)
        texts[split] = {problem.text for problem in problems}
        levels = np.bincount([problem.level for problem in problems])[2:]
        assert len(levels) == 11
        assert levels.max() - levels.min() <= 1
    assert len(texts["held_out"]) == 1024
    assert not texts["held_out"] & (texts["pretrain"] | texts["train"])
    assert not texts["pretrain"] & texts["train"]


def test_source_is_random_access():
    source = GraphSource(CONFIG, "train", seed=4, size=50)
    forward = [source[index] for index in range(50)]
    assert [source[index] for index in reversed(range(50))] == forward[::-1]
    assert GraphSource(CONFIG, "train", seed=4, size=9)[7] == forward[7]
    assert GraphSource(CONFIG, "train", seed=5, size=50)[7] != forward[7]
    problem, drawn = forward[7], source.graph(7)
    assert (problem.text, problem.answers, problem.level) == (
        drawn.text,
        (drawn.answer,),
        len(drawn.definitions),
    )
    with pytest.raises(IndexError, match="50 of 50"):
        source[50]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("given", 0),
        ("min_operations", 0),
        ("max_operations", 1),
        ("max_operations", 16),
        ("operators", "+/"),
        ("operators", ""),
        ("chain", 1.5),
        ("hasty_min", -0.1),
        ("hasty_right", 2.0),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        dataclasses.replace(CONFIG, **{setting: value})


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="held_out"):
        GraphSource(CONFIG, "test")


@pytest.fixture(scope="module")
def shipped_tokenizer():
    config = read_config(shipped_policy())
    return load_tokenizer(shipped_policy(), config.vocab_size)


def test_shipped_tokenizer_round_trip(shipped_tokenizer):
    for index in range(30):
        problem = draw_problem(8, index)
        text = graph.demonstration(problem, np.random.default_rng(index), 0.3)
        for written in (problem.text, text, f"{problem.text} {text}"):
            ids = shipped_tokenizer.encode(written)
            assert len(ids) == len(written.split(" "))
            assert shipped_tokenizer.decode(ids) == written
    # Spaces around the blank line do not matter to the ids.
    assert (
        shipped_tokenizer.encode("c= 0\n\nf:").tolist()
        == shipped_tokenizer.encode("c= 0 \n\n f:").tolist()
    )


def test_shipped_tokenizer_has_one_step_separator_and_one_end(shipped_tokenizer):
    vocabulary = graph.vocabulary()
    separators = shipped_tokenizer.separators()
    assert np.flatnonzero(separators.blank_line).tolist() == [vocabulary.index("\n\n")]
    assert shipped_tokenizer.end_ids == (vocabulary.index(graph.END),)
    assert shipped_tokenizer.vocab_size == len(vocabulary)
    assert shipped_tokenizer.decode([vocabulary.index("\n\n")]) == "\n\n"


def test_shipped_policy_is_small_and_of_the_recipe():
    assert read_config(shipped_policy()) == pretrain.model_config()
    assert sum(path.stat().st_size for path in shipped_policy().iterdir()) < 8 * 2**20


@pytest.mark.slow
def test_shipped_policy_solves_the_easy_and_few_of_the_hard(shipped_tokenizer):
    """The band that leaves reinforcement learning something to gain and something to see."""
    params = load_params(shipped_policy(), pretrain.model_config())
    measured = pretrain.evaluate(params, CONFIG, shipped_tokenizer, 264)
    by_operations = measured["accuracy_by_operations"]
    assert 0.25 <= measured["accuracy"] <= 0.60
    assert np.mean([by_operations[k] for k in (2, 3)]) >= 0.75
    assert np.mean([by_operations[k] for k in (11, 12)]) <= 0.25
    assert measured["named_before_last"] >= 0.8
    assert 4 <= measured["steps"]["mean"] <= 15
