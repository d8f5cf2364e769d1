"""Whether a run fits its devices, before its first step; and which settings make it fit.

The compiler says what every program needs. Where that is more than a device has, the setting that a
program's size follows is halved, and what has changed compiled again, until everything fits:

    sampling                 sampler.slots
    prefill                  sampler.prefill_rows
    scoring                  score_batch_tokens
    the update               micro_batch_tokens, and pack_length where a sequence is the least

What the run compiles later in the same process it finds compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from attnrl_jax.compilation.programs import (
    Compiled,
    Program,
    compile_program,
    kept_bytes,
    run_programs,
)
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.shapes import bucket_length
from attnrl_jax.sharding import batch_devices
from attnrl_jax.training.state import TrainConfig

# What the programs do whose size follows a setting.
WORK = {
    "sampler.slots": "sampling",
    "sampler.prefill_rows": "sampling",
    "score_batch_tokens": "scoring",
    "micro_batch_tokens": "the update",
}
# Which other setting makes room for them: by what lies beside them, or by shorter sequences.
NEXT = {"sampler.slots": "sampler.prefill_rows", "sampler.prefill_rows": "sampler.slots",
        "score_batch_tokens": "micro_batch_tokens"}  # fmt: skip
SETTINGS = (*WORK, "pack_length")
# Others need what these do, and more: `generate` what the first two do, `accumulate` the rest.
PARTS_OF_OTHERS = (
    "empty decode state", "collect", "zero gradients", "reference log-probabilities"
)  # fmt: skip
# What the devices work on in each stage of a step (`training.setup.Stopwatch`). While the host
# judges and builds trees they score.
STAGES = {
    "generate": "sampler.slots",
    "evaluate": "sampler.slots",
    "score": "score_batch_tokens",
    "judge": "score_batch_tokens",
    "tree": "score_batch_tokens",
    "update": "micro_batch_tokens",
}
# Those in which the host holds all rows of a step.
HOST_STAGES = ("judge", "branch", "tree")


class DeviceMemoryError(ValueError):
    """A run that needs more memory than its devices have; says what to change."""


@dataclass(frozen=True)
class Need:
    """What a program needs of a device.

    Attributes:
      program: as it stands in `run_programs`.
      compiled: bytes of it and of what lies beside it; None where the compiler itself refuses it.
    """

    program: Program
    compiled: Compiled | None

    def fits(self, limit: int) -> bool:
        return self.compiled is not None and self.compiled.total <= limit

    def __str__(self) -> str:
        name, work = self.program.name, WORK.get(self.program.setting)
        size = "more than the compiler allows"
        if self.compiled is not None:
            size = format_bytes(self.compiled.total)
        return f"{name} ({work}) needs {size}" if work else f"{name} needs {size}"


def device_limit(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that programs may use on each of this process's devices: the least of what they say.

    None where they do not say it, as CPUs.
    """
    limits = []
    for device in devices:
        if device.process_index != jax.process_index():
            continue
        try:
            limits.append((device.memory_stats() or {}).get("bytes_limit"))
        except jax.errors.JaxRuntimeError:
            # A backend that has no such numbers.
            return None
    return min((limit for limit in limits if limit), default=None)


def compile_every_size(
    model: ModelConfig,
    config: TrainConfig,
    mesh: Mesh,
    sampling_mesh: Mesh,
    sampling_dtype: str = "",
) -> int:
    """Compiles what a training step may run, in every size in which it may come, so that a run that
    follows in this process compiles nothing later. Arguments as `check_memory`.

    Returns:
      the number of programs.
    """
    programs = run_programs(model, config, mesh, sampling_mesh, sampling_dtype, every_size=True)
    for program in programs:
        with jax.set_mesh(program.mesh):
            program.function.lower(*program.arguments, **program.options).compile()
    return len(programs)


def check_memory(
    model: ModelConfig,
    config: TrainConfig,
    mesh: Mesh,
    sampling_mesh: Mesh,
    limit: int,
    sampling_dtype: str = "",
) -> list[Need]:
    """Compiles what a training step runs, and holds it against the memory of a device.

    All processes must call it with the same limit: they compile for the devices of all.

    Args:
      model: the policy.
      config: of training.
      mesh, sampling_mesh: of `sharding.make_meshes`.
      limit: bytes of a device.
      sampling_dtype: of sampling, where it is not the model's.

    Returns:
      what each program needs, but for those that are parts of others.

    Raises:
      DeviceMemoryError: something does not fit. It names the programs, and the settings that make
        all of them fit, the largest of those that halving comes to; or, where none does, what takes
        the memory and what else would help.
    """
    kept = kept_bytes(model, config, mesh, sampling_mesh)
    if sum(kept.values()) > limit:
        raise DeviceMemoryError(
            f"{_listed(kept)} take {format_bytes(sum(kept.values()))} of a device that has "
            f"{format_bytes(limit)}. What helps: {_remedies(model, config, '')}"
        )
    found: dict[Any, Compiled | None] = {}

    def needs(config: TrainConfig) -> list[Need]:
        programs = run_programs(model, config, mesh, sampling_mesh, sampling_dtype)
        return [
            Need(program, _compiled(program, found))
            for program in programs
            if program.name not in PARTS_OF_OTHERS
        ]

    def too_large(config: TrainConfig) -> list[Need]:
        return [need for need in needs(config) if not need.fits(limit)]

    given = needs(config)
    refused = [need for need in given if not need.fits(limit)]
    if not refused:
        return given
    devices = (batch_devices(mesh), batch_devices(sampling_mesh))
    said = f"a device has {format_bytes(limit)}, but {', '.join(map(str, refused))}"
    fitting, stuck = _fit(config, devices, too_large)
    if stuck is not None:
        raise DeviceMemoryError(
            f"{said}. {_no_way(stuck, config, fitting)}. "
            f"What helps: {_remedies(model, config, stuck.program.setting)}"
        )
    largest = max(need.compiled.total for need in needs(fitting) if need.compiled is not None)
    raise DeviceMemoryError(
        f"{said}. Lower {_changes(config, fitting)}: then {format_bytes(largest)} are enough"
    )


def _compiled(program: Program, found: dict[Any, Compiled | None]) -> Compiled | None:
    """What the compiler says of a program, which it is asked once."""
    leaves, structure = jax.tree.flatten((program.arguments, program.options))
    key = (program.name, program.mesh, tuple(leaves), structure)
    if key not in found:
        try:
            found[key] = compile_program(program, is_counted=False)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            found[key] = None
    compiled = found[key]
    if compiled is None:
        return None
    # Beside the same program lies something else.
    unread = compiled.held["arguments not read"]
    return dataclasses.replace(compiled, held=program.held | {"arguments not read": unread})


def _fit(
    config: TrainConfig,
    devices: tuple[int, int],
    too_large: Callable[[TrainConfig], list[Need]],
) -> tuple[TrainConfig, Need | None]:
    """Lowers settings until nothing is too large.

    Args:
      config: given.
      devices: that share the batch axis in updates, and in sampling.
      too_large: the programs that do not fit.

    Returns:
      the configuration that fits, and nothing; or one whose settings are at their least, and the
      program that does not fit all the same.
    """
    tried: list[TrainConfig] = [config]
    while refused := too_large(config):
        lowered = config
        for need in refused:
            own = need.program.setting
            # What lies beside the program where its own setting is at its least.
            for setting in (own, NEXT.get(own, "")):
                if _lower(config, setting, devices) is not None:
                    if _value(lowered, setting) == _value(config, setting):
                        lowered = _lower(lowered, setting, devices) or lowered
                    break
            else:
                return config, need
        config = lowered
        tried.append(config)
    # What was lowered before something else was may have gone too far.
    for setting in SETTINGS:
        for earlier in tried:
            larger = _replace(config, setting, _value(earlier, setting))
            if larger == config:
                break
            if not too_large(larger):
                config = larger
                break
    return config, None


