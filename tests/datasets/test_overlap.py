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
        ("Let $\\gcd(a,b)=1$", "Let $\\gcd(ab)=1$"),
        ("Let f(ab, g(cd), ef) be", "Let f(ab g(cd) ef) be"),
        ("Roots $x_1,x_2$ are", "Roots $x_1x_2$ are"),
        ("Roots x_1, x_2 are", "Roots x_1 x_2 are"),
        ("Write $0.\\overline{3}$", "Write $0\\overline{3}$"),
        ("Write 0.\\overline{3}", "Write 0\\overline{3}"),
        ("Let $ab, cd$ be", "Let $abcd$ be"),
        ("Let \\pi, \\tau be", "Let \\pi\\tau be"),
        ("Compute 2ⁿ", "Compute 2n"),
        ("Compute xⁿ⁺¹ now", "Compute xⁿ + 1 now"),
        ("Compute 2⁻¹", "Compute 2-1"),
        ("Compute 101₂", "Compute 1012"),
        ("Compute 101₂", "Compute 101²"),
        ("Compute 2½", "Compute 21⁄2"),
    ],
)
def test_other_problems_are_other_texts(one, other):
    assert same_text_key(one) != same_text_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Point (1, 2)", "Point (1,2)"),
        ("for $1, 2, \\ldots, N$", "for $1,2,\\ldots,N$"),
        ("for 1, 2 and 3", "for 1,2 and 3"),
        ("less than $10, 000$.", "less than $10,000$"),
        ("Let $n=3.$ Find", "Let $n=3$. Find"),
        ("If $x, y,$ and $z$", "If $x$, $y$ and $z$"),
        ("In $ABC$, a point", "In $ABC$ a point"),
        ("Evaluate $\\log_8 2$", "Evaluate $\\log_82$"),
        ("Let $f\\,dx\\ $ be", "Let $fdx$ be"),
        ("Of 9 men, he has", "Of 9 men he has"),
        ("from $1 to $999 inclusive. The men", "from \\$1 to \\$999 inclusive the men"),
        ("\\[x=1,\\\\ y=2.\\]", "\\[x=1\\\\ y=2\\]"),
        ("已知 $a$、$b$，求", "已知 $a,b$ 求"),
        ("Compute 101₂ or x²", "Compute 101_2 or x^2"),
    ],
)
def test_space_and_prose_marks_make_no_other_text(one, other):
    """Bug: the comma of `(1, 2)` was left out, that of `(1,2)` was not; 17 groups of DAPO kept."""
    assert same_text_key(one) == same_text_key(other)


@settings(derandomize=True)
@given(st.lists(st.sampled_from(["a", "bc", "1", ",", ".", "(", ")", "+", "\\pi", "_"])))
def test_key_does_not_see_space_in_mathematics(parts):
    def written(space):
        # Digits stand apart either way.
        return "Let $" + space.join(parts).replace("1", " 1 ") + "$ be"

    assert same_text_key(written(" ")) == same_text_key(written("").replace("\\pi", "\\pi "))


def test_deep_brackets_are_no_burden():
    text = "(" * 2000 + "a, b" + ")" * 2000
    assert same_text_key(text) == text.replace(" ", "")
    assert same_text_key("(" * 20_000 + "$") == "(" * 20_000


@settings(derandomize=True)
@given(st.text())
def test_key_does_not_see_outer_space_and_case(text):
    assert same_text_key(f"  {text}\n") == same_text_key(text)


def test_words():
    assert words("Let $x_1^{2} = \\frac{3}{4}y²$, 求和 ２a.") == [
        "let", "x", "1", "2", "frac", "3", "4", "y", "2", "求", "和", "2", "a",
    ]  # fmt: skip


def test_words_do_not_see_space_in_mathematics():
    for text in ("$xy+yz$ of xy", "$x y + y z$ of xy", "\\(x y+yz\\) of xy", "$$x y+y z$$ of xy"):
        assert words(text) == ["xy", "yz", "of", "xy"]
    assert words("a b $\\sin x y \\text{ if it is}$, $5 c d") == [
        "a", "b", "sin", "xy", "text", "if", "it", "is", "5", "c", "d",
    ]  # fmt: skip
    assert words("101₂ and 2ⁿ") == ["101", "2", "and", "2", "n"]


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


LEAK = "Positive integers $x, y, z$ satisfy $x y+z=160$. Compute the smallest value of $x+y z$."


@pytest.mark.parametrize("share", [0.0, 0.8, 1.0])
def test_a_problem_spaced_otherwise_overlaps(share):
    """Bug: DAPO kept this olympiad problem, of which it writes `$xy + z = 160$`."""
    text = LEAK.replace("x y+z=", "xy + z = ").replace("y z", "yz")
    assert overlap([text, "Find $x$."], LEAK, ngram=6, share=share) == {0}


def test_equal_texts_overlap_whatever_the_share():
    problem = "a b c d e f"
    assert overlap(["x a b c d e f", "A b c d e f?"], problem, share=0) == {1}
    keys = [same_text_key(text) for text in ("x", problem)]
    assert find_overlap(["x", problem], {"one": [problem]}, 2, 0, keys).texts == {"one": {1}}


def test_every_benchmark_has_its_own_counts():
    found = find_overlap(
        ["a b c", "d e f", "x y z"],
        {"one": ["a b c", "d e f", "q r s"], "two": ["d e f"], "none": []},
        ngram=3,
        share=1.0,
    )
    assert found.problems == {"one": {0, 1}, "two": {0}, "none": set()}
    assert found.texts == {"one": {0, 1}, "two": {1}, "none": set()}
