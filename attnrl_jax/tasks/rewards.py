"""Rewards by a Python function of the user's.

The function runs in the killable workers of `judging_pool`: a hang, a crash or an exception costs
one answer, never the run. It is sent there by cloudpickle, so that it may be defined anywhere: in a
notebook, in a configuration file, as a closure.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from attnrl_jax.tasks.judging_pool import PooledJudge, Reading
from attnrl_jax.tasks.verdicts import JudgeConfig, JudgeCounts

logger = logging.getLogger(__name__)

# From the text of a response and the golds of its problem to a reward in 0 .. 1. In AttnRL's
# expansion by difficulty a response of at least one half counts as right.
RewardFunction = Callable[[str, tuple[str, ...]], float]

# So many answers without one that was rewarded say that the function is wrong, not the answers.
MOST_FAILURES = 32

# The function of this worker, once it has started.
_function: RewardFunction | None = None


class RewardError(ValueError):
    """A reward function that fails on an answer, or returns what is no reward."""


class RewardJudge(PooledJudge):
    """Rewards responses by a function, in worker processes.

    An answer on which the function fails, or takes too long, is counted as lost and gets 0; the
    first failure of each kind is shown. A function that fails on the first `MOST_FAILURES` answers
    and on no other ends what asks.

    Args:
      function: from (response text, golds) to a reward in 0 .. 1. Nothing that it prints is seen.
        Equal texts with equal golds may be asked once for all.
      config: limits of a call in time and memory.

    Raises:
      ValueError: the function cannot be sent to another process.
    """

    def __init__(self, function: RewardFunction, config: JudgeConfig | None = None):
        import cloudpickle

        try:
            sent = cloudpickle.dumps(function)
        except Exception as error:  # whatever the function refers to may refuse
            raise ValueError(
                f"the reward function {function!r} cannot be sent to worker processes: {error}"
            ) from error
        self._shown: set[str] = set()
        self._last, self._answered, self._lost = "", 0, 0
        super().__init__(
            config or JudgeConfig(), _ask_always, _reward, functools.partial(_receive, sent)
        )

    def on_lost(self, error: BaseException) -> None:
        """Shows an error of the function once."""
        if isinstance(error, RewardError):
            said = str(error)
        elif isinstance(error, TimeoutError):
            said = (
                f"it took longer than judging.timeout_seconds ({self.config.timeout_seconds:g} s)"
            )
        elif hasattr(error, "exitcode"):  # pebble's ProcessExpired
            said = f"its process ended (exit code {error.exitcode})"
        else:
            return
        self._last = kind = said.rpartition("\n")[2]
        if kind not in self._shown and len(self._shown) < 10:
            self._shown.add(kind)
            logger.warning("the reward function failed; the answer gets 0: %s", said)

    def on_verdicts(self, counts: JudgeCounts) -> None:
        """Ends what asks where the function has never worked."""
        self._answered += counts.verified
        self._lost += counts.timeouts + counts.failures
        if self._answered == 0 and self._lost >= MOST_FAILURES:
            raise RewardError(
                f"the reward function failed on all of the first {self._lost} answers: {self._last}"
            )


def send_by_value(module: ModuleType) -> None:
    """Makes reward functions of a module go to the workers whole: for modules that another process
    cannot import by their name."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(module)


def _ask_always(response_text: str, golds: Sequence[str]) -> Reading:
    return (response_text, tuple(golds))


def _receive(sent: bytes) -> None:
    import cloudpickle

    global _function
    # What it prints would run through what the program shows.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        _function = cloudpickle.loads(sent)
    except Exception:
        # Said when it is asked: a worker that does not start is only started anew.
        message = traceback.format_exc()

        def refuse(text: str, golds: tuple[str, ...]) -> float:
            raise RewardError(f"it cannot be loaded in a worker process:\n{message.strip()}")

        _function = refuse


def _reward(question: Any) -> float:
    assert _function is not None
    try:
        reward = float(_function(*question))
    except RewardError:
        raise
    except BaseException as error:
        # Not the exception itself, which the other process may not be able to load.
        raise RewardError(traceback.format_exc().strip()) from error
    if not math.isfinite(reward) or not 0 <= reward <= 1:
        raise RewardError(f"it returned {reward}; a reward lies in 0 .. 1")
    return reward
