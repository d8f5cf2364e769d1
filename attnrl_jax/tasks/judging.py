r"""Judges of final answers: rewards of responses, 1 for a right one and 0 otherwise.

`ExactJudge` compares texts and numbers and never leaves the process; `MathJudge` asks math-verify
about the rest, in worker processes that are killed when an answer takes too long or too much memory
(`judging_pool`). Model text is never evaluated as code.

`submit` returns at once, so that judging overlaps with generation; `judge_many` waits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnrl_jax.tasks.answers import (
    exact_verdict,
    final_answer,
    final_answers,
    gold_text,
    math_verify_equal,
    question,
)
from attnrl_jax.tasks.judging_pool import PooledJudge, Reading
from attnrl_jax.tasks.verdicts import Item, Judge, JudgeConfig, JudgeCounts, Pending, Verdicts

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


class MathJudge(PooledJudge):
    """Exact comparison first, then math-verify in a pool of killable workers.

    A response is right if it equals any gold.
    """

    def __init__(self, config: JudgeConfig | None = None):
        super().__init__(config or JudgeConfig(), _decide, math_verify_equal, warm_math_verify)


def warm_math_verify() -> None:
    """Loads math-verify, which takes long the first time."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    math_verify_equal((("x+1", "1+x"),))


def _decide(response_text: str, answers: Sequence[str]) -> Reading:
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
