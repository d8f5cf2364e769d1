"""The line protocol of a contender that runs in a process of its own.

Runs in the peers' virtual environment: standard library alone. A line of standard input is a JSON
object with the name of a command in `do`; the answer is one line of JSON, `{"error": ...}` when the
command failed. The process does nothing between commands. Whatever libraries print goes to standard
error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Command = Callable[..., dict[str, Any]]


def serve(commands: dict[str, Command]) -> None:
    """Answers until standard input closes.

    Args:
      commands: name to function; what a line holds beside `do` are its keyword arguments.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        given = json.loads(line)
        try:
            answer = commands[given.pop("do")](**given)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def run_batches(run: Callable[[int], object], starts: range, tokens: int) -> dict[str, Any]:
    """Runs a batch from each start on; the seconds of all, and the useful tokens they hold."""
    began = time.perf_counter()
    for start in starts:
        run(start)
    return {"seconds": time.perf_counter() - began, "amount": tokens}
