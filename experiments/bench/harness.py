"""How a benchmark is written, run and judged.

A benchmark is a module of this package with

    PARTS: dict[str, Callable[[Context], Part]]

one function for each part of its table (`rollouts.PARTS` has `A`, `B`, `C`), and a line in
`BENCHMARKS` of `__main__.py`. A part's function sets up what is measured and returns a `Part`:

- its rows, `contenders`: a name, how one run is made (`run`, which returns the seconds it took and
  the amount done, such as tokens) and how everything that it needs is compiled (`warm_up`, which
  returns the settings used, in words). `run` times itself, so that it can leave out what does not
  count, and ends with the results on the host;
- its `ratios`: one contender over the best of others, and what is wanted of it (`at_least` or
  `at_most`; without either it is only shown). With `quantity="rate"` contenders are compared by
  amount per second, more is better; with `quantity="seconds"` by the seconds of a run, less is
  better, and a ratio is one of seconds;
- `facts`: single numbers that are not measured by the clock (share of padding, bytes), or follow
  from what was (share of a step), with what is wanted of them;
- `tables`: any further ones, of text.

`run_part` runs all contenders in turn in each round, each round beginning with the next of them:
ours, peer 1, peer 2; peer 1, peer 2, ours; ... While one computes the others wait: a contender in
this process has returned, one in a process of its own waits for its next line (`Context.peer`). So
what else the machine does hits all of them alike. A ratio is one of medians over rounds; the ratio
of every round is reported beside it. Nothing else decides: `met` is whether the ratio of medians,
or the fact, is what was wanted.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from experiments.bench.processes import Peer
from experiments.bench.venv import peers_python

# Threads of torch and XLA go to sleep a moment after they have nothing to do.
PAUSE_SECONDS = 0.5


@dataclass(frozen=True)
class Measured:
    """One run of one contender.

    Attributes:
      seconds: wall clock.
      amount: what was done in it, in the numerator of the part's unit.
      detail: any other numbers of the run; they are written to the JSON.
    """

    seconds: float
    amount: float = 1.0
    detail: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
      name: of the row.
      run: makes one run.
      warm_up: compiles all that a run needs, and returns the settings used, in words.
    """

    name: str
    run: Callable[[], Measured]
    warm_up: Callable[[], str]


@dataclass(frozen=True)
class Ratio:
    """What one contender is to be over the best of others.

    Attributes:
      of: name of a contender.
      over: names of others; the best of them counts.
      at_least, at_most: what is wanted; None wants nothing.
    """

    of: str
    over: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Fact:
    """A number and what is wanted of it."""

    name: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Table:
    """A further table of text; the first row is its heading."""

    title: str
    rows: Sequence[Sequence[str]]


Variant = TypeVar("Variant")
# All runs of each contender, by round.
Runs = dict[str, list[Measured]]


@dataclass(frozen=True)
class Part:
    """One part of a benchmark.

    Attributes:
      title: what is measured, in a line.
      unit: of the table's numbers, such as `useful tokens/s`, or `s`.
      contenders: in the order in which they run; later rounds begin with another.
      ratios: what is compared.
      quantity: whether contenders are compared by amount per second or by seconds.
      facts: given all runs, single numbers.
      tables: given all runs, further tables.
    """

    title: str
    unit: str
    contenders: Sequence[Contender] = ()
    ratios: Sequence[Ratio] = ()
    quantity: Literal["rate", "seconds"] = "rate"
    facts: Callable[[Runs], Sequence[Fact]] = lambda runs: ()
    tables: Callable[[Runs], Sequence[Table]] = lambda runs: ()


@dataclass
class Context:
    """What a part may use.

    Attributes:
      folder: for files; removed at the end.
      threads: cores that every contender may use.
      platform: where our side computes: `cpu`, `cuda` or `tpu`.
      peers: folder of the peers' virtual environment.
      find_links: folder of wheels for it, or "".
      say: prints a line on what goes on.
      closing: closed at the end.
      versions: name to version of the peers that took part.
      notes: sentences for the report.
    """

    folder: Path
    threads: int
    platform: str
    peers: Path
    find_links: str
    say: Callable[[str], None]
    closing: ExitStack
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _running: dict[str, Peer] = field(default_factory=dict)

    def peer(self, script: str, **load: Any) -> Peer:
        """A process of a script of `peers/`, started and loaded once a benchmark.

        Args:
          script: name of the file without `.py`.
          **load: arguments of its command `load`, beside `threads`.

        Raises:
          ValueError: our side computes elsewhere than on the CPU, where peers do.
        """
        if self.platform != "cpu":
            raise ValueError(f"--platform={self.platform}: this part compares on the CPU")
        if script not in self._running or self._running[script].ended:
            python = peers_python(self.peers, self.find_links, self.say)
            self.say(f"starting {script}")
            started = Peer(python, script, self.folder / f"{script}.log", self.threads)
            self.closing.enter_context(started)
            answer = started.ask("load", threads=self.threads, **load)
            # One that failed to load is not asked again.
            self._running[script] = started
            self.versions |= answer.get("versions", {})
        return self._running[script]


