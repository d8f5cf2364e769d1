"""Runs everything that must pass: lint, format, types, tests. `python -m tests [pytest options]`"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("pytest", "-n", "2"),
)


def main() -> int:
    for check in CHECKS:
        command = [sys.executable, "-m", *check]
        if check[0] == "pytest":
            command += sys.argv[1:]
        print("$ python -m", *command[2:], flush=True)
        if code := subprocess.run(command, cwd=ROOT).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
