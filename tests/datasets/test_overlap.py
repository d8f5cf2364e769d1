"""Same texts, words, and overlap by n-grams."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrl_jax.datasets.overlap import find_overlap, same_text_key, words


@pytest.mark.parametrize(
    "other",
    [
        "find $a+b$  for $a=1, b = 2$",
        "Find \\(a + b\\) for \\(a=1\\), \\(b=2\\).",
        "Ｆｉｎｄ $a + b$ for $a=1$，$b=2$．",
        "Find\n\\[a+b\\]\nfor $a=1$, $b=2$:",
    ],
)
def test_mark_up_makes_no_other_text(other):
    assert same_text_key(other) == same_text_key("Find $a + b$ for $a=1$, $b=2$.")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Sum $2n - 1$.", "Sum $2n + 1$."),
        ("What is $88 \\div (4 \\div 2)$?", "What is $88 \\div 4 \\div 2$?"),
        ("Compute 10² now", "Compute 102 now"),
        ("Compute 1.5 now", "Compute 15 now"),
        ("Points (1,2) and 3", "Points (12) and 3"),
        ("Digits 1 2", "Digits 12"),
        ("Compute 5!", "Compute 5"),
    ],
)
def test_other_problems_are_other_texts(one, other):
    assert same_text_key(one) != same_text_key(other)


@settings(derandomize=True)
@given(st.text())
def test_key_does_not_see_outer_space_and_case(text):
    assert same_text_key(f"  {text}\n") == same_text_key(text)


def test_words():
    assert words("Let $x_1^{2} = \\frac{3}{4}y²$, 求和 ２a.") == [
        "let", "x", "1", "2", "frac", "3", "4", "y", "2", "求", "和", "2", "a",
    ]  # fmt: skip


def overlap(texts, problem, ngram=2, share=0.8):
    found = find_overlap(texts, {"bench": [problem]}, ngram, share)
    assert bool(found.problems["bench"]) == bool(found.texts["bench"])
    return found.texts["bench"]


def test_share_counts_different_n_grams_of_the_benchmark_problem():
    problem = "a b c d e f"  # five bigrams: ab bc cd de ef
    texts = ["a b c d e", "a b c d", "x a b c d e f y z u v w", "f e d c b a", "ab ab ab ab ab"]
    # Four of five are 0.8, three of five are not; the length of the text does not matter.
    assert overlap(texts, problem) == {0, 2}
    assert overlap(texts, problem, share=1.0) == {2}
    assert overlap(texts, problem, share=0.6) == {0, 1, 2}
    # "a b" once or often is one bigram.
    assert overlap(["a b"], "a b a b a b", share=0.5) == {0}
    assert overlap(["a b"], "a b a b a b", share=0.51) == set()


def test_share_is_exact_where_floats_are_not():
    """0.8 * 35 rounds up to 28.000000000000004; 28 of 35 n-grams are 80 %."""
    grams = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(35)]
    assert overlap([" ".join(grams[:28])], " ".join(grams), ngram=1) == {0}
    assert overlap([" ".join(grams[:27])], " ".join(grams), ngram=1) == set()


def test_signs_do_not_hide_a_benchmark_problem():
    assert overlap(["Find the value of $x-1$"], "find the value of \\(x + 1\\)", ngram=6) == {0}


def test_short_problem_overlaps_with_its_own_text_only():
    texts = ["What is $1+1$", "What is 1 - 1?", "Say what is 1+1?"]
    assert overlap(texts, "What is 1 + 1?", ngram=6) == {0}


def test_every_benchmark_has_its_own_counts():
    found = find_overlap(
        ["a b c", "d e f", "x y z"],
        {"one": ["a b c", "d e f", "q r s"], "two": ["d e f"], "none": []},
        ngram=3,
        share=1.0,
    )
    assert found.problems == {"one": {0, 1}, "two": {0}, "none": set()}
    assert found.texts == {"one": {0, 1}, "two": {1}, "none": set()}
