"""Writes the table of what was compiled ahead of time: `experiments/aot_results/README.md`.

    python -m experiments.aot --config=FILE --topology=v5e:4x4 \\
        --json=experiments/aot_results/NAME.json
    python -m experiments.aot_table

Everything is read from the JSON files in that folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.aot import GIB
from experiments.commands import guarded, parser
from experiments.tables import table

RESULTS = Path(__file__).parent / "aot_results"

HEADING = """# Programs compiled for TPUs that were not there

Written by `python -m experiments.aot_table` from the JSON files of `python -m experiments.aot`,
which hold all numbers. Nothing here was run on a TPU: bytes are the compiler's, times are bounds
from counts (the longest of computing, memory and interconnect), no forecasts. At most 1,024 tokens
of prompt and 8,192 of response. GiB are those of one device; `sum` is everything on it while the
program runs.
"""


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """What was compiled, by name of file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def page(results: dict[str, dict[str, Any]]) -> str:
    """The page of all results."""
    parts = [HEADING, summary(results) + "\n"]
    for name, result in results.items():
        parts.append(f"## {name}\n\n{section(result)}\n")
    return "\n".join(parts)


def summary(results: dict[str, dict[str, Any]]) -> str:
    """A row for each run: what it needs at most, and of which program."""
    rows = [["file", "slice", "chip has GiB", "most needed GiB", "by", "fits"]]
    for name, result in results.items():
        most = max(_compiled(result), key=lambda program: program["total"])
        refused = [program["name"] for program in result["programs"] if not program.get("fits")]
        rows.append([
            name, f"{result['topology']} ({result['accelerator_type']})",
            f"{result['chip']['hbm'] / GIB:.2f}", f"{most['total'] / GIB:.2f}", most["name"],
            "no: " + ", ".join(refused) if refused else "yes",
        ])  # fmt: skip
    return table(rows, left=2)


def section(result: dict[str, Any]) -> str:
    """The programs of one run."""
    command = result["command"].replace(" --", " \\\n        --")
    rows = [["program", "one execution", "arguments", "temporaries", "outputs", "held", "sum",
             "TFLOP", "roofline ms", "bound by", "sent MiB"]]  # fmt: skip
    for program in result["programs"]:
        if "error" in program:
            rows.append([program["name"], program["unit"], *["-"] * 8, program["error"][:40]])
            continue
        held = sum(program["held"].values())
        sizes = [program[key] for key in ("arguments", "temporaries", "outputs")]
        bounds = program["roofline_seconds"]
        longest = max(bounds, key=bounds.__getitem__)
        sent = sum(found["sent"] for found in program["collectives"].values())
        rows.append([
            program["name"], program["unit"],
            *(f"{size / GIB:.2f}" for size in (*sizes, held, program["total"])),
            f"{program['flops'] / 1e12:.3g}", f"{1e3 * bounds[longest]:.3g}", longest,
            f"{sent / 2**20:.4g}",
        ])  # fmt: skip
    held = {}
    for program in _compiled(result):
        held |= program["held"]
    held.pop("arguments not read", None)
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items())
    versions = f"jax {result['jax']}, libtpu {result['libtpu']}, {result['date']}."
    return f"{versions}\n\n    {command}\n\n{table(rows, left=2)}\n\nHeld, in GiB: {listed}.\n"


def _compiled(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [program for program in result["programs"] if "error" not in program]


def main(_: argparse.Namespace) -> None:
    results, file = read_results(), RESULTS / "README.md"
    file.write_text(page(results))
    print(f"{len(results)} results in {file}")


if __name__ == "__main__":
    guarded(main, parser(__doc__, "aot_table", quiet=None).parse_args(), "nothing was written")
