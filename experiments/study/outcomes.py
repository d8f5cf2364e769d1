"""Outcomes of the study's runs: one small JSON file each, which is all that is kept of them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from experiments.curves import Point, evaluations
from experiments.folders import write_atomically
from experiments.plan import ROOT, Run
from experiments.records import METRICS_FILE, read_metrics
from experiments.study.policies import answers_of, policy_of
from experiments.study.protocol import name_of

# Of every step; the rest is in the curve.
PER_STEP = (
    "tokens/sampled", "tokens/trained", "tokens/trained_distinct", "rows/sampled", "rows/trained",
    "rows/with_advantage", "problems/drawn", "problems/kept", "branching/positions",
    "train/response_length", "train/entropy", "update/updates", "update/approx_kl",
    "update/gradient_norm", "seconds/step", "seconds/generate",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
      method: by its name in `Protocol.methods`.
      learning_rate, seed: of the run.
      curve: its evaluations on the held-out problems.
      per_step: values of the metrics `PER_STEP`, of every step.
      greedy, sampled: of the test, as `policies.Answers` has them; None of a run that chose
        learning rates.
    """

    method: str
    learning_rate: float
    seed: int
    curve: tuple[Point, ...]
    per_step: Mapping[str, Float[np.ndarray, "step"]]
    greedy: Int[np.ndarray, "problem"] | None
    sampled: Int[np.ndarray, "problem"] | None


def file_of(run: Run, folder: Path) -> Path:
    """Where a run's outcome is kept."""
    method = name_of(run.overrides).replace(", ", "_").replace(" ", "-")
    rate = run.overrides["optimizer.learning_rate"]
    return folder / f"{method}_{rate:g}_{run.overrides['seed']}.json"


def record(run: Run, path: Path, with_test: bool) -> None:
    """Writes what is kept of a run that has finished.

    Args:
      run: of a sweep of the study.
      path: of the file.
      with_test: whether its last policy is asked the test's problems.
    """
    history = read_metrics(run.folder / METRICS_FILE)
    steps = [metrics for metrics in history if metrics["step"] > 0]
    found: dict[str, Any] = {
        "method": name_of(run.overrides),
        "learning_rate": run.overrides["optimizer.learning_rate"],
        "seed": run.overrides["seed"],
        "overrides": run.overrides,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {jax.default_backend()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "curve_columns": ["step", "accuracy", "sampled_tokens", "trained_tokens", "seconds"],
        "curve": [
            [p.step, round(p.accuracy, 6), p.sampled_tokens, p.trained_tokens, round(p.seconds, 2)]
            for p in evaluations(history)
        ],
        # A step that was skipped has no update's metrics.
        "per_step": {
            name: [float(f"{metrics.get(name, 0.0):.5g}") for metrics in steps] for name in PER_STEP
        },
    }
    if with_test:
        answers = answers_of(policy_of(run.folder))
        # A digit for each problem.
        found["test"] = {
            "greedy": "".join(map(str, answers.greedy.tolist())),
            "sampled": "".join(map(str, answers.sampled.tolist())),
            "response_length": round(answers.response_length, 2),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
    write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _commit() -> str:
    """Of the program; empty where git does not say."""
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return asked.stdout.strip()


def read(path: Path) -> Outcome:
    """The outcome of a run, as `record` wrote it.

    Raises:
      ValueError: the file is not one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        test = found.get("test")
        return Outcome(
            method=found["method"],
            learning_rate=found["learning_rate"],
            seed=found["seed"],
            curve=tuple(Point(*values) for values in found["curve"]),
            per_step={name: np.array(values) for name, values in found["per_step"].items()},
            greedy=_digits(test["greedy"]) if test else None,
            sampled=_digits(test["sampled"]) if test else None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no outcome of the study: {error!r}") from error


def _digits(text: str) -> np.ndarray:
    return np.array([int(digit) for digit in text])


def read_all(folder: Path) -> list[Outcome]:
    """The outcomes in a folder, in the order of their names."""
    return [read(path) for path in sorted(folder.glob("*.json"))]
