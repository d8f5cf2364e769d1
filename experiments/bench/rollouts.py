"""Rollouts: useful tokens per second, that is, tokens up to each row's own end.

A: groups of samples with a long tail. B: equal lengths. C: AttnRL's joint round of new responses
and branches of earlier ones. Every contender samples at temperature 1 from the full distribution
and ends each row at the length that the workload gives it: ours by budget, the peers by cutting a
batch at its longest row. Peers get no more than that: they return tokens, ours also returns the
behaviour log-probability of each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from experiments.bench import ours
from experiments.bench.common import checked_peer, common_folder
from experiments.bench.harness import (
    Contender,
    Context,
    Fact,
    Measured,
    Part,
    Ratio,
    Runs,
    fastest,
)
from experiments.bench.processes import Peer
from experiments.bench.workloads import (
    SLOTS,
    Rollouts,
    static_slot_steps,
    workload_a,
    workload_b,
    workload_c,
)

UNIT = "useful tokens/s"
# What static batching may choose from; only an oracle sorts by lengths not yet sampled.
STATIC_ORDERS = ("response", "total")
STATIC_PREFILL_ROWS = (4, 8, 16)
PEERS = {"Tunix": "tunix_rollouts", "transformers": "transformers_rollouts"}


def part_a(context: Context) -> Part:
    """24 prompts of 64 tokens, 8 samples each: lengths with a long tail."""
    title = "A: 24 prompts of 64 x 8 samples, lengths lognormal (median 64, sigma 1, to 256)"
    return against_peers(context, "a", title, workload_a(), at_least=3.0)


def part_b(context: Context) -> Part:
    """32 prompts of 64 tokens, one response of 256 each."""
    title = "B: 32 prompts of 64 x 1, all 256 tokens"
    return against_peers(context, "b", title, workload_b(), at_least=1.0)


def part_c(context: Context) -> Part:
    """The joint round, against the best static batching of the same model code."""
    workload = workload_c()
    model = ours.load(common_folder(context))
    longest_prefix_first = np.argsort([-len(prefix) for prefix in workload.prefixes], kind="stable")
    by_prefix = workload.lengths[longest_prefix_first]

    return Part(
        title="C: 16 problems x 6 responses (median 128, sigma 0.7, to 512) and 4 branches of each "
        "of 48 earlier responses",
        unit=UNIT,
        contenders=[sampler(model, workload), static_batches(model, workload)],
        ratios=[Ratio("ours", ("static batches",), at_least=2.0)],
        facts=lambda runs: [
            *slot_facts(runs, workload),
            Fact(
                "slot-steps that static batches sorted by prefix, all they can know, lose",
                1 - workload.lengths.sum() / static_slot_steps(by_prefix, SLOTS),
            ),
        ],
    )


def against_peers(
    context: Context, name: str, title: str, workload: Rollouts, at_least: float
) -> Part:
    """A workload of equal prompt lengths, for ours and both peers."""
    model = ours.load(common_folder(context))
    file = context.folder / f"workload_{name}.npz"
    np.savez(file, prompts=np.stack(workload.prefixes), lengths=workload.lengths)
    peers = [
        peer_contender(label, checked_peer(context, script, model), str(file))
        for label, script in PEERS.items()
    ]
    return Part(
        title=title,
        unit=UNIT,
        contenders=[sampler(model, workload), *peers],
        ratios=[
            Ratio("ours", tuple(PEERS), at_least=at_least),
            *[Ratio("ours", (label,)) for label in PEERS],
        ],
        facts=lambda runs: [
            *slot_facts(runs, workload),
            Fact(
                "slot-steps that static batches in the order given lose",
                1 - workload.lengths.sum() / static_slot_steps(workload.lengths, SLOTS),
            ),
        ],
    )


def sampler(model: ours.Model, workload: Rollouts) -> Contender:
    """Our sampler on all rows of a workload."""
    config = ours.sampler_config(workload, SLOTS)

    def run() -> Measured:
        return ours.sample_rows(model, workload, config)

    def warm_up() -> str:
        run()
        return f"{model.config.dtype}, {config}"

    return Contender("ours", run, warm_up)


def static_batches(model: ours.Model, workload: Rollouts) -> Contender:
    """The best static batching of our model code; the warm-up finds it."""
    chosen: list[ours.StaticBatches] = []

    def seconds(config: ours.StaticBatches, most_steps: int | None = None) -> float:
        return ours.sample_static(model, workload, config, most_steps).seconds

    def warm_up() -> str:
        candidates, tried = [], []
        for order in STATIC_ORDERS:
            sizes = [ours.StaticBatches(SLOTS, size, order) for size in STATIC_PREFILL_ROWS]
            # Sizes differ in their prefills alone, so that one decode step of each batch will do.
            best, taken = fastest(sizes, lambda config: seconds(config, most_steps=1))
            candidates.append(best)
            shown = ", ".join(f"{config.prefill_rows}: {s:.2g} s" for config, s in taken.items())
            tried.append(f"prefilled at a time, by {order}: {shown}")
        best, taken = fastest(candidates, seconds)
        chosen[:] = [best]
        shown = ", ".join(f"{config.order} {s:.3g} s" for config, s in taken.items())
        return (
            f"same model code, batches of {SLOTS} to their longest, attention over the filled part "
            f"of the cache, every prefix prefilled on its own; the fastest found: rows sorted by "
            f"length of {best.order} (all rows: {shown}), {best.prefill_rows} prefixes of like "
            f"width at a time ({'; '.join(tried)}; least of 2 timings in turn)"
        )

    return Contender(
        "static batches", lambda: ours.sample_static(model, workload, chosen[0]), warm_up
    )


def peer_contender(label: str, peer: Peer, workload: str) -> Contender:
    """A peer on a workload file."""
    return Contender(label, runs_of(peer), lambda: _prepared(peer, workload))


def _prepared(peer: Peer, workload: str) -> str:
    return str(peer.ask("prepare", workload=workload, batch=SLOTS)["settings"])


def runs_of(peer: Peer) -> Callable[[], Measured]:
    """The command `run` of a peer."""

    def run() -> Measured:
        answer = peer.ask("run")
        return Measured(answer["seconds"], answer["amount"], answer.get("detail", {}))

    return run


def slot_facts(runs: Runs, workload: Rollouts) -> list[Fact]:
    """What the slots of our own contenders were used for."""
    useful = float(workload.lengths.sum())
    facts = []
    for name, measured in runs.items():
        detail = measured[0].detail if measured else {}
        if "slot_steps" in detail:
            lost = 1 - useful / detail["slot_steps"]
            facts += [
                Fact(f"{name}: slot-steps lost", lost),
                Fact(f"{name}: tokens prefilled", detail["prefill_tokens"]),
            ]
        if "prefill_places" in detail:
            facts.append(Fact(f"{name}: places prefilled, with padding", detail["prefill_places"]))
    return facts


PARTS = {"A": part_a, "B": part_b, "C": part_c}
