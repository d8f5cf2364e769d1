"""Small runs inside of the test's process, and what to do to them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from rich.console import Console

from experiments.run import run
from experiments.terminal import Terminal


def small(config, steps=3):
    """The same run, a few responses wide; eight simulated devices share its batches."""
    config.steps = steps
    config.num_problems = 4
    config.num_responses = 4
    config.branching.num_positions = 2
    config.branching.num_continuations = 2
    config.mini_batch_rows = 100000
    config.optimizer.learning_rate = 3e-4
    config.eval_every = 2
    config.checkpoint_every = 1
    config.data.held_out_size = 16
    config.score_batch_tokens = 4096
    config.micro_batch_tokens = 4096
    config.length_multiple = 256
    config.sampler.slots = 32
    return config


def execute(config, folder, **options):
    with open(os.devnull, "w") as nowhere:
        return run(config, folder, Console(file=nowhere), **options)


def without_clock(history):
    clock = ("seconds/", "process/")
    return [{k: v for k, v in m.items() if not k.startswith(clock)} for m in history]


def execute_with(
    config, folder, stage: str, occurrence: int, action: Callable[[], None], **options
):
    """`execute`, and when a stage begins for the given time (from 0), the action besides."""
    before, seen = Terminal.stage, 0

    def begin(self, name):
        nonlocal seen
        before(self, name)
        if name == stage:
            seen += 1
            if seen == occurrence + 1:
                action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Terminal, "stage", begin)
        return execute(config, folder, **options)


class CrashError(BaseException):
    """The end of a process, as far as one process can be ended in a test: nothing handles it."""


def crash(config, folder, stage, occurrence):
    """Stops a run while it works on a step, as a machine that goes away would."""

    def stop():
        raise CrashError

    with pytest.raises(CrashError):
        execute_with(config, folder, stage, occurrence, stop)
