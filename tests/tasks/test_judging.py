"""Judges: verdicts, and what hostile answers and dying workers cost."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrl_jax.tasks import judging
from attnrl_jax.tasks.judging import (
    ExactJudge,
    JudgeConfig,
    JudgeCounts,
    MathJudge,
    exact_match,
)

ROOT = Path(__file__).parents[2]
OWN_CASES = ROOT / "tests" / "data" / "problems" / "judged_answers.json"
COMPARED = ROOT / "tests" / "data" / "problems" / "compared_answers.json"
SHARED = ROOT.parent / "shared" / "data"


def surd(n):
    """A right answer that only math-verify can tell; equal ones are not asked twice."""
    return rf"It is \boxed{{\sqrt{{{8 * n * n}}}}}.", [rf"{2 * n}\sqrt{{2}}"]


def hang(n):
    """An answer that keeps math-verify busy for minutes."""
    return rf"\boxed{{({n}^{{99999}})^{{99999}}}}", [r"\sqrt{3}"]


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


def test_compared_answers(judge):
    """Regression: differing units and bases, words after a number (`18 million`, `5 not`),
    anagrams, rounded numbers and hedges were right; ordinary ways to write 18 were wrong."""
    cases = json.loads(COMPARED.read_text())
    items = [(rf"\boxed{{{case['answer']}}}", [case["gold"]]) for case in cases]
    rewards, counts = judge.judge_many(items)
    wrong = [case for case, reward in zip(cases, rewards, strict=True) if reward != case["right"]]
    assert wrong == []
    assert counts.timeouts == counts.failures == 0


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
    "(9^{99999})^{99999}",
    r"\left(8^{99999}\right)^{99999}",
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


@given(text=st.text(max_size=200), gold=st.text(max_size=40), boxed=st.booleans())
@settings(max_examples=500)
def test_any_answer_can_be_read(text, gold, boxed):
    """Whatever it is, in the process itself; nothing is lost to it."""
    response = rf"So \boxed{{{text}}}" if boxed else text
    rewards, counts = ExactJudge().judge_many([(response, [gold]), (r"\boxed{1}", ["1"])])
    assert rewards[1] == 1
    assert counts.failures == 0
    assert sum(counts) == 2


def test_an_answer_on_which_reading_fails_costs_itself(judge, monkeypatch):
    """A bug: the exception came out of the judge, and ended the run."""
    honest = judging.exact_verdict

    def failing(answer, gold):
        if answer == "13":
            raise RecursionError("too deep")
        return honest(answer, gold)

    monkeypatch.setattr(judging, "exact_verdict", failing)
    items = [(r"\boxed{13}", ["13"]), (r"\boxed{5}", ["5"]), ("none", ["5"]), SURD]
    rewards, counts = judge.judge_many(items)
    assert rewards.tolist() == [0, 1, 0, 1]
    assert counts == JudgeCounts(unanswered=1, exact=1, verified=1, failures=1)
    rewards, counts = ExactJudge().judge_many(items[:3])
    assert rewards.tolist() == [0, 1, 0]
    assert counts == JudgeCounts(unanswered=1, exact=1, failures=1)


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
        hanging = [hang(7), hang(8)]
        pending = fresh.submit([*hanging, surd(2), (r"\boxed{5}", ["5"])])
        while not all(future.running() for future in pending._outcomes[:2]):
            time.sleep(0.05)
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        rewards, counts = pending.result()
        assert rewards.tolist() == [0, 0, 1, 1]
        assert counts == JudgeCounts(exact=1, verified=1, failures=2)
        assert fresh.judge_many([surd(3)]).rewards.tolist() == [1]


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="no fork server here"
)
def test_a_killed_fork_server_costs_no_more_than_its_workers_have_in_hand():
    """Regression: the pool it had served was found broken only by the next answers, all lost."""
    from multiprocessing import forkserver

    with MathJudge() as fresh:
        assert fresh.judge_many([SURD]).rewards.tolist() == [1]
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        pending = fresh.submit([surd(n) for n in range(2, 6)])
        rewards, counts = pending.result()
        # What a worker had in hand when it died with its server is lost; what waited is not.
        assert counts.failures <= fresh.config.workers
        assert counts.verified == rewards.sum() == 4 - counts.failures
        assert pending.result().rewards.tolist() == rewards.tolist()
        # The workers it had started are found dead one after the other; then all is as before.
        for call in range(1, 6):
            verdicts = fresh.judge_many([surd(n) for n in range(6 * call, 6 * call + 6)])
            assert verdicts.counts.failures <= fresh.config.workers
            assert (
                verdicts.counts.verified == verdicts.rewards.sum() == 6 - verdicts.counts.failures
            )
            if not verdicts.counts.failures:
                break
        else:
            pytest.fail("answers are lost for ever")


def test_a_pool_that_does_not_start_costs_its_answers_alone():
    """In a process of its own, whose open files are limited. Regression: the OSError left
    `submit`."""
    code = """
import resource
from attnrl_jax.tasks.judging import MathJudge
resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))
with MathJudge() as judge:
    print(judge.judge_many([(r"\\boxed{x+1}", ["1+x"]), (r"\\boxed{5}", ["5"])]).counts)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "exact=1, verified=0, timeouts=0, failures=1" in ran.stdout, ran.stderr


