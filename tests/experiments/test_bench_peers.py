"""The peers of the benchmarks: their environment, and their processes driven line by line."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from experiments.bench import processes, venv
from experiments.bench.harness import Context
from experiments.bench.processes import Peer, PeerError
from experiments.bench.venv import STAMP, VenvError, peers_python


def test_the_environment_is_kept_until_requirements_change(tmp_path, monkeypatch):
    """Without packages, so that nothing is downloaded."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    requirements, folder, said = tmp_path / "requirements.txt", tmp_path / "peers", []
    requirements.write_text("# nothing\n")

    def python():
        return peers_python(folder, "", said.append, requirements)

    made = python()
    assert made == folder / "bin" / "python"
    assert made.exists()
    (folder / "marker").touch()
    said.clear()
    assert python() == made
    assert said == []
    assert (folder / "marker").exists()

    requirements.write_text("# something else\nno-such-package==1\n")
    with pytest.raises(VenvError, match="no-such-package"):
        python()
    assert not (folder / "marker").exists()
    assert any("other requirements" in line for line in said)
    # An environment that was not finished is none.
    assert json.loads((folder / STAMP).read_text()) == {}


def test_no_folder_of_others_is_removed(tmp_path):
    (tmp_path / "pyvenv.cfg").touch()
    with pytest.raises(VenvError, match="holds something else"):
        peers_python(tmp_path, "", print)
    assert (tmp_path / "pyvenv.cfg").exists()


def test_requirements_are_pinned():
    lines = venv.REQUIREMENTS.read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert {"google-tunix==0.1.7", "torch==2.13.0"} < set(pins)
    assert all("==" in pin for pin in pins)


ECHO = """
import sys
sys.path.insert(0, {folder!r})
from protocol import serve

def say(text):
    print("noise of a library")
    return {{"text": text * 2}}

def fail():
    raise KeyError("gone")

def end():
    print("last words", file=sys.stderr)
    raise SystemExit(3)

serve({{"say": say, "fail": fail, "end": end}})
"""


def test_a_peer_answers_line_by_line(tmp_path, monkeypatch):
    script = ECHO.format(folder=str(processes.SCRIPTS))
    (tmp_path / "echo.py").write_text(script)
    monkeypatch.setattr(processes, "SCRIPTS", tmp_path)
    with Peer(Path(sys.executable), "echo", tmp_path / "log", 1) as peer:
        assert peer.ask("say", text="ab") == {"text": "abab"}
        with pytest.raises(PeerError, match="KeyError: 'gone'"):
            peer.ask("fail")
        # A failure is one of the command, not of the process.
        assert peer.ask("say", text="") == {"text": ""}
        assert not peer.ended
        with pytest.raises(PeerError, match=r"exit code 3: .*last words"):
            peer.ask("end")
        with pytest.raises(PeerError, match="exit code 3"):
            peer.ask("say", text="x")
        assert peer.ended
    assert "noise of a library" in (tmp_path / "log").read_text()


def test_peers_are_on_the_cpu(tmp_path):
    with ExitStack() as closing:
        context = Context(tmp_path, 1, "cuda", tmp_path / "peers", "", print, closing)
        with pytest.raises(ValueError, match="--platform=cuda"):
            context.peer("tunix_rollouts")
    assert not (tmp_path / "peers").exists()


def test_flags_of_xla_would_hold_for_ours_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    with pytest.raises(ValueError, match="XLA_FLAGS is set to '--xla_cpu_enable_fast_math=true'"):
        processes.check_environment()
    monkeypatch.delenv("XLA_FLAGS")
    processes.check_environment()
