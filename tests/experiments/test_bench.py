"""The benchmarks' own code: workloads, judgement, tables, the peers' environment. Nothing timed."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from experiments.bench import __main__ as command
from experiments.bench import accelerator, ours, processes, step, venv
from experiments.bench.harness import (
    Contender,
    Context,
    Fact,
    Measured,
    Part,
    Ratio,
    Table,
    is_met,
    judged,
    missed,
    run_part,
)
from experiments.bench.model import COMMON, num_parameters, random_params, write_model
from experiments.bench.processes import Peer, PeerError
from experiments.bench.report import markdown, write
from experiments.bench.update import random_rows
from experiments.bench.venv import STAMP, VenvError, peers_python
from experiments.bench.workloads import (
    PROMPT,
    VOCAB,
    Rollouts,
    batches_of,
    lognormal_lengths,
    static_slot_steps,
    workload_a,
    workload_b,
    workload_c,
)
from tests.training.tiny import tiny_setup

TINY = ModelConfig(
    family="qwen2", vocab_size=VOCAB, width=16, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=8, mlp_width=16, qkv_bias=True,
)  # fmt: skip


def test_lognormal_lengths_have_median_spread_and_cut():
    lengths = lognormal_lengths(np.random.default_rng(0), 20_000, 64, 1.0, 256)
    assert lengths.min() >= 1
    assert lengths.max() == 256
    assert np.median(lengths) == pytest.approx(64, rel=0.03)
    # P(N(0, 1) > log 4) = 0.0829 are cut; a sixth lies below 64 / e.
    assert np.mean(lengths == 256) == pytest.approx(0.0829, abs=0.01)
    assert np.mean(lengths < 64 / np.e) == pytest.approx(0.1587, abs=0.01)


def test_workload_a_is_that_of_the_issue():
    work = workload_a()
    assert len(work.prefixes) == len(work.lengths) == 24 * 8
    assert {len(prefix) for prefix in work.prefixes} == {64}
    assert len({prefix.tobytes() for prefix in work.prefixes}) == 24
    assert all(np.array_equal(work.prefixes[8], prefix) for prefix in work.prefixes[8:16])
    assert work.lengths.max() <= 256
    assert work.total == 64 + 256
    # Two thirds of the slot-steps of static batches are lost.
    assert 1 - work.lengths.sum() / static_slot_steps(work.lengths, 32) == pytest.approx(0.67, 0.01)
    again = workload_a()
    assert np.array_equal(again.lengths, work.lengths)
    assert np.array_equal(again.prefixes, work.prefixes)


def test_workload_b_leaves_nothing_to_schedule():
    work = workload_b()
    assert work.lengths.tolist() == [256] * 32
    assert static_slot_steps(work.lengths, 32) == work.lengths.sum()
    assert len({prefix.tobytes() for prefix in work.prefixes}) == 32


def test_workload_c_branches_at_thirds_and_keeps_the_total():
    work = workload_c()
    assert len(work.lengths) == 16 * 6 + 48 * 4
    paths = np.array([len(prefix) for prefix in work.prefixes]) + work.lengths
    assert paths.max() == work.total == 64 + 512
    assert work.lengths.min() >= 1
    assert {len(prefix) for prefix in work.prefixes[:96]} == {64}
    for first in range(96, len(work.prefixes), 4):
        early, early_too, late, late_too = work.prefixes[first : first + 4]
        assert np.array_equal(early, early_too)
        assert np.array_equal(late, late_too)
        # One begins with the other, the late one leaves twice as far from the prompt.
        assert np.array_equal(late[: len(early)], early)
        assert len(late) - PROMPT - 2 * (len(early) - PROMPT) in (0, 1)
    assert len(np.unique(work.problem)) == 16 + 8


def test_tokens_are_of_the_vocabulary_without_padding():
    for work in (workload_a(), workload_b(), workload_c()):
        tokens = np.concatenate(work.prefixes)
        assert tokens.min() >= 1
        assert tokens.max() < VOCAB == COMMON.vocab_size


def test_static_batches_by_hand():
    assert batches_of(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    # max(3, 1) * 2 + max(2, 2) * 2 + 5
    assert static_slot_steps(np.array([3, 1, 2, 2, 5]), 2) == 15


def test_rows_of_the_update_hold_the_responses():
    work = workload_a()
    rows = random_rows(work)
    assert rows["prompts"].shape == (192, 64)
    assert rows["responses"].shape == (192, 256)
    assert np.array_equal((rows["responses"] != 0).sum(axis=1), work.lengths)
    assert np.array_equal(rows["behaviour"] != 0, rows["responses"] != 0)


def test_the_common_model_has_its_size():
    params = random_params(COMMON)
    assert num_parameters(params) == 30_947_840
    # A bias that is left out, or a scale, would show in the logits.
    attention = params["layers"]["self_attn"]
    assert np.abs(attention["q_proj"]["bias"]).min() > 0
    assert np.std(params["norm"]["scale"]) == pytest.approx(0.1, rel=0.2)
    assert np.std(attention["o_proj"]["kernel"]) == pytest.approx(512**-0.5, rel=0.01)


def contender(name, seconds, order=None, amount=100.0):
    """Runs that take the given seconds, one after the other."""
    left = iter(seconds)

    def run():
        if order is not None:
            order.append(name)
        return Measured(next(left), amount, {"steps": 7.0})

    return Contender(name, run, lambda: f"settings of {name}")


def example_part(order=None, **changes):
    values = {
        "title": "example",
        "unit": "tokens/s",
        # Rates 100, 50, 25 against 50, 25, 12.5 and 10, 100, 10.
        "contenders": [
            contender("ours", [1.0, 2.0, 4.0], order),
            contender("one", [2.0, 4.0, 8.0], order),
            contender("two", [10.0, 1.0, 10.0], order),
        ],
        "ratios": [Ratio("ours", ("one", "two"), at_least=2.0)],
        "facts": lambda runs: [Fact("steps", runs["ours"][0].detail["steps"], at_most=8.0)],
        "tables": lambda runs: [Table("more", [["a", "b"], ["1", "2"]])],
    }
    return Part(**(values | changes))


def test_a_step_is_split_into_its_stages(golden_model):
    """Steps go on from one measurement to the next, and their parts add up to the wall clock."""
    golden = golden_model("qwen2_tied")
    setup = tiny_setup(golden)
    schedule = step.Schedule(setup, golden.params, steps=1)
    first, second = schedule.run(), schedule.run()
    for measured in (first, second):
        parts = [measured.detail[name] for name in (*step.STAGES, "other")]
        assert sum(parts) == pytest.approx(measured.seconds)
        assert min(parts) > 0
        assert measured.amount > 0
    assert sum(step.shares([first, second]).values()) == pytest.approx(1)
    table = step.split_table({"one": [first, second]}, steps=1)
    assert len(table.rows) == 2
    assert table.rows[1][0] == "one"
    assert float(table.rows[1][-1].replace(",", "")) > 0


def test_the_step_is_that_of_the_default_run_and_learns_nothing():
    settings = step.settings_of("on_policy", {"num_problems": 3})
    assert settings.train.optimizer.learning_rate == 0
    assert not settings.train.batch_size.adaptive
    assert (settings.train.num_problems, settings.train.num_responses) == (3, 6)


def test_limits_of_an_accelerator_by_hand(tmp_path):
    """Matrices are all but embedding, scales and biases; a tied embedding is one of them."""
    shapes = jax.eval_shape(lambda key: init_params(TINY, key), jax.random.key(0))
    kernels = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if path[-1].key == "kernel"
    ]
    assert accelerator.matrix_params(TINY) == sum(kernels)
    # 2 layers, 1 head of keys and values of 8, float32.
    cache = 2 * 2 * 8 * 3 * 10 * 4
    assert accelerator.step_bytes(TINY, 3, 10) == 4 * sum(kernels) + cache
    # Each token sees half of 5 tokens on average: 2 products, 2 layers, 16 wide, 2 operations.
    assert accelerator.forward_flops(TINY, 3, 5) == 15 * (2 * sum(kernels) + 2 * 2 * 16 * 5)
    with ExitStack() as closing:
        context = Context(tmp_path, 1, "cpu", tmp_path, "", print, closing)
        with pytest.raises(ValueError, match="--platform=cuda or tpu"):
            command.BENCHMARKS["accelerator"]["decode"](context)


def test_contenders_run_in_turn():
    order, said = [], []
    result = run_part(example_part(order), 3, said.append, pause=0)
    assert order == ["ours", "one", "two"] * 3
    assert [c["median"] for c in result["contenders"]] == [50.0, 25.0, 10.0]
    assert [c["settings"] for c in result["contenders"]][1] == "settings of one"
    assert result["contenders"][2]["max"] == 100.0
    assert len(result["load_average"]) == 4


def test_a_ratio_is_of_medians_over_the_best():
    (ratio,) = run_part(example_part(), 3, print, pause=0)["ratios"]
    assert ratio["value"] == 2.0
    # In the second round the best of the others is another one.
    assert ratio["rounds"] == [2.0, 0.5, 2.0]
    assert ratio["met"]


def test_seconds_are_better_when_fewer():
    part = example_part(quantity="seconds", ratios=[Ratio("ours", ("one", "two"), at_most=0.4)])
    (ratio,) = run_part(part, 3, print, pause=0)["ratios"]
    assert ratio["value"] == 2.0 / 4.0
    assert ratio["rounds"] == [1.0 / 2.0, 2.0 / 1.0, 4.0 / 8.0]
    assert not ratio["met"]


@pytest.mark.parametrize(
    ("number", "at_least", "at_most", "met"),
    [
        (3.0, 3.0, None, True),
        (2.99, 3.0, None, False),
        (1.3, None, 1.3, True),
        (1.31, None, 1.3, False),
        (0.0, None, None, True),
        (float("nan"), 1.0, None, False),
        (float("nan"), None, 1.0, False),
    ],
)
def test_what_is_wanted(number, at_least, at_most, met):
    assert is_met(number, at_least, at_most) == met


def test_what_is_missed_is_named():
    part = example_part(
        ratios=[Ratio("ours", ("one", "two"), at_least=3.0), Ratio("ours", ("two",))],
        facts=lambda runs: [Fact("padding", 0.2, at_most=0.1), Fact("size", 5.0)],
    )
    result = run_part(part, 3, print, pause=0)
    assert missed({"A": result}) == [
        "A: ours over the best of one, two is 2, wanted >= 3",
        "A: padding is 0.2, wanted <= 0.1",
    ]
    assert missed({"A": run_part(example_part(), 3, print, pause=0)}) == []


def test_a_ratio_of_nobody_is_refused():
    with pytest.raises(ValueError, match="'them'"):
        judged(example_part(ratios=[Ratio("ours", ("them",))]), {}, {"ours": [Measured(1.0)]})


def bench(tmp_path, monkeypatch, part, *flags):
    """The command on a benchmark of one part; its exit code."""
    monkeypatch.setitem(command.BENCHMARKS, "rollouts", {"A": lambda context: part})
    # The cores of the whole test session.
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)
    arguments = ["rollouts", "--rounds=3", "--threads=1", f"--out={tmp_path}", *flags]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    try:
        command.main(command.make_parser().parse_args(arguments))
    except SystemExit as end:
        return end.code
    return 0


def test_check_is_the_exit_code(tmp_path, monkeypatch, capsys):
    wanted = [Ratio("ours", ("one", "two"), at_least=2.5)]
    assert bench(tmp_path, monkeypatch, example_part(), "--check") == 0
    assert bench(tmp_path, monkeypatch, example_part(ratios=wanted)) == 0
    assert bench(tmp_path, monkeypatch, example_part(ratios=wanted), "--check") == 1
    said = capsys.readouterr()
    assert "missed: A: ours over the best of one, two is 2, wanted >= 2.5" in said.err
    # The result is written and shown either way.
    result = json.loads((tmp_path / "rollouts.json").read_text())
    assert result["parts"]["A"]["ratios"][0]["met"] is False
    assert result["parts"]["A"]["contenders"][0]["rounds"][2] == {
        "seconds": 4.0, "amount": 100.0, "detail": {"steps": 7.0},
    }  # fmt: skip
    assert result["machine"]["cores_used"] == 1
    assert result["versions"]["jax"]
    assert (tmp_path / "rollouts.md").read_text() == markdown(result)
    assert "| ours over the best of one, two |  2.00 | >= 2.5 |  NO |" in said.out


def test_only_some_parts_have_files_of_their_own(tmp_path, monkeypatch):
    assert bench(tmp_path, monkeypatch, example_part(), "--only=A") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollouts-A.json", "rollouts-A.md"]
    with pytest.raises(ValueError, match="there is no part 'D'"):
        bench(tmp_path, monkeypatch, example_part(), "--only=A,D")
    assert command.chosen_parts("C, A", {"A": 1, "B": 2, "C": 3}) == ["A", "C"]


def test_the_report_shows_every_number(tmp_path):
    part = run_part(example_part(), 3, print, pause=0)
    result = {
        "benchmark": "rollouts", "date": "2026-01-02", "command": "python -m x", "platform": "cpu",
        "machine": {"processor": "P", "cores": 4, "cores_used": 2, "memory": "M", "system": "S"},
        "versions": {"jax": "1"}, "peers_versions": {"torch": "2"}, "notes": ["Checked."],
        "parts": {"A": part | {"load_average": [0.5, 1.25]}},
    }  # fmt: skip
    text = markdown(result)
    assert "2026-01-02, P, 2 of 4 cores, M, S." in text
    assert "Ours: jax 1. Peers: torch 2." in text
    assert "\nChecked.\n" in text
    cells = " ".join(text.split())
    assert "| contender | median tokens/s | min | max | every round |" in cells
    assert "| ours | 50 | 25 | 100 | 100, 50, 25 |" in cells
    assert "| two | 10 | 10 | 100 | 10, 100, 10 |" in cells
    assert "Load average before and after each round: 0.5, 1.2." in text
    assert "- one: settings of one" in text
    assert "| steps | 7 | <= 8 | yes |" in cells
    assert "more:\n\n| a   |   b |" in text
    paths = write(result, tmp_path / "out", "name")
    assert json.loads(paths[0].read_text()) == result
    assert paths[1].read_text() == text


def test_the_environment_is_kept_until_requirements_change(tmp_path, monkeypatch):
    """Without packages, so that nothing is downloaded."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    requirements, folder, said = tmp_path / "requirements.txt", tmp_path / "peers", []
    requirements.write_text("# nothing\n")

    def python():
        return peers_python(folder, "", said.append, requirements)

    made = python()
    assert made == folder / "bin" / "python"
    assert made.exists()
    (folder / "marker").touch()
    said.clear()
    assert python() == made
    assert said == []
    assert (folder / "marker").exists()

    requirements.write_text("# something else\nno-such-package==1\n")
    with pytest.raises(VenvError, match="no-such-package"):
        python()
    assert not (folder / "marker").exists()
    assert any("other requirements" in line for line in said)
    # An environment that was not finished is none.
    assert json.loads((folder / STAMP).read_text()) == {}


