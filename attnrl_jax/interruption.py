"""SIGTERM and Ctrl-C as a wish that the run stops soon, on which all processes agree.

A signal only leaves a mark. A run asks for it where it can stop without loss, so that it can save
what it has and be continued from there.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class InterruptedRunError(Exception):
    """A run that is to stop.

    Attributes:
      signal: that asked for it.
    """

    def __init__(self, wanted: signal.Signals):
        super().__init__(wanted.name)
        self.signal = wanted

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells and schedulers have it: 143 after SIGTERM says that the program
        was taken away and did not fail."""
        return 128 + self.signal


class Interruption:
    """Takes SIGTERM, and in a process on its own Ctrl-C, while a `with` block runs.

    A second Ctrl-C interrupts at once, as ever. Of several processes any that gets SIGTERM asks for
    all: JAX's preemption service, which is told by the signal, chooses a call of `check` that none
    has reached yet. (So all must call it equally often.) Where signals cannot be taken, outside of
    the main thread, nothing is.
    """

    def __init__(self) -> None:
        self._wanted: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._calls = 0

    def __enter__(self) -> Interruption:
        self._is_shared = jax.distributed.is_initialized()
        if threading.current_thread() is threading.main_thread() and not self._is_shared:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._wanted is not None:
            raise KeyboardInterrupt
        self._wanted = self._wanted or signal.Signals(number)

    def check(self) -> None:
        """Raises `InterruptedRunError` if the run is to stop, in all processes in the same call."""
        if self._is_shared:
            self._calls += 1
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self._wanted = signal.SIGTERM
        if self._wanted is not None:
            raise InterruptedRunError(self._wanted)
