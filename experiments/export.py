"""Writes the policy of a run as a Hugging Face folder.

    python -m experiments.export --workdir=runs/mine --out=DIR
    python -m experiments.export --workdir=runs/mine --step=100 --out=DIR

The folder has the tensors (names, shapes, dtypes, division into files), the configuration and the
tokenizer of the folder that the run started from; only the values are the run's. It may be given
to `experiments.run` or `experiments.evaluate`, and to transformers. A run under way may be
exported: nothing of it is changed, and only the CPU is used.
"""

from __future__ import annotations

import argparse
import functools
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from absl import logging

from attnrl_jax.datasets.hub import model_folder
from attnrl_jax.models.config import ModelConfig, read_config
from attnrl_jax.models.transformer import init_params
from attnrl_jax.models.weights import check_free, save_folder
from attnrl_jax.training.checkpoint import Checkpointer
from experiments import commands
from experiments.terminal import make_console, working


class ExportError(ValueError):
    """A run that cannot be exported as asked."""


def export(
    workdir: str | Path,
    out: str | Path,
    step: int | str | None = None,
    source: str | Path | None = None,
) -> int:
    """Writes the parameters of a run after a step as a folder like the one it started from.

    Parameters are rounded to the dtypes of that folder, and refused where that would make one
    infinite. The host holds them once in float32; the
    optimizer's state is not read.

    Args:
      workdir: run folder.
      out: folder to make; must not exist or be empty (and not the present one).
      step: one whose checkpoint is there, or `best`: that of the highest held-out accuracy; by
        default the newest.
      source: folder that the run started from, where it is no longer at `model.path`.

    Returns:
      the step.

    Raises:
      ExportError: no such run, step or source folder.
      CheckpointError: the checkpoint is damaged, or of another model than the source folder's.
      ModelError: `out` holds files or cannot be replaced, the source folder cannot be used, or a
        parameter does not fit its dtype there.
    """
    workdir = Path(workdir)
    check_free(out)
    folder = source_folder(workdir, source)
    model = read_config(folder)
    with closing(Checkpointer(workdir / "checkpoints", read_only=True)) as checkpointer:
        steps = checkpointer.steps()
        if not steps:
            raise ExportError(f"{workdir} has no checkpoint yet")
        if step is None:
            step = steps[-1]
        if step == "best":
            step = checkpointer.best_step()
            if step is None:
                raise ExportError(f"no checkpoint of {workdir} is of a step that was evaluated")
        if step not in steps:
            there = ", ".join(map(str, steps))
            raise ExportError(f"{workdir} has no checkpoint of step {step}; there are: {there}")
        params = checkpointer.restore_params(step, parameter_shapes(model))
    save_folder(out, params, model, source=folder)
    return step


def source_folder(workdir: Path, source: str | Path | None) -> Path:
    """The folder a run started from."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ExportError(f"{workdir} is no run folder: it has no config.json")
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["model"]["path"]
        if not isinstance(named, str):
            raise TypeError(f"model.path is {named!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is not the configuration of a run: {error!r}") from error
    if source is not None:
        if not Path(source).is_dir():
            raise ExportError(f"--source: there is no folder {source}")
        return Path(source)
    if not named:
        from experiments.tasks import shipped_policy

        return shipped_policy()
    folder = model_folder(named)
    if not folder.is_dir():
        raise ExportError(
            f"the run started from {named}, which is not there (relative paths count from the "
            "present folder); --source=DIR names it, or a copy"
        )
    return folder


def parameter_shapes(model: ModelConfig) -> Any:
    """The parameters' tree without their values."""
    return jax.eval_shape(functools.partial(init_params, model), jax.eval_shape(jax.random.key, 0))


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number or best; got {text!r}")
    return text if text == "best" else int(text)


def main(arguments: argparse.Namespace) -> None:
    console = make_console(arguments.quiet, stderr=True)
    with working(console, f"reading {arguments.workdir}, writing {arguments.out}", only_live=True):
        step = export(arguments.workdir, arguments.out, arguments.step, arguments.source)
    print(f"the policy after step {step} is in {arguments.out}")


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = commands.parser(__doc__, "export")
    parser.add_argument("--workdir", required=True, metavar="RUN", help="run folder")
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N",
        help="step to export, or `best`: the checkpoint of the highest held-out accuracy (default: "
        "the newest checkpoint)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--source",
        metavar="DIR",
        help="folder that the run started from, where it has moved since",
    )
    arguments = parser.parse_args(argv)
    # Orbax warns of what is meant here, such as a folder that is only read.
    logging.set_verbosity(logging.ERROR)
    # The accelerator may be at work for the run.
    jax.config.update("jax_platforms", "cpu")
    commands.guarded(main, arguments, "nothing was written; give the same command again")


if __name__ == "__main__":
    command()
