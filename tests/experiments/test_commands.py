"""How commands end when something goes wrong."""

from __future__ import annotations

import pytest

from attnrl_jax.processes import ProcessError
from experiments.commands import stop


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("no such setting"), 2, "error: no such setting\n"),
        (FileNotFoundError("no file"), 2, "error: no file\n"),
        (ProcessError("one died"), 1, "error: one died\n"),
        (RuntimeError("a bug"), 1, "error: RuntimeError: a bug (--debug shows the traceback)\n"),
    ],
)
def test_what_was_given_is_told_from_what_may_work_again(error, code, message, capsys):
    with pytest.raises(SystemExit) as ended:
        stop(error)
    assert ended.value.code == code
    assert capsys.readouterr().err == message