def run_part(
    part: Part, rounds: int, say: Callable[[str], None], pause: float = PAUSE_SECONDS
) -> dict[str, Any]:
    """Warms up and runs every contender in turn, and judges.

    Args:
      part: to run.
      rounds: runs of each contender.
      say: prints a line on what goes on.
      pause: seconds before each run.

    Returns:
      what the JSON holds of the part.
    """
    settings = {}
    for contender in part.contenders:
        say(f"{contender.name}: warming up")
        began = time.perf_counter()
        settings[contender.name] = contender.warm_up()
        say(f"{contender.name}: {time.perf_counter() - began:.0f} s, {settings[contender.name]}")
    runs: Runs = {contender.name: [] for contender in part.contenders}
    load = [os.getloadavg()[0]]
    for number in range(rounds if part.contenders else 0):
        gc.collect()
        first = number % len(part.contenders)
        # Nobody always comes after the same one.
        for contender in (*part.contenders[first:], *part.contenders[:first]):
            time.sleep(pause)
            measured = contender.run()
            runs[contender.name].append(measured)
            shown = value(measured, part.quantity)
            say(f"round {number + 1}/{rounds}: {contender.name} {shown:.4g} {part.unit}")
        load.append(os.getloadavg()[0])
    return judged(part, settings, runs) | {"load_average": load}


def fastest(
    variants: Sequence[Variant], seconds: Callable[[Variant], float], timings: int = 2
) -> tuple[Variant, dict[Variant, float]]:
    """The variant that takes least, and what each took.

    Args:
      variants: all different.
      seconds: runs one; each is run once more before, to compile.
      timings: of each, in turn; the least counts.
    """
    for variant in variants:
        seconds(variant)
    rounds = [[seconds(variant) for variant in variants] for _ in range(timings)]
    taken = dict(zip(variants, map(min, zip(*rounds, strict=True)), strict=True))
    return min(variants, key=lambda variant: taken[variant]), taken


def value(measured: Measured, quantity: str) -> float:
    """The number by which runs are compared."""
    return measured.seconds if quantity == "seconds" else measured.amount / measured.seconds


def judged(part: Part, settings: Mapping[str, str], runs: Runs) -> dict[str, Any]:
    """Numbers, ratios and facts of a part's runs, as JSON has them.

    Raises:
      ValueError: a ratio names a contender that is not there.
    """
    values = {
        name: [value(measured, part.quantity) for measured in measurements]
        for name, measurements in runs.items()
    }
    return {
        "title": part.title,
        "unit": part.unit,
        "quantity": part.quantity,
        "contenders": [
            {
                "name": name,
                "settings": settings.get(name, ""),
                "min": min(numbers),
                "median": statistics.median(numbers),
                "max": max(numbers),
                "rounds": [
                    {"seconds": m.seconds, "amount": m.amount, "detail": dict(m.detail)}
                    for m in runs[name]
                ],
            }
            for name, numbers in values.items()
        ],
        "ratios": [_ratio(ratio, values, part.quantity) for ratio in part.ratios],
        "facts": [
            {
                "name": fact.name,
                "value": fact.value,
                "unit": fact.unit,
                "at_least": fact.at_least,
                "at_most": fact.at_most,
                "met": is_met(fact.value, fact.at_least, fact.at_most),
            }
            for fact in part.facts(runs)
        ],
        "tables": [
            {"title": table.title, "rows": [list(row) for row in table.rows]}
            for table in part.tables(runs)
        ],
    }


def _ratio(ratio: Ratio, values: Mapping[str, list[float]], quantity: str) -> dict[str, Any]:
    missing = {ratio.of, *ratio.over} - set(values)
    if missing or not ratio.over:
        raise ValueError(
            f"a ratio of {ratio.of!r} over {list(ratio.over)} needs contenders among "
            f"{sorted(values)}"
        )
    best = min if quantity == "seconds" else max
    medians = {name: statistics.median(numbers) for name, numbers in values.items()}
    whole = medians[ratio.of] / best(medians[name] for name in ratio.over)
    return {
        "of": ratio.of,
        "over": list(ratio.over),
        "value": whole,
        "rounds": [
            own / best(values[name][number] for name in ratio.over)
            for number, own in enumerate(values[ratio.of])
        ],
        "at_least": ratio.at_least,
        "at_most": ratio.at_most,
        "met": is_met(whole, ratio.at_least, ratio.at_most),
    }


def is_met(number: float, at_least: float | None, at_most: float | None) -> bool:
    """Whether a number is what was wanted; one that is not a number never is."""
    if number != number:
        return at_least is None and at_most is None
    return (at_least is None or number >= at_least) and (at_most is None or number <= at_most)


def missed(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for every ratio and fact of `run_part`'s results that is not what was wanted.

    Parts that failed have none.
    """
    lines = []
    for name, part in parts.items():
        if "failed" in part:
            continue
        for ratio in part["ratios"]:
            if not ratio["met"]:
                pair = f"{ratio['of']} over {best_of(ratio['over'])}"
                lines.append(f"{name}: {pair} is {ratio['value']:.3g}, wanted {wanted(ratio)}")
        for fact in part["facts"]:
            if not fact["met"]:
                lines.append(
                    f"{name}: {fact['name']} is {fact['value']:.3g}, wanted {wanted(fact)}"
                )
    return lines


def wanted(judgement: Mapping[str, Any]) -> str:
    """`>= 3` of a ratio or fact; nothing where nothing is wanted."""
    limits = ((">=", judgement["at_least"]), ("<=", judgement["at_most"]))
    return ", ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)


def best_of(names: Sequence[str]) -> str:
    """How the other side of a ratio is called."""
    return names[0] if len(names) == 1 else f"the best of {', '.join(names)}"
