"""Metrics in Weights & Biases, offline, read back from the file that it writes."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from experiments.configs import attnrl_graph
from experiments.records import METRICS_FILE, read_metrics
from experiments.run import run
from experiments.run_folder import FREE_TO_CHANGE
from experiments.settings import SettingError, build
from experiments.weights_and_biases import ID_FILE, WeightsAndBiases
from tests.experiments.runs import small
from tests.test_readme import ROOT

# Of wandb's file of an offline run: a header, then LevelDB's log of blocks.
HEADER, BLOCK, RECORD = 7, 32768, struct.Struct("<IHB")


def logged(data: bytes) -> Iterator[bytes]:
    """The entries of a LevelDB log: whole (1), or begun (2), gone on with (3) and ended (4)."""
    place, entry = HEADER, b""
    while place + RECORD.size <= len(data):
        if BLOCK - place % BLOCK < RECORD.size:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = RECORD.unpack_from(data, place)
        place += RECORD.size
        entry += data[place : place + length]
        place += length
        if kind in (1, 4):
            yield entry
            entry = b""


def read_back(folder: Path) -> tuple[list[str], dict[str, object], list[dict[str, float]]]:
    """Ids and projects of the runs, the settings of the last, and the metrics of every step."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs, settings, steps = [], {}, []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for entry in logged(path.read_bytes()):
            record = Record.FromString(entry)
            if record.HasField("run"):
                runs.append(f"{record.run.project}/{record.run.run_id}")
                for item in record.run.config.update:
                    name = item.key or ".".join(item.nested_key)
                    settings[name] = json.loads(item.value_json)
            if record.HasField("history"):
                values = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                steps.append({k: v for k, v in values.items() if not k.startswith("_")})
                assert record.history.step.num == values["step"]
    return runs, settings, steps


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def config_of(steps: int, project: str = "attnrl"):
    config = small(attnrl_graph.get_config(), steps)
    config.eval_every = 0
    config.logging.wandb = project
    return config


def execute(config, folder: Path) -> str:
    said = io.StringIO()
    run(config, folder, Console(file=said, width=1000))
    return said.getvalue()


def test_a_run_and_its_continuation_are_one_run_there(tmp_path, offline):
    folder = tmp_path / "run"
    assert "warning" not in execute(config_of(1), folder)
    assert "warning" not in execute(config_of(2), folder)
    runs, settings, steps = read_back(folder)
    [kept] = json.loads((folder / ID_FILE).read_text()).values()
    # wandb tells of a run more than once.
    assert set(runs) == {f"attnrl/{kept}"}
    assert settings["method"] == "attnrl"
    assert settings["sampler.slots"] == 32
    assert settings["steps"] == 2
    written = read_metrics(folder / METRICS_FILE)
    assert [m["step"] for m in written] == [0, 1, 2]
    assert steps == written


def test_a_failure_costs_no_step(tmp_path, offline):
    """A file stands where wandb's folder is to be."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ID_FILE).mkdir()
    warnings = []
    tracker = WeightsAndBiases("attnrl", folder, {}, warnings.append)
    tracker.write({"step": 0})
    tracker.close()
    [said] = warnings
    assert said.startswith("Weights & Biases is left out (IsADirectoryError: ")


def test_a_run_that_is_gone_is_given_up_once(tmp_path, offline):
    warnings = []
    tracker = WeightsAndBiases("attnrl", tmp_path, {}, warnings.append)
    tracker.write({"step": 0, "a/b": 1.0})
    # As when its service was killed: wandb refuses what comes after the end.
    tracker._run.finish()
    tracker.write({"step": 1})
    tracker.write({"step": 2})
    tracker.close()
    [said] = warnings
    assert said.startswith("Weights & Biases is left out (")


@pytest.mark.parametrize("project", ["a/b", "x" * 129, "a:b"])
def test_names_that_are_no_project(project):
    with pytest.raises(SettingError, match="logging: wandb must be the name of a project"):
        build(config_of(1, project))


def test_it_may_be_asked_for_later():
    assert "logging.wandb" in FREE_TO_CHANGE


@pytest.mark.parametrize("project", ["", "attnrl"])
def test_it_is_only_needed_where_it_is_asked_for(tmp_path, project):
    """Without wandb, but with a folder of the name, as wandb leaves one where it ran."""
    (tmp_path / "wandb").mkdir()
    code = f"""
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "wandb":
            from importlib.machinery import ModuleSpec
            spec = ModuleSpec("wandb", None, is_package=True)
            spec.submodule_search_locations = [{str(tmp_path / "wandb")!r}]
            return spec
sys.meta_path.insert(0, Missing())
from experiments.weights_and_biases import check_installed
import experiments.run
check_installed({project!r})
assert "wandb" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == bool(project), done.stderr
    if project:
        assert "SettingError: logging.wandb is 'attnrl', but wandb is not installed" in done.stderr