def test_no_folder_of_others_is_removed(tmp_path):
    (tmp_path / "pyvenv.cfg").touch()
    with pytest.raises(VenvError, match="holds something else"):
        peers_python(tmp_path, "", print)
    assert (tmp_path / "pyvenv.cfg").exists()


def test_requirements_are_pinned():
    lines = venv.REQUIREMENTS.read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert {"google-tunix==0.1.7", "torch==2.13.0"} < set(pins)
    assert all("==" in pin for pin in pins)


ECHO = """
import sys
sys.path.insert(0, {folder!r})
from protocol import serve

def say(text):
    print("noise of a library")
    return {{"text": text * 2}}

def fail():
    raise KeyError("gone")

def end():
    print("last words", file=sys.stderr)
    raise SystemExit(3)

serve({{"say": say, "fail": fail, "end": end}})
"""


def test_a_peer_answers_line_by_line(tmp_path, monkeypatch):
    script = ECHO.format(folder=str(processes.SCRIPTS))
    (tmp_path / "echo.py").write_text(script)
    monkeypatch.setattr(processes, "SCRIPTS", tmp_path)
    with Peer(Path(sys.executable), "echo", tmp_path / "log", 1) as peer:
        assert peer.ask("say", text="ab") == {"text": "abab"}
        with pytest.raises(PeerError, match="KeyError: 'gone'"):
            peer.ask("fail")
        # A failure is one of the command, not of the process.
        assert peer.ask("say", text="") == {"text": ""}
        with pytest.raises(PeerError, match=r"exit code 3: .*last words"):
            peer.ask("end")
        with pytest.raises(PeerError, match="exit code 3"):
            peer.ask("say", text="x")
    assert "noise of a library" in (tmp_path / "log").read_text()


