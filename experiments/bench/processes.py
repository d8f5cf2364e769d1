"""Contenders in processes of their own, driven line by line."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

# Settings of XLA that peers do not inherit, so that ours must not have them either.
XLA_FLAGS = "XLA_FLAGS"
SCRIPTS = Path(__file__).parent / "peers"


def check_environment() -> None:
    """Refuses settings that would hold for our own side alone.

    Raises:
      ValueError: XLA_FLAGS is set.
    """
    if os.environ.get(XLA_FLAGS):
        raise ValueError(
            f"{XLA_FLAGS} is set to {os.environ[XLA_FLAGS]!r}: all contenders run with the "
            "defaults of XLA; unset it"
        )


class PeerError(ValueError):
    """A contender that failed; the end of its log is in the message."""


class Peer:
    """A script of `peers/` under the peers' Python; see `peers/protocol.py`.

    Args:
      python: the interpreter.
      script: name of the file without `.py`.
      log: file for what it prints.
      threads: for torch; XLA takes the cores that this process may use.
    """

    def __init__(self, python: Path, script: str, log: Path, threads: int):
        self.script, self.log = script, log
        # Nothing that belongs to this process' packages, and no look at the network.
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", XLA_FLAGS)}
        environment = inherited | {
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONNOUSERSITE": "1",
        }
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python), str(SCRIPTS / f"{script}.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command and its answer.

        Raises:
          PeerError: the command failed, or the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do} | arguments), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise PeerError(f"{self.script} ended with exit code {code}: {self._end_of_log()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.script}, {do}: {answer['error']}")
        return answer

    def _end_of_log(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " / ".join(lines[-3:]) or "it said nothing"

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            # It may be in the middle of a run.
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
