"""The peers' virtual environment: made on first use, made anew when its requirements change."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements-peers.txt"
DEFAULT = Path("~/.cache/attnrl_jax/bench-peers")
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# Marks a folder as ours, which may be removed; empty until the environment is finished.
STAMP = "attnrl_jax.json"


class VenvError(ValueError):
    """The environment of the peers cannot be made."""


def peers_python(
    folder: Path,
    find_links: str,
    say: Callable[[str], None],
    requirements: Path = REQUIREMENTS,
) -> Path:
    """The interpreter of the peers' environment, which is made where need be.

    Args:
      folder: of the environment.
      find_links: folder (or page) of wheels that pip may take too; "" takes torch's CPU build from
        its own index, unless the environment variable PIP_FIND_LINKS names a folder.
      say: prints a line on what goes on.
      requirements: what is in it.

    Raises:
      VenvError: the folder holds something else, or pip failed.
    """
    wanted = {
        "requirements": hashlib.sha256(requirements.read_bytes()).hexdigest(),
        "python": "{}.{}".format(*sys.version_info[:2]),
    }
    python = folder / "bin" / "python"
    with _locked(folder, say):
        if _stamp(folder) == wanted and python.exists():
            return python
        if folder.exists():
            if any(folder.iterdir()) and not (folder / STAMP).exists():
                raise VenvError(f"--peers: {folder} holds something else (no {STAMP})")
            say(f"{folder} was made from other requirements, or not to its end: removing it")
            shutil.rmtree(folder)
        say(f"making the peers' virtual environment in {folder} (once; some minutes)")
        folder.mkdir()
        (folder / STAMP).write_text("{}\n")
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        links = ["--find-links", find_links] if find_links else []
        if not links and not os.environ.get("PIP_FIND_LINKS"):
            links = ["--extra-index-url", TORCH_INDEX]
        # Our own pip installs for the other interpreter.
        pip = [sys.executable, "-m", "pip", f"--python={python}", "install"]
        _run([*pip, "--quiet", "--disable-pip-version-check", *links, "-r", str(requirements)])
        (folder / STAMP).write_text(json.dumps(wanted) + "\n")
        return python


def _stamp(folder: Path) -> dict[str, str] | None:
    try:
        return json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in said if line.startswith("ERROR")] or said[-3:]
        raise VenvError(f"{' '.join(command)} failed: {' / '.join(errors)}")


@contextmanager
def _locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process makes {folder}: waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