def test_peers_are_on_the_cpu(tmp_path):
    with ExitStack() as closing:
        context = Context(tmp_path, 1, "cuda", tmp_path / "peers", "", print, closing)
        with pytest.raises(ValueError, match="--platform=cuda"):
            context.peer("tunix_rollouts")
    assert not (tmp_path / "peers").exists()


def test_both_of_our_own_sides_sample_every_token(tmp_path):
    """Two prompts and a branch, longer than one bucket of the cache."""
    model = ours.load(write_model(tmp_path / "model", TINY))
    rng = np.random.default_rng(0)
    prompt, other = rng.integers(1, VOCAB, (2, 8), dtype=np.int32)
    branch = np.concatenate([prompt, rng.integers(1, VOCAB, 60, dtype=np.int32)])
    work = Rollouts(
        prefixes=[prompt, prompt, other, branch],
        lengths=np.array([5, 1, 3, 9]),
        problem=np.array([0, 0, 1, 0]),
        total=77,
    )
    measured = ours.sample_rows(model, work, ours.sampler_config(work, 2))
    assert measured.amount == 18
    # The prompt is a cut of the branch's prefix.
    assert measured.detail["prefill_tokens"] == 68 + 8
    static = ours.sample_static(model, work, 2)
    assert static.amount == 18
    # Sorted: (9, 5), (3, 1); every prefix on its own.
    assert static.detail["slot_steps"] == 2 * 9 + 2 * 3
    assert static.detail["prefill_tokens"] == 68 + 8 + 8 + 8
