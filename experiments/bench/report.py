"""Results of a benchmark as JSON and as Markdown, with the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import jax

from experiments.bench.harness import best_of, wanted
from experiments.folders import write_atomically
from experiments.tables import one_line, table

# What jax needs for an accelerator.
PLUGINS = re.compile(r"jax-cuda\d+-(plugin|pjrt)|libtpu")


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores, memory and system; the devices that our side computes on."""
    devices = jax.devices()
    return {
        "processor": _line("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "cores_used": threads,
        "memory": _line("/proc/meminfo", "MemTotal") or "unknown",
        "system": platform.platform(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "device_platform": one_line(devices[0].client.platform_version.strip()),
    }


def _line(path: str, name: str) -> str:
    """Value of the first line `name: value` of a file of the system; "" where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, text = line.partition(":")
        if key.strip() == name:
            return text.strip()
    return ""


def own_versions() -> dict[str, str]:
    """Of what our own side runs on."""
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    installed = {found.name: found.version for found in distributions()}
    plugins = {name: installed[name] for name in sorted(installed) if PLUGINS.fullmatch(name)}
    return {"python": platform.python_version()} | packages | plugins


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result, under a heading."""
    about = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    peers = ", ".join(f"{name} {number}" for name, number in result["peers_versions"].items())
    lines = [
        f"# {result['benchmark']}",
        "",
        f"{result['date']}, {about['processor']}, {about['cores_used']} of {about['cores']} cores, "
        f"{about['memory']}, {about['system']}.",
        f"Our side computes on {about['devices']} x {about['device']} "
        f"({about['device_platform']}).",
        f"Ours: {versions}." + (f" Peers: {peers}." if peers else ""),
        f"Command: `{result['command']}`.",
    ]
    for note in result["notes"]:
        lines += ["", note]
    for part in result["parts"].values():
        shown = [f"Failed: {one_line(part['failed'])}"] if "failed" in part else _part(part)
        lines += ["", f"## {part['title']}", "", *shown]
    return "\n".join(lines) + "\n"


def _part(part: Mapping[str, Any]) -> list[str]:
    lines = []
    if part["contenders"]:
        rows = [["contender", f"median {part['unit']}", "min", "max", "every round"]]
        for contender in part["contenders"]:
            rounds = [
                run["seconds"] if part["quantity"] == "seconds" else run["amount"] / run["seconds"]
                for run in contender["rounds"]
            ]
            numbers = [number(contender[name]) for name in ("median", "min", "max")]
            rows.append([contender["name"], *numbers, ", ".join(map(number, rounds))])
        lines += [table(rows), ""]
        load = ", ".join(f"{x:.1f}" for x in part["load_average"])
        lines += [f"Load average before and after each round: {load}.", ""]
        lines += [f"- {c['name']}: {c['settings']}" for c in part["contenders"]]
    if part["ratios"]:
        rows = [["ratio of medians", "value", "wanted", "met", "every round"]]
        for ratio in part["ratios"]:
            name = f"{ratio['of']} over {best_of(ratio['over'])}"
            rounds = ", ".join(f"{x:.2f}" for x in ratio["rounds"])
            rows.append([name, f"{ratio['value']:.2f}", wanted(ratio), _met(ratio), rounds])
        lines += ["", table(rows)]
    if part["facts"]:
        rows = [["fact", "value", "wanted", "met"]]
        for fact in part["facts"]:
            text = f"{number(fact['value'])} {fact['unit']}".strip()
            rows.append([fact["name"], text, wanted(fact), _met(fact)])
        lines += ["", table(rows)]
    for further in part["tables"]:
        lines += ["", f"{further['title']}:", "", table(further["rows"])]
    return lines


def _met(judgement: Mapping[str, Any]) -> str:
    if judgement["at_least"] is None and judgement["at_most"] is None:
        return ""
    return "yes" if judgement["met"] else "NO"


def number(x: float) -> str:
    """Three digits that count, whole numbers from 100 on."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def write(result: Mapping[str, Any], out: Path, name: str) -> tuple[Path, Path]:
    """Writes `NAME.json` and `NAME.md` into a folder, and returns both paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = out / f"{name}.json", out / f"{name}.md"
    write_atomically(paths[0], json.dumps(result, indent=2) + "\n")
    write_atomically(paths[1], markdown(result))
    return paths
