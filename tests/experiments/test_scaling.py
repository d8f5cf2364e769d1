"""Formulas of the bounds on a step's time, by hand-counted numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnrl_jax.compilation.chips import CHIPS, Chip
from attnrl_jax.models.config import ModelConfig
from experiments import roofline, scaling
from experiments.roofline import MODELS, Workload

ROOT = Path(__file__).resolve().parents[2]
# Matrices: 2 layers x 16 x (2 x 16 + 2 x 16 + 3 x 32) and 16 x 64 twice.
TINY = ModelConfig(
    family="qwen2", vocab_size=64, width=16, num_layers=2, num_heads=2, num_kv_heads=2,
    head_dim=8, mlp_width=32,
)  # fmt: skip
MATRICES = 2 * 16 * 160 + 1024
ONE = Workload(problems=1)
# A second for a million operations, ten thousand bytes of memory, a hundred of links.
CHIP = Chip("c", "c", 2, 1, hbm=10**9, flops=1e6, hbm_rate=1e4, ici_rate=100.0)


def test_parameters_of_the_models():
    assert roofline.all_params(TINY) == MATRICES + 1024
    # 28 layers of 46,792,704, and 151,936 x 1,536 twice: 1.78 billion.
    assert roofline.all_params(MODELS["1.5B"]) == 28 * 46_792_704 + 2 * 233_373_696
    assert roofline.all_params(MODELS["7B"]) == pytest.approx(7.62e9, rel=0.01)
    assert roofline.all_params(MODELS["32B"]) == pytest.approx(32.8e9, rel=0.01)


def test_tokens_of_one_problem():
    """6 responses of 5,000 tokens after 150, two branches of each, continued twice."""
    assert (ONE.initial, ONE.rows) == (6, 30)
    assert ONE.continued == 6 * 4 * 2500
    assert ONE.sampled == 30_000 + 60_000
    assert ONE.prefixes == pytest.approx(20_000)
    assert ONE.prefilled == pytest.approx(7 * 150 + 20_000)
    assert ONE.scored == pytest.approx((6 * 5150, 150 + 20_000 + 60_000))
    assert ONE.trained == 150 + 90_000


def test_operations_and_bytes():
    # Two products of 2 heads x 8 with 10 others, 2 operations each, 2 layers.
    assert roofline.attention_flops(TINY, 10) == 2 * 2 * 2 * 2 * 8 * 10
    assert roofline.forward_flops(TINY, ONE) == 2 * MATRICES + 128 * 2575
    assert roofline.slot_bytes(TINY, ONE) == 2 * 2 * 2 * 8 * 2 * 9216
    kept, inside, output = 2 * 2 * 16 * 9216 * 2, 6 * 32 * 9216 * 2, 2 * 64 * 16 * 4
    assert roofline.update_temporaries(TINY, ONE) == kept + inside + output
    assert roofline.update_temporaries(TINY, ONE, 2) == kept + (inside + output) / 2


def test_decoding_by_hand():
    """One chip: 11 slots do the 90,000 tokens of a problem in the 8,192 steps of the longest."""
    stage = roofline.generation(TINY, CHIP, 1, ONE, 1)
    assert stage.settings == {"tensor": 1, "slots": 11, "steps": 8192}
    slot = roofline.slot_bytes(TINY, ONE)
    assert stage.memory == pytest.approx(8192 * (2 * MATRICES + 11 * slot) / 1e4)
    seen = 150 + 2 / 3 * 5000
    decode = 8192 * 11 * (2 * MATRICES + 128 * seen) / 1e6
    prefill = 21_050 * (2 * MATRICES + 128 * 2575) / 1e6
    assert stage.compute == pytest.approx(prefill + decode)
    assert stage.interconnect == 0
    assert stage.seconds == pytest.approx(prefill + max(decode, stage.memory))
    assert stage.bound == "memory"


def test_decoding_over_two_chips():
    """Two all-reduces a layer of [11, 16] in bfloat16, half of it each way, and two hops."""
    stage = roofline.generation(TINY, CHIP, 2, ONE, 2)
    each = 2 * 0.5 * 11 * 16 * 2 / 100 + 2 * 1e-6
    assert stage.interconnect == pytest.approx(8192 * 2 * 2 * each)
    slot = roofline.slot_bytes(TINY, ONE)
    assert stage.memory == pytest.approx(8192 * (MATRICES + 11 * slot / 2) / 1e4)
    # Two heads of keys and values are not cut over four chips.
    whole = roofline.generation(TINY, CHIP, 4, ONE, 4)
    assert whole.memory == pytest.approx(8192 * (MATRICES / 2 + 11 * slot) / 1e4)


def test_memory_limits_the_slots():
    slot, held = roofline.slot_bytes(TINY, ONE), 18 * roofline.all_params(TINY)
    small = Chip("c", "c", 2, 1, int((held + 3.5 * slot) / roofline.USABLE), 1e6, 1e4, 100.0)
    stage = roofline.generation(TINY, small, 1, ONE, 1)
    assert stage.settings == {"tensor": 1, "slots": 3, "steps": 30_000}
    none = Chip("c", "c", 2, 1, int((held + 0.5 * slot) / roofline.USABLE), 1e6, 1e4, 100.0)
    assert roofline.generation(TINY, none, 1, ONE, 1) is None


def test_passes_by_hand():
    """100 tokens more than one sequence a chip: two batches. What is gathered comes meanwhile."""
    args = (TINY, CHIP, 2, ONE)
    stage = roofline.passes(*args, 1, 2 * 9216 + 100, flops=10, gathers=6, reduces=2)
    assert stage.settings == {"tensor": 1, "batches": 2}
    assert stage.compute == pytest.approx(2 * 9216 * 10 / 1e6)
    assert stage.interconnect == pytest.approx(2 * 6 * (MATRICES + 1024) / 2 / 100)
    assert stage.seconds == stage.interconnect
    # One sequence on both: twice as many batches, half of the work each, sums to wait for.
    stage = roofline.passes(*args, 2, 2 * 9216 + 100, flops=10, gathers=6, reduces=2)
    assert stage.compute == pytest.approx(3 * 9216 * 5 / 1e6)
    sums = 3 * 2 * 0.5 * 2 * 2 * 2 * 9216 * 16 / 100
    assert stage.interconnect == pytest.approx(sums)
    assert stage.seconds == pytest.approx(max(stage.compute, stage.memory) + sums)


def test_updates_and_what_does_not_fit():
    stage = roofline.updating(TINY, CHIP, 1, ONE, 1)
    flops = 10 * MATRICES + 4 * 128 * 2575
    # Ten mini-batches of 9,015 tokens: a sequence each.
    assert stage.compute == pytest.approx(10 * 9216 * flops / 1e6)
    assert stage.memory == pytest.approx(10 * (2 * MATRICES + 28 * (MATRICES + 1024)) / 1e4)
    assert roofline.step_time(MODELS["32B"], CHIPS["v5e"], 8, Workload()) is None


def test_chips_that_are_left_idle():
    """A mini-batch of 64 problems has 63 sequences: more chips than that need `tensor`."""
    v5e = CHIPS["v5e"]
    assert Workload().trained / 10 / 9216 == pytest.approx(62.6, abs=0.1)
    times = {
        chips: roofline.updating(MODELS["1.5B"], v5e, chips, Workload(), 1).compute
        for chips in (32, 64, 128)
    }
    assert times[32] == 2 * times[64]
    assert times[64] == times[128]


def test_counts_beside_the_formulas():
    program = {"name": "accumulate", "roofline_seconds": {"compute": 0.5, "memory": 0.1,
                                                          "interconnect": 0.25}}  # fmt: skip
    result = {
        "name": "qwen_1p5b", "devices": 8, "chip": {"name": "v5e"}, "mesh": {"tensor": 1},
        "programs": [program, {"name": "narrow"}, {"name": "accumulate", "error": "too large"}],
    }  # fmt: skip
    lines = scaling.against_counts([json.loads(json.dumps(result))]).splitlines()
    assert len(lines) == 3
    model = MODELS["1.5B"]
    flops = 8 * 1_543_569_408 + 3 * roofline.attention_flops(model, 4608)
    sent = 8 * roofline.all_params(model) * 7 / 8
    expected = [9216 * flops / 197e12, 0.5, sent / 200e9, 0.25]
    assert [cell.strip() for cell in lines[2].split("|")[3:-1]] == [
        f"{1e3 * x:.0f}" for x in expected
    ]


def test_the_page_has_the_tables():
    """docs/scaling.md is what the command prints."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling.tables() in page
