"""What a program computes and sends: counted from its jaxpr and from its compiled text.

XLA's own cost analysis counts the body of a loop once, however often it runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"


def count_flops(jaxpr: Any, platform: str = "tpu") -> int:
    """Floating-point operations of all matrix products, over all devices.

    A scan counts as often as it runs, a `while_loop` once (nobody knows how often it runs), of the
    branches of a conditional the one with the most. A Pallas kernel counts its body for all of its
    grid, also where it skips blocks; what `shard_map` runs counts for every device.

    Args:
      jaxpr: of the program (`jitted.trace(...).jaxpr`).
      platform: whose branch of `platform_dependent` counts.
    """
    return sum(_equation_flops(equation, platform) for equation in _equations(jaxpr))


def _equations(jaxpr: Any) -> list[Any]:
    return getattr(jaxpr, "jaxpr", jaxpr).eqns


def _equation_flops(equation: Any, platform: str) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return (
            2
            * math.prod(equation.outvars[0].aval.shape)
            * math.prod(shape[axis] for axis in contracted)
        )
    if name in ("conv_general_dilated", "ragged_dot_general"):
        raise ValueError(f"no rule for the operations of {name}")
    if name == "cond":
        by_branch = [count_flops(branch, platform) for branch in params["branches"]]
        chosen = _branch_of(platform, params.get("branches_platforms"))
        return max(by_branch) if chosen is None else by_branch[chosen]
    inner = sum(count_flops(held, platform) for held in _held_jaxprs(params))
    if name == "scan":
        return params["length"] * inner
    if name == "shard_map":
        # Of the other axes the compiler cuts what is inside.
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * inner
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * inner
    return inner


def _branch_of(platform: str, platforms: Any) -> int | None:
    """Index of a platform's branch; None where the branches are not those of platforms."""
    if platforms is None:
        return None
    named = [k for k, names in enumerate(platforms) if names is not None and platform in names]
    default = [k for k, names in enumerate(platforms) if names is None]
    return (named + default)[0]


def _held_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    # Rules of differentiation that the program does not run are functions, not jaxprs.
    for value in params.values():
        for leaf in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(leaf, "jaxpr", leaf), "eqns"):
                yield leaf


@dataclass(frozen=True)
class Collectives:
    """Collectives of one kind, in one execution, on one device.

    Attributes:
      count: how many run.
      result: bytes of their results.
      sent: bytes that the device sends, by the ring algorithm.
    """

    count: float = 0
    result: float = 0
    sent: float = 0

    def plus(self, other: Collectives, times: float = 1) -> Collectives:
        return Collectives(
            self.count + times * other.count,
            self.result + times * other.result,
            self.sent + times * other.sent,
        )


def count_collectives(text: str) -> dict[str, Collectives]:
    """Collectives of a compiled program by kind (`compiled.as_text()`, of any platform).

    Loops count as often as they run, where their text says so: by `known_trip_count`, or by the
    constant that the loop's counter is compared with. Others count once. Of the branches of a
    conditional, the one that sends the most counts.
    """
    module = _Module(text)
    return module.total(module.entry, set())


class _Module:
    """Computations of a module, by name."""

    def __init__(self, text: str):
        self.lines: dict[str, list[str]] = {}
        self.entry = ""
        found = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(found[1]) if found else 1
        name = ""
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.~-]+) \(.*\) -> .*\{$", line)
            if head:
                name = head[2]
                self.lines[name] = []
                self.entry = name if head[1] else self.entry
            elif name:
                self.lines[name].append(line)

    def total(
        self, computation: str, seen: set[str], is_called: bool = False
    ) -> dict[str, Collectives]:
        """Collectives of a computation and of all that it calls.

        Args:
          computation: its name.
          seen: channels so far, of this turn of a loop. A TPU starts, does and ends one collective
            in several fusions, each of which has it; some of them inside later loops.
          is_called: whether it is a fusion. Elsewhere a channel says nothing: all collectives that
            a `shard_map` asks for have the same one.
        """
        totals: dict[str, Collectives] = {}

        def add(more: dict[str, Collectives], times: float = 1) -> None:
            for kind, found in more.items():
                totals[kind] = totals.get(kind, Collectives()).plus(found, times)

        for line in self.lines.get(computation, []):
            operation = re.match(rf"\s*(?:ROOT )?\S+ = (.*?) ({_KINDS})(-start)?\(", line)
            channel = re.search(r"channel_id=(\d+)", line)
            if operation:
                if not is_called or channel is None or channel[1] not in seen:
                    add({operation[2]: self._collective(line, *operation.groups())})
                if channel:
                    seen.add(channel[1])
            elif " while(" in line:
                body, condition = (_named(line, key)[0] for key in ("body", "condition"))
                add(self.total(body, set(seen)), self._trips(line, condition))
            elif " conditional(" in line:
                keys = ("branch_computations", "true_computation", "false_computation")
                names = [name for key in keys for name in _named(line, key)]
                branches = [self.total(name, set(seen)) for name in names]
                add(max(branches, key=lambda b: sum(c.sent for c in b.values()), default={}))
            else:
                for name in _named(line, "calls") + _named(line, "to_apply"):
                    add(self.total(name, seen, True))
        return totals

    def _collective(self, line: str, shape: str, kind: str, start: str | None) -> Collectives:
        if start and kind in ("all-gather", "collective-permute"):
            # (operands, results, ...)
            shape = _parts(shape)[1]
        result = _bytes(shape)
        group = self._group(line)
        ring = (group - 1) / group
        factor = {"all-reduce": 2 * ring, "reduce-scatter": group - 1, "collective-permute": 1}
        return Collectives(1, result, result * factor.get(kind, ring))

    def _group(self, line: str) -> int:
        """Devices that take part in one collective together."""
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
            return int(found[1])
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
            return len(found[1].split(","))
        if found := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
        return self.devices

    def _trips(self, line: str, condition: str) -> int:
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
            return int(found[1])
        lines = self.lines.get(condition, [])
        lines = lines + [
            inner for held in lines for name in _named(held, "calls")
            for inner in self.lines.get(name, [])
        ]  # fmt: skip
        compared = [text for text in lines if "direction=" in text]
        bounds = [
            int(found[1])
            for text in lines
            if (found := re.search(r"s32\[\]\S* constant\((\d+)\)", text))
        ]
        if len(compared) == len(bounds) == 1 and "direction=LT" in compared[0]:
            return bounds[0]
        return 1


def _named(line: str, key: str) -> list[str]:
    """Computations that a line calls: `key=%name` or `key={%name, ...}`."""
    found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.~-]+)", line)
    return re.findall(r"[\w.~-]+", found[1]) if found else []


def _parts(shape: str) -> list[str]:
    """Elements of a tuple's shape, those of an inner tuple together."""
    shape = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", shape.strip())[1:-1]
    parts, depth = [""], 0
    for character in shape:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _bytes(shape: str) -> int:
    """Bytes of all arrays that a shape names."""
    total = 0.0
    for kind, dimensions in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        bits = re.search(r"\d+", kind)
        size = 1 if kind == "pred" or bits is None else int(bits[0]) / 8
        total += size * math.prod(int(n) for n in dimensions.split(",") if n)
    return int(total)


def bytes_per_device(tree: Any) -> int:
    """Bytes that the arrays of a tree take on each device.

    Args:
      tree: of arrays or `jax.ShapeDtypeStruct`; without a sharding they count whole.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape, sharding = leaf.shape, getattr(leaf, "sharding", None)
        shape = shape if sharding is None else sharding.shard_shape(shape)
        total += math.prod(shape) * np.dtype(leaf.dtype).itemsize
    return total
