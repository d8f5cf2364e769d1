"""Checkpoints of a whole run with Orbax: everything the next step depends on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from attnrl_jax.training.leaves import from_arrays, to_arrays
from attnrl_jax.training.state import LoopState, TrainState

# What of a run's state is rows, and what is plain numbers.
ROWS = ("batch", "continued", "following")
COUNTERS = {f.name for f in fields(LoopState)} - {"train", *ROWS}


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or does not fit the run."""


class Checkpointer:
    """The checkpoints of one run folder.

    Orbax writes to a temporary folder and renames it, so that a checkpoint is whole or absent.

    Args:
      folder: made if needed, unless it is only read.
      keep: newest checkpoints that stay.
      read_only: leaves the folder as it is, so that a run may be using it.
    """

    def __init__(self, folder: str | Path, keep: int = 2, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def save(self, state: LoopState) -> None:
        """Writes the state of a run after `state.step`; returns once it is on disk."""
        counters = {f.name: getattr(state, f.name) for f in fields(state) if f.name in COUNTERS}
        held = {name: getattr(state, name) for name in ROWS}
        in_flight = [name for name in ROWS if held[name] is not None]
        # Orbax refuses an empty tree, and an on-policy run has no rows in flight. It refuses empty
        # arrays too.
        rows: dict[str, Any] = {
            name: {field: x for field, x in to_arrays(held[name]).items() if x.size}
            for name in in_flight
        }
        self._manager.save(
            state.step,
            args=ocp.args.Composite(
                train=ocp.args.StandardSave(state.train),
                rows=ocp.args.StandardSave(rows or {"none": np.zeros(1)}),
                loop=ocp.args.JsonSave(counters | {"in_flight": in_flight}),
            ),
            force=True,
        )
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """Newest step saved, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps saved, the oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, template: TrainState) -> LoopState:
        """Reads the newest checkpoint.

        Args:
          template: a fresh state of the same run, whose arrays give shapes, dtypes and shardings.

        Raises:
          FileNotFoundError: there is none.
          CheckpointError: it is damaged, or of another model.
        """
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._manager.directory}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    train=ocp.args.StandardRestore(abstract),
                    # Rows differ in number from step to step: shapes come from the checkpoint.
                    rows=ocp.args.StandardRestore(),
                    loop=ocp.args.JsonRestore(),
                ),
            )
            counters = restored["loop"]
            rows: dict[str, Any] = dict.fromkeys(ROWS)
            for name in counters.pop("in_flight"):
                arrays = {field: np.array(x) for field, x in restored["rows"][name].items()}
                rows[name] = from_arrays(arrays)
            return LoopState(train=restored["train"], **rows, **counters)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {self._manager.directory / str(step)} cannot be read: {error}"
            ) from error

    def restore_params(self, step: int, template: Any) -> Any:
        """Reads the parameters of a step into host memory; the optimizer's state is not read.

        Args:
          step: one of `steps()`.
          template: the parameters' tree of shapes and dtypes.

        Returns:
          the tree as numpy arrays, whatever devices the run had.

        Raises:
          FileNotFoundError: there is no such step.
          CheckpointError: it is damaged, or of another model (the first parameter that differs is
            named).
        """
        folder = Path(self._manager.directory) / str(step)
        if step not in self.steps():
            raise FileNotFoundError(f"no checkpoint of step {step} in {self._manager.directory}")
        wanted = {"params": template}
        to_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                stored = reader.metadata(folder / "train").item_metadata.tree["params"]
                _check_same_model(folder, _shapes(stored), _shapes(template))
                restored = reader.restore(
                    folder / "train",
                    args=ocp.args.PyTreeRestore(wanted, to_host, partial_restore=True),
                )
            return restored["params"]
        except CheckpointError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from error

    def close(self) -> None:
        self._manager.close()


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _check_same_model(
    folder: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    for name in sorted(stored.keys() | wanted.keys()):
        there, here = stored.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            raise CheckpointError(
                f"checkpoint {folder} is of another model: parameter {name} is {there} there, "
                f"{here} in the model"
            )
