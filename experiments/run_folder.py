"""The folder of a run, and what must be the same whenever the run goes on: settings, problems.

All is checked before anything is written.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from attnrl_jax import processes
from attnrl_jax.datasets.preparation import Prepared
from attnrl_jax.training.checkpoint import CheckpointError
from experiments.folders import (
    FolderError,
    claimed,
    described,
    differences,
    flat,
    is_same,
    write_atomically,
)
from experiments.settings import SettingError

CONFIG_FILE = "config.json"
# Settings that may differ when a run is continued: they do not change what a step computes.
FREE_TO_CHANGE = (
    "steps", "max_sampled_tokens", "checkpoint_every", "keep_checkpoints", "keep_best",
    "max_not_finite", "data.cache", "judging.workers", "trees.per_step", "logging.wandb",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sampling_tensor", "mesh.sampling_devices",
    "memory.check", "memory.bytes_per_device", "memory.every_size",
    "guards.min_entropy", "guards.max_entropy", "guards.length_drop", "guards.max_truncated",
    "guards.max_repetition", "guards.max_lost_answers", "guards.max_mismatch",
)  # fmt: skip
# Settings that may not, even by name: a checkpoint holds responses that were sampled by them.
FIXED = (
    "method", "seed", "model.path", "model.tokenizer", "data.", "graph.", "prompt.",
    "prompt_budget", "response_budget", "temperature", "top_p", "top_k", "num_responses",
    "branching.rule", "schedule", "overlap", "importance_cap",
    "parts.problems", "parts.held_out", "parts.segmenter",
)  # fmt: skip
ALLOW = "--allow_change"
HINT = f" ({ALLOW}=NAME lets a setting change; begin another run for any other)"


def freed(config: ConfigDict, allowed: Sequence[str]) -> tuple[str, ...]:
    """Settings that may differ: those that always may, and those that the user names.

    Raises:
      SettingError: a name that is no setting, or of one that cannot change.
    """
    known = flat(as_json(config))
    for name in allowed:
        if name not in known:
            raise SettingError(f"{ALLOW}: there is no setting {name}")
        if any(name == fixed or (fixed[-1] == "." and name.startswith(fixed)) for fixed in FIXED):
            raise SettingError(
                f"{ALLOW}: {name} cannot change in a run, whose checkpoints hold responses that "
                "were sampled by it; begin another run"
            )
    return (*FREE_TO_CHANGE, *allowed)


@contextmanager
def claimed_run(
    folder: Path, config: ConfigDict, free: Sequence[str] = FREE_TO_CHANGE
) -> Iterator[None]:
    """Holds a run folder: makes it, or checks that the one there is of the same configuration.

    Raises:
      FolderError: it belongs to another run (the difference is named), holds other files, or is in
        use by another process. Of several processes of one run the first holds it for all.
    """
    with ExitStack() as held:
        claim = claimed(folder, "run", CONFIG_FILE, as_json(config), free, HINT)
        processes.first_then_all(lambda: held.enter_context(claim))
        yield


def check_same_run(folder: Path, config: ConfigDict) -> bool:
    """Whether the folder has a run, which must then be of this configuration.

    Raises:
      FolderError: it belongs to another run; the differences are named.
    """
    return is_same(folder, "run", CONFIG_FILE, as_json(config), FREE_TO_CHANGE, HINT)


def as_json(config: ConfigDict) -> dict[str, Any]:
    """All settings as `config.json` keeps them."""
    return json.loads(config.to_json_best_effort())


def check_same_settings(values: dict[str, Any]) -> None:
    """Makes sure that all processes have the settings of process 0.

    Args:
      values: of `as_json`.

    Raises:
      ValueError: some have others, which they name.
    """
    if processes.count() == 1:
        return
    wanted, given = flat(json.loads(processes.from_first(json.dumps(values)))), flat(values)
    changed = [
        f"{key}: {wanted.get(key)!r} in process 0, {given.get(key)!r} here"
        for key in sorted({*wanted, *given})
        if wanted.get(key) != given.get(key)
    ]
    differ = np.flatnonzero(processes.of_all(np.int32(bool(changed))))
    if len(differ):
        others = f"process {', '.join(map(str, differ))} has other settings than process 0"
        raise ValueError("; ".join(changed) or others)


def check_shared(folder: Path, patience: float = 30.0) -> None:
    """Makes sure that all processes see the run folder that process 0 writes to.

    Args:
      folder: there, in process 0.
      patience: seconds that another host may take to show a file.

    Raises:
      FolderError: some do not.
    """
    if processes.count() == 1:
        return
    first = processes.from_first(str(folder))
    path = folder / processes.from_first(f".seen-{uuid.uuid4().hex}")
    processes.first_then_all(lambda: path.write_text("by all processes?\n"))
    deadline = time.monotonic() + patience
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    missing = np.flatnonzero(~processes.of_all(np.bool_(seen)))
    if processes.is_first():
        path.unlink()
    if len(missing):
        raise FolderError(
            f"the run folder {first} of process 0 is not seen by process "
            f"{', '.join(map(str, missing))}; give all of them one shared folder as --workdir"
        )


def record_problems(folder: Path, prepared: Prepared, console: Console) -> None:
    """Writes, and shows the first time, which problems the run has and how they were cleaned.

    Raises:
      FolderError: the run began with other problems, whose responses are in its checkpoint.
    """
    path = folder / "data.json"
    version = prepared.folder.parent.name
    processes.check_agreement("the training problems", version)
    if path.exists():
        before = json.loads(path.read_text())["version"]
        if before != version:
            raise FolderError(
                f"{folder}: the problems (data.train, data.held_out, data.benchmarks or the "
                f"tokenizer) have changed since the run began: version {before} then, {version} "
                "now; give them back, or begin another run"
            )
        return
    if not processes.is_first():
        return
    console.print(prepared.report.to_table(), soft_wrap=True, highlight=False)
    values = {"version": version} | prepared.report.to_dict()
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def check_notes(notes: dict[str, Any], config: ConfigDict, free: Sequence[str]) -> None:
    """Makes sure that a checkpoint is of these settings, whatever folder it lies in.

    Args:
      notes: of the checkpoint.
      config: of the run.
      free: settings that may differ.

    Raises:
      CheckpointError: others differ; they are named.
    """
    if changed := differences(notes["settings"], flat(as_json(config)), free):
        raise CheckpointError(
            f"the checkpoint is of other settings; {described(changed)}. "
            f"{ALLOW}={','.join(changed)} goes on with those given now"
        )


def record_changes(folder: Path, step: int, changed: dict[str, tuple[Any, Any]]) -> None:
    """Appends what changed after a step to `changes.jsonl`, once."""
    path = folder / "changes.jsonl"
    before = path.read_text() if path.exists() else ""
    lines = [
        json.dumps({"after_step": step, "setting": name, "before": old, "now": new}) + "\n"
        for name, (old, new) in changed.items()
    ]
    new = "".join(line for line in lines if line not in before)
    if new:
        write_atomically(path, before + new)
