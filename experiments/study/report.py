"""Tables and figure of the study, made of its recorded outcomes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from attnrl_jax.evaluation import Estimate
from experiments.folders import write_atomically
from experiments.study import bootstrap, comparison
from experiments.study.comparison import DIFFICULTIES, Axis, Runs
from experiments.study.figure import draw
from experiments.study.outcomes import read_all
from experiments.study.protocol import Protocol
from experiments.study.signal import signal
from experiments.tables import table

OURS = "AttnRL"
TREE = "TreeRL"
ON_POLICY = "AttnRL, on-policy"
RANDOM = "AttnRL, random steps"


def write(results: Path, protocol: Protocol) -> str:
    """Writes `report.md` and `study.png` into the folder of the outcomes.

    Args:
      results: with `tuning/`, `comparison/` and `attention.json`, as far as they are there.
      protocol: of the comparison.

    Returns:
      the text of the report.

    Raises:
      ValueError: there are no outcomes of the comparison, or none of AttnRL.
    """
    methods = comparison.by_method(read_all(results / "comparison"), protocol)
    if OURS not in methods:
        raise ValueError(f"{results / 'comparison'} has no outcome of {OURS} yet")
    tuning = comparison.tuning_scores(read_all(results / "tuning"))
    parts = ["# Outcomes of the study", _answers(methods, protocol)]
    parts += ["## Methods", _methods(methods, protocol), _NOTE]
    parts += ["## By length of the problem", _by_difficulty(methods)]
    parts += ["## Learning rates", _tuning(tuning)]
    attention = results / "attention.json"
    if attention.exists():
        parts += ["## Attention", attention_tables(json.loads(attention.read_text()))]
    measured = results / "signal.json"
    if measured.exists():
        parts += ["## Signal of the gradient", signal_table(json.loads(measured.read_text()))]
    text = "\n\n".join(parts) + "\n"
    write_atomically(results / "report.md", text)
    draw(results / "study.png", methods, OURS, protocol.timed)
    return text


_NOTE = (
    "Test: 528 problems that no run has seen. In brackets 95 % bootstrap intervals over seeds and "
    "problems. `lead`: avg@8 of AttnRL less that of the method, paired, in points. "
    "`rounds`: of generation. "
    "`with advantage`: share of sampled rows that are trained on with an advantage other than 0. "
    "`trained on`: share of sampled tokens that are in an update, each counted once."
)


def _points(value: Estimate) -> str:
    """A share in points, with its interval."""
    return f"{100 * value.value:+.1f} ({100 * value.low:+.1f} to {100 * value.high:+.1f})"


def _share(value: Estimate) -> str:
    return f"{100 * value.value:.1f} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def _grpo(methods: Mapping[str, Runs]) -> list[str]:
    return [name for name in methods if name.startswith("GRPO")]


def best_grpo(methods: Mapping[str, Runs]) -> str:
    """The GRPO of the higher avg@8."""
    return max(_grpo(methods), key=lambda name: comparison.correct(methods[name]).mean())


def _answers(methods: Mapping[str, Runs], protocol: Protocol) -> str:
    """What was asked first, each in a line."""
    ours, budget = methods[OURS], protocol.budget
    lines = [f"Runs of {len(ours)} seeds, {budget:,} sampled tokens each."]
    grpo = best_grpo(methods) if _grpo(methods) else None
    if grpo:
        lines.append(
            f"- {OURS} less {grpo}, avg@8 at the end: "
            f"{_points(comparison.lead(ours, methods[grpo]))} points"
        )
    if TREE in methods:
        over_tree = _points(comparison.lead(ours, methods[TREE]))
        lines.append(f"- {OURS} less {TREE}, avg@8 at the end: {over_tree} points")
    most = min(comparison.last(runs, "trained_tokens") for runs in methods.values())
    for name in (grpo, TREE):
        if name in methods:
            theirs = methods[name]
            axes: tuple[tuple[Axis, float], ...] = (
                ("sampled_tokens", budget / 2),
                ("sampled_tokens", budget),
                ("trained_tokens", most),
            )
            for axis, place in axes:
                at = comparison.lead_at(ours, theirs, axis, place)
                lines.append(
                    f"- {OURS} less {name} at {place:,.0f} {axis.replace('_', ' ')}, on the "
                    f"held-out problems: {_points(at)} points"
                )
            if ON_POLICY in methods:
                at = comparison.lead_at(methods[ON_POLICY], theirs, "sampled_tokens", budget / 2)
                lines.append(
                    f"- {ON_POLICY} less {name} at {budget / 2:,.0f} sampled tokens, on the "
                    f"held-out problems: {_points(at)} points"
                )
            reached = comparison.tokens_to_reach(ours, theirs, budget)
            lines.append(f"- {OURS} reaches the final accuracy of {name} with {_reach(reached)}")
    if ON_POLICY in methods:
        two = methods[ON_POLICY]
        for name in (grpo, TREE, RANDOM):
            if name in methods:
                over = _points(comparison.lead(two, methods[name]))
                lines.append(f"- {ON_POLICY} less {name}, avg@8 at the end: {over} points")
        clock = ""
        if protocol.timed:
            seconds = comparison.seconds_ratio(ours, two)
            clock = (
                f"{seconds.value:.2f} ({seconds.low:.2f} to {seconds.high:.2f}) times the wall "
                "clock a sampled token, "
            )
        lines.append(
            f"- one step off-policy over two rounds: {clock}avg@8 "
            f"{_points(comparison.lead(ours, two))} points"
        )
    return "\n".join([lines[0], "", *lines[1:]])


def _reach(share: Estimate) -> str:
    low, value, high = (
        "more than 100" if np.isinf(x) else f"{100 * x:.0f}"
        for x in (share.low, share.value, share.high)
    )
    return f"{value} ({low} to {high}) % of the sampled tokens"


def _methods(methods: Mapping[str, Runs], protocol: Protocol) -> str:
    rows = [["method", "rate", "seeds", "greedy", "avg@8", "lead", "sampled k", "trained k",
             "seconds", "rounds", "with advantage", "trained on"]]  # fmt: skip
    for name, runs in methods.items():
        ends = [run.curve[-1] for run in runs.values()]
        rates = {run.learning_rate for run in runs.values()}
        rows.append(
            [
                name,
                ", ".join(f"{rate:g}" for rate in sorted(rates)),
                str(len(runs)),
                _share(bootstrap.interval(comparison.correct(runs, greedy=True))),
                _share(bootstrap.interval(comparison.correct(runs))),
                "" if name == OURS else _points(comparison.lead(methods[OURS], runs)),
                f"{np.mean([end.sampled_tokens for end in ends]) / 1000:.0f}",
                f"{np.mean([end.trained_tokens for end in ends]) / 1000:.0f}",
                f"{np.mean([end.seconds for end in ends]):.0f}" if protocol.timed else "",
                f"{comparison.rounds(runs, protocol.methods[name]):.0f}",
                f"{100 * comparison.rows_with_advantage(runs):.0f} %",
                f"{100 * comparison.trained_on(runs):.0f} %",
            ]
        )
    return table(rows)


def _by_difficulty(methods: Mapping[str, Runs]) -> str:
    heading = [f"avg@8, {low} to {high} operations" for low, high in DIFFICULTIES]
    rows = [["method", *heading]]
    for name, runs in methods.items():
        values = comparison.correct(runs)
        parts = [comparison.of_difficulty(values, low, high) for low, high in DIFFICULTIES]
        rows.append([name, *(_share(bootstrap.interval(part)) for part in parts)])
    return table(rows)


def _tuning(tuning: Mapping[str, Mapping[float, Sequence[float]]]) -> str:
    rates = sorted({rate for scores in tuning.values() for rate in scores})
    rows = [["method", *(f"{rate:g}" for rate in rates)]]
    for name, scores in tuning.items():
        best = comparison.best_rate(scores)
        cells = [
            ", ".join(f"{100 * score:.1f}" for score in scores.get(rate, ())) + "*" * (rate == best)
            for rate in rates
        ]
        rows.append([name, *cells])
    return (
        table(rows)
        + "\n\nHeld-out accuracy, mean of the last two evaluations, of each tuning seed; "
        "* is the rate that was chosen."
    )


def signal_table(found: Mapping[str, Mapping]) -> str:
    """Of each policy and method, how far the method's gradients point uphill.

    Args:
      found: of `signal.json`.
    """
    rows = [["policy", "method", "steps", "tokens a step", "cosine", "signal of 10,000 tokens"]]
    for policy, methods in found.items():
        for name, of in methods.items():
            cosine, tokens = np.array(of["cosine"]), np.array(of["tokens"])
            measured = signal(cosine, tokens)
            rows.append(
                [
                    policy,
                    name,
                    str(len(cosine)),
                    f"{tokens.mean():,.0f}",
                    f"{cosine.mean():.3f}",
                    f"{measured.value:.3f} ({measured.low:.3f} to {measured.high:.3f})",
                ]
            )
    return table(rows, left=2)


def attention_tables(found: Mapping[str, Mapping]) -> str:
    """The three questions about attention, a table for each.

    Args:
      found: of `attention.json`: answers by policy.
    """
    return "\n\n".join(
        [
            _question(found, "picked", "1. Share of the steps picked that are of a kind, %", 100),
            _question(found, "decided", "2. Change of the value over the steps picked", 1),
            _question(found, "causal", "3. Fall of accuracy, points", 100),
        ]
    )


def _question(found: Mapping[str, Mapping], name: str, title: str, scale: float) -> str:
    rows: list[list[str]] = []
    heading: Sequence[str] = ()
    for policy, answers in found.items():
        for row, cells in answers[name].items():
            heading = [*cells]
            shown = [
                "{:.2f} ({:.2f} to {:.2f})".format(*(scale * x for x in cell))
                if scale == 1
                else "{:.1f} ({:.1f} to {:.1f})".format(*(scale * x for x in cell))
                for cell in cells.values()
            ]
            rows.append([policy, row, *shown])
    return f"{title}\n\n{table([['policy', '', *heading], *rows], left=2)}"
