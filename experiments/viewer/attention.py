"""Attention of recorded responses, by the parameters of a checkpoint.

What sampled a response is gone when its tree is looked at, so attention is that of the parameters
that are there: those of the newest checkpoint. FCI of the run itself is in the trees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnrl_jax.models.config import read_config
from attnrl_jax.step_attention import StepAttention, step_attention
from attnrl_jax.training.checkpoint import Checkpointer
from experiments.export import parameter_shapes, source_folder
from experiments.viewer.recorded import Recorded, ViewError, read_step

# Of longer ones a map could not be read, and would be most of the page.
MOST_RANGES = 512
# Responses of a problem: attention is looked at one by one, and is most of a page.
MOST_RESPONSES = 2


@dataclass(frozen=True)
class Attention:
    """Attention of a response.

    Attributes:
      attention: between its steps.
      parameters: training step of the parameters it is of.
    """

    attention: StepAttention
    parameters: int


def attention_of(run: Recorded, newest: int) -> Iterator[tuple[tuple[int, int, int], Attention]]:
    """Attention of the branched responses in the newest steps.

    Args:
      run: whose trees and checkpoints.
      newest: so many steps; of each the first problem, and of that `MOST_RESPONSES` initial
        responses, those that branched first. Responses of `MOST_RANGES` steps or more are left
        out.

    Yields:
      (training step, number of the problem, row) and the attention.

    Raises:
      ViewError: the run has no checkpoint.
      ExportError, CheckpointError, ModelError: its parameters cannot be read.
    """
    folder = source_folder(run.folder, None)
    model = read_config(folder)
    with closing(Checkpointer(run.folder / "checkpoints", read_only=True)) as checkpointer:
        steps = checkpointer.steps()
        if not steps:
            raise ViewError(f"{run.folder} has no checkpoint, whose attention could be looked at")
        params = checkpointer.restore_params(steps[-1], parameter_shapes(model))
    for step in sorted(run.files)[-newest:] if newest else ():
        for number, problem in enumerate(read_step(run.files[step])[:1]):
            for leaf in _responses(problem):
                tokens, step_ids = _with_ranges(problem, leaf)
                found = step_attention(
                    params, model, tokens, step_ids, delta=run.config["branching"]["delta"]
                )
                yield (step, number, leaf["row"]), Attention(found, steps[-1])


def _responses(problem: dict[str, Any]) -> list[dict[str, Any]]:
    branched = {leaf["root"] for leaf in problem["leaves"] if leaf["row"] != leaf["root"]}
    initial = [
        leaf
        for leaf in problem["leaves"]
        if leaf["row"] == leaf["root"]
        and leaf.get("tokens")
        and 0 < len(leaf["steps"]) < MOST_RANGES
    ]
    return sorted(initial, key=lambda leaf: leaf["row"] not in branched)[:MOST_RESPONSES]


def _with_ranges(problem: dict[str, Any], leaf: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of prompt and response, and the range of each."""
    prompt = problem["prompt"]
    lengths = [len(prompt), *(step["end"] - step["start"] for step in leaf["steps"])]
    step_ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return np.array([*prompt, *leaf["tokens"]], np.int32), step_ids