def _lower(config: TrainConfig, setting: str, devices: tuple[int, int]) -> TrainConfig | None:
    """The configuration with a setting halved, or more where half makes no program smaller.

    Returns:
      the configuration; None where the setting is at its least, or is none.
    """
    updating, sampling = devices
    if not setting:
        return None
    value = _value(config, setting)
    if setting.startswith("sampler."):
        slots = bucket_length(value, sampling)
        half = bucket_length(-(-slots // 2), sampling)
        return _replace(config, setting, half) if half < slots else None

    def places(config: TrainConfig) -> int:
        """Of one device's batch: one sequence at the least."""
        length = config.packed_length(updating)
        return max(_value(config, setting) // length // updating, 1) * length

    while value > 1:
        value //= 2
        lower = _replace(config, setting, value)
        if places(lower) < places(config):
            return lower
    longest = bucket_length(config.width, config.length_multiple)
    shorter = max(bucket_length(-(-config.pack_length // 2), config.length_multiple), longest)
    if setting == "micro_batch_tokens" and shorter < config.pack_length:
        # Otherwise as many more of the shorter sequences would be computed together.
        room = shorter * updating
        return dataclasses.replace(
            config,
            pack_length=shorter,
            micro_batch_tokens=min(config.micro_batch_tokens, room),
            score_batch_tokens=min(config.score_batch_tokens, room),
        )
    return None


def _value(config: TrainConfig, setting: str) -> int:
    section, _, name = setting.rpartition(".")
    return getattr(config.sampler if section else config, name)


def _replace(config: TrainConfig, setting: str, value: int) -> TrainConfig:
    section, _, name = setting.rpartition(".")
    changed: Any = {name: value}
    if section:
        changed = {section: dataclasses.replace(config.sampler, **changed)}
    return dataclasses.replace(config, **changed)


def _changes(config: TrainConfig, lower: TrainConfig) -> str:
    pairs = [(name, _value(config, name), _value(lower, name)) for name in SETTINGS]
    changed = [f"{name} from {old} to {new}" for name, old, new in pairs if old != new]
    return " and ".join(part for part in (", ".join(changed[:-1]), *changed[-1:]) if part)


def _no_way(need: Need, config: TrainConfig, least: TrainConfig) -> str:
    """What takes the memory where no setting of a batch is low enough."""
    there = need.program.held | need.program.given
    changes = _changes(config, least)
    said = f"No smaller batch makes {need.program.name} fit"
    said = f"With {changes} still {need}" if changes else said
    own = need.compiled.total - sum(there.values()) if need.compiled is not None else 0
    return f"{said}: {_listed(there | {'what it computes with': own})}"


def _remedies(model: ModelConfig, config: TrainConfig, setting: str) -> str:
    """What lowers the memory of a device besides the settings of a batch.

    Args:
      model: the policy.
      config: of training.
      setting: that the size of what is too large follows. Without one it is parameters, their
        gradients and moments, which are float32 always.
    """
    ways = ["more devices (mesh.fsdp, mesh.tensor)"]
    if config.loss.kl_beta > 0:
        ways.append("loss.kl_beta=0 (drops the reference)")
    if setting == "micro_batch_tokens" and model.remat != "full":
        ways.append("model.remat='full'")
    if setting and model.dtype != "bfloat16":
        ways.append("model.dtype='bfloat16'")
    if setting:
        ways.append("a smaller prompt_budget or response_budget")
    return ", ".join(ways)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError):
            return True
        text = str(seen).lower()
        words = ("resource_exhausted", "out of memory", "bad_alloc")
        if isinstance(seen, RuntimeError) and any(word in text for word in words):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


def explain_out_of_memory(
    error: BaseException,
    stage: str,
    model: ModelConfig,
    config: TrainConfig,
    mesh: Mesh,
    sampling_mesh: Mesh,
) -> str | None:
    """A sentence about memory that ran out while running; None for other errors.

    Args:
      error: that ended the step, or came with it.
      stage: of `training.setup.Stopwatch` in which it happened, or `evaluate`.
      model, config, mesh, sampling_mesh: of the run.
    """
    if not is_out_of_memory(error):
        return None
    said = f"out of memory in stage {stage}"
    if stage in HOST_STAGES and isinstance(error, MemoryError):
        problems = config.num_problems
        return f"the host is {said}: lower num_problems from {problems} to {max(problems // 2, 1)}"
    setting = STAGES.get(stage, "")
    lower = _lower(config, setting, (batch_devices(mesh), batch_devices(sampling_mesh)))
    if lower is not None:
        return f"{said}: lower {_changes(config, lower)}"
    if setting:
        said = f"{said}, where {setting} {_value(config, setting)} is at its least"
    return f"{said}: what helps: {_remedies(model, config, setting)}"


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(n)}" for name, n in parts.items())


def format_bytes(count: int) -> str:
    """Bytes as people read them: in GiB, or MiB below one of these."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
