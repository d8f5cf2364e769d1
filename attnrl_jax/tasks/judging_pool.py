"""Judging in killable worker processes.

A hang, a crash, a killed worker or an answer on which reading itself fails costs that one answer,
which is judged wrong and counted. Where the whole pool breaks down (its fork server was killed),
what waited is asked once more; what its workers had in hand is lost.

Workers come from a fork server (a fresh process: forking one that runs JAX's threads can
deadlock). As always with `multiprocessing`, the program's main module is imported anew in each
worker, so it needs its `if __name__ == "__main__"`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.context
import multiprocessing.resource_tracker
import os
import select
import signal
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

import numpy as np

from attnrl_jax.host_memory import limit_arenas
from attnrl_jax.tasks.verdicts import Item, JudgeConfig, JudgeCounts, Pending, Verdicts

logger = logging.getLogger(__name__)

# What is left to ask: a tuple, which is equal for equal questions.
Question = tuple[Any, ...]
# None for no answer, a verdict where there is one.
Reading = bool | Question | None
Outcome = bool | concurrent.futures.Future | None

# Starting workers may take this long before anything is judged; beyond it (and the time limit of
# the answers under way) a silent pool is taken for broken.
_START_SECONDS = 60.0
# A worker ends itself so long after the time limit of an answer, if nobody else has.
_GRACE_SECONDS = 10.0
_HAS_FORK_SERVER = "forkserver" in multiprocessing.get_all_start_methods()


class PooledJudge:
    """Judges in worker processes what cannot be decided at once.

    The pool starts when the first answer needs it, and lives until `close` (or the end of a
    `with` block). Equal questions are asked once, while the first is under way and after it was
    decided; one that was lost (to a time limit or a crash) is asked anew in the next call. Safe to
    call from several threads.

    Args:
      config: limits.
      read: decides an item at once where it can, else returns what is left to ask.
      answer: runs in a worker: from that to the reward.
      make_ready: runs in a worker as it starts; like `answer`, a function that can be pickled.
    """

    def __init__(
        self,
        config: JudgeConfig,
        read: Callable[[str, Sequence[str]], Reading],
        answer: Callable[[Question], float],
        make_ready: Callable[[], None],
    ):
        self.config = config
        self._read, self._answer, self._make_ready = read, answer, make_ready
        self._pool: Any = None
        self._lock = threading.Lock()
        self._inflight: set[concurrent.futures.Future] = set()
        # By `close`: a pool that is stopped may say of its questions that it broke down.
        self._given_up: weakref.WeakSet[concurrent.futures.Future] = weakref.WeakSet()
        # In order of use.
        self._recent: OrderedDict[Question, concurrent.futures.Future] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pool_started(self) -> bool:
        """Whether worker processes have been started."""
        return self._pool is not None

    def submit(self, items: Sequence[Item]) -> Pending:
        """Decides what it can at once and hands the rest to the workers."""
        asked: dict[Question, concurrent.futures.Future] = {}
        outcomes: list[Outcome] = []
        for response_text, answers in items:
            outcome = self._try_to_read(response_text, answers)
            if isinstance(outcome, tuple):
                if outcome not in asked:
                    asked[outcome] = self._ask(outcome)
                outcomes.append(asked[outcome])
            else:
                outcomes.append(outcome)
        return _Asked(self, outcomes, {future: question for question, future in asked.items()})

    def judge_many(self, items: Sequence[Item]) -> Verdicts:
        """Rewards of (response text, golds) pairs."""
        return self.submit(items).result()

    def close(self) -> None:
        """Stops the workers; answers still under way become failures. Idempotent."""
        with self._lock:
            # A copy: futures that finish leave it in threads of the pool.
            self._given_up.update(self._inflight.copy())
        self._stop_pool()

    def _stop_pool(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
            abandoned = self._inflight.copy()
        if pool is not None:
            pool.stop()
            pool.join()
        # A stopped pool may forget a question that was on its way to a worker.
        for future in abandoned:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(RuntimeError("the judge was closed"))

    def _was_lost_with_its_pool(self, future: concurrent.futures.Future) -> bool:
        """Not by a crash of its own worker (ProcessExpired), nor to a time limit or `close`."""
        if not future.done() or future.cancelled() or future in self._given_up:
            return False
        return isinstance(future.exception(), BrokenProcessPool)

    def _try_to_read(self, response_text: str, answers: Sequence[str]) -> Outcome | Question:
        """`read`; an answer on which it fails is lost, and the run is not."""
        try:
            return self._read(response_text, answers)
        except Exception as error:
            logger.warning("an answer could not be read, and is judged wrong: %r", error)
            lost: concurrent.futures.Future = concurrent.futures.Future()
            lost.set_exception(error)
            return lost

    def _ask(self, question: Question) -> concurrent.futures.Future:
        for _ in range(2):
            try:
                with self._lock:
                    if question in self._recent:
                        self._recent.move_to_end(question)
                        return self._recent[question]
                    if self._pool is None:
                        self._pool = start_pool(self.config, self._make_ready)
                    seconds = self.config.timeout_seconds
                    future = self._pool.schedule(
                        answer_within, (self._answer, question, seconds), timeout=seconds
                    )
                    self._inflight.add(future)
                    self._recent[question] = future
                    if len(self._recent) > self.config.remembered:
                        self._recent.popitem(last=False)
                # Outside the lock: a future that is done calls at once.
                future.add_done_callback(functools.partial(self._finish, question))
                return future
            # pebble: the pool was stopped or has broken down; or no process can be started.
            except (RuntimeError, OSError) as error:
                logger.warning("the pool of judging workers is started anew: %s", error)
                self._stop_pool()
        failed: concurrent.futures.Future = concurrent.futures.Future()
        failed.set_exception(RuntimeError("the pool of judging workers does not start"))
        return failed

    def on_verdicts(self, counts: JudgeCounts) -> None:
        """Called with the counts of answers whose verdicts are asked for; may raise."""

    def on_lost(self, error: BaseException) -> None:
        """Called with what an answer was lost to, in a thread of the pool."""

    def _finish(self, question: Question, future: concurrent.futures.Future) -> None:
        self._inflight.discard(future)
        if not future.cancelled() and (error := future.exception()) is not None:
            self.on_lost(error)
        if _outcome_of(future)[0] != "verified":
            with self._lock:
                if self._recent.get(question) is future:
                    del self._recent[question]

    def _wait(self, futures: list[concurrent.futures.Future]) -> None:
        """Waits for `futures`, but not for ever on a pool in which nothing moves.

        A time limit counts from when a worker takes the question: workers that die while they
        start would never take one.
        """
        patience = _START_SECONDS + 2 * self.config.timeout_seconds
        while waiting := [future for future in futures if not future.done()]:
            moving = self._inflight.copy() | set(waiting)
            done, _ = concurrent.futures.wait(
                moving, timeout=patience, return_when=concurrent.futures.FIRST_COMPLETED
            )
            if not done:
                logger.warning(
                    "no judging worker answered for %.0f s: %d answers are judged wrong",
                    patience,
                    len(waiting),
                )
                self.close()
                return


class _Asked:
    """Outcomes of one `submit`: None for no answer, a bool if decided, else a future."""

    def __init__(
        self,
        judge: PooledJudge,
        outcomes: list[Outcome],
        questions: dict[concurrent.futures.Future, Question],
    ) -> None:
        self._judge = judge
        self._outcomes = outcomes
        # By future; emptied once those lost with their pool were asked again.
        self._questions = questions

    def result(self) -> Verdicts:
        self._wait()
        questions, self._questions = self._questions, {}
        again = {
            future: self._judge._ask(question)
            for future, question in questions.items()
            if self._judge._was_lost_with_its_pool(future)
        }
        if again:
            self._outcomes = [
                again.get(o, o) if isinstance(o, concurrent.futures.Future) else o
                for o in self._outcomes
            ]
            self._wait()
        rewards = np.zeros(len(self._outcomes), np.float32)
        counts = dict.fromkeys(JudgeCounts._fields, 0)
        for row, outcome in enumerate(self._outcomes):
            if outcome is None:
                kind, reward = "unanswered", 0.0
            elif isinstance(outcome, bool):
                kind, reward = "exact", float(outcome)
            else:
                kind, reward = _outcome_of(outcome)
            rewards[row] = reward
            counts[kind] += 1
        found = JudgeCounts(**counts)
        self._judge.on_verdicts(found)
        return Verdicts(rewards, found)

    def _wait(self) -> None:
        self._judge._wait([o for o in self._outcomes if isinstance(o, concurrent.futures.Future)])


def _outcome_of(future: concurrent.futures.Future) -> tuple[str, float]:
    if not future.done():
        return "failures", 0.0
    try:
        return "verified", float(future.result())
    except TimeoutError:
        return "timeouts", 0.0
    except (Exception, concurrent.futures.CancelledError) as error:
        logger.debug("an answer was lost: %r", error)
        return "failures", 0.0


def start_pool(config: JudgeConfig, make_ready: Callable[[], None]) -> Any:
    """A pebble pool of workers.

    Args:
      config: their number and limits.
      make_ready: called in each as it starts; sent to them.
    """
    from pebble import ProcessPool

    context: multiprocessing.context.BaseContext
    if _HAS_FORK_SERVER:
        context = _ForkServerContext()
        # Loaded once in the server: a killed worker's successor starts in milliseconds.
        context.set_forkserver_preload(["math_verify", "numpy"])
        _start_fork_server()
    else:
        context = multiprocessing.get_context("spawn")
    return ProcessPool(
        max_workers=config.workers,
        initializer=start_worker,
        initargs=(config.memory_bytes, make_ready),
        context=context,
    )


if _HAS_FORK_SERVER:

    class _Worker(multiprocessing.context.ForkServerProcess):
        """One that takes no SIGTERM: pebble stops it by SIGKILL."""

        def terminate(self) -> None:
            self.kill()

    class _ForkServerContext(multiprocessing.context.ForkServerContext):
        Process = _Worker


def _start_fork_server() -> None:
    """Starts it with SIGTERM blocked, which it passes on: a scheduler sends that to every process
    of a job, and what the workers have in hand is not to be lost before the run has saved."""
    from multiprocessing import forkserver

    # Starting the tracker, which the server does too, would unblock it.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(memory_bytes: int, make_ready: Callable[[], None]) -> None:
    """Readies a worker: what it needs loaded, memory limited, its life bound to the run's."""
    _end_with_the_run()
    if _HAS_FORK_SERVER:
        # SIGKILL ends it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    make_ready()
    # Out of memory, glibc would reserve 64 MiB of addresses for a second arena. Where these are the
    # last that the limit leaves, the stack cannot grow: an answer too large would end the worker.
    limit_arenas(1)
    # Platforms that cannot limit the address space still have the time limit.
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as statm:
            in_use = int(statm.read().split()[0]) * resource.getpagesize()
        limit = in_use + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _end_with_the_run() -> None:
    """Lets the kernel end this worker when the process that started it is gone, even if that was
    killed and the worker hangs inside one huge integer power. The fork server goes with its last
    worker.

    What the run holds of a worker is a pipe. (The parent of a worker is the fork server, which
    lives on while there are workers: PR_SET_PDEATHSIG would wait for it, and it for them.)
    """
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None:
        return
    import fcntl

    pipe = parent.sentinel
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:
        # It was gone before.
        os.kill(os.getpid(), signal.SIGKILL)


def answer_within(answer: Callable[[Question], float], question: Question, seconds: float) -> float:
    """`answer` in a worker, which the kernel ends if it is not stopped at its time limit: the run
    that watches over it may be gone, or at a halt."""
    if not hasattr(signal, "setitimer"):
        return answer(question)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)
    try:
        return answer(question)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
