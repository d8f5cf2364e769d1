"""Checkpoints of a whole run with Orbax: everything the next step depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from attnrl_jax.training.loop import LoopState
from attnrl_jax.training.state import TrainState
from attnrl_jax.types import Rollouts


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
        host = {name: getattr(state, name) for name in _counters(state)}
        arrays = {} if state.batch is None else dict(state.batch.__dict__)
        # Orbax refuses an empty tree, and an on-policy run has no batch in flight.
        arrays["present"] = np.asarray(state.batch is not None)
        self._manager.save(
            state.step,
            args=ocp.args.Composite(
                train=ocp.args.StandardSave(state.train),
                batch=ocp.args.StandardSave(arrays),
                loop=ocp.args.JsonSave(host),
            ),
            force=True,
        )
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """Newest step saved, or None."""
        return self._manager.latest_step()

    def restore(self, template: TrainState, step: int | None = None) -> LoopState:
        """Reads a checkpoint.

        Args:
          template: a fresh state of the same run, whose arrays give shapes, dtypes and shardings.
          step: which; the newest by default.

        Raises:
          FileNotFoundError: there is none.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._manager.directory}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                train=ocp.args.StandardRestore(abstract),
                # Rows differ in number from step to step: shapes come from the checkpoint.
                batch=ocp.args.StandardRestore(),
                loop=ocp.args.JsonRestore(),
            ),
        )
        arrays: dict[str, Any] = {k: np.asarray(v) for k, v in restored["batch"].items()}
        present = bool(arrays.pop("present"))
        return LoopState(
            train=restored["train"],
            batch=Rollouts(**{k: np.array(v) for k, v in arrays.items()}) if present else None,
            **restored["loop"],
        )

    def close(self) -> None:
        self._manager.close()


def _counters(state: LoopState) -> list[str]:
    return [name for name in state.__dataclass_fields__ if name not in ("train", "batch")]
