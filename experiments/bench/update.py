"""The policy-gradient update: response tokens per second.

One optimizer update, behaviour log-probabilities given, no penalty towards a reference. Numbers in
the rows are random: no cost depends on them. No layer is computed twice (`remat` "none"; nor does
Tunix). Part A: workload A's rows (8 responses to a prompt), against Tunix's GRPO update; by default
we lay out once what rows share, here the prompts. The other parts: AttnRL's rows (6 responses, 2
branch positions, 2 continuations of each), trees laid out once against the same rows packed one by
one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnrl_jax.training.state import TrainConfig
from experiments.bench import ours
from experiments.bench.branches import EARLY, THIRDS, branched_rows, sharing
from experiments.bench.common import checked_peer, common_folder
from experiments.bench.harness import Contender, Context, Fact, Measured, Part, Ratio, Runs
from experiments.bench.rollouts import runs_of
from experiments.bench.workloads import PROMPT, Rollouts, random_tokens, workload_a

MICRO_SIZES = (4, 8, 16, 32)
LEARNING_RATE = 1e-6


def random_rows(workload: Rollouts, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of a workload of equal prompt lengths with random responses.

    Returns:
      `prompts` `[row, 64]` and `responses` `[row, longest]`, int32, responses padded with 0;
      `lengths`, `advantages` `[row]`; `behaviour` `[row, longest]`, nats.
    """
    rng = np.random.default_rng((seed, 3))
    width = workload.total - PROMPT
    count = len(workload.lengths)
    inside = np.arange(width)[None] < workload.lengths[:, None]
    return {
        "prompts": np.stack(workload.prefixes),
        "responses": np.where(inside, random_tokens(rng, count, width), 0),
        "lengths": workload.lengths,
        "advantages": rng.standard_normal(count).astype(np.float32),
        "behaviour": rng.uniform(-11, -8, (count, width)).astype(np.float32) * inside,
    }


def part_a(context: Context) -> Part:
    """All rows of workload A, against Tunix."""
    workload = workload_a()
    rows = random_rows(workload)
    file = context.folder / "rows.npz"
    np.savez(file, **rows)
    model = ours.load(common_folder(context))
    peer = checked_peer(context, "tunix_update", model)
    change = peer.ask("packing")["change"]
    context.notes.append(
        "Tunix's sequence packing is left out: with segment ids alone its Qwen2 model on a CPU "
        f"attends to later tokens (a changed last token moves the first one's logits by "
        f"{change:.1g})."
    )
    train_rows = ours.train_rows(
        workload,
        np.concatenate([rows["prompts"], rows["responses"]], axis=1),
        rows["advantages"],
        np.pad(rows["behaviour"], ((0, 0), (PROMPT, 0))),
    )

    def own(name: str, packing: str) -> Contender:
        def run() -> Measured:
            return ours.update_ours(model, train_rows, packing)

        def warm_up() -> str:
            run()
            return settings_of(ours.update_config(len(workload.lengths), packing))

        return Contender(name, run, warm_up)

    def warm_up_peer() -> str:
        answer = peer.ask(
            "prepare",
            rows=str(file),
            micro_sizes=list(MICRO_SIZES),
            learning_rate=LEARNING_RATE,
            num_samples=8,
        )
        return str(answer["settings"])

    return Part(
        title="Rows of workload A: 24 prompts of 64 x 8 responses, one optimizer update",
        unit="response tokens/s",
        contenders=[
            own("ours", "auto"),
            own("ours, row by row", "rows"),
            Contender("Tunix", runs_of(peer), warm_up_peer),
        ],
        ratios=[
            Ratio("ours", ("Tunix",), at_least=2.0),
            Ratio("ours, row by row", ("Tunix",)),
        ],
        facts=lambda runs: [
            padding_of(name, runs, at_most=0.1) for name in ("ours", "ours, row by row")
        ],
    )


def settings_of(config: TrainConfig) -> str:
    """Our settings, in words."""
    return (
        f"float32, remat 'none', packing={config.packing!r} into sequences of "
        f"{config.packed_length()} tokens, micro-batches of at most "
        f"{config.micro_batch_tokens}, AdamW, one optimizer update"
    )


def padding_of(name: str, runs: Runs, at_most: float | None = None) -> Fact:
    """Share of the packed tokens of a contender's micro-batches that are padding."""
    return Fact(f"padding, {name}", runs[name][0].detail["padding"], at_most=at_most)


def branches(
    title: str, positions: tuple[float, ...], longer: bool, at_least: float | None
) -> Callable[[Context], Part]:
    """A part on trees that branch at these shares of each response."""

    def part(context: Context) -> Part:
        rows = branched_rows(4, positions, longer=longer)
        model = ours.load(common_folder(context))

        def own(name: str, packing: str) -> Contender:
            def warm_up() -> str:
                ours.update_ours(model, rows, packing)
                return settings_of(ours.update_config(len(rows.tokens), packing, 512))

            return Contender(name, lambda: ours.update_ours(model, rows, packing), warm_up)

        return Part(
            title="4 problems of 6 responses x 2 branch positions x 2 continuations, "
            f"{title}: rows hold {sharing(rows.paths):.2f} times the distinct tokens",
            unit="response tokens/s",
            contenders=[own("rows", "rows"), own("trees", "tree")],
            ratios=[Ratio("trees", ("rows",), at_least=at_least)],
            facts=lambda runs: [
                Fact(
                    "tokens of the rows over tokens computed, trees",
                    runs["trees"][0].detail["sharing"],
                ),
                padding_of("rows", runs),
                padding_of("trees", runs),
            ],
        )

    return part


PARTS = {
    "A": part_a,
    "thirds": branches(
        "branches at 1/3 and 2/3, all paths as long as a response", THIRDS, False, 1.5
    ),
    "thirds_longer": branches(
        "branches at 1/3 and 2/3, continuations as long as a response", THIRDS, True, 1.5
    ),
    "early": branches(
        "branches at 1/20 and 3/20, all paths as long as a response", EARLY, False, None
    ),
    "early_longer": branches(
        "branches at 1/20 and 3/20, continuations as long as a response", EARLY, True, None
    ),
}
