"""The worker processes of `judging.MathJudge`.

Workers come from a fork server: a fresh process, since forking one that runs JAX's threads can
deadlock.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.context
import signal
from typing import Any

from attnrl_jax.tasks.answers import math_verify_equal


def start_pool(workers: int, memory_bytes: int) -> Any:
    """A pebble pool whose workers have math-verify loaded.

    Args:
      workers: number of processes.
      memory_bytes: address space an answer may add to that of its idle worker.
    """
    from pebble import ProcessPool

    context: multiprocessing.context.BaseContext
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        # Loaded once in the server: a killed worker's successor starts in milliseconds.
        context.set_forkserver_preload(["math_verify", "numpy"])
    else:
        context = multiprocessing.get_context("spawn")
    return ProcessPool(
        max_workers=workers,
        initializer=start_worker,
        initargs=(memory_bytes,),
        context=context,
    )


def start_worker(memory_bytes: int) -> None:
    """Readies a worker: math-verify loaded and warm, memory limited, SIGTERM deadly at once."""
    # Python runs its signal handlers between bytecodes: inside one huge integer power, never.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    math_verify_equal((("x+1", "1+x"),))
    # Platforms that cannot limit the address space still have the time limit.
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as statm:
            in_use = int(statm.read().split()[0]) * resource.getpagesize()
        limit = in_use + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
