"""The programs of a run: their arguments are those of the run, and no device holds too much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np
import pytest

from attnrl_jax.algorithms.losses import LossMetrics
from attnrl_jax.branching.positions import BranchingConfig
from attnrl_jax.compilation.programs import compile_program, run_programs
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import init_params
from attnrl_jax.packing import row_paths
from attnrl_jax.sampling import sampler
from attnrl_jax.sampling.requests import Request
from attnrl_jax.sharding import (
    MeshConfig,
    batch_devices,
    cast_to_mesh,
    make_meshes,
    parameter_shardings,
)
from attnrl_jax.training.state import TrainConfig
from attnrl_jax.training.step import pack_rows
from attnrl_jax.types import TrainRows
from tests.trees import random_rollouts

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig("qwen2", 64, 32, 1, 4, 2, 8, 48, qkv_bias=True)
CONFIG = TrainConfig(
    prompt_budget=32,
    response_budget=96,
    length_multiple=32,
    micro_batch_tokens=1024,
    score_batch_tokens=2048,
    sampler=sampler.SamplerConfig(
        slots=16, prefill_rows=4, length_bucket=32, attend_parts=2, halvings=1, unroll=False
    ),
)
MESH = MeshConfig(data=2, fsdp=-1, tensor=2, sampling_tensor=1)
NAMES = [
    "reshard", "empty decode state", "prefill", "insert", "generate", "collect", "narrow",
    "score initial responses, with FCI", "score continuations", "zero gradients",
    "reference log-probabilities", "accumulate", "apply gradients",
]  # fmt: skip


def programs(mesh=MESH, config=CONFIG, model=MODEL):
    return {program.name: program for program in run_programs(model, config, *make_meshes(mesh))}


def described(tree):
    """Shape and dtype of every array, and the layout of those that lie on a mesh."""
    arrays = []
    for leaf in jax.tree.leaves(tree):
        laid_out = getattr(leaf, "sharding", None)
        if not isinstance(laid_out, jax.sharding.NamedSharding):
            laid_out = None
        share = None if laid_out is None else laid_out.shard_shape(leaf.shape)
        arrays.append(
            (
                np.shape(leaf),
                jax.dtypes.canonicalize_dtype(getattr(leaf, "dtype", type(leaf))),
                share,
            )
        )
    return arrays


def test_every_program_of_a_run_is_there():
    assert list(programs()) == NAMES
    without_tree = TrainConfig(branching=BranchingConfig(rule="none"), top_p=0.9)
    assert "score continuations" not in programs(config=without_tree)


def test_sampling_calls_what_is_compiled(monkeypatch):
    expected = programs()
    mesh, sampling_mesh = make_meshes(MESH)
    params = init_params(MODEL, jax.random.key(0))
    params = jax.device_put(params, parameter_shardings(params, mesh))
    copy = cast_to_mesh(params, MODEL.dtype, sampling_mesh)
    assert described(expected["reshard"].arguments) == described(params)
    called = {}

    def recorded(name):
        function = getattr(sampler, name)

        def record(*arguments):
            called.setdefault(name, arguments)
            return function(*arguments)

        return record

    names = {"prefill": "prefill", "insert": "insert", "generate": "generate", "narrow": "narrow"}
    names |= {"empty decode state": "empty_state", "collect": "take_slots"}
    for name in names.values():
        monkeypatch.setattr(sampler, name, recorded(name))
    requests = [Request(np.ones(119, np.int32), 20, 5, seed=0)]
    with jax.set_mesh(sampling_mesh):
        sampler.sample(copy, MODEL, requests, [0], CONFIG.sampler_shapes)
    for program, name in names.items():
        given, compiled = called[name], expected[program].arguments
        fixed = [x for x in given if isinstance(x, ModelConfig | int | tuple)]
        assert fixed == [x for x in compiled if isinstance(x, ModelConfig | int | tuple)], name
        assert described(given) == described(compiled), name


def test_batches_are_those_of_the_update():
    mesh = make_meshes(MESH)[0]
    rollouts = random_rollouts(np.random.default_rng(0), problems=40)
    rows = TrainRows(
        rollouts.tokens, row_paths(rollouts, rollouts.root == np.arange(len(rollouts.root))),
        np.zeros(rollouts.tokens.shape, np.float32), np.zeros(rollouts.tokens.shape, np.float32),
    )  # fmt: skip
    _, batches = pack_rows(rows, CONFIG, batch_devices(mesh))
    compiled = programs()["accumulate"].arguments[4]
    given = batches[0].batch
    assert compiled.packed.layout == given.packed.layout
    assert [x[:2] for x in described(compiled)] == [x[:2] for x in described(given)]


def test_what_is_held_beside_a_program():
    held = {name: set(program.held) for name, program in programs().items()}
    always = {"parameters", "optimizer state", "reference"}
    assert held["generate"] == always | {"prefixes"}
    assert held["prefill"] == always | {"decode state", "prefixes"}
    # The copy that sampled is gone by then, except where more is sampled beside the update.
    assert held["accumulate"] == {"optimizer state", "reference"}
    assert held["apply gradients"] == {"reference"}
    overlapping = programs(config=TrainConfig(overlap="initial"))["accumulate"].held
    assert set(overlapping) == {"optimizer state", "reference", "sampling copy"}
    # Float32 parameters are held once for every moment of AdamW, and cut like these; two counts.
    update = programs()["score continuations"].held
    assert update["optimizer state"] == 2 * update["reference"] + 8
    # While sampling no parameter is cut.
    shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    whole = sum(x.size for x in jax.tree.leaves(shapes))
    assert update["sampling copy"] == 4 * whole


def test_devices_that_only_sample_hold_no_optimizer_state():
    split = programs(MeshConfig(sampling_devices=4), TrainConfig(overlap="initial"))
    assert set(split["generate"].held) == {"prefixes"}
    assert set(split["accumulate"].held) == {"optimizer state", "reference"}
    elsewhere = split["score continuations, where sampling is"]
    assert elsewhere.mesh == split["generate"].mesh != split["accumulate"].mesh


def test_compiled_bytes_add_up():
    program = programs()["reshard"]
    compiled = compile_program(program)
    params = init_params(MODEL, jax.random.key(0))
    mesh, sampling_mesh = make_meshes(MESH)

    def share(mesh):
        laid_out = parameter_shardings(params, mesh)
        return 4 * sum(
            int(np.prod(s.shard_shape(x.shape)))
            for x, s in zip(jax.tree.leaves(params), jax.tree.leaves(laid_out), strict=True)
        )

    assert compiled.arguments == share(mesh)
    # The results, and a pointer to each.
    assert compiled.outputs == share(sampling_mesh) + 8 * len(jax.tree.leaves(params))
    beside = compiled.temporaries + sum(compiled.held.values())
    assert compiled.total == compiled.arguments + compiled.outputs + beside
    assert compiled.traffic == compiled.arguments + compiled.outputs
    assert compiled.flops == 0


SIXTEEN = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 16)
from attnrl_jax.compilation.programs import compile_program, run_programs
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.sampling.sampler import SamplerConfig
from attnrl_jax.sharding import MeshConfig, make_meshes
from attnrl_jax.training.state import TrainConfig
config = TrainConfig(
    prompt_budget=32, response_budget=96, pack_length=128, micro_batch_tokens=8 * 128,
    sampler=SamplerConfig(slots=16),
)
meshes = make_meshes(MeshConfig(data=1, fsdp=8, tensor=2))
found = {}
for layers in (2, 4):
    model = ModelConfig("qwen2", 2048, 256, layers, 4, 2, 64, 1024, qkv_bias=True)
    for program in run_programs(model, config, *meshes):
        if program.name == "accumulate" or (program.name, layers) == ("apply gradients", 4):
            compiled = compile_program(program)
            found[f"{program.name} {layers}"] = (compiled.arguments, compiled.temporaries)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def update_of_sixteen():
    """Argument and temporary bytes of the update of 2 and of 4 layers on 16 devices."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", SIXTEEN], env=environment, check=True, capture_output=True, text=True
    )
    return {name: tuple(pair) for name, pair in json.loads(done.stdout.splitlines()[-1]).items()}


