"""Parts of a run that are Python of the user's own.

A configuration file may define `get_parts()` next to its `get_config()`; from Python they are given
to `experiments.run.run`. docs/extending.md has an example of each.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from attnrl_jax.branching.positions import BranchRule
from attnrl_jax.branching.steps import Segmenter
from attnrl_jax.tasks.problems import Problem, Source
from attnrl_jax.tasks.rewards import RewardFunction, send_by_value
from attnrl_jax.tasks.tokenizer import Tokenizer
from experiments.settings import SettingError

MODULE = "_attnrl_parts"


@dataclass(frozen=True)
class Parts:
    """What takes the place of a part of the program; None leaves the program's own.

    A run folder records the names of these, and is not continued with others.

    Attributes:
      reward: from (response text, golds of the problem) to a reward in 0 .. 1. Runs in worker
        processes under the limits of `judging.*`.
      problems: training problems: anything with `__len__` and `__getitem__`.
      held_out: problems that are only evaluated; needed where `problems` is given.
      segmenter: from (ids of a response, tokenizer) to a truth value for each: whether a step ends
        there. What it returns must depend on these alone.
      branch_rule: chooses the branch positions, as `branching.selection.branch_positions` does;
        `branching.rule` is "custom" then.
    """

    reward: RewardFunction | None = None
    problems: Source | None = None
    held_out: Sequence[Problem] | None = None
    segmenter: Callable[[np.ndarray, Tokenizer], np.ndarray] | None = None
    branch_rule: BranchRule | None = None

    def __post_init__(self) -> None:
        for name in ("reward", "segmenter", "branch_rule"):
            part = getattr(self, name)
            if part is not None and not callable(part):
                raise SettingError(f"parts: {name} must be a function; got {part!r}")
        if (self.problems is None) != (self.held_out is None):
            raise SettingError("parts: problems and held_out are given together or not at all")

    def cut(self, tokenizer: Tokenizer) -> Segmenter | None:
        """The segmenter for responses of a tokenizer."""
        if self.segmenter is None:
            return None
        return functools.partial(_cut, self.segmenter, tokenizer)


def _cut(
    segmenter: Callable[[np.ndarray, Tokenizer], np.ndarray],
    tokenizer: Tokenizer,
    response: np.ndarray,
) -> np.ndarray:
    return segmenter(response, tokenizer)


def with_parts(config: ConfigDict, parts: Parts) -> ConfigDict:
    """The configuration of a run with these parts: a copy that names them.

    Raises:
      SettingError: a setting contradicts a part.
    """
    config = config.copy_and_resolve_references()
    for field in fields(parts):
        part = getattr(parts, field.name)
        config.parts[field.name] = "" if part is None else _name(part)
    rule = config.branching.rule
    if parts.branch_rule is not None:
        if rule not in (None, "custom"):
            raise SettingError(f"branching.rule is {rule!r}, but the parts have a branch_rule")
        config.branching.rule = "custom"
    elif rule == "custom":
        raise SettingError("branching.rule 'custom' needs a branch_rule among the parts")
    if parts.problems is not None and config.data.train:
        raise SettingError("data.train is given, but the parts have problems")
    return config


def _name(part: Any) -> str:
    """What a part is called where it is defined."""
    while isinstance(part, functools.partial):
        part = part.func
    named = part if inspect.isroutine(part) or inspect.isclass(part) else type(part)
    module = named.__module__
    return named.__qualname__ if module == MODULE else f"{module}.{named.__qualname__}"


def load_parts(path: str | Path) -> Parts:
    """The parts that a configuration file defines by `get_parts()`; none where it has no such
    function. The file is run.

    Raises:
      SettingError: `get_parts` returned something else.
    """
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        return Parts()
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "get_parts"):
        return Parts()
    send_by_value(module)
    parts = module.get_parts()
    if not isinstance(parts, Parts):
        raise SettingError(f"{path}: get_parts() must return Parts; got {type(parts).__name__}")
    return parts
