"""What the host does in a training step, against the time that the devices need for it.

The program's own step runs (`training.loop.train_step`), as it does in the first of so many
processes; but every jitted program, and every exchange between processes, is replaced by a stand-in
that returns arrays of the right shape and kind and computes nothing. A stand-in's own time is taken
off. So what is left is the scheduler of the sampler, the rows, packing for scoring and for the
update, branch positions, trees, advantages, the choice of mini-batches; and of judging the part of
this process: decoding text, reading answers, handing some of them to workers (they are
`MathJudge`'s; time in which nothing is done but wait for them does not count).

Every process holds the tokens of all rows, each once, and decides over all of them. What it packs,
judges and looks for branch positions in is its share.

Not measured, since there are no devices: copies between host and devices. Their bytes are counted,
and their time is estimated at `LINK`. Nor is waiting for other processes.

The devices' time is the bound of `experiments.roofline`: the least that the step can take.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from functools import partial

import numpy as np

from attnrl_jax.datasets.stream import ProblemStream
from attnrl_jax.tasks.judging import JudgeConfig, MathJudge
from attnrl_jax.tasks.problems import Problem
from attnrl_jax.training import loop
from attnrl_jax.training.setup import Setup, Task
from attnrl_jax.training.state import TrainState
from experiments.bench.harness import Contender, Context, Fact, Measured, Part, Table
from experiments.bench.idle import MODEL, IdleDevices, Load, made_tokenizer
from experiments.bench.limits import GIBI

# What the host may take of the time that the devices need.
MOST = 0.1
# Bytes per second between a host and its devices: PCIe 4.0 on 8 lanes has 16e9 at most.
LINK = 1e10
STAGES = ("sample", "judge", "branch", "score", "tree", "update", "agree", "other")


class HostStep:
    """A run without devices, which goes on from one measurement to the next."""

    def __init__(self, load: Load, judge: MathJudge):
        tokenizer, answers = made_tokenizer(load.vocab, load.symbolic)
        self.load = load
        self.idle = IdleDevices(load, tokenizer, answers, judge)
        rng = np.random.default_rng(2)
        prompts = rng.integers(50, load.vocab, (4 * load.problems, load.prompt), dtype=np.int32)
        problems = [Problem(str(k), "", (str(k % 40),)) for k in range(len(prompts))]
        task = Task(
            stream=ProblemStream(problems, seed=0),
            held_out=problems[:1],
            tokenizer=tokenizer,
            prompt=lambda problem: prompts[int(problem.id)],
            judge=self.idle,
        )
        self._setup = Setup(
            task, MODEL, load.config(), reference=object(), on_stage=self.idle.on_stage
        )
        with self.idle.instead():
            nothing = TrainState(None, None, np.int32(0), np.int32(0), np.int32(0))
            self._state = loop.start(self._setup, nothing)

    def run(self) -> Measured:
        """Seconds of each stage of a step, and bytes moved."""
        idle, batch = self.idle, self._state.batch
        assert batch is not None
        idle.reset()
        idle.responses = batch.own_length
        with idle.instead():
            self._state, report = loop.train_step(self._state, self._setup)
        metrics = report.metrics
        seconds = {
            name: metrics.get(f"seconds/{name}", 0.0) - idle.own[name]
            for name in ("generate", "judge", "branch", "score", "tree", "update")
        }
        seconds["sample"] = seconds.pop("generate") - idle.parts["judge"]
        seconds["judge"] += idle.parts["judge"]
        seconds["agree"] = idle.parts["agree"]
        seconds["other"] = metrics["seconds/other"] - idle.parts["agree"] - idle.waited
        detail = seconds | {
            "sent": idle.sent, "fetched": idle.fetched_rows,
            "fetched_by_the_sampler": idle.fetched_slots, "dispatches": idle.dispatches,
            "responses": idle.sampled, "rows": metrics["rows/sampled"],
        }  # fmt: skip
        return Measured(sum(seconds.values()), 1.0, detail)

    def peak(self) -> float:
        """Most bytes of arrays and objects in a step, besides what it begins with (the initial
        responses)."""
        # Text is not kept, and to trace what decoding allots takes minutes.
        self.idle.judges = False
        tracemalloc.start()
        try:
            self.run()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            self.idle.judges = True


def part_of(context: Context, load: Load) -> Part:
    """A step of so many problems."""
    name = f"{load.problems:,} problems"
    judge = MathJudge(JudgeConfig())
    context.closing.callback(judge.close)
    held: list[HostStep] = []
    peaks: list[float] = []
    step = load.device_step()

    def warm_up() -> str:
        held.append(HostStep(load, judge))
        held[0].run()
        peaks.append(held[0].peak())
        return f"{load.chips} chips, {load.hosts} processes, {load.config().sampler.slots:,} slots"

    return Part(
        title=f"The host's work in a step of {name}",
        unit="s",
        quantity="seconds",
        contenders=[Contender(name, lambda: held[0].run(), warm_up)],
        facts=lambda runs: facts_of(load, runs[name], peaks[0]),
        tables=lambda runs: [stage_table(runs[name], step.seconds)],
    )


def facts_of(load: Load, measurements: Sequence[Measured], peak: float) -> list[Fact]:
    """Numbers of a step of all problems.

    Args:
      load: of the step.
      measurements: of it.
      peak: bytes of memory that it takes.
    """
    device = load.device_step().seconds
    seconds = float(np.median([measured.seconds for measured in measurements]))
    detail = measurements[-1].detail
    moved = detail["sent"] + detail["fetched"] + detail["fetched_by_the_sampler"]
    return [
        Fact("least time of the devices", device, "s"),
        Fact("of it the host's work", seconds / device, "", at_most=MOST),
        Fact("of it copies at 10 GB/s, not measured", moved / LINK / device),
        Fact("sent to the devices of a process", detail["sent"] / GIBI, "GiB"),
        Fact("fetched by scoring", detail["fetched"] / GIBI, "GiB"),
        Fact("fetched by the sampler", detail["fetched_by_the_sampler"] / GIBI, "GiB"),
        Fact("most memory", peak / GIBI, "GiB"),
        Fact("rows", detail["rows"]),
        Fact("responses sampled", detail["responses"]),
        Fact("calls of the decode loop", detail["dispatches"]),
    ]


def stage_table(measurements: Sequence[Measured], device_seconds: float) -> Table:
    """Least seconds of every stage over the runs, and what share of the devices' time they are."""
    rows = [["stage", "s", "of the devices' time"]]
    for stage in STAGES:
        seconds = min(measured.detail[stage] for measured in measurements)
        rows.append([stage, f"{seconds:.2f}", f"{seconds / device_seconds:.1%}"])
    return Table("Seconds of a step by stage", rows)


# Slices of v5e: one host has 8 chips, each of several has 4.
PARTS = {
    "64": partial(part_of, load=Load(64)),
    "128": partial(part_of, load=Load(128, hosts=4)),
    "512": partial(part_of, load=Load(512, hosts=16)),
    "4096": partial(part_of, load=Load(4096, hosts=128)),
}
