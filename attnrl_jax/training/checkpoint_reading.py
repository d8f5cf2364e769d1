"""What is read of a checkpoint, and how damage is told from what is merely another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from attnrl_jax import processes
from attnrl_jax.training.checksums import text_checksum

# Of what a checkpoint holds; raise it when that changes.
FORMAT = 3


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or does not fit the run."""


class DamagedError(CheckpointError):
    """One that another checkpoint may stand in for."""


def read_values(folder: Path) -> dict[str, Any]:
    """Counters, notes and checksums of a checkpoint.

    Raises:
      DamagedError: they are not those that were saved.
      CheckpointError: they are, by another version of this program.
    """
    stored = ocp.JsonCheckpointHandler().restore(folder / "loop")
    values = stored.get("values")
    if values is None or text_checksum(values) != stored.get("checksum"):
        raise DamagedError(f"checkpoint {folder} is damaged: its numbers are not those saved")
    if values.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {folder} was written by another version of this program")
    return values


def stored_score(folder: Path) -> float | None:
    try:
        score = ocp.JsonCheckpointHandler().restore(folder / "loop")["values"]["score"]
        return None if score is None else float(score)
    except Exception:  # damage, of which `restore` says more
        return None


def check_checksums(folder: Path, saved: Mapping[str, Any], found: Mapping[str, int]) -> None:
    differ = sorted(name for name in {*saved, *found} if saved.get(name) != found.get(name))
    if differ:
        raise DamagedError(
            f"checkpoint {folder} is damaged: {len(differ)} of {len(found)} arrays are not those "
            f"that were saved, such as {differ[0]}"
        )


def together(folder: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives; where one of several processes cannot read, all of them say so.

    Raises:
      CheckpointError: of another model or version.
      DamagedError: anything else that reading may raise: a file that is damaged can be at odds
        with all of Orbax.
    """
    refused: CheckpointError | None = None
    result = None
    try:
        result = read()
    except CheckpointError as error:
        refused = error
    except (jax.errors.JaxRuntimeError, MemoryError):
        # Of the devices, not of the files.
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        refused = DamagedError(
            f"checkpoint {folder} cannot be read: {type(error).__name__}: {reason[:500]}"
        )
        refused.__cause__ = error
    failed = int(processes.total(np.array(refused is not None, np.int32)))
    if refused is not None:
        raise refused
    if failed:
        raise DamagedError(f"checkpoint {folder} cannot be read by {failed} other process(es)")
    return result


def check_same_model(folder: Path, name: str, template: Any) -> None:
    """Shapes of the stored parameters, before any is read."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(folder / "train").item_metadata.tree[name]
    stored, wanted = _shapes(tree), _shapes(template)
    for path in sorted(stored.keys() | wanted.keys()):
        there, here = stored.get(path, "absent"), wanted.get(path, "absent")
        if there != here:
            raise CheckpointError(
                f"checkpoint {folder} is of another model: parameter {path} is {there} there, "
                f"{here} in the model"
            )


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }
