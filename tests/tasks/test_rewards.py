"""Rewards by a function of the user's, which may do anything."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest

from attnrl_jax.tasks.rewards import MOST_FAILURES, RewardError, RewardJudge
from attnrl_jax.tasks.verdicts import JudgeConfig

LIMITS = JudgeConfig(workers=1, timeout_seconds=3.0)


def judged(function, items, config=LIMITS):
    with RewardJudge(function, config) as judge:
        return judge.judge_many(items)


def test_rewards_are_those_of_the_function():
    """A closure, as a notebook has it, with rewards between 0 and 1."""
    longest = 4

    def brevity(text, golds):
        return float(golds[0] in text) * min(len(text), longest) / longest

    items = [("a1", ("1",)), ("aaa1", ("1",)), ("aaaa", ("1",)), ("a1", ("1", "2"))]
    verdicts = judged(brevity, items)
    assert verdicts.rewards.tolist() == [0.5, 1.0, 0.0, 0.5]
    assert verdicts.counts._asdict() == {
        "unanswered": 0, "exact": 0, "verified": 4, "timeouts": 0, "failures": 0
    }  # fmt: skip


def test_a_function_that_fails_costs_the_answer_alone(caplog):
    """Exceptions, crashes, hangs and what is no reward; each kind of message is shown once."""

    def misbehaves(text, golds):
        if text == "hangs":
            time.sleep(60)
        if text == "dies":
            os._exit(3)
        return {"right": 1, "much": 2.0, "nan": float("nan")}[text]

    texts = ["right", "raises", "raises", "much", "nan", "dies", "hangs", "right"]
    with caplog.at_level(logging.WARNING):
        verdicts = judged(misbehaves, [(text, (str(k),)) for k, text in enumerate(texts)])
    assert verdicts.rewards.tolist() == [1, 0, 0, 0, 0, 0, 0, 1]
    assert verdicts.counts.verified == 2
    assert verdicts.counts.timeouts == 1
    assert verdicts.counts.failures == 5
    assert caplog.text.count("KeyError: 'raises'") == 1
    assert "it returned 2.0; a reward lies in 0 .. 1" in caplog.text
    assert "in misbehaves" in caplog.text
    assert "it took longer than judging.timeout_seconds (3 s)" in caplog.text
    assert "its process ended (exit code 3)" in caplog.text


def test_a_function_that_never_works_ends_what_asks(caplog):
    """Bug: a run of such rewards went on to its end, as if nothing could be learnt."""

    def broken(text, golds):
        return golds["answer"]

    items = [(str(k), ("1",)) for k in range(MOST_FAILURES)]
    with RewardJudge(broken, LIMITS) as judge:
        assert judge.judge_many(items[:-1]).counts.failures == MOST_FAILURES - 1
        with pytest.raises(RewardError, match=r"all of the first 63 answers: TypeError"):
            judge.judge_many(items)
    sometimes = [("1", ("1",)), *items]

    def works_once(text, golds):
        return 1 / (text == golds[0])

    with RewardJudge(works_once, LIMITS) as judge:
        assert judge.judge_many(sometimes).rewards.sum() == 2


def test_what_a_function_prints_is_not_seen(capfd):
    def talks(text, golds):
        print("thinking aloud")
        os.write(2, b"and louder")
        return 1.0

    assert judged(talks, [("a", ("1",))]).rewards.tolist() == [1]
    seen = capfd.readouterr()
    assert "aloud" not in seen.out
    assert "louder" not in seen.err


def test_what_cannot_be_sent_is_refused_by_name():
    lock = threading.Lock()

    def holds_a_lock(text, golds):
        return lock.locked()

    with pytest.raises(ValueError, match=r"holds_a_lock.*cannot be sent to worker processes"):
        RewardJudge(holds_a_lock)


class OnlyHere:
    """Can be sent, and not be loaded elsewhere."""

    def __reduce__(self):
        return (_load_only_in, (os.getpid(),))

    def __call__(self, text, golds):
        return 1.0


def _load_only_in(process):
    if os.getpid() != process:
        raise OSError("not on this machine")
    return OnlyHere()


def test_what_cannot_be_loaded_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        verdicts = judged(OnlyHere(), [("a", ("1",))])
    assert verdicts.rewards.tolist() == [0]
    assert verdicts.counts.failures == 1
    assert "cannot be loaded in a worker process" in caplog.text
    assert "not on this machine" in caplog.text