def test_huge_powers_are_asked_of_nobody():
    """Regression: each different one cost a time limit."""
    with MathJudge() as fresh:
        texts = [f"2^{{{300000000 + k}}}" for k in range(8)]
        texts += ["9^{9^{9^9}}", "2^{10^9}", "99999999!", "((9!)!)!", "10**10**10"]
        items = [(rf"\boxed{{{text}}}", [r"\sqrt{3}"]) for text in texts]
        assert fresh.judge_many(items).counts == JudgeCounts(exact=len(items))
        assert not fresh.pool_started
        ordinary = [(r"\boxed{2^{2^5}+1}", ["4294967297"]), (r"\boxed{2^{10}}", ["1024"])]
        assert fresh.judge_many(ordinary).rewards.tolist() == [1, 1]


def test_workers_are_limited_in_memory():
    """In a process of its own, as the limit cannot be taken back: 64 MiB are not a gigabyte. What
    is refused takes nothing of the 64 (as a second heap of glibc would, where it is aligned)."""
    code = """
from attnrl_jax.tasks.answers import math_verify_equal
from attnrl_jax.tasks.judging import warm_math_verify
from attnrl_jax.tasks.judging_pool import start_worker
start_worker(64 * 2**20, warm_math_verify)

def largest():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmPeak"))

before = largest()
try:
    bytearray(2**30)
except MemoryError:
    print("refused", math_verify_equal(((r"2\\sqrt{2}", r"\\sqrt{8}"),)))
print(largest() - before < 16 * 2**10)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "refused True\nTrue\n"


def test_a_closed_judge_starts_again():
    fresh = MathJudge()
    assert fresh.judge_many([SURD]).rewards.tolist() == [1]
    pending = fresh.submit([hang(9)])
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
    hanging = hang(6)
    # Its workers have started: that may take longer than an answer may.
    hasty_judge.judge_many([surd(9)])
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
    with MathJudge(JudgeConfig(timeout_seconds=60.0)) as fresh:
        fresh.judge_many([SURD])
        # Both workers are busy when the third is asked.
        pending = fresh.submit([hang(6), hang(7), surd(2)])
        fresh.close()
        assert pending.result().counts == JudgeCounts(failures=3)
        assert fresh.judge_many([surd(2)]).counts == JudgeCounts(verified=1)


def test_what_close_gives_up_is_not_asked_again():
    """Bug: a pool that is being stopped may take that for a breakdown; then a judge that had been
    closed started another one, and waited for its answers."""
    with MathJudge(JudgeConfig(timeout_seconds=60.0)) as fresh:
        pending = fresh.submit([hang(6), hang(7), surd(2)])
        pool = fresh._pool
        stop = pool.stop

        def break_down():
            pool._pool_manager.handle_broken_pool(BrokenProcessPool("the pipe is closed"))
            stop()

        pool.stop = break_down
        fresh.close()
        assert pending.result().counts == JudgeCounts(failures=3)
        assert not fresh.pool_started


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


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_limits_are_positive_and_finite(value):
    """Regression: inf and nan were taken, and an evaluation failed at its end, as JSON has
    neither."""
    with pytest.raises(
        ValueError, match=f"timeout_seconds must be positive and finite, got {value}"
    ):
        JudgeConfig(timeout_seconds=value)


# A program whose answers hang, and the processes that it has started.
HANGING = """
import sys
from attnrl_jax.tasks.judging import JudgeConfig, MathJudge

if __name__ == "__main__":
    judge = MathJudge(JudgeConfig(workers=2, timeout_seconds=600.0))
    texts = [rf"\\boxed{{({n}^{{99999}})^{{99999}}}}" for n in (7, 8)]
    judge.judge_many([(r"\\boxed{\\sqrt{8}}", [r"2\\sqrt{2}"])])
    pending = judge.submit([(text, [r"\\sqrt{3}"]) for text in texts])
    while not all(future.running() for future in pending._outcomes):
        pass
    print("hanging", flush=True)
    pending.result()
"""


def process_state(pid):
    """`(parent, letter)` as Linux has it; None of a process that is gone, also if nobody asked."""
    try:
        letter, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if letter == "Z" else (int(parent), letter)


def descendants(pid):
    every = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    parents = {one: state[0] for one in every if (state := process_state(one))}
    found = {pid}
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.fixture
def hanging(tmp_path):
    """Such a program, and all processes that it has started."""
    path = tmp_path / "hanging.py"
    path.write_text(HANGING)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as program:
        said = program.stdout.readline()
        started = descendants(program.pid)
        try:
            assert said == "hanging\n"
            # Two workers, the fork server, the resource tracker.
            assert len(started) == 4
            yield program, started
        finally:
            for pid in (*started, program.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def wait_until_gone(pids):
    until = time.monotonic() + 30
    while (alive := [pid for pid in pids if process_state(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive


only_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@only_linux
def test_workers_end_with_a_program_that_is_killed(hanging):
    """Bug: a hanging worker and its fork server lived on for ever."""
    program, started = hanging
    program.kill()
    assert wait_until_gone(started)


@only_linux
def test_sigterm_to_all_processes_costs_no_answer(hanging):
    """Bug: a scheduler's SIGTERM killed the workers, and what they had in hand counted as wrong
    before the run had saved."""
    program, started = hanging
    for pid in started:
        os.kill(pid, signal.SIGTERM)
    # Longer than it takes to die of it. The hanging answers go on hanging.
    time.sleep(1)
    assert all(map(process_state, started))
    program.terminate()
    assert wait_until_gone(started)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_an_answer_that_nobody_stops_ends_its_worker():
    """As where the program that watches over it stands still."""
    code = """
from attnrl_jax.tasks import judging_pool
judging_pool._GRACE_SECONDS = 0.1
print(judging_pool.answer_within(float, "0.5", 0.1), flush=True)
judging_pool.answer_within(lambda n: float(pow(n, 10**9)), 7, 0.1)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "0.5\n"
    assert ran.returncode == -signal.SIGALRM
