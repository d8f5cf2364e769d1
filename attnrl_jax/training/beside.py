"""An update beside generation: launched part by part, while other devices sample.

One thread launches both, since programs that run in several processes must be launched in the same
order by all of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

import jax
from jax.sharding import Mesh

from attnrl_jax.sharding import under
from attnrl_jax.training.setup import Stopwatch

# Parts that are launched ahead, so that the devices never wait for the host. Runtimes hold back a
# host that is 32 programs ahead, and a part may be two.
AHEAD = 8

Result = TypeVar("Result")


class PartByPart(Generic[Result]):
    """Work that is launched a part at a time.

    Args:
      parts: launches a part whenever it is asked for one, and gives an array that is there once the
        devices are done with it; returns the result.
      mesh: where the parts run.
      watch: gets the stage, from the first launch to the end of the last part.
      stage: its name.
    """

    def __init__(
        self,
        parts: Generator[jax.Array, None, Result],
        mesh: Mesh | None,
        watch: Stopwatch,
        stage: str,
    ):
        self._parts, self._mesh, self._watch, self._stage = parts, mesh, watch, stage
        self._last: jax.Array | None = None
        self._result: Result | None = None
        self._is_launched = False
        self._end: Callable[[float], None] | None = None
        self._waiter: threading.Thread | None = None

    def advance(self) -> None:
        """Launches `AHEAD` parts the first time, and then one; the same in every process.

        What the devices have done by then is not asked: processes might see it differently.
        """
        for _ in range(AHEAD if self._last is None else 1):
            self._launch()

    def result(self) -> Result:
        """Launches what is left, and waits for the end of all."""
        while not self._is_launched:
            self._launch()
        if self._waiter is not None:
            self._waiter.join()
        return self._result  # type: ignore[return-value]

    def _launch(self) -> None:
        if self._is_launched:
            return
        begin = time.perf_counter()
        try:
            with under(self._mesh):
                self._last = next(self._parts)
            self._end = self._end or self._watch.begin(self._stage, begin)
        except StopIteration as launched:
            self._result, self._is_launched = launched.value, True
            if self._last is not None:
                self._waiter = threading.Thread(target=self._wait)
                self._waiter.start()

    def _wait(self) -> None:
        """Notes when the last part is done, whatever the launching thread does meanwhile."""
        try:
            jax.block_until_ready(self._last)
        except jax.errors.JaxRuntimeError:
            # Whoever reads the result meets it too.
            return
        assert self._end is not None
        self._end(time.perf_counter())
