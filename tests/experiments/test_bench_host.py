"""The benchmark of the host's work: the program's own step without devices. Nothing timed."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import numpy as np
import pytest

from attnrl_jax import processes
from attnrl_jax.sampling import sampler
from attnrl_jax.tasks.judging import MathJudge
from attnrl_jax.training import step
from experiments.bench import host
from experiments.bench.harness import Context, Measured
from experiments.bench.idle import Load

LOAD = Load(
    problems=4, hosts=2, prompt_budget=8, response_budget=64, prompt=6, median=40.0,
    sigma=0.3, slots=8, vocab=200, symbolic=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    """A tiny step without devices, and what it came to."""
    with MathJudge() as judge:
        made = host.HostStep(LOAD, judge)
        found = made.run()
        assert not judge.pool_started
        yield made, found


def test_every_response_of_the_step_is_sampled(measured):
    _, found = measured
    # 6 initial responses of 4 problems, and 2 branches of each, continued twice; a response too
    # short to branch has fewer. The step's rows have the initial responses of the step before.
    assert 2 * 4 * 6 < found.detail["responses"] <= 4 * 6 * (1 + 2 * 2)
    assert found.detail["rows"] == found.detail["responses"]
    assert set(host.STAGES) <= set(found.detail)
    assert found.seconds == sum(found.detail[stage] for stage in host.STAGES)


def test_what_the_sampler_fetches_is_counted(measured):
    """Tokens and log-probabilities of slots whose response has ended, one at a time with so few
    slots; always which are active, their lengths and which have ended."""
    _, found = measured
    slots, length = LOAD.slots, LOAD.prompt_budget + LOAD.response_budget
    calls, fetched = found.detail["dispatches"], found.detail["fetched_by_the_sampler"]
    ended = found.detail["responses"] * 2 * 4 * length
    most = calls * (slots * (1 + 1 + 8) + 8)
    assert ended + most / 4 < fetched <= ended + most
    assert found.detail["sent"] > 0
    assert found.detail["fetched"] > 0


def test_rows_are_those_of_a_step_with_devices(measured):
    """Lengths are drawn as the load says, and prefixes are those of the roots."""
    made, _ = measured
    rows = made._state.batch
    assert len(rows.tokens) == 4 * 6
    length = rows.length - rows.prompt_length
    assert length.max() <= 64
    assert 20 < length.mean() < 60
    assert rows.own_length.tolist() == [*map(len, rows.tokens)]
    ended = np.array([tokens[-1] for tokens in rows.tokens])
    assert (ended[rows.ended] == 0).all()
    assert set(rows.prompt_length) == {6}


def test_each_process_makes_what_goes_to_its_devices():
    """The first of two processes sends about half of what one sends to the same two chips."""
    sent = []
    for hosts in (1, 2):
        load = dataclasses.replace(LOAD, hosts=hosts, problems=16)
        with MathJudge() as judge:
            sent.append(host.HostStep(load, judge).run().detail["sent"])
    assert sent[0] / 3 < sent[1] < sent[0] / 1.5


def test_the_programs_come_back(measured):
    made, _ = measured
    before = sampler.generate, step.accumulate, processes.to_host, processes.check_agreement
    with made.idle.instead():
        assert sampler.generate is not before[0]
        assert list(processes.share(4)) == [True, False, True, False]
    after = sampler.generate, step.accumulate, processes.to_host, processes.check_agreement
    assert after == before


def test_memory_of_a_step_holds_its_rows(measured):
    made, _ = measured
    # Tokens, log-probabilities and entropies of at least 24 rows of 20 and as many again.
    assert made.peak() > 2 * 24 * 20 * 3 * 4


def test_facts_of_a_part(tmp_path):
    detail = dict.fromkeys(host.STAGES, 1.0) | {
        "sent": 2.0**30, "fetched": 2.0**30, "fetched_by_the_sampler": 8e9, "dispatches": 3,
        "responses": 4, "rows": 5,
    }  # fmt: skip
    runs = {"512 problems": [Measured(len(host.STAGES), 1.0, detail)]}
    with ExitStack() as closing:
        context = Context(tmp_path, 1, "cpu", tmp_path, "", print, closing)
        load = Load(512, hosts=16)
        part = host.part_of(context, load)
        part_facts = {fact.name: fact for fact in host.facts_of(load, runs["512 problems"], 2**30)}
    seconds = load.device_step().seconds
    assert [contender.name for contender in part.contenders] == ["512 problems"]
    assert part_facts["of it the host's work"].value == pytest.approx(8 / seconds)
    assert part_facts["of it the host's work"].at_most == 0.1
    assert part_facts["most memory"].value == 1
    copies = (2 * 2**30 + 8e9) / host.LINK
    assert part_facts["of it copies at 10 GB/s, not measured"].value == pytest.approx(
        copies / seconds
    )
    [table] = part.tables(runs)
    assert len(table.rows) == 1 + len(host.STAGES)
