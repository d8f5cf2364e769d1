r"""Judges: rewards of responses, 1 for a right final answer and 0 otherwise.

Two judges share one protocol. `ExactJudge` compares texts and numbers and never leaves the
process; `MathJudge` asks math-verify about the rest, in worker processes that are killed when an
answer takes too long or too much memory. A hang, a crash, a killed worker or an answer on which
reading itself fails costs that one answer, which is judged wrong and counted. Where the whole pool
breaks down (its fork server was killed), what waited is asked once more; what its workers had in
hand is lost. Model text is never evaluated as code.

`submit` returns at once, so that judging overlaps with generation; `judge_many` waits.

Workers come from a fork server (a fresh process: forking one that runs JAX's threads can
deadlock). As always with `multiprocessing`, the program's main module is imported anew in each
worker, so it needs its `if __name__ == "__main__"`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from attnrl_jax.tasks.answers import (
    exact_verdict,
    final_answer,
    final_answers,
    gold_text,
    math_verify_equal,
    question,
)
from attnrl_jax.tasks.judging_pool import start_pool

__all__ = [
    "ExactJudge",
    "Judge",
    "JudgeConfig",
    "JudgeCounts",
    "MathJudge",
    "Pending",
    "Verdicts",
    "exact_match",
    "final_answer",
]

logger = logging.getLogger(__name__)

Item = tuple[str, Sequence[str]]
# (answer, gold) pairs, one of which is to be equal.
Question = tuple[tuple[str, str], ...]

# Starting workers may take this long before anything is judged; beyond it (and the time limit of
# the answers under way) a silent pool is taken for broken.
_START_SECONDS = 60.0


@dataclass(frozen=True)
class JudgeConfig:
    """Limits of `MathJudge`.

    Attributes:
      workers: number of worker processes.
      timeout_seconds: time one answer may take; its worker is killed then.
      memory_bytes: address space an answer may add to that of its idle worker.
      remembered: verdicts of math-verify that are kept, the latest used, for equal questions.

    Raises:
      ValueError: a limit that is not positive, or not finite.
    """

    workers: int = 2
    timeout_seconds: float = 5.0
    memory_bytes: int = 2 * 2**30
    remembered: int = 4096

    def __post_init__(self) -> None:
        for name in ("workers", "timeout_seconds", "memory_bytes", "remembered"):
            if not 0 < getattr(self, name) < math.inf:  # nan is refused as well
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")


class JudgeCounts(NamedTuple):
    """How the responses of one call were judged; the fields add up to their number.

    Attributes:
      unanswered: no balanced box after the reasoning (wrong).
      exact: decided by comparing texts and numbers.
      verified: decided by math-verify, either way.
      timeouts: stopped at the time limit (wrong).
      failures: lost to a crash, a killed worker or an exception (wrong).
    """

    unanswered: int = 0
    exact: int = 0
    verified: int = 0
    timeouts: int = 0
    failures: int = 0


class Verdicts(NamedTuple):
    """Rewards, float32 0 or 1 by item in the order given, and how they were arrived at."""

    rewards: np.ndarray
    counts: JudgeCounts


class Pending(Protocol):
    """Verdicts under way."""

    def result(self) -> Verdicts:
        """Waits for all of them."""
        ...


class Judge(Protocol):
    """What the training loop and evaluation ask of a judge. An item is (response text, golds)."""

    def submit(self, items: Sequence[Item]) -> Pending: ...

    def judge_many(self, items: Sequence[Item]) -> Verdicts: ...

    def close(self) -> None: ...


def exact_match(response_text: str, answers: Sequence[str]) -> bool:
    r"""Whether the last balanced `\boxed{}` after `</think>` equals any gold by exact reading.

    Texts are compared after taking off mark-up, numbers as fractions. Pure; linear in the text.
    """
    answer = final_answer(response_text)
    return answer is not None and any(exact_verdict(answer, gold) is True for gold in answers)


@dataclass(frozen=True)
class _Decided:
    verdicts: Verdicts

    def result(self) -> Verdicts:
        return self.verdicts


class ExactJudge:
    """Judges by `exact_match` alone: for tasks whose answers have one written form."""

    def submit(self, items: Sequence[Item]) -> Pending:
        return _Decided(self.judge_many(items))

    def judge_many(self, items: Sequence[Item]) -> Verdicts:
        rewards = np.zeros(len(items), np.float32)
        unanswered = failures = 0
        for row, (text, answers) in enumerate(items):
            try:
                unanswered += final_answer(text) is None
                rewards[row] = exact_match(text, answers)
            except Exception as error:
                logger.warning("an answer could not be read, and is judged wrong: %r", error)
                failures += 1
        exact = len(items) - unanswered - failures
        return Verdicts(rewards, JudgeCounts(unanswered, exact, failures=failures))

    def close(self) -> None:
        pass


class MathJudge:
    """Exact comparison first, then math-verify in a pool of killable workers.

    The pool starts when the first answer needs it, and lives until `close` (or the end of a
    `with` block). Equal questions are asked once, while the first is under way and after it was
    decided; one that was lost (to a time limit or a crash) is asked anew in the next call. Safe to
    call from several threads.
    """

    def __init__(self, config: JudgeConfig | None = None):
        self.config = config or JudgeConfig()
        self._pool: Any = None
        self._lock = threading.Lock()
        self._inflight: set[concurrent.futures.Future] = set()
        # In order of use.
        self._recent: OrderedDict[Question, concurrent.futures.Future] = OrderedDict()

    def __enter__(self) -> MathJudge:
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
        outcomes: list[bool | concurrent.futures.Future | None] = []
        for response_text, answers in items:
            outcome = _read(response_text, answers)
            if isinstance(outcome, tuple):
                if outcome not in asked:
                    asked[outcome] = self._ask(outcome)
                outcomes.append(asked[outcome])
            else:
                outcomes.append(outcome)
        return _Asked(self, outcomes, {future: question for question, future in asked.items()})

    def judge_many(self, items: Sequence[Item]) -> Verdicts:
        """Rewards of (response text, golds) pairs; a response is right if it equals any gold."""
        return self.submit(items).result()

    def close(self) -> None:
        """Stops the workers; answers still under way become failures. Idempotent."""
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

    def _ask(self, question: Question) -> concurrent.futures.Future:
        for _ in range(2):
            try:
                with self._lock:
                    if question in self._recent:
                        self._recent.move_to_end(question)
                        return self._recent[question]
                    if self._pool is None:
                        self._pool = start_pool(self.config.workers, self.config.memory_bytes)
                    future = self._pool.schedule(
                        math_verify_equal, args=(question,), timeout=self.config.timeout_seconds
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
                self.close()
        failed: concurrent.futures.Future = concurrent.futures.Future()
        failed.set_exception(RuntimeError("the pool of judging workers does not start"))
        return failed

    def _finish(self, question: Question, future: concurrent.futures.Future) -> None:
        self._inflight.discard(future)
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
        judge: MathJudge,
        outcomes: list[bool | concurrent.futures.Future | None],
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
            if _was_lost_with_its_pool(future)
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
                kind, right = "unanswered", False
            elif isinstance(outcome, bool):
                kind, right = "exact", outcome
            else:
                kind, right = _outcome_of(outcome)
            rewards[row] = right
            counts[kind] += 1
        return Verdicts(rewards, JudgeCounts(**counts))

    def _wait(self) -> None:
        self._judge._wait([o for o in self._outcomes if isinstance(o, concurrent.futures.Future)])


def _was_lost_with_its_pool(future: concurrent.futures.Future) -> bool:
    """Not by a crash of its own worker (ProcessExpired), nor to a time limit."""
    if not future.done() or future.cancelled():
        return False
    return isinstance(future.exception(), BrokenProcessPool)


def _read(
    response_text: str, answers: Sequence[str]
) -> bool | Question | concurrent.futures.Future | None:
    """`_decide`; an answer on which it fails is lost, and the run is not."""
    try:
        return _decide(response_text, answers)
    except Exception as error:
        logger.warning("an answer could not be read, and is judged wrong: %r", error)
        lost: concurrent.futures.Future = concurrent.futures.Future()
        lost.set_exception(error)
        return lost


def _decide(response_text: str, answers: Sequence[str]) -> bool | Question | None:
    """None without an answer, a verdict where exact reading has one, else what is left to ask."""
    readings = final_answers(response_text)
    if not readings:
        return None
    undecided = []
    for gold in map(gold_text, answers):
        for reading in readings:
            verdict = exact_verdict(reading, gold)
            if verdict:
                return True
            if verdict is None:
                undecided.append(question(reading, gold))
    return tuple(undecided) if undecided else False


def _outcome_of(future: concurrent.futures.Future) -> tuple[str, bool]:
    if not future.done():
        return "failures", False
    try:
        return "verified", bool(future.result())
    except TimeoutError:
        return "timeouts", False
    except (Exception, concurrent.futures.CancelledError) as error:
        logger.debug("an answer was lost: %r", error)
        return "failures", False
