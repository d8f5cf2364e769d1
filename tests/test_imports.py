"""Imports point one way: types -> sharding -> models -> sampling, scoring -> training."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "attnrl_jax"

BELOW_MODELS = {
    "types", "shapes", "processes", "sharding", "branching", "algorithms", "packing"
}  # fmt: skip
BELOW_TRAINING = BELOW_MODELS | {
    "models", "sampling", "scoring", "tasks", "datasets", "evaluation"
}  # fmt: skip
# What each room of the package may import of the others.
MAY_IMPORT = {
    "types": set(),
    "host_memory": set(),
    "shapes": set(),
    "processes": set(),
    "packing": {"types", "shapes"},
    "branching": {"types"},
    "algorithms": {"types", "branching"},
    "sharding": {"types"},
    "tasks": {"types", "host_memory", "branching"},
    "datasets": {"tasks"},
    "models": BELOW_MODELS,
    "sampling": BELOW_MODELS | {"models"},
    "scoring": BELOW_MODELS | {"models"},
    "step_attention": BELOW_MODELS | {"models"},
    "evaluation": {"types", "branching", "models", "sampling", "tasks"},
    "training": BELOW_TRAINING | {"host_memory"},
    "interruption": set(),
    "compilation": BELOW_TRAINING | {"training"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Dotted names of all that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    """`models` of attnrl_jax/models/config.py, `scoring` of attnrl_jax/scoring.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = room(path)
    if own == "__init__":
        return
    assert own in MAY_IMPORT, f"{own} has no place in the order of imports yet"
    for name in imported_names(path):
        top, *rest = name.split(".")
        assert top not in ("experiments", "ml_collections", "torch", "tensorflow"), name
        if top == "attnrl_jax":
            assert rest, f"{name}: import the module that is meant"
            assert rest[0] == own or rest[0] in MAY_IMPORT[own], name
        if top == "flax":
            assert own not in ("branching", "algorithms"), name
            assert own == "models" or name.startswith("flax.struct"), name


def test_the_rule_sees_imports(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import flax.linen as nn\ndef f():\n    from attnrl_jax.models import config\n")
    assert imported_names(path) == {"flax.linen", "attnrl_jax.models.config"}
    assert {"steps.py", "losses.py", "types.py"} <= {module.name for module in MODULES}
