"""What the properties are asked about: trees of responses, requests, JSON values, settings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from attnrl_jax.types import Paths

# Of every property of this folder, in the order in which their files are imported.
COUNTS: list[int] = []


def cases(count: int) -> settings:
    """How many cases a property is asked about; they are added up by `test_count.py`."""
    COUNTS.append(count)
    return settings(max_examples=count)


@dataclass(frozen=True)
class Row:
    """A response of a tree, initial (its `root` is its own place) or continued."""

    problem: int
    root: int
    prompt_length: int
    split: int
    response_length: int
    reward: float


def _column(rows: list[Row], name: str, dtype: type = np.int64) -> np.ndarray:
    return np.array([getattr(row, name) for row in rows], dtype)


def tree_arguments(rows: list[Row]) -> dict[str, np.ndarray]:
    """The rows as `path_segments` takes them."""
    names = ("problem", "root", "split", "response_length")
    return {name: _column(rows, name) for name in names} | {
        "reward": _column(rows, "reward", np.float64)
    }


def paths_of(rows: list[Row]) -> Paths:
    """The rows as `place_paths` takes them."""
    prompt, response = _column(rows, "prompt_length"), _column(rows, "response_length")
    root, split = _column(rows, "root"), _column(rows, "split")
    initial = root == np.arange(len(rows))
    return Paths(
        prompt_length=prompt,
        length=prompt + response,
        problem=_column(rows, "problem"),
        root=root,
        shared=prompt + np.where(initial, response, split),
    )


_BRANCHES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.booleans()), max_size=4)
_ROOTS = st.lists(st.tuples(st.integers(0, 9), st.booleans(), _BRANCHES), min_size=1, max_size=3)


@st.composite
def trees(draw: st.DrawFn) -> list[Row]:
    """Rows of up to three problems in any order: empty responses, offsets that repeat, at 0 and at
    the response's end, continuations of no tokens."""
    problems = draw(st.lists(st.tuples(st.integers(1, 4), _ROOTS), max_size=3))
    rows: list[Row] = []
    for problem, (prompt, roots) in enumerate(problems):
        for length, reward, branches in roots:
            root = len(rows)
            rows.append(Row(problem, root, prompt, 0, length, float(reward)))
            for offset, own, branch_reward in branches:
                split = min(offset, length)
                rows.append(Row(problem, root, prompt, split, split + own, float(branch_reward)))
    order = draw(st.permutations(range(len(rows))))
    place = np.argsort(order) if rows else []
    return [
        Row(r.problem, int(place[r.root]), r.prompt_length, r.split, r.response_length, r.reward)
        for r in (rows[i] for i in order)
    ]


# Half surrogate pairs, NUL, marks of LaTeX and digits, of which problems are made.
STRANGE_TEXT = st.text(
    st.sampled_from("ab1 0.,$\\{}()#-\n\x00é中²½\ud800\u202e") | st.characters(codec=None),
    max_size=12,
)
HUGE = st.sampled_from([2**31, -(2**31), 2**63, 2**64, -(2**63) - 1, 10**400, -(10**400)])
FLOATS = st.floats() | st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e308, 5e-324, 2.0**53])
SCALARS = st.none() | st.booleans() | st.integers(-3, 12) | HUGE | FLOATS | STRANGE_TEXT
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRANGE_TEXT, inner, max_size=3),
    max_leaves=5,
)
