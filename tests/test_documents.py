"""The documents' blocks run, their links lead somewhere, and the code that they name is there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import numpy as np
import pytest

from attnrl_jax.branching.selection import BranchingConfig
from experiments.settings import build, default_config
from tests.documents import DOCUMENTS, ROOT, anchors, links, prose, run_blocks

PLACE = re.compile(r"`((?:attnrl_jax|experiments|tests|docs)/[\w./-]+)`")

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def test_the_examples_of_the_method_print_what_they_say():
    """Run by the project's functions; the numbers below were worked out by hand."""
    namespace, printed = run_blocks(ROOT / "docs" / "algorithm.md")
    # Step 1: 0.4 from step 2 and 0.4 from step 3 (second head); step 2: 0.6 (first head).
    np.testing.assert_allclose(namespace["fci"], [0, 0, 0.6, 0], atol=1e-6)
    np.testing.assert_allclose(namespace["again"], [0.5, 0.8, 0.6, 0], atol=1e-6)
    assert namespace["found"].offsets[0, 0] == 2
    # Row 0: V = 3/5 over five leaves, 2/3 over three, 0; row 2 hangs below the first of these.
    root, shared, middle = 2 / 3, 3 / 5, 2 / 3
    first = 2 * (shared - root) / 5**0.5
    second = ((middle - root) + (middle - shared)) / 3**0.5
    expected = [[first, second, (0 - root) + (0 - middle)], [2 / 3, 0, 0]]
    expected += [[first, (1 - root) + (1 - shared), 0], [first, (0 - root) + (0 - shared), 0]]
    expected += [[first, second, 2 / 3]] * 2
    np.testing.assert_allclose(namespace["advantage"], expected, atol=1e-6)
    # target = floor(64 * 1920 / 960) = 128; ceil(12.8 + 57.6) = 71.
    assert "\n71\n" in printed


@every_document
def test_links_lead_somewhere(path):
    """Files and folders of the project, and headings in its documents."""
    for text, target in links(path):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"[{text}]({target})"
        assert there.is_relative_to(ROOT), f"[{text}]({target})"
        if anchor:
            assert there.suffix == ".md", f"[{text}]({target})"
            assert anchor in anchors(there), f"[{text}]({target})"


@every_document
def test_places_in_the_code_exist(path):
    """Paths in backquotes, and links whose text is a name: to the file that defines it."""
    for place in PLACE.findall(prose(path)):
        assert (ROOT / place).exists(), place
    for text, target in links(path):
        if re.fullmatch(r"`[A-Za-z_][\w.]*`", text) and target.endswith(".py"):
            file = path.parent / target
            assert is_defined(text.strip("`"), file), f"[{text}]({target})"


def test_settings_of_the_released_program_are_accepted():
    """The method's table of settings: its defaults are ours, and its other column is a run's."""
    text = (ROOT / "docs" / "algorithm.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \| `([^`]+)` \|$", text, flags=re.MULTILINE)
    assert len(rows) == 6
    config = default_config()
    for name, ours, theirs in rows:
        *groups, last = name.split(".")
        place = config
        for group in groups:
            place = place[group]
        assert place[last] == value(ours), name
        place[last] = value(theirs)
    train = build(config).train
    expected = BranchingConfig.golden(rule="fci")
    assert train.branching == expected
    assert (train.keep_unbranched, train.judge) == (False, "continuation")
    assert (train.batch_size.bounds, train.loss.mean_over) == (None, "micro-batch")


def test_symbols_of_the_method_are_settings_with_these_defaults():
    text = (ROOT / "docs" / "algorithm.md").read_text()
    settings = build(default_config()).train
    found = 0
    for row in re.findall(r"^\| \$.*\|$", text, flags=re.MULTILINE):
        _, _, names, defaults = row[1:-1].split("|")
        numbers = [
            int(number) for number in re.findall(r"\d+", re.sub(r",(?=\d{3})", "", defaults))
        ]
        for name, number in zip(re.findall(r"`([a-z_.]+)`", names), numbers, strict=True):
            assert functools.reduce(getattr, name.split("."), settings) == number, name
            found += 1
    assert found == 8


def value(text: str) -> object:
    """A setting as a table shows it: strings without quotes."""
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def test_the_method_names_its_places():
    named = [text for text, target in links(ROOT / "docs" / "algorithm.md") if ".py" in target]
    assert len(named) > 40


@pytest.mark.parametrize(
    ("name", "is_there"),
    [
        ("segment_steps", True),
        ("Separators.from_texts", True),
        ("Separators.newline", True),
        ("attnrl_jax.branching.steps", True),
        ("segment_step", False),
        ("Separators.from_text", False),
        ("Sequence", False),
    ],
)
def test_a_name_is_looked_up(name, is_there):
    assert is_defined(name, ROOT / "attnrl_jax" / "branching" / "steps.py") == is_there


@every_document
def test_formulas_are_what_github_renders(path):
    r"""Markdown eats a backslash before punctuation, and GitHub refuses \operatorname."""
    text = re.sub(r"`[^`]*`", "", prose(path))
    for display, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$]+)\$", text, flags=re.DOTALL):
        formula = display or inline
        assert not re.search(r"\\[^A-Za-z]|\\operatorname", formula), formula


def is_defined(name: str, file: Path) -> bool:
    """Whether a module defines a function, class, method, field or constant, or is called so."""
    if name == ".".join(file.resolve().relative_to(ROOT).with_suffix("").parts):
        return True
    body = ast.parse(file.read_text()).body
    for part in name.split("."):
        found = [node for node in body if part in _names(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]
