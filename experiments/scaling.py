"""Bounds on the time of a training step, by model, chip and number of chips.

    python -m experiments.scaling
    python -m experiments.scaling --counts=experiments/aot_results

Prints the tables of docs/scaling.md, which explains every formula (`experiments.roofline`). Nothing
is run and nothing is measured: these are operations and bytes over the rates of a chip. With
--counts also how they compare with what the TPU compiler counted (`experiments.aot --json`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnrl_jax.compilation.chips import CHIPS
from experiments.bench.limits import matrix_params
from experiments.commands import guarded, parser
from experiments.roofline import (
    BF16,
    FLOAT32,
    MODELS,
    Step,
    Workload,
    attention_flops,
    passes,
    step_time,
)
from experiments.tables import table

CHIP_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
FEW_COUNTS = (8, 16, 64, 256, 1024)
# The largest slice. Beyond it data parallelism goes over the network between slices.
SLICE = {"v5e": 256, "v5p": 8960}
# Which of them a file of `experiments.aot` is about.
FILES = {"qwen_1p5b": "1.5B", "qwen_7b": "7B", "qwen_32b": "32B"}
# Of a program: operations per matrix parameter, passes of attention, bytes gathered and scattered
# per parameter, all-reduces per layer.
PROGRAMS = {
    "reference log-probabilities": (2, 1, BF16, 2),
    "accumulate": (8, 3, 2 * BF16 + FLOAT32, 6),
}


def step_table(counts: Sequence[int], problems_per_chip: int | None) -> str:
    """Every model on so many chips.

    Args:
      counts: of chips.
      problems_per_chip: of a batch that grows with the chips; None: the paper's 64.
    """
    rows = [[
        "model", "chip", "chips", "problems", "`sampling_tensor`", "`slots`", "decode steps",
        "generate s", "bound by", "links", "`tensor`", "score s", "update s", "bound by", "links",
        "step s", "chip-hours",
    ]]  # fmt: skip
    for name, model in MODELS.items():
        for chip in (CHIPS["v5e"], CHIPS["v5p"]):
            for chips in counts:
                problems = 64 if problems_per_chip is None else problems_per_chip * chips
                step = step_time(model, chip, chips, Workload(problems))
                several = "*" if chips > SLICE[chip.name] else ""
                cells = ["does not fit", *["-"] * 12] if step is None else _cells(step, chips)
                rows.append([name, chip.name, f"{chips:,}{several}", f"{problems:,}", *cells])
    return table(rows, left=2)


def _cells(step: Step, chips: int) -> list[str]:
    sampling, update = step.generate.settings, step.update.settings
    return [
        str(sampling["tensor"]), f"{sampling['slots']:,}", f"{sampling['steps']:,}",
        _seconds(step.generate.seconds), step.generate.bound, step.generate.links,
        str(update["tensor"]), _seconds(step.score.seconds), _seconds(step.update.seconds),
        step.update.bound, step.update.links, _seconds(step.seconds),
        f"{step.seconds * chips / 3600:,.1f}",
    ]  # fmt: skip


def _seconds(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def against_counts(results: Sequence[dict[str, Any]]) -> str:
    """One execution of the update's programs: the formulas beside what the compiler counted.

    Args:
      results: of `experiments.aot --json`, each with the `name` of its file.
    """
    rows = [["run", "program", "compute ms", "counted", "interconnect ms", "counted"]]
    for result in results:
        known = [model for key, model in FILES.items() if key in result["name"]]
        chip, chips, tensor = CHIPS[result["chip"]["name"]], result["devices"], result["mesh"]
        for program in result["programs"]:
            if not known or program["name"] not in PROGRAMS or "error" in program:
                continue
            products, attention, gathers, reduces = PROGRAMS[program["name"]]
            model, work = MODELS[known[0]], Workload()
            # Of a full sequence a token sees half.
            flops = products * matrix_params(model)
            flops += attention * attention_flops(model, work.longest / 2)
            found = passes(model, chip, chips, work, tensor["tensor"], 1, flops, gathers, reduces)
            counted = program["roofline_seconds"]
            numbers = (found.compute, counted["compute"], found.interconnect,
                       counted["interconnect"])  # fmt: skip
            rows.append([result["name"], program["name"], *(f"{1e3 * x:.0f}" for x in numbers)])
    return table(rows, left=2)


def tables() -> str:
    """Both tables of docs/scaling.md that follow from the formulas."""
    growing = "Eight problems a chip, which is the paper's batch on eight chips"
    return (
        f"The paper's batch, 64 problems:\n\n{step_table(CHIP_COUNTS, None)}\n\n"
        f"{growing}:\n\n{step_table(FEW_COUNTS, 8)}"
    )


def main(arguments: argparse.Namespace) -> None:
    print(tables())
    if arguments.counts:
        folder = Path(arguments.counts)
        if not folder.is_dir():
            raise ValueError(f"--counts: there is no folder {folder}")
        files = sorted(folder.glob("*.json"))
        results = [json.loads(path.read_text()) | {"name": path.stem} for path in files]
        print(f"\nOne batch, beside the compiler's counts:\n\n{against_counts(results)}")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__, "scaling", quiet=None)
    made.add_argument("--counts", default="", metavar="DIR", help="folder of the compiler's counts")
    return made


if __name__ == "__main__":
    guarded(main, make_parser().parse_args(), "nothing was written")