# Of the update of sixteen, fsdp 8 and tensor 2, in bytes.
LAYER_KERNELS = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)
VOCABULARY_MATRIX = 4 * 2048 * 256
# Kernels by 16, biases by the two of `tensor`, norms whole.
LAYER_SHARE = LAYER_KERNELS // 16 + 4 * (256 + 128 + 128) // 2 + 4 * 2 * 256


def share_of_parameters(layers):
    return layers * LAYER_SHARE + 2 * VOCABULARY_MATRIX // 16 + 4 * 256


def test_every_device_is_given_its_share_of_the_update(update_of_sixteen):
    # One sequence a device: tokens, positions, intervals, places of the tokens before; mask,
    # weights, advantages, log-probabilities of behaviour and reference. One number
    # besides, and the metrics.
    batch = 9 * 4 * 128 + 4 * (1 + len(fields(LossMetrics)))
    for layers in (2, 4):
        arguments = update_of_sixteen[f"accumulate {layers}"][0]
        assert arguments == 2 * share_of_parameters(layers) + batch
    # Parameters, two moments, gradients; updates, those skipped, those in a row, AdamW's own count,
    # that of its schedule and the loss.
    assert update_of_sixteen["apply gradients 4"][0] == 4 * share_of_parameters(4) + 6 * 4


def test_no_device_replicates_what_is_cut(update_of_sixteen):
    two, four = (update_of_sixteen[f"accumulate {layers}"][1] for layers in (2, 4))
    # What the backward pass finds: the layer's input, attention's output and its log-sum-exp.
    kept = 4 * 128 * (256 + 2 * 64 + 2)
    each = (four - two) // 2
    assert each == pytest.approx(LAYER_SHARE + kept, rel=0.02)
    # Of all layers one at a time is whole along `fsdp`, with its gradient; so are the two matrices
    # of the vocabulary.
    rest = two - 2 * each
    assert rest < 2 * LAYER_KERNELS / 2 + 4 * VOCABULARY_MATRIX / 2
    # A CPU writes the new moments, or parameters and what is added to them, beside the old.
    assert update_of_sixteen["apply gradients 4"][1] < 2 * share_of_parameters(4)
