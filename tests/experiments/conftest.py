"""Runs that several tests look at."""

from __future__ import annotations

import pytest

from experiments.configs import attnrl_graph
from tests.experiments.runs import execute, small


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder and history of an uninterrupted run of the default configuration."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, execute(small(attnrl_graph.get_config()), folder)
