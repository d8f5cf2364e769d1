"""The API reference builds by the command of CONTRIBUTING.md, with warnings as errors."""

from __future__ import annotations

import html
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Folder of the reference, built by the command as printed."""
    folder = tmp_path_factory.mktemp("reference")
    [printed] = re.findall(r"^python (-W error -m pdoc .*)$", contributing(), flags=re.MULTILINE)
    words = [str(folder) if word == "DIR" else word for word in shlex.split(printed)]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder


def contributing() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text().replace("\\\n", " ")


def public_modules() -> dict[str, Path]:
    """Source of every module of a package none of whose names begins with an underscore."""
    modules = {}
    for package in ("attnrl_jax", "experiments"):
        for source in (ROOT / package).rglob("*.py"):
            path = source.relative_to(ROOT).with_suffix("")
            parts = path.parent.parts if path.name == "__init__" else path.parts
            folders = [ROOT.joinpath(*parts[:n]) for n in range(1, len(parts))]
            if all((folder / "__init__.py").exists() for folder in folders) and not any(
                part.startswith("_") for part in parts
            ):
                modules["/".join(parts)] = source
    return modules


def test_every_public_module_has_its_page(reference):
    modules = public_modules()
    assert {"attnrl_jax/branching/selection", "experiments/run"} <= modules.keys()
    pages = {
        page.relative_to(reference).with_suffix("").as_posix() for page in reference.rglob("*.html")
    }
    assert modules.keys() | {"index"} == pages


def test_every_public_module_says_what_it_is_for(reference):
    """A page without text below its heading would be that of a module without a docstring."""
    assert not [
        name
        for name in public_modules()
        if '<div class="docstring">'
        not in (reference / f"{name}.html").read_text().split("<section id=")[0]
    ]


def shown(page: Path) -> str:
    """Text of a page, source code aside."""
    text = page.read_text()
    text = re.sub(r'<div class="pdoc-code codehilite">.*?</pre>', "", text, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", "", text))


def test_types_of_arrays_read_as_in_the_source(reference):
    losses = shown(reference / "attnrl_jax/algorithms/losses.html")
    assert "per_token(self) -> dict[str, Float[Array, '']]" in losses
    assert "mask: Union[Float[Array, 'batch time'], Float[ndarray, 'batch time']]" in losses
    for page in reference.rglob("*.html"):
        text = shown(page)
        for wrong in ("ForwardRef", "jaxtyping.", "Alias for field number"):
            assert wrong not in text, page
