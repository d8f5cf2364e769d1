"""Memory of this process as the system counts it, and what glibc keeps of it.

glibc gives every thread an *arena* of its own, a heap that keeps what was freed in it. With many
threads, as XLA has them, the resident set of a long run grows by what each arena once held.
"""

from __future__ import annotations

import contextlib
import ctypes

# Of malloc.h.
_M_ARENA_MAX = -8
# Elsewhere than in glibc these functions do nothing: there is no such call, or no such library.
_NOT_THERE = (AttributeError, OSError, TypeError)


def resident_bytes() -> int:
    """Bytes of this process in memory; 0 where the platform does not say."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def return_memory() -> None:
    """Gives back to the system what was freed. Takes milliseconds."""
    with contextlib.suppress(*_NOT_THERE):
        ctypes.CDLL(None).malloc_trim(0)


def limit_arenas(most: int) -> None:
    """Limits how many arenas there will be; those that are there already stay.

    Args:
      most: at least 1.
    """
    with contextlib.suppress(*_NOT_THERE):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, most)
