"""Loads the golden files under tests/data/golden (see the README there)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "data" / "golden"


@functools.cache
def load_json(name: str) -> Any:
    """Content of `name`.json; shared by all tests, so do not change it."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


@functools.cache
def load_npz(name: str) -> dict[str, np.ndarray]:
    """Arrays of `name`.npz by key."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def question_arrays(question: dict, num_ranges: int) -> dict[str, np.ndarray]:
    """A golden question (prompt_len and responses' step_lengths, fci) as arrays by range.

    Golden FCI starts at the first response step; here range 0, the prompt, is put before it.
    """
    responses, prompt = question["responses"], question["prompt_len"]
    fci = np.zeros((len(responses), num_ranges), np.float32)
    starts = np.zeros(fci.shape, np.int32)
    ends = np.zeros(fci.shape, np.int32)
    for r, response in enumerate(responses):
        bounds = np.cumsum([0, prompt, *response["step_lengths"]])
        count = len(bounds) - 1
        starts[r], ends[r] = bounds[-1], bounds[-1]
        starts[r, :count], ends[r, :count] = bounds[:-1], bounds[1:]
        fci[r, 1:count] = response["fci"]
    num_steps = np.array([len(response["fci"]) for response in responses], np.int32)
    return {"fci": fci, "starts": starts, "ends": ends, "num_steps": num_steps}


class RecordedChoices:
    """Stands in for a random generator: hands out the recorded subset of a pool.

    Subsets are found by their pool and size, since some files do not hold them in the order of
    the questions.
    """

    def __init__(self, pools: list[list[int]], subsets: list[list[int]]):
        self._recorded = list(zip(pools, subsets, strict=True))

    def choice(self, a, size, replace):
        assert not replace
        matches = [
            i
            for i, (pool, subset) in enumerate(self._recorded)
            if pool == list(a) and len(subset) == size
        ]
        assert matches, f"no subset of {size} of {a} was recorded"
        return np.array(self._recorded.pop(matches[0])[1], dtype=int)

    def exhausted(self) -> bool:
        return not self._recorded
