"""The jitted programs of a run, to be compiled for devices that need not be there.

Each stands with abstract arguments in the shapes and layouts of the run, and with what else lies on
its devices meanwhile. They follow `training.loop.train_step`:

    parameters, optimizer state, reference   always
    sampling copy                            from the reshard to the update; through it where more
                                             is sampled beside
    decode state, prefixes                   while sampling; decode parameters too where layers are
                                             unrolled, of which the sampler makes a copy
    gradients                                in the update

Of programs that come in several sizes it is the largest: full micro-batches, prefixes as long as
the cache, slots before they are narrowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnrl_jax import sharding
from attnrl_jax.compilation.counts import (
    Collectives,
    bytes_per_device,
    count_collectives,
    count_flops,
)
from attnrl_jax.compilation.trees import (
    Trees,
    host_array,
    laid_out,
    platform_of,
)
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.sampling import engine
from attnrl_jax.sampling.sampler import take_slots
from attnrl_jax.scoring import score_packed
from attnrl_jax.shapes import bucket_length, few_lengths
from attnrl_jax.sharding import (
    BATCH,
    CACHE_SPEC,
    batch_devices,
    fit_spec,
    parameter_shardings,
)
from attnrl_jax.training import step
from attnrl_jax.training.state import TrainConfig
from attnrl_jax.types import PackedTokens, TrainBatch


@dataclass(frozen=True)
class Program:
    """One jitted function with abstract arguments.

    Attributes:
      name: what it does.
      function: the jitted function.
      arguments, options: what it is called with, by position and by name.
      mesh: where it runs.
      held: bytes per device of what else lies there meanwhile, by name.
      given: bytes per device of those of its arguments that stay for a while, by name.
      setting: which one its size follows; empty: none.
      reads_donated, writes_donated: whether it reads, and writes, all of what it is given to keep;
        a decode state is changed in a few places.
      unit: what one execution does.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    held: dict[str, int]
    given: dict[str, int] = field(default_factory=dict)
    setting: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    reads_donated: bool = True
    writes_donated: bool = True
    unit: str = "call"


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program; bytes are those of one device.

    Attributes:
      arguments: of what it reads.
      temporaries: while it runs.
      outputs: of its results, without those that take the place of an argument.
      held: of what else lies on the device, arguments that it does not read included, by name.
      flops: operations of matrix products in one execution, over all devices.
      traffic: least bytes read from and written to memory: arguments and results, once each.
      collectives: of one execution, by kind.
    """

    arguments: int
    temporaries: int
    outputs: int
    held: dict[str, int]
    flops: int
    traffic: int
    collectives: dict[str, Collectives]

    @property
    def total(self) -> int:
        """Bytes that a device needs."""
        return self.arguments + self.temporaries + self.outputs + sum(self.held.values())


def compile_program(program: Program, is_counted: bool = True) -> Compiled:
    """Compiles a program for the devices of its mesh.

    Args:
      program: the program.
      is_counted: whether operations and collectives are counted. Otherwise they are none.
    """
    with jax.set_mesh(program.mesh):
        traced = program.function.trace(*program.arguments, **program.options)
        compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    read, aliased = memory.argument_size_in_bytes, memory.alias_size_in_bytes
    given = bytes_per_device(_arrays((program.arguments, program.options)))
    traffic = read + memory.output_size_in_bytes
    traffic -= aliased * (2 - program.reads_donated - program.writes_donated)
    return Compiled(
        arguments=read,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - aliased,
        held=program.held | {"arguments not read": max(given - read, 0)},
        flops=count_flops(traced.jaxpr, platform_of(program.mesh)) if is_counted else 0,
        traffic=traffic,
        collectives=count_collectives(compiled.as_text()) if is_counted else {},
    )


def _arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]


def run_programs(
    model: ModelConfig,
    config: TrainConfig,
    mesh: Mesh,
    sampling_mesh: Mesh,
    sampling_dtype: str = "",
    every_size: bool = False,
) -> list[Program]:
    """Every jitted program of a training step, in order.

    Args:
      model: the policy.
      config: of training.
      mesh, sampling_mesh: of `sharding.make_meshes`.
      sampling_dtype: of sampling, where it is not the model's.
      every_size: whether programs that come in several sizes are there in each; the largest comes
        first.
    """
    trees = Trees(model, config, mesh, sampling_mesh, sampling_dtype)
    parts = [(1, trees)]
    if every_size:
        # As `packing.deal_batches` cuts them.
        parts = [(part, trees.with_batches_of(part)) for part in (1, 2, 4)]
    scoring = [program for _, smaller in parts for program in _scoring(smaller)]
    updates = [
        program
        for part, smaller in parts
        for program in _update(smaller)
        if part == 1 or program.setting == "micro_batch_tokens"
    ]
    return [*_reshard(trees), *_sampling(trees, every_size), *scoring, *updates]


def kept_bytes(
    model: ModelConfig, config: TrainConfig, mesh: Mesh, sampling_mesh: Mesh
) -> dict[str, int]:
    """Bytes per device of what an update has there whatever its batch, by name.

    Args: as in `run_programs`.
    """
    trees = Trees(model, config, mesh, sampling_mesh, "")
    return trees.bytes_of(mesh, (*trees.always, "gradients"))


def _reshard(trees: Trees) -> list[Program]:
    """Parameters in the layout of sampling: `sharding.cast_to_mesh`."""
    around = trees.around(trees.mesh, trees.always, ["parameters"])
    target = jax.tree.map(lambda x: x.sharding, trees.copy)

    def program(name: str, params: Any, target: Any, mesh: Mesh, around: dict[str, Any]) -> Program:
        cast = sharding.cast_function(params, trees.sampling_model.dtype, target)
        return Program(name, cast, (params,), mesh, **around)

    if not trees.is_split:
        return [program("reshard", trees.params, target, trees.mesh, around)]
    programs = [program("cast", trees.params, None, trees.mesh, around)]
    if trees.mesh.size == trees.sampling_mesh.size:
        # Shares arrive as they lay, on as many other devices.
        arrived = Mesh(
            trees.sampling_mesh.devices.reshape(trees.mesh.devices.shape),
            trees.mesh.axis_names, axis_types=trees.mesh.axis_types,
        )  # fmt: skip
        shares = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape,
                trees.sampling_model.dtype,
                sharding=NamedSharding(arrived, x.sharding.spec),
            ),
            trees.params,
        )
        programs.append(program("reshard", shares, target, trees.sampling_mesh, {"held": {}}))
    return programs


def _sampling(trees: Trees, every_size: bool) -> list[Program]:
    """The programs of `sampling.sampler.sample`."""
    model, mesh = trees.sampling_model, trees.sampling_mesh
    sampler, devices = trees.config.sampler_shapes, batch_devices(mesh)
    assert sampler.cache_length is not None
    length = bucket_length(sampler.cache_length, sampler.length_bucket)
    slots = bucket_length(sampler.slots, devices)
    # What a run leaves open it decides by its backend, which here is that of the mesh.
    unroll = sampler.unroll if sampler.unroll is not None else platform_of(mesh) != "tpu"
    layers = engine.layer_groups(model, unroll)
    part = bucket_length(-(-length // sampler.attend_parts), sampler.length_bucket)

    state = jax.eval_shape(partial(engine.empty_state, model, slots, length, layers))
    state = jax.tree.map(partial(_over_slots, mesh), state)
    decoding = jax.eval_shape(partial(engine.decode_params, dtype=model.dtype, groups=layers),
                              trees.copy)  # fmt: skip
    decoding = laid_out(decoding, parameter_shardings(decoding, mesh))
    tokens = host_array(
        bucket_length(sampler.prefill_rows, devices),
        min(few_lengths(length, sampler.length_bucket), length),
    )
    lengths = host_array(tokens.shape[0])
    prefixes = jax.eval_shape(partial(engine.prefill, config=model), trees.copy, tokens=tokens,
                              lengths=lengths)  # fmt: skip
    prefixes = jax.tree.map(partial(_over_slots, mesh), prefixes)
    entering = max(1, int(sampler.refill * slots))
    one, real = host_array(entering), host_array(entering, dtype=jnp.float32)
    admissions = engine.Admissions(
        slot=one, row=one, length=one, limit=one, seed=host_array(entering, 2, dtype=jnp.uint32),
        sample=one, temperature=real, top_p=real, top_k=one,
    )  # fmt: skip
    truncated = trees.config.top_p < 1 or trees.config.top_k > 0

    trees.held |= {"decode state": state, "prefixes": prefixes}
    names = [*trees.always, "sampling copy", "decode state", "prefixes"]
    decoded_with = "sampling copy"
    if layers > 1:
        decoded_with = "decode parameters"
        trees.held[decoded_with] = decoding
        names.append(decoded_with)

    def around(setting: str, *given: str, absent: Sequence[str] = ()) -> dict[str, Any]:
        there = [name for name in names if name not in absent]
        return trees.around(mesh, there, given) | {"setting": setting}

    programs = [
        Program(
            "empty decode state", engine.empty_state, (model, slots, length, layers), mesh,
            **around("sampler.slots", absent=("decode state", "prefixes")),
        ),
        # The prefixes of the requests before are held until these are there.
        Program(
            "prefill", engine.prefill, (trees.copy, model, tokens, lengths), mesh,
            **around("sampler.prefill_rows", "sampling copy"),
            unit=f"{tokens.shape[0]} prefixes of {tokens.shape[1]:,} tokens",
        ),
        Program(
            "insert", engine.insert, (state, prefixes, tokens, admissions), mesh,
            **around("sampler.slots", "decode state", "prefixes"),
            reads_donated=False, writes_donated=False, unit=f"{entering} responses begin",
        ),
        Program(
            "generate", engine.generate,
            (decoding, model, state, host_array(1), host_array(), host_array(), truncated,
             tuple(range(part, length, part))),
            mesh,
            **around("sampler.slots", "decode state", decoded_with),
            writes_donated=False, unit=f"one token of each of {slots} slots",
        ),
    ]  # fmt: skip
    programs.append(
        Program(
            "collect", take_slots, (state, one), mesh, **around("sampler.slots", "decode state"),
            unit=f"{entering} responses end",
        )
    )  # fmt: skip
    if sampler.halvings and slots % (2 * devices) == 0:
        kept = host_array(devices, slots // devices // 2)
        narrowing = around("sampler.slots", "decode state")
        programs.append(Program("narrow", engine.narrow, (state, kept), mesh, **narrowing))
    if not every_size:
        return programs

    widths = {
        min(few_lengths(needed, sampler.length_bucket), length)
        for needed in range(sampler.length_bucket, length, sampler.length_bucket)
    }
    for width in sorted(widths - {tokens.shape[1]}):
        narrower = host_array(tokens.shape[0], width)
        kv = jax.eval_shape(partial(engine.prefill, config=model), trees.copy, tokens=narrower,
                            lengths=lengths)  # fmt: skip
        kv = jax.tree.map(partial(_over_slots, mesh), kv)
        programs += [
            Program("prefill", engine.prefill, (trees.copy, model, narrower, lengths), mesh, {}),
            Program("insert", engine.insert, (state, kv, narrower, admissions), mesh, {}),
        ]
    least, few = -(-slots // 2**sampler.halvings), host_array(-(-entering // 4))
    left = slots
    while True:
        here = jax.eval_shape(partial(engine.empty_state, model, left, length, layers))
        here = jax.tree.map(partial(_over_slots, mesh), here)
        narrows = left % (2 * devices) == 0 and left // 2 >= least
        programs += [
            Program("collect", take_slots, (here, which), mesh, {}) for which in (one, few)
        ]
        if left < slots:
            arguments = (decoding, model, here, *programs[3].arguments[3:])
            programs.append(Program("generate", engine.generate, arguments, mesh, {}))
            if narrows:
                kept = host_array(devices, left // devices // 2)
                programs.append(Program("narrow", engine.narrow, (here, kept), mesh, {}))
        if not narrows:
            return programs
        left //= 2


def _over_slots(mesh: Mesh, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """As `sampling.engine` pins its arrays: the cache by its table, all others over slots."""
    spec = CACHE_SPEC if x.ndim == len(CACHE_SPEC) else PartitionSpec(BATCH)
    laid_out = NamedSharding(mesh, fit_spec(spec, x.shape, mesh.shape))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=laid_out)


def _scoring(trees: Trees) -> list[Program]:
    """Scoring of initial responses, with FCI where it is used, and of continuations."""
    config = trees.config
    has_tree = config.branching.rule != "none"
    with_fci = config.needs_fci
    kinds = [("score initial responses", with_fci)]
    if has_tree:
        kinds.append(("score continuations", False))
    places = [(trees.mesh, trees.params, "")]
    if trees.is_split and config.overlap != "none":
        places.append((trees.sampling_mesh, trees.copy, ", where sampling is"))
    programs = []
    for mesh, params, where in places:
        given = "sampling copy" if where else "parameters"
        around = trees.around(mesh, (*trees.always, "sampling copy"), [given])
        ids, is_wanted = (
            trees.rows(mesh, config.score_batch_tokens, dtype) for dtype in (jnp.int32, jnp.bool_)
        )
        for name, fci in kinds:
            packed = PackedTokens(ids, ids, ids, ids, layout="packed" if fci else "tree")
            arguments = (params, trees.model, packed, is_wanted, ids if fci else None,
                         config.temperature)  # fmt: skip
            programs.append(
                Program(
                    name + (", with FCI" if fci else "") + where, score_packed, arguments, mesh,
                    **around, setting="score_batch_tokens",
                    options={"delta": config.branching.delta},
                    unit="{} sequences of {:,} tokens".format(*ids.shape),
                )
            )  # fmt: skip
    return programs


def _update(trees: Trees) -> list[Program]:
    """The programs of `training.step.update`."""
    config, model, mesh = trees.config, trees.model, trees.mesh
    ids, real = (
        trees.rows(mesh, config.micro_batch_tokens, dtype) for dtype in (jnp.int32, jnp.float32)
    )
    layout = "tree" if config.shares_prefixes else "packed"
    batch = TrainBatch(PackedTokens(ids, ids, ids, ids, layout=layout), *[real] * 4)
    unit = "{} sequences of {:,} tokens".format(*ids.shape)

    names = [*trees.always, "gradients"]
    if config.overlap != "none":
        names.append("sampling copy")

    def around(*given: str, absent: Sequence[str] = ()) -> dict[str, Any]:
        return trees.around(mesh, [name for name in names if name not in absent], given)

    programs = [
        Program("zero gradients", step.no_gradients, (trees.params,), mesh,
                **around("parameters", absent=("gradients",))),
    ]  # fmt: skip
    reference = None
    if config.loss.kl_beta > 0:
        reference = real
        programs.append(
            Program(
                "reference log-probabilities", step.reference_logprobs,
                (trees.params, model, batch, config.temperature), mesh, **around("reference"),
                setting="micro_batch_tokens", unit=unit,
            )
        )  # fmt: skip
    denominator = jax.ShapeDtypeStruct((), np.float32)
    arguments = (trees.gradients, trees.params, model, config.loss, batch, reference, denominator,
                 config.temperature)  # fmt: skip
    loss = trees.gradients[1].policy_loss
    programs += [
        Program("accumulate", step.accumulate, arguments, mesh, **around("parameters", "gradients"),
                setting="micro_batch_tokens", unit=unit),
        Program("apply gradients", step.apply_gradients,
                (trees.state, trees.gradients[0], loss, config.optimizer), mesh,
                **around("parameters", "optimizer state", "gradients"), unit="optimizer update"),
    ]  # fmt: skip
    return programs
