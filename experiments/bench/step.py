"""The wall clock of whole training steps, by stage, and how many tokens are sampled meanwhile.

The shipped policy on its own task, by the settings of `attnrl_graph_trees`, but at learning rate 0
and with as many problems in every step: so all steps, of both schedules, do about as much. Tokens
sampled per second compares the schedules at equal sampled tokens.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnrl_jax.sharding import make_mesh
from attnrl_jax.training.loop import start, train_step
from attnrl_jax.training.setup import Setup
from attnrl_jax.training.state import LoopState, TrainConfig, init_state
from experiments.bench.harness import Contender, Context, Fact, Measured, Part, Ratio, Runs, Table
from experiments.configs import attnrl_graph_trees
from experiments.settings import Settings, build
from experiments.tasks import build_task, load_policy

STEPS = 2
# All other time of a step is `other`; the stages in it are shown too.
STAGES = ("generate", "judge", "score", "update")
SECONDS = "seconds/"
# The loop's own names for what is no stage.
NO_STAGES = ("other", "overlapped", "step")
MOST_OTHER = 0.05
SCHEDULES = {"one step off-policy": "off_policy", "two rounds on-policy": "on_policy"}


class Schedule:
    """A run that goes on from one measurement to the next."""

    def __init__(self, setup: Setup, params: Any, steps: int):
        self._setup = setup
        self._steps = steps
        train = init_state(jax.tree.map(jnp.copy, params), setup.config.optimizer, setup.mesh)
        with _mesh(setup):
            self._state: LoopState = start(setup, train)

    def run(self) -> Measured:
        """The next steps: sampled tokens, and the seconds of each stage and of `other`."""
        seconds: dict[str, float] = defaultdict(float)
        tokens = trained = 0.0
        began = time.perf_counter()
        for _ in range(self._steps):
            with _mesh(self._setup):
                self._state, report = train_step(self._state, self._setup)
            for name, value in report.metrics.items():
                if name.startswith(SECONDS) and name.removeprefix(SECONDS) not in NO_STAGES:
                    seconds[name] += value
            tokens += report.metrics["tokens/sampled"]
            trained += report.metrics["tokens/trained"]
        jax.block_until_ready(self._state.train.params)
        total = time.perf_counter() - began
        named = sum(seconds[SECONDS + name] for name in STAGES)
        detail = dict(seconds) | {f"{SECONDS}other": total - named, "trained_tokens": trained}
        return Measured(total, tokens, detail)


def _mesh(setup: Setup) -> AbstractContextManager:
    return nullcontext() if setup.mesh is None else jax.set_mesh(setup.mesh)


def shares(measurements: Sequence[Measured]) -> dict[str, float]:
    """Part of the wall clock that each stage took, and `other`."""
    total = sum(measured.seconds for measured in measurements)
    return {
        name: sum(measured.detail[SECONDS + name] for measured in measurements) / total
        for name in (*STAGES, "other")
    }


def split_table(runs: Runs, steps: int) -> Table:
    """Seconds of a step, stage by stage, and its tokens; medians of the runs.

    Stages that are part of `other` come after it, whichever there are.
    """
    found = {
        name.removeprefix(SECONDS): None
        for measurements in runs.values()
        for measured in measurements
        for name in measured.detail
        if name.startswith(SECONDS)
    }
    inside = [name for name in found if name not in (*STAGES, "other")]

    def cells(measurements: Sequence[Measured]) -> list[str]:
        def median(values: Sequence[float]) -> float:
            return float(np.median(values)) / steps

        stages = [
            f"{median([measured.detail.get(SECONDS + name, 0.0) for measured in measurements]):.2f}"
            for name in (*STAGES, "other", *inside)
        ]
        whole = median([measured.seconds for measured in measurements])
        tokens = median([measured.amount for measured in measurements])
        trained = median([measured.detail["trained_tokens"] for measured in measurements])
        return [*stages, f"{whole:.2f}", f"{tokens:,.0f}", f"{trained:,.0f}"]

    heading = [
        "schedule", *STAGES, "other", *inside, "step", "tokens sampled", "tokens trained on",
    ]  # fmt: skip
    rows = [[name, *cells(measurements)] for name, measurements in runs.items()]
    holds = f"; other holds {', '.join(inside)}" if inside else ""
    return Table(f"Seconds of one training step (medians{holds})", [heading, *rows])


def settings_of(schedule: str, changes: Mapping[str, object]) -> Settings:
    """The settings of `attnrl_graph_trees` for this measurement."""
    config = attnrl_graph_trees.get_config()
    config.update(dict(changes))
    config.schedule = schedule
    config.batch_size.adaptive = False
    config.optimizer.learning_rate = 0.0
    return build(config)


def part_default(context: Context, steps: int = STEPS, **changes: object) -> Part:
    """The settings of `attnrl_graph_trees`.

    Args:
      context: of the benchmark.
      steps: training steps of one measurement.
      **changes: of the configuration.
    """
    contenders = []
    for name, schedule in SCHEDULES.items():
        settings = settings_of(schedule, changes)
        mesh = make_mesh(settings.mesh)
        policy = load_policy(settings, mesh)
        task = build_task(settings, policy)[0]
        context.closing.callback(task.judge.close)
        # No run ends here by its number of steps.
        config = dataclasses.replace(settings.train, steps=10**6)
        setup = Setup(task, policy.model, config, mesh)
        contenders.append(_contender(name, setup, policy.params, steps))
    one, two = (contender.name for contender in contenders)
    return Part(
        title="A training step with trees of up to 30 rows, both schedules",
        unit="sampled tokens/s",
        contenders=contenders,
        ratios=[Ratio(one, (two,))],
        facts=lambda runs: [
            Fact(f"other, {name}", shares(measured)["other"], "of the step", at_most=MOST_OTHER)
            for name, measured in runs.items()
        ],
        tables=lambda runs: [split_table(runs, steps)],
    )


def _contender(name: str, setup: Setup, params: Any, steps: int) -> Contender:
    schedules: list[Schedule] = []

    def warm_up() -> str:
        schedules.append(Schedule(setup, params, steps))
        # Twice: a second step may meet shapes that the first did not.
        for _ in range(2):
            schedules[0].run()
        return _described(setup.config)

    return Contender(name, lambda: schedules[0].run(), warm_up)


def _described(config: TrainConfig) -> str:
    return (
        f"{config.num_problems} problems, n {config.num_responses}, N "
        f"{config.branching.num_positions}, C {config.branching.num_continuations}, "
        f"{config.prompt_budget} + {config.response_budget} tokens, packing {config.packing}, "
        f"{config.sampler.slots} slots"
    )


PARTS = {"default": part_default}
