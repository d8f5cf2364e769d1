"""Every notebook runs, holds no logic of its own, and shows its outputs where it is read."""

from __future__ import annotations

import ast
import re
import subprocess

import nbformat
import pytest

from tests.notebooks import FOLDER, NOTEBOOKS, execute, without_clutter

NAMES = [
    "01_quickstart", "02_attention_compass", "03_compare_methods", "04_your_own_model_and_data"
]  # fmt: skip


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == NAMES


def test_the_install_script_is_a_script():
    subprocess.run(["bash", "-n", FOLDER / "colab.sh"], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    """And gives the kinds of output that are committed; figures and tables among them."""
    ran = without_clutter(execute(path, tmp_path), tmp_path)
    committed = nbformat.read(path, as_version=4)
    for cell, shown in zip(code_cells(ran), code_cells(committed), strict=True):
        kinds = [
            {(output.output_type, *sorted(output.get("data", {}))) for output in c.outputs}
            for c in (cell, shown)
        ]
        assert kinds[0] == kinds[1], cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_can_be_read_and_opened(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first, install, *cells = notebook.cells
    assert f"/blob/main/notebooks/{path.stem}.ipynb)" in first.source
    assert "colab-badge.svg" in first.source
    assert "notebooks/colab.sh" in install.source
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert [cell.execution_count for cell in code_cells(notebook)] == [
        *range(1, len(code_cells(notebook)) + 1)
    ]
    text = nbformat.writes(notebook)
    assert not re.search(r"/(tmp|work|home|root)/", text)
    for cell in cells:
        if cell.cell_type == "code":
            check_plain(cell.source)


def check_plain(source: str) -> None:
    """No classes, branches or nested loops: what a notebook does, the library does."""
    lines = [line for line in source.splitlines() if not line.startswith(("!", "%"))]
    for node in ast.walk(ast.parse("\n".join(lines))):
        assert not isinstance(node, ast.ClassDef | ast.If | ast.While | ast.Try), source
        if isinstance(node, ast.FunctionDef):
            # A reward function is the reader's own.
            assert len(node.body) <= 2, source
