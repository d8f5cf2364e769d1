"""What a process says of itself: programs compiled, memory. A continued run is another process."""

from __future__ import annotations

import functools

import jax

from attnrl_jax.host_memory import resident_bytes

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts the programs that this process compiled, or took from the compilation cache."""

    def __init__(self) -> None:
        self.total = 0
        self._reported = 0

    def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.total += event == _COMPILED

    def since_last(self) -> int:
        """Programs since the call before."""
        new, self._reported = self.total - self._reported, self.total
        return new


@functools.cache
def compilations() -> Compilations:
    """The counter of this process, which counts from the first call on."""
    counter = Compilations()
    # jax offers no way to take a listener back, so there is one for the whole process.
    jax.monitoring.register_event_duration_secs_listener(counter._count)
    return counter


def process_metrics() -> dict[str, float]:
    """`process/...`: programs compiled since the last call, resident memory in GiB."""
    return {
        "process/compilations": compilations().since_last(),
        "process/resident_gib": resident_bytes() / 2**30,
    }
