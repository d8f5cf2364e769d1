"""The notebooks, run from top to bottom: `python -m tests.notebooks` writes their outputs anew."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.conftest import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# What tqdm and Orbax say of things that are meant.
CLUTTER = re.compile("TqdmWarning|WARNING:absl")
# Of one cell, seconds; on a machine at work.
TIMEOUT = 600


def execute(path: Path, workdir: Path) -> nbformat.NotebookNode:
    """Runs a notebook in a copy of its own of what it finds around it.

    Args:
      path: of the notebook.
      workdir: empty folder; what the notebook writes goes there.

    Returns:
      the notebook with its outputs.

    Raises:
      CellExecutionError: a cell failed.
    """
    for name in ("attnrl_jax", "experiments", "docs"):
        (workdir / name).symlink_to(ROOT / name)
    (workdir / "notebooks").mkdir()
    notebook = nbformat.read(path, as_version=4)
    # As Jupyter starts it: in the folder of the notebook.
    client = NotebookClient(
        notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(workdir / "notebooks")}}
    )
    environment = {name: os.environ.get(name) for name in ("PYTHONPATH", "XLA_FLAGS")}
    os.environ["PYTHONPATH"] = str(workdir)
    os.environ.pop("XLA_FLAGS", None)
    try:
        client.execute()
    finally:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    return notebook


def without_clutter(notebook: nbformat.NotebookNode, workdir: Path) -> nbformat.NotebookNode:
    """Without what differs from run to run, names this machine, or is other packages' advice."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [o for o in cell.outputs if not CLUTTER.search(o.get("text", ""))]
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = output.text.replace(str(workdir), "/content/attnrl_jax")
    return notebook


def main() -> None:
    import tempfile

    chosen = [path for path in NOTEBOOKS if not sys.argv[1:] or path.stem in sys.argv[1:]]
    for path in chosen:
        with tempfile.TemporaryDirectory() as folder:
            notebook = without_clutter(execute(path, Path(folder)), Path(folder))
        nbformat.write(notebook, path)
        print(f"{path.name}: written")


if __name__ == "__main__":
    main()
