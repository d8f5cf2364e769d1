"""What a branching rule is told, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from attnrl_jax.types import ArrayLike


@dataclass(frozen=True)
class BranchingConfig:
    """Settings of the branching.

    Attributes:
      rule: criterion for branch positions: "fci", "entropy", "random", "none", or "custom": a
        `BranchRule` of the user's.
      num_positions: branch positions per expanded response (N of the paper's tree).
      num_continuations: continuations sampled at each position (C).
      delta: ranges a query must be ahead of a step to count in its FCI.
      quantile: quantile of a response's FCI that a step must reach to be a candidate.
      min_distance: least distance in tokens between branch positions, and of the first of them
        from the sequence's start.
      order: "score" takes the highest FCI first, which is what branching at the steps of high
        attention says; "position" takes candidates from left to right (released program).
      fill: "none" branches only where importance chose, so at steps of positive FCI; "first_steps"
        fills a shortfall with steps 2, 3, ... of the response, from the second again when they
        run out, and knows of `</think>` only by the zeroed FCI (released program).
      zero_first: whether the first response step has its FCI zeroed.
      after_think: whether branches after `</think>` are allowed.

    Raises:
      ValueError: a setting outside of what it allows.
    """

    rule: str = "fci"
    num_positions: int = 2
    num_continuations: int = 2
    delta: int = 4
    quantile: float = 0.8
    min_distance: int = 512
    order: str = "score"
    fill: str = "none"
    zero_first: bool = True
    after_think: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "rule": ("fci", "entropy", "random", "none", "custom"),
            "order": ("score", "position"),
            "fill": ("none", "first_steps"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"branching {name}={getattr(self, name)!r}: allowed are {values}")
        for name, least in (
            ("num_positions", 1),
            ("num_continuations", 1),
            ("delta", 0),
            ("min_distance", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"branching {name}={value!r}: an integer of at least {least}")
        if not 0.0 <= self.quantile <= 1.0:
            raise ValueError(f"branching quantile={self.quantile!r}: between 0 and 1")

    @classmethod
    def golden(cls, **changes: Any) -> BranchingConfig:
        """The released program's mode, with `changes` to its other settings."""
        return cls(**({"order": "position", "fill": "first_steps"} | changes))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BranchPositions:
    """Branch positions of each response, by ascending offset; invalid ones come last.

    Attributes:
      offsets: tokens of the response before the branch; 0 where invalid.
      steps: range of the first token that is sampled anew; 0 where invalid.
      by_importance: whether the position was chosen by a positive FCI.
      valid: whether there is such a position.
    """

    offsets: Int[ArrayLike, "response position"]
    steps: Int[ArrayLike, "response position"]
    by_importance: Bool[ArrayLike, "response position"]
    valid: Bool[ArrayLike, "response position"]


class BranchRule(Protocol):
    """Chooses branch positions; `branch_positions` is one."""

    def __call__(
        self,
        config: BranchingConfig,
        *,
        fci: Float[np.ndarray, "response step"],
        entropy: Float[np.ndarray, "response time"],
        step_ids: Int[np.ndarray, "response time"],
        prompt_length: Int[np.ndarray, "response"],
        length: Int[np.ndarray, "response"],
        first_after_think: Int[np.ndarray, "response"] | None,
        rng: np.random.Generator,
    ) -> BranchPositions: ...


def check_positions(
    positions: BranchPositions, length: Int[np.ndarray, "response"], num_positions: int
) -> None:
    """Refuses what a rule of the user's returns where it is no positions.

    Args:
      positions: as a rule chose them.
      length: tokens of each response.
      num_positions: branch positions of a response, at most.

    Raises:
      ValueError: no `BranchPositions`, an array of another shape or type, a position at the first
        token or outside, or one twice.
    """
    if not isinstance(positions, BranchPositions):
        raise ValueError(
            f"the branching rule returned {type(positions).__name__}; it must return "
            "BranchPositions (branching.selection.best_step_positions makes them of scores)"
        )
    shape = (len(length), num_positions)
    for name, x in vars(positions).items():
        if not isinstance(x, np.ndarray) or x.shape != shape:
            raise ValueError(
                f"the branching rule returned {name} of shape {list(np.shape(x))}; it must be an "
                f"array of {list(shape)} (responses, num_positions)"
            )
        kind = np.bool_ if name in ("by_importance", "valid") else np.integer
        if not np.issubdtype(x.dtype, kind):
            raise ValueError(
                f"the branching rule returned {name} of type {x.dtype}; it must be "
                f"{'bool' if kind is np.bool_ else 'an integer'}"
            )
    outside = positions.valid & ((positions.offsets < 1) | (positions.offsets >= length[:, None]))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"the branching rule chose offset {positions.offsets[row, column]} of a response of "
            f"{length[row]} tokens; a branch keeps at least one token and leaves at least one"
        )
    for offsets, valid in zip(positions.offsets, positions.valid, strict=True):
        chosen = offsets[valid].tolist()
        if len({*chosen}) < len(chosen):
            # Their continuations would be the same, and count twice.
            raise ValueError(f"the branching rule chose an offset twice in one response: {chosen}")
