"""Metrics of a run in Weights & Biases, where `logging.wandb` names a project.

wandb is not among the requirements, and is imported only here and only when it is asked for. Where
and how it sends what it is given, its own variables say: WANDB_ENTITY, WANDB_API_KEY,
WANDB_MODE=offline (written to the run folder alone; `wandb sync` sends it later).
"""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.folders import write_atomically
from experiments.records import Warn
from experiments.settings import SettingError

# Beside wandb's own folder `wandb`, which holds what is written offline.
ID_FILE = "wandb.json"
# A network that is gone must not hold up the begin or the end of a run for longer.
MOST_SECONDS = 60.0


def check_installed(project: str) -> None:
    """Makes sure that metrics can be written as asked.

    Args:
      project: of `logging.wandb`; empty for none.

    Raises:
      SettingError: wandb is not installed.
    """
    # The name is also that of a folder which wandb leaves: one without code.
    found = importlib.util.find_spec("wandb") if project else None
    if project and (found is None or found.origin is None):
        raise SettingError(
            f"logging.wandb is {project!r}, but wandb is not installed: pip install wandb, or "
            "leave the setting out"
        )


class WeightsAndBiases:
    """A run there, which is the same one whenever the run goes on. Failures cost no step: what
    cannot be sent is left out with a warning.

    Args:
      project: in which the run is shown.
      folder: of the run; keeps its id.
      settings: of the run, by dotted name.
      warn: told of the failure after which nothing more is written.
    """

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any], warn: Warn):
        self._warn, self._run = warn, None
        try:
            import wandb

            self._run = wandb.init(
                project=project,
                id=_kept_id(folder, project),
                # Of a run that was deleted there: made anew.
                resume="allow",
                name=folder.name,
                dir=folder,
                config=dict(settings),
                # Settings that may change between two starts do.
                allow_val_change=True,
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=MOST_SECONDS,
                    login_timeout=MOST_SECONDS,
                    finish_timeout=MOST_SECONDS,
                ),
            )
        # Whatever a library of services and networks may raise.
        except Exception as error:
            self._give_up(error)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of a step; the step is the horizontal axis there. Those of steps that a
        run does again are there already, and stay."""
        if self._run is None:
            return
        try:
            self._run.log(dict(metrics), step=int(metrics["step"]))
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Waits until all is sent, though not for ever."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        said = " ".join(str(error).split())
        self._warn(f"Weights & Biases is left out ({type(error).__name__}: {said})")


def _kept_id(folder: Path, project: str) -> str:
    """The run's id in a project; made, and kept in the run folder, the first time."""
    path = folder / ID_FILE
    ids = json.loads(path.read_text()) if path.exists() else {}
    if project not in ids:
        ids[project] = uuid.uuid4().hex[:12]
        write_atomically(path, json.dumps(ids) + "\n")
    return ids[project]
