"""Work that is launched a part at a time beside other work."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from attnrl_jax.training.beside import AHEAD, PartByPart
from attnrl_jax.training.setup import Stopwatch


def parts(number, launched):
    for k in range(number):
        launched.append(k)
        yield jnp.zeros(())
    return number


def test_parts_are_launched_ahead_then_one_by_one_then_all():
    launched, watch = [], Stopwatch(lambda stage: None)
    work = PartByPart(parts(AHEAD + 5, launched), None, watch, "update")
    assert launched == []
    work.advance()
    assert len(launched) == AHEAD
    work.advance()
    assert len(launched) == AHEAD + 1
    assert work.result() == AHEAD + 5 == len(launched)
    [(stage, begin, end)] = watch.spans
    assert stage == "update"
    assert begin < end
    # Nothing is left.
    work.advance()
    assert work.result() == len(launched)


def test_no_parts_are_no_stage():
    stages = []
    watch = Stopwatch(stages.append)
    work = PartByPart(parts(0, []), None, watch, "update")
    work.advance()
    assert work.result() == 0
    assert (stages, watch.spans) == ([], [])


def test_an_error_of_a_part_is_raised():
    def failing():
        yield jnp.zeros(())
        raise ValueError("rows disagree")

    work = PartByPart(failing(), None, Stopwatch(lambda stage: None), "update")
    with pytest.raises(ValueError, match="rows disagree"):
        work.advance()
