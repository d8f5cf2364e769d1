"""The README's code blocks run as they are printed, and its commands are the real ones."""

from __future__ import annotations

from tests.documents import ROOT, blocks, run_blocks

README = ROOT / "README.md"


def test_library_blocks_run_in_order():
    namespace, printed = run_blocks(README)
    assert "\\boxed{" in printed
    assert "branch at response tokens [" in printed
    assert namespace["verdicts"].rewards.tolist() == [1.0]
    # V_root = 2/3, V(shared) = 2/3 over three leaves, V(tails) = 0, 1, 1.
    advantages = namespace["segment_advantages"](namespace["segments"])
    assert abs(advantages[0, 1] - (-4 / 3)) < 1e-6
    assert abs(advantages[1, 1] - 2 / 3) < 1e-6
    assert abs(advantages[0, 0]) < 1e-6


def test_two_commands_set_everything_up():
    set_up = [block.strip() for block in blocks(README, "bash") if "-m venv" in block]
    assert len(set_up) == 2
    run, test = set_up
    for command, requirements, module in (
        (run, "requirements.txt", "experiments.run"),
        (test, "requirements-test.txt", "tests"),
    ):
        assert f"-r {requirements}" in command
        assert (ROOT / requirements).is_file()
        assert command.endswith(f"python -m {module}")
    # CI runs the second, in a virtual environment of its own.
    script = (ROOT / ".ci" / "run").read_text()
    assert "install --quiet --disable-pip-version-check -r requirements-test.txt" in script
    assert '"$venv/bin/python" -m tests' in script


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README.read_text()
