"""What benchmarks on the common model share: its folder, and that it is one model everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.bench import ours
from experiments.bench.harness import Context
from experiments.bench.model import write_model
from experiments.bench.processes import Peer
from experiments.bench.workloads import random_tokens

# Float32 sums in another order.
TOLERANCE = 1e-3


def common_folder(context: Context) -> Path:
    """The Hugging Face folder of the common model, written once a command."""
    folder = context.folder / "model"
    return folder if folder.exists() else write_model(folder)


def checked_peer(context: Context, script: str, model: ours.Model) -> Peer:
    """A peer with the common model, which gives the logits that ours gives.

    Raises:
      ValueError: its logits differ by more than `TOLERANCE`.
    """
    answer, checked = context.folder / f"{script}.npy", context.folder / f"{script}.checked"
    peer = context.peer(script, folder=str(common_folder(context)))
    if checked.exists():
        return peer
    given = context.folder / "tokens.npy"
    tokens = random_tokens(np.random.default_rng(1), 48)
    np.save(given, tokens)
    peer.ask("logits", tokens=str(given), out=str(answer))
    expected, found = ours.logits(model, tokens), np.load(answer)
    difference = float(np.abs(expected - found).max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{script} computes another model: its logits differ by {difference:.2g} from ours, "
            f"allowed are {TOLERANCE:g}"
        )
    note = (
        f"Checked: `{script}` loads the folder that we write and gives our logits, largest "
        f"difference {difference:.1e} of logits up to {float(np.abs(expected).max()):.1f}."
    )
    checked.touch()
    context.say(note)
    context.notes.append(note)
    return peer
