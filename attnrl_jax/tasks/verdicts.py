"""What judges are asked and what they say: their protocol and their limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

# Response text, golds.
Item = tuple[str, Sequence[str]]


@dataclass(frozen=True)
class JudgeConfig:
    """Limits of judging in worker processes.

    Attributes:
      workers: number of worker processes.
      timeout_seconds: time one answer may take; its worker is killed then.
      memory_bytes: address space an answer may add to that of its idle worker.
      remembered: verdicts that are kept, the latest used, for equal questions.

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
      verified: decided by a worker, either way.
      timeouts: stopped at the time limit (wrong).
      failures: lost to a crash, a killed worker or an exception (wrong).
    """

    unanswered: int = 0
    exact: int = 0
    verified: int = 0
    timeouts: int = 0
    failures: int = 0


class Verdicts(NamedTuple):
    """Rewards, float32 in 0 .. 1 by item in the order given, and how they were arrived at."""

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
