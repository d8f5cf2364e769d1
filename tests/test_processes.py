"""Several processes: what they exchange, and runs that equal those of one process."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from attnrl_jax import processes
from tests.exchange import some_gradients
from tests.two_processes import SMALL_RUN, run_processes, start_processes

RUN = (
    "-m", *SMALL_RUN, "--config.steps=3", "--config.num_problems=4", "--config.eval_every=0",
    "--config.checkpoint_every=1",
)  # fmt: skip
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
OTHER_MESH = ("--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.mesh.sampling_tensor=2")


def metrics_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("seconds/", "process/"))}
        for line in lines
    ]


def same_metrics(ours, expected):
    assert len(ours) == len(expected)
    for own, other in zip(ours, expected, strict=True):
        assert own.keys() == other.keys()
        for name, value in own.items():
            # Packing follows the number of devices, everything else the seeds alone.
            if name not in ("update/padding", "update/sharing"):
                assert value == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    run_processes([*RUN, *MESH, f"--workdir={folder}"], 1, 8, folder.parent / "logs")
    return folder


def test_two_processes_exchange_what_they_know(tmp_path):
    """What the processes assert is in tests/exchange.py; their gradients are those of one."""
    folder = tmp_path / "shared"
    folder.mkdir()
    command = ["-m", "tests.exchange", f"--folder={folder}"]
    assert all("exchanged" in text for text in run_processes(command, 2, 4, tmp_path))
    expected = some_gradients()
    with np.load(folder / "gradients.npz") as found:
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert np.abs(value).max() > 0 or "clip" in name or "kl" in name, name
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_as_one_on_another_mesh(one_process, tmp_path):
    """The same tokens, rewards, trees and updates; the last step is done by one process."""
    folder = tmp_path / "run"
    command = [*RUN, f"--workdir={folder}"]
    said = run_processes([*command, *MESH, "--config.steps=2"], 2, 4, tmp_path / "logs")
    assert ["run folder" in text for text in said] == [True, False]
    expected, found = metrics_of(one_process), metrics_of(folder)
    same_metrics(found[:2], expected[:2])
    # The last step of a run is evaluated too.
    same_metrics([{k: found[2][k] for k in expected[2]}], expected[2:3])
    for step in (1, 2):
        name = f"trees/step_{step:06}.json"
        assert json.loads((folder / name).read_text()) == json.loads(
            (one_process / name).read_text()
        )
    run_processes([*command, *OTHER_MESH], 1, 8, tmp_path / "again")
    same_metrics(metrics_of(folder)[3:], expected[3:])


@pytest.mark.slow
def test_processes_whose_devices_are_split_equal_one(tmp_path):
    """Some devices of each sample while the others update."""
    split = ("--config.overlap=all", "--config.mesh.data=2", "--config.mesh.tensor=2")
    folders = []
    for number in (1, 2):
        folders.append(tmp_path / str(number) / "run")
        run_processes(
            [*RUN, *split, "--config.steps=2", f"--workdir={folders[-1]}",
             f"--config.mesh.sampling_devices={4 // number}"],
            number, 8 // number, folders[-1].parent / "logs",
        )  # fmt: skip
    same_metrics(*map(metrics_of, folders[::-1]))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others(tmp_path, killed):
    folder = tmp_path / "run"
    command = [*RUN, *MESH, "--config.steps=1000", f"--workdir={folder}", "--process_timeout=10"]
    started = start_processes(command, 2, 4, tmp_path / "logs")
    try:
        until = time.monotonic() + 240
        while not (folder / "metrics.jsonl").exists() or len(metrics_of(folder)) < 3:
            assert started[0].poll() is None, (tmp_path / "logs" / "0.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.2)
        started[killed].kill()
        assert started[1 - killed].wait(timeout=120) != 0
    finally:
        for process in started:
            process.kill()
    assert "error" in (tmp_path / "logs" / f"{1 - killed}.log").read_text().lower()
    # What it has written is whole: another number of processes goes on from there.
    saved = int(metrics_of(folder)[-1]["step"])
    [said] = run_processes(
        [*RUN, *MESH, f"--workdir={folder}", f"--config.steps={saved + 1}"], 1, 8,
        tmp_path / "again",
    )  # fmt: skip
    assert "continuing after step" in said
    assert [m["step"] for m in metrics_of(folder)] == [*range(saved + 2)]


def test_one_process_is_the_plain_thing():
    assert processes.share(3).all()
    x = np.arange(3)
    assert processes.total(x) is x
    assert processes.from_first("a") == "a"
    processes.check_agreement("nothing", object)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", None, None), "given together"),
        ((None, 2, None), "given together"),
        (("localhost:1", 2, 2), r"within 0 \.\. 1; got 2"),
        (("localhost:1", 0, 0), "at least 1; got 0"),
        (("localhost", 2, 0), "address:port; got 'localhost'"),
        (("localhost:99999", 2, 0), "address:port; got 'localhost:99999'"),
        ((None, None, None, 0), "at least a second: 0"),
    ],
)
def test_flags_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        processes.connect(*given)
