"""Checkpoints of a whole run with Orbax: everything the next step depends on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from attnrl_jax.training.loop import LoopState
from attnrl_jax.training.rollout import empty_rollouts
from attnrl_jax.training.state import TrainState
from attnrl_jax.types import Rollouts

# What of a run's state is plain numbers.
COUNTERS = {f.name for f in fields(LoopState)} - {"train", "batch"}


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
        # Orbax refuses an empty tree, and an on-policy run has no batch in flight.
        rows = state.batch if state.batch is not None else empty_rollouts(1, 1)
        self._manager.save(
            state.step,
            args=ocp.args.Composite(
                train=ocp.args.StandardSave(state.train),
                batch=ocp.args.StandardSave({f.name: getattr(rows, f.name) for f in fields(rows)}),
                loop=ocp.args.JsonSave(counters | {"batch_in_flight": state.batch is not None}),
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
                    batch=ocp.args.StandardRestore(),
                    loop=ocp.args.JsonRestore(),
                ),
            )
            counters = restored["loop"]
            rows = Rollouts(**{name: np.array(x) for name, x in restored["batch"].items()})
            in_flight = counters.pop("batch_in_flight")
            return LoopState(train=restored["train"], batch=rows if in_flight else None, **counters)
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
