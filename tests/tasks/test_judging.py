"""Judges: verdicts, and what hostile answers and dying workers cost."""

import concurrent.futures
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from attnrl_jax.tasks.judging import (
    ExactJudge,
    JudgeConfig,
    JudgeCounts,
    MathJudge,
    exact_match,
)

ROOT = Path(__file__).parents[2]
OWN_CASES = ROOT / "tests" / "data" / "problems" / "judged_answers.json"
SHARED = ROOT.parent / "shared" / "data"


def surd(n):
    """A right answer that only math-verify can tell; equal ones are not asked twice."""
    return rf"It is \boxed{{\sqrt{{{8 * n * n}}}}}.", [rf"{2 * n}\sqrt{{2}}"]


SURD = surd(1)


@pytest.fixture(scope="module")
def judge():
    with MathJudge(JudgeConfig(workers=2, timeout_seconds=60.0)) as shared:
        yield shared


@pytest.fixture(scope="module")
def hasty_judge():
    with MathJudge(JudgeConfig(workers=2, timeout_seconds=2.0)) as shared:
        yield shared


def verdicts_of(judge, cases):
    rewards, counts = judge.judge_many([(case["response"], [case["answer"]]) for case in cases])
    assert rewards.dtype == np.float32
    assert rewards.shape == (len(cases),)
    assert sum(counts) == len(cases)
    wrong = [case for case, reward in zip(cases, rewards, strict=True) if reward != case["correct"]]
    return wrong, counts


def test_own_cases(judge):
    wrong, counts = verdicts_of(judge, json.loads(OWN_CASES.read_text()))
    assert wrong == []
    assert counts.timeouts == counts.failures == 0
    assert counts.unanswered == 2
    assert counts.exact > 0
    assert counts.verified > 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="answer-checking cases are not here")
def test_collected_cases(judge):
    wrong, counts = verdicts_of(judge, json.loads((SHARED / "grader_cases.json").read_text()))
    assert [case["id"] for case in wrong] == []
    assert counts.timeouts == counts.failures == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="problem files are not here")
def test_every_gold_equals_itself():
    """Each of a problem's golds: against itself alone, and among all of them."""
    alone, among = [], []
    for path in sorted((SHARED / "eval").glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            golds = row.get("answers", [row["answer"]])
            assert row["answer"] in golds
            for gold in golds:
                alone.append((rf"\boxed{{{gold}}}", [gold]))
                among.append((rf"<think>\boxed{{0}}</think> So \boxed{{{gold}}}.", golds))
    assert len(alone) > 2900
    with MathJudge() as fresh:
        for items in (alone, among):
            rewards, counts = fresh.judge_many(items)
            assert rewards.all()
            assert counts == JudgeCounts(exact=len(items))
        assert not fresh.pool_started


def test_exact_answers_start_no_pool():
    with MathJudge() as fresh:
        items = [(r"\boxed{18}", ["18"]), (r"\boxed{17}", ["18"]), ("none", ["18"])]
        rewards, counts = fresh.judge_many(items)
        assert rewards.tolist() == [1, 0, 0]
        assert counts == JudgeCounts(unanswered=1, exact=2)
        assert not fresh.pool_started
        assert fresh.judge_many([]).rewards.shape == (0,)


def test_any_gold_is_enough(judge):
    item = (r"\boxed{\sqrt{8}}", ["5", r"\pi", r"2\sqrt{2}"])
    assert judge.judge_many([item]).rewards.tolist() == [1]
    assert judge.judge_many([(item[0], item[1][:2])]).rewards.tolist() == [0]


def test_submit_returns_before_the_verdict(judge):
    pending = [judge.submit([(rf"\boxed{{x+{i}}}", [f"{i}+x"])] * 3) for i in range(4)]
    for one in reversed(pending):
        assert one.result().rewards.tolist() == [1, 1, 1]
        assert one.result().counts == JudgeCounts(verified=3)


HOSTILE = [
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "((((9!)!)!)!)!",
    r"\prod_{n=1}^{10^9} n",
    "2^{10^9}",
    r"\frac{1}{0}",
    "{" * 300 + "}" * 300,
    r"\sqrt{" * 150 + "2",
    "(" * 400 + "1",
    "x" * 900,
    "x" * 100_000,
    r"\frac{" * 100 + "}",
    "\\" * 501,
    "a_{" * 100,
    "10^10^10^10",
    "99999999!",
    r"\frac{1}{" * 5_000 + "2" + "}" * 5_000,
    r"\begin{pmatrix}" + ("1&" * 11 + r"1\\") * 25 + r"\end{pmatrix}",
    "\0" * 900,
    "١٢٣٤",
    "7" * 100_000,
    "\0\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
]


def test_hostile_answers_cost_themselves_alone(hasty_judge):
    """Whatever a model writes is judged wrong in bounded time, and its neighbours rightly."""
    items = [(rf"\boxed{{{text}}}", [r"\frac{\sqrt{3}}{2}"]) for text in HOSTILE]
    rewards, counts = hasty_judge.judge_many([surd(1), *items, surd(2)])
    assert rewards.tolist() == [1] + [0] * len(items) + [1]
    assert counts.timeouts >= 2
    assert sum(counts) == len(items) + 2
    assert hasty_judge.judge_many([surd(3)]).rewards.tolist() == [1]


def test_code_is_never_run(hasty_judge, tmp_path):
    target = tmp_path / "owned"
    touch = f"__import__('os').system('touch {target}')"
    texts = [
        touch,
        f"(lambda: {touch})()",
        f"1 if {touch} else 2",
        rf"\text{{{touch}}}",
        f"${touch}$",
        f"x.__class__.__base__.__subclasses__() + [{touch}]",
        f"\\input{{{target}}}\\write18{{touch {target}}}",
    ]
    items = [(rf"\boxed{{{text}}}", ["3", r"\pi", text.replace("touch", "echo")]) for text in texts]
    rewards, _ = hasty_judge.judge_many(items + [(rf"\boxed{{{t}}}", [r"\sqrt{2}"]) for t in texts])
    assert not rewards.any()
    assert not target.exists()


def test_a_killed_worker_costs_one_answer():
    """Both workers are busy with one hanging answer each when all workers are killed."""
    before = set(multiprocessing.active_children())
    with MathJudge(JudgeConfig(workers=2, timeout_seconds=60.0)) as fresh:
        assert fresh.judge_many([SURD]).rewards.tolist() == [1]
        workers = set(multiprocessing.active_children()) - before
        assert len(workers) == 2
        hanging = [(rf"\boxed{{{n}^{{9^{{9^9}}}}}}", [r"\sqrt{3}"]) for n in (7, 8)]
        pending = fresh.submit([*hanging, surd(2), (r"\boxed{5}", ["5"])])
        while not all(future.running() for future in pending._outcomes[:2]):
            time.sleep(0.05)
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        rewards, counts = pending.result()
        assert rewards.tolist() == [0, 0, 1, 1]
        assert counts == JudgeCounts(exact=1, verified=1, failures=2)
        assert fresh.judge_many([surd(3)]).rewards.tolist() == [1]


def test_workers_are_limited_in_memory():
    """In a process of its own, as the limit cannot be taken back: 64 MiB are not a gigabyte."""
    code = """
from attnrl_jax.tasks.answers import math_verify_equal
from attnrl_jax.tasks.judging import _start_worker
_start_worker(64 * 2**20)
try:
    bytearray(2**30)
except MemoryError:
    print("refused", math_verify_equal(((r"2\\sqrt{2}", r"\\sqrt{8}"),)))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "refused True\n"


def test_a_closed_judge_starts_again():
    fresh = MathJudge()
    assert fresh.judge_many([SURD]).rewards.tolist() == [1]
    pending = fresh.submit([(r"\boxed{9^{9^{9^9}}}", [r"\sqrt{3}"])])
    fresh.close()
    fresh.close()
    assert not fresh.pool_started
    assert pending.result().counts == JudgeCounts(failures=1)
    assert fresh.judge_many([surd(2)]).rewards.tolist() == [1]
    fresh.close()


def test_decided_questions_are_remembered():
    """What a judge without workers still decides was not asked again."""
    with MathJudge(JudgeConfig(remembered=2)) as fresh:
        wrong = (r"\boxed{x+1}", ["x"])
        assert fresh.judge_many([surd(1), surd(2)]).rewards.tolist() == [1, 1]
        assert fresh.judge_many([surd(1), wrong]).rewards.tolist() == [1, 0]
        fresh.close()
        # The least recent of the three was forgotten. The text around an answer does not count.
        again = [(r"So \boxed{\sqrt{8}}.", SURD[1]), wrong]
        rewards, counts = fresh.judge_many(again)
        assert rewards.tolist() == [1, 0]
        assert counts == JudgeCounts(verified=2)
        assert not fresh.pool_started
        assert fresh.judge_many([surd(2)]).rewards.tolist() == [1]
        assert fresh.pool_started


def test_questions_under_way_are_asked_once(hasty_judge):
    """Though submitted from several threads; one that was lost is asked anew."""
    hanging = (r"\boxed{6^{9^{9^9}}}", [r"\sqrt{3}"])
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        pending = list(threads.map(hasty_judge.submit, [[hanging, surd(4)]] * 8))
    for place in range(2):
        assert len({id(one._outcomes[place]) for one in pending}) == 1
    for one in pending:
        assert one.result().counts == JudgeCounts(verified=1, timeouts=1)
    again = hasty_judge.submit([hanging, surd(4)])
    assert again._outcomes[0] is not pending[0]._outcomes[0]
    assert again._outcomes[1] is pending[0]._outcomes[1]
    assert again.result().counts == JudgeCounts(verified=1, timeouts=1)


def test_a_lost_question_is_not_remembered():
    with MathJudge() as fresh:
        fresh.judge_many([SURD])
        pending = fresh.submit(
            [surd(2)] + [(rf"\boxed{{{n}^{{9^{{9^9}}}}}}", ["x"]) for n in (6, 7)]
        )
        fresh.close()
        assert pending.result().counts == JudgeCounts(failures=3)
        assert fresh.judge_many([surd(2)]).counts == JudgeCounts(verified=1)


def test_exact_match_and_exact_judge():
    assert exact_match(r"steps \boxed{7}", ["3", "7"])
    assert exact_match(r"\boxed{7,000}", ["7000"])
    assert not exact_match(r"\boxed{7}", ["3"])
    assert not exact_match("7", ["7"])
    assert not exact_match(r"\boxed{x+1}", ["1+x"])
    judge = ExactJudge()
    items = [(r"\boxed{7}", ["7"]), (r"\boxed{8}", ["7"]), ("7", ["7"])]
    rewards, counts = judge.submit(items).result()
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [1, 0, 0]
    assert counts == JudgeCounts(unanswered=1, exact=2)
    judge.close()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="workers"):
        JudgeConfig(workers=0)
    with pytest.raises(ValueError, match="timeout_seconds"):
        JudgeConfig(timeout_seconds=-1.0)
