"""What the entries of a sweep are made of: grids, lists side by side, random points.

Every function returns a plain list of overrides (`{"method": "grpo", "seed": 1}`). Lists are
joined with `+`, and multiplied with `[a | b for a in grid(...) for b in grid(...)]`.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Overrides = dict[str, Any]
# Draws one value.
Sampler = Callable[[np.random.Generator], Any]


def grid(
    settings: Mapping[str, Iterable[Any]] | None = None, /, **more: Iterable[Any]
) -> list[Overrides]:
    """Every combination of the values of some settings; the last setting varies fastest.

    Args:
      settings: values of each setting, for names with dots: `{"optimizer.learning_rate": [...]}`.
      more: the same as keywords: `method=["attnrl", "grpo"], seed=range(5)`.

    Returns:
      list of overrides.

    Raises:
      ValueError: a setting is given twice, has no values, or is not a list of values.
    """
    axes = _axes(settings, more)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def zipped(
    settings: Mapping[str, Iterable[Any]] | None = None, /, **more: Iterable[Any]
) -> list[Overrides]:
    """First values together, second values together, and so on.

    Args:
      settings, more: as for `grid`.

    Returns:
      list of overrides, as many as each setting has values.

    Raises:
      ValueError: as for `grid`, or the settings have different numbers of values.
    """
    axes = _axes(settings, more)
    if len({len(values) for values in axes.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(values)}" for name, values in axes.items())
        raise ValueError(f"zipped settings must have as many values as each other: {lengths}")
    return [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]


def _axes(
    settings: Mapping[str, Iterable[Any]] | None, more: Mapping[str, Iterable[Any]]
) -> dict[str, list[Any]]:
    settings = settings or {}
    if twice := sorted(settings.keys() & more.keys()):
        raise ValueError(f"{', '.join(twice)}: given twice")
    axes = {}
    for name, values in [*settings.items(), *more.items()]:
        if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
            raise ValueError(f"{name} must be a list of values; got {values!r}")
        axes[name] = list(values)
        if not axes[name]:
            raise ValueError(f"{name} has no values")
    if not axes:
        raise ValueError("no settings are given")
    return axes


def random_search(count: int, seed: int, settings: Mapping[str, Sampler]) -> list[Overrides]:
    """Random points, no two of them equal.

    Each setting draws from its own stream of `seed`, so a larger `count` keeps the points of a
    smaller one (a sweep is extended without losing what has run), and another setting beside it
    does not change its values.

    Args:
      count: of points, at least 1.
      seed: of the streams.
      settings: how each is drawn: `uniform`, `log_uniform`, `choice`.

    Returns:
      list of `count` overrides.

    Raises:
      ValueError: `count` is below 1, no settings are given, one is not a sampler, or there are
        fewer different points.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    if not settings:
        raise ValueError("no settings are given")
    for name, sampler in settings.items():
        if not callable(sampler):
            raise ValueError(
                f"{name} must be uniform(...), log_uniform(...) or choice(...); got {sampler!r}"
            )
    streams = {name: np.random.default_rng([seed, zlib.crc32(name.encode())]) for name in settings}
    points: dict[str, Overrides] = {}
    # Points are seldom equal; of so many draws all are only if there are no others.
    for _ in range(1000 + 100 * count):
        point = {name: sampler(streams[name]) for name, sampler in settings.items()}
        points.setdefault(json.dumps(point, default=repr), point)
        if len(points) == count:
            return list(points.values())
    raise ValueError(f"{count} different points are asked for, only {len(points)} were found")


def uniform(low: float, high: float, digits: int = 4) -> Sampler:
    """Draws evenly from `[low, high]`.

    Args:
      low, high: finite, `low < high`.
      digits: significant digits that are kept, so that names of runs can be read.

    Returns:
      for `random_search`.

    Raises:
      ValueError: the bounds are none.
    """
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"uniform needs low < high, both finite; got {low} and {high}")
    return lambda rng: _rounded(rng.uniform(low, high), low, high, digits)


def log_uniform(low: float, high: float, digits: int = 4) -> Sampler:
    """Draws numbers whose logarithms are even in `[log low, log high]`.

    Args:
      low, high: finite, `0 < low < high`.
      digits: significant digits that are kept.

    Returns:
      for `random_search`.

    Raises:
      ValueError: the bounds are none.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"log_uniform needs 0 < low < high, both finite; got {low} and {high}")
    logs = math.log(low), math.log(high)
    return lambda rng: _rounded(math.exp(rng.uniform(*logs)), low, high, digits)


def choice(values: Iterable[Any]) -> Sampler:
    """Draws one of the values, each as likely as the others.

    Returns:
      for `random_search`.

    Raises:
      ValueError: there are none, or they are not a list.
    """
    [options] = _axes({"choice": values}, {}).values()
    return lambda rng: options[int(rng.integers(len(options)))]


def _rounded(value: float, low: float, high: float, digits: int) -> float:
    # Rounding may leave the bounds.
    return float(min(max(float(f"{value:.{digits}g}"), low), high))
