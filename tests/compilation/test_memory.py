"""A device that is too small: what is said before the first step, and when it happens later."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.algorithms.adaptive import AdaptiveExpansionConfig
from attnrl_jax.algorithms.losses import LossConfig
from attnrl_jax.branching.positions import BranchingConfig
from attnrl_jax.compilation import memory
from attnrl_jax.compilation.memory import (
    DeviceMemoryError,
    check_memory,
    device_limit,
    explain_out_of_memory,
    format_bytes,
)
from attnrl_jax.compilation.programs import Compiled, compile_program, run_programs
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from attnrl_jax.packing import row_paths
from attnrl_jax.sampling.requests import Request
from attnrl_jax.sampling.sampler import SamplerConfig, sample
from attnrl_jax.sharding import MeshConfig, batch_devices, cast_to_mesh, make_meshes
from attnrl_jax.training import step
from attnrl_jax.training.setup import layout
from attnrl_jax.training.state import TrainConfig, init_state
from attnrl_jax.types import TrainRows
from tests.trees import random_rollouts

MODEL = ModelConfig("qwen2", 64, 32, 1, 4, 2, 8, 48, tie_embeddings=True)
# Few programs: one kind of scoring, one length that decoding attends to, nothing narrowed.
CONFIG = TrainConfig(
    prompt_budget=8,
    response_budget=24,
    length_multiple=32,
    pack_length=32,
    micro_batch_tokens=256,
    score_batch_tokens=128,
    branching=BranchingConfig(rule="none"),
    expansion=AdaptiveExpansionConfig(filter_easy=False),
    loss=LossConfig(kl_beta=0.1),
    sampler=SamplerConfig(slots=48, prefill_rows=4, length_bucket=32, attend_parts=1, halvings=0),
)


def one_device():
    return make_meshes(MeshConfig(), jax.devices()[:1])


def value(config, setting):
    return getattr(config.sampler if "." in setting else config, setting.rpartition(".")[2])


def changed(config, setting, number):
    if "." in setting:
        return replace(config, sampler=replace(config.sampler, **{setting[8:]: number}))
    return replace(config, **{setting: number})


def advised(error, config):
    """The configuration that an error asks for; what it says of the old one must be so."""
    found = re.findall(r"([\w.]+) from (\d+) to (\d+)", str(error).partition("Lower")[2])
    assert found, error
    for setting, old, new in found:
        assert int(new) < int(old) == value(config, setting)
        config = changed(config, setting, int(new))
    return config, [setting for setting, *_ in found]


def refusal(config, limit, meshes=None, model=MODEL):
    with pytest.raises(DeviceMemoryError) as caught:
        check_memory(model, config, *(meshes or one_device()), limit)
    return caught.value


@pytest.fixture(scope="module")
def totals():
    """Bytes that each program needs, of parts of others too."""
    return {
        program.name: compile_program(program, is_counted=False).total
        for program in run_programs(MODEL, CONFIG, *one_device())
    }


def test_what_fits_passes(totals):
    needs = check_memory(MODEL, CONFIG, *one_device(), max(totals.values()))
    found = {need.program.name: need.compiled.total for need in needs}
    assert found == {name: totals[name] for name in found}
    # What was not compiled is smaller than what was.
    left = {name: total for name, total in totals.items() if name not in found}
    assert len(left) == 4
    for name, total in left.items():
        other = "accumulate" if name in ("zero gradients", "reference log-probabilities") else (
            "generate"
        )  # fmt: skip
        assert total <= found[other], name


def test_the_setting_of_what_is_too_large_is_lowered(totals):
    largest, second = sorted(totals.values(), reverse=True)[:2]
    assert largest == totals["accumulate"]
    limit = max(second, int(0.8 * largest))
    error = refusal(CONFIG, limit)
    assert f"accumulate (the update) needs {format_bytes(largest)}" in str(error)
    assert f"a device has {format_bytes(limit)}" in str(error)
    fitting, settings = advised(error, CONFIG)
    assert settings == ["micro_batch_tokens"]
    needs = check_memory(MODEL, fitting, *one_device(), limit)
    assert f"then {format_bytes(max(n.compiled.total for n in needs))} are enough" in str(error)
    refusal(replace(CONFIG, micro_batch_tokens=2 * fitting.micro_batch_tokens), limit)


def test_settings_are_lowered_together(totals):
    limit = int(0.95 * totals["generate"])
    assert limit > totals["apply gradients"]
    error = refusal(CONFIG, limit)
    assert "generate (sampling) needs" in str(error)
    assert "accumulate (the update) needs" in str(error)
    fitting, settings = advised(error, CONFIG)
    assert {"sampler.slots", "micro_batch_tokens"} <= set(settings)
    check_memory(MODEL, fitting, *one_device(), limit)
    for setting in settings:
        larger = changed(fitting, setting, 2 * value(fitting, setting))
        assert "Lower" in str(refusal(larger, limit))


def test_what_nothing_helps_is_said(totals):
    limit = totals["apply gradients"] - 1
    said = str(refusal(CONFIG, limit))
    assert "Lower" not in said
    assert "No smaller batch makes apply gradients fit" in said
    # No batch, no activation: neither their dtype nor their length helps.
    helps = said.partition("What helps: ")[2]
    assert helps == "more devices (mesh.fsdp, mesh.tensor), loss.kl_beta=0 (drops the reference)"


def test_what_is_always_held_is_not_compiled_for(monkeypatch):
    monkeypatch.setattr(memory, "compile_program", lambda *_, **__: pytest.fail("compiled"))
    shapes = run_programs(MODEL, CONFIG, *one_device())[0].arguments[0]
    size = 4 * sum(x.size for x in jax.tree.leaves(shapes))
    said = str(refusal(CONFIG, 5 * size))
    for name, count in (("parameters", size), ("reference", size), ("optimizer state", 2 * size)):
        assert f"{name} {format_bytes(count)}" in said
    assert "gradients" in said
    assert "mesh.fsdp" in said
    assert "kl_beta" in said
    without = replace(CONFIG, loss=LossConfig(kl_beta=0.0))
    assert "kl_beta" not in str(refusal(without, 4 * size))


def test_a_run_finds_its_programs_compiled(totals, caplog):
    assert totals
    mesh, sampling_mesh = one_device()
    # One sequence a batch, so that there are no parts of batches.
    config = replace(CONFIG, micro_batch_tokens=32)
    for program in run_programs(MODEL, config, mesh, sampling_mesh):
        compile_program(program, is_counted=False)
    params = init_params(MODEL, jax.random.key(0))
    state = init_state(params, config.optimizer, mesh)
    reference = jax.tree.map(jnp.copy, state.params)
    rollouts = random_rollouts(np.random.default_rng(0), vocab=64)
    rows = TrainRows(
        rollouts.tokens, row_paths(rollouts, rollouts.root == np.arange(len(rollouts.root))),
        np.zeros(rollouts.tokens.shape, np.float32), rollouts.logprobs,
    )  # fmt: skip
    requests = [Request(np.ones(8, np.int32), 50, 4, seed=0)]
    with jax.set_mesh(mesh), jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(0)
        copy = cast_to_mesh(state.params, MODEL.dtype, sampling_mesh)
        sample(copy, MODEL, requests, [0], config.sampler_shapes)
        step.update(state, MODEL, config, rows, np.random.default_rng(0), reference, **layout(mesh))
    compiled = {name for text in caplog.messages for name in re.findall(r"Compiling (\S+) ", text)}
    assert "jit(<lambda>)" in compiled
    names = {"prefill", "insert", "generate", "empty_state", "no_gradients", "accumulate",
             "reference_logprobs", "apply_gradients"}  # fmt: skip
    assert not {f"jit({name})" for name in names} & compiled


def bytes_by_formula(program, is_counted=True):
    """As a compiler might count them: what goes in, and what one device computes."""
    arrays = [x for x in jax.tree.leaves(program.arguments) if hasattr(x, "shape")]
    batch = [x.shape for x in arrays if len(x.shape) == 2 and x.dtype == jnp.int32]
    cost = {"accumulate": 4000, "prefill": 2000, "generate": 1000}.get(program.name, 500)
    work = cost * max((int(np.prod(shape)) for shape in batch), default=0)
    work = work // batch_devices(program.mesh) if program.setting else 0
    given = sum(program.given.values())
    return Compiled(given, work, 0, program.held | {"arguments not read": 0}, 0, 0, {})


EIGHT = MeshConfig(data=2, fsdp=2, tensor=2, sampling_tensor=1)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), EIGHT])
@pytest.mark.parametrize("pack_length", [0, 128])
@pytest.mark.parametrize("share", [0.9, 0.3])
def test_advice_fits_and_nothing_larger_does(monkeypatch, mesh, pack_length, share):
    monkeypatch.setattr(memory, "compile_program", bytes_by_formula)
    sampler = replace(CONFIG.sampler, slots=50, prefill_rows=10)
    config = replace(
        CONFIG, pack_length=pack_length, micro_batch_tokens=3000, score_batch_tokens=6000,
        sampler=sampler,
    )  # fmt: skip
    meshes = make_meshes(mesh, jax.devices()[: 1 if mesh.data == 1 else 8])
    needs = check_memory(MODEL, config, *meshes, 1 << 60)
    limit = int(share * max(need.compiled.total for need in needs))
    fitting, settings = advised(refusal(config, limit, meshes), config)
    check_memory(MODEL, fitting, *meshes, limit)
    for setting in settings:
        larger = min(2 * value(fitting, setting), value(config, setting))
        refusal(changed(fitting, setting, larger), limit, meshes)


def test_a_program_that_the_compiler_refuses_is_too_large(monkeypatch):
    def compile_some(program, is_counted=True):
        compiled = bytes_by_formula(program)
        if compiled.temporaries > 4000 * 64:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm")
        return compiled

    monkeypatch.setattr(memory, "compile_program", compile_some)
    error = refusal(CONFIG, 1 << 30)
    assert "accumulate (the update) needs more than the compiler allows" in str(error)
    assert advised(error, CONFIG)[0].micro_batch_tokens == 64

    def fail(program, is_counted=True):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")

    monkeypatch.setattr(memory, "compile_program", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        check_memory(MODEL, CONFIG, *one_device(), 1 << 30)


def test_one_sequence_a_device_is_the_least(monkeypatch):
    monkeypatch.setattr(memory, "compile_program", bytes_by_formula)
    meshes = one_device()
    sampler = replace(CONFIG.sampler, slots=1, prefill_rows=1)
    config = replace(CONFIG, score_batch_tokens=32, sampler=sampler)
    least = replace(config, micro_batch_tokens=32)
    needs = {n.program.name: n.compiled.total for n in check_memory(MODEL, least, *meshes, 1 << 60)}
    limit = needs["accumulate"] - 1
    said = str(refusal(config, limit))
    assert "With micro_batch_tokens from 256 to 32" in said
    assert f"still accumulate (the update) needs {format_bytes(needs['accumulate'])}" in said
    assert "gradients 0" in said
    for help in ("mesh.fsdp", "model.remat='full'", "model.dtype='bfloat16'", "loss.kl_beta=0",
                 "a smaller prompt_budget or response_budget"):  # fmt: skip
        assert help in said
    lean = replace(MODEL, remat="full", dtype="bfloat16")
    said = str(refusal(least, limit, model=lean))
    assert "No smaller batch makes accumulate fit" in said
    assert "remat" not in said
    assert "dtype" not in said


def explain(error, stage, config=CONFIG):
    return explain_out_of_memory(error, stage, MODEL, config, *one_device())


def test_memory_that_runs_out_while_running_names_the_setting():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros(1 << 46).block_until_ready()
    said = {stage: explain(caught.value, stage) for stage in ("generate", "evaluate", "update")}
    assert said["generate"] == "out of memory in stage generate: lower sampler.slots from 48 to 24"
    assert "sampler.slots from 48 to 24" in said["evaluate"]
    assert "micro_batch_tokens from 256 to 128" in said["update"]
    for stage in ("score", "judge", "tree"):
        assert "score_batch_tokens from 128 to 64" in explain(caught.value, stage)
    assert "mesh.fsdp" in explain(caught.value, "reshard")
    least = explain(caught.value, "update", replace(CONFIG, micro_batch_tokens=32))
    assert "micro_batch_tokens 32 is at its least" in least
    assert "model.remat='full'" in least


def test_memory_of_the_host_that_runs_out():
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 60, np.uint8)
    assert "lower num_problems from 64 to 32" in explain(caught.value, "tree")
    assert "sampler.slots" in explain(caught.value, "generate")
    assert "micro_batch_tokens" in explain(RuntimeError("std::bad_alloc"), "update")


def test_an_error_that_came_from_memory_counts_and_no_other():
    def wrapped(inner):
        try:
            try:
                raise inner
            except Exception as error:
                raise ValueError("step 3 failed") from error
        except ValueError as error:
            return error

    assert "score_batch_tokens" in explain(wrapped(MemoryError()), "score")
    assert explain(wrapped(KeyError("tokens")), "score") is None
    assert explain(ValueError("out of memory, it says"), "score") is None
    assert explain(jax.errors.JaxRuntimeError("INTERNAL: something else"), "score") is None


def device(limit, process=0):
    return SimpleNamespace(process_index=process, memory_stats=lambda: limit)


def test_limit_of_the_devices():
    assert device_limit(jax.devices()) is None
    stats = [device({"bytes_limit": 5}), device({"bytes_limit": 3}), device({"bytes_limit": 1}, 1)]
    assert device_limit(stats) == 3
    assert device_limit([device({"bytes_in_use": 5})]) is None


def test_bytes_are_read_in_their_unit():
    assert [format_bytes(n) for n in (14_066_067_210, 2**30, 2**30 - 1, 300_000)] == [
        "13.1 GiB", "1.0 GiB", "1024.0 MiB", "0.3 MiB"
    ]  # fmt: skip


def test_every_size_of_a_program_is_there():
    """Prefixes of every width of the sampler, slots before and after each halving, whole, half and
    quarter batches; each once, and of the largest as without it."""
    sampler = SamplerConfig(slots=16, prefill_rows=4, length_bucket=8, halvings=2, unroll=False)
    config = replace(CONFIG, sampler=sampler)
    meshes = one_device()
    largest = run_programs(MODEL, config, *meshes)
    programs = run_programs(MODEL, config, *meshes, every_size=True)

    def sizes(name, place):
        return [jax.tree.leaves(p.arguments[place])[-1].shape for p in programs if p.name == name]

    assert {p.name for p in programs} == {p.name for p in largest}
    assert [width for _, width in sizes("prefill", 2)] == [32, 8, 16, 24]
    assert [width for _, width in sizes("insert", 2)] == [32, 8, 16, 24]
    states = [p.arguments[2].length.shape[0] for p in programs if p.name == "generate"]
    assert states == [16, 8, 4]
    assert [p.arguments[0].length.shape[0] for p in programs if p.name == "narrow"] == [16, 8]
    batches = [p.arguments[4].mask.shape for p in programs if p.name == "accumulate"]
    assert batches == [(8, 32), (4, 32), (2, 32)]
    scored = [p.arguments[2].tokens.shape for p in programs if p.name.startswith("score initial")]
    assert scored == [(4, 32), (2, 32), (1, 32)]
    assert sum(p.name == "apply gradients" for p in programs) == 1
