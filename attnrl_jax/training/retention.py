"""Which checkpoints of a run stay: the newest, and those of the highest scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class NewestAndBest:
    """Which checkpoints stay, as Orbax asks for it.

    Attributes:
      newest, best: how many of each.
      scores: of steps that have one; may grow.
    """

    newest: int
    best: int
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.newest :], *best_steps(steps, self.scores, self.best)}
        return [step in kept for step in steps]


def best_steps(steps: Sequence[int], scores: Mapping[int, float], number: int) -> list[int]:
    """Steps of the highest scores; of equals the newest."""
    scored = sorted((scores[step], step) for step in steps if step in scores)
    return [step for _, step in scored[max(len(scored) - number, 0) :]]


def steps_on_disk(folder: Path) -> list[int]:
    """Whole checkpoints: those under their own name."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
