"""Checkpoints of a whole run with Orbax: everything the next step depends on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

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
      folder: made if needed.
      keep: newest checkpoints that stay.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
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

    def close(self) -> None:
        self._manager.close()
