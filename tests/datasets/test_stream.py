"""The stream over a source of problems."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrl_jax.datasets.files import read_problems
from attnrl_jax.datasets.preparation import prepare
from attnrl_jax.datasets.prepared import open_prepared
from attnrl_jax.datasets.stream import ProblemStream
from attnrl_jax.tasks.problems import DataError, Problem

ROOT = Path(__file__).parents[2]


def problems(count):
    return [Problem(str(i), f"problem {i}", (str(i),)) for i in range(count)]


def test_an_epoch_is_a_permutation_and_epochs_differ():
    stream = ProblemStream(problems(50), seed=3)
    first, second = ([p.id for p in stream.take(epoch * 50, 50).problems] for epoch in range(2))
    assert sorted(first) == sorted(second) == sorted(str(i) for i in range(50))
    assert first != second
    assert first != [str(i) for i in range(50)]
    other = [p.id for p in ProblemStream(problems(50), seed=4).take(0, 50).problems]
    assert other != first


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_batches_of_any_size_cut_one_sequence(sizes):
    """The adaptive batch changes its size every step: the order must not depend on it."""
    stream = ProblemStream(problems(50), 0, {"odd": lambda p: int(p.id) % 2 == 0})
    cursor, taken, skipped = 0, [], 0
    for size in sizes:
        draw = stream.take(cursor, size)
        assert len(draw.problems) == size
        taken += draw.problems
        cursor, skipped = draw.cursor, skipped + draw.skipped["odd"]
    whole = stream.take(0, sum(sizes))
    assert taken == whole.problems
    assert (cursor, skipped) == (whole.cursor, whole.skipped["odd"])
    assert cursor == len(taken) + skipped


def test_a_new_stream_continues_from_the_cursor():
    draw = ProblemStream(problems(11), 5).take(0, 17)
    rest = ProblemStream(problems(11), 5).take(draw.cursor, 10)
    assert draw.problems + rest.problems == ProblemStream(problems(11), 5).take(0, 27).problems


def test_filters_count_by_name_in_order():
    filters = {"long": lambda p: len(p.text) < 10, "seven": lambda p: p.id != "7"}
    draw = ProblemStream(problems(20), 0, filters).take(0, 9)
    assert sorted(int(p.id) for p in draw.problems) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert draw.skipped["seven"] <= 1
    assert draw.cursor == 9 + sum(draw.skipped.values())


def test_nothing_passes_the_filters():
    with pytest.raises(DataError, match=r"none of the 4 problems passes.*'never'"):
        ProblemStream(problems(4), 0, {"never": lambda p: False}).take(0, 1)


def test_rare_survivor_is_found():
    stream = ProblemStream(problems(40), 1, {"rare": lambda p: p.id == "17"})
    assert [p.id for p in stream.take(0, 3).problems] == ["17"] * 3


def test_bad_arguments():
    with pytest.raises(DataError, match="empty"):
        ProblemStream([], 0)
    with pytest.raises(ValueError, match="seed"):
        ProblemStream(problems(2), -1)
    with pytest.raises(ValueError, match="cursor"):
        ProblemStream(problems(2), 0).take(-1, 1)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=6),
    st.integers(0, 3),
)
def test_shards_interleave_to_the_one_draw(steps, seed):
    """Whatever the number of processes, which may change from step to step where a run was saved
    and continued, the run draws the same problems."""
    stream = ProblemStream(problems(50), seed, {"odd": lambda p: int(p.id) % 2 == 0})
    cursor, taken = 0, []
    for count, number in steps:
        shards = [stream.take(cursor, count, (index, number)) for index in range(number)]
        assert len({(shard.cursor, shard.skipped["odd"]) for shard in shards}) == 1
        assert max(len(s.problems) for s in shards) - min(len(s.problems) for s in shards) <= 1
        woven = [None] * count
        for index, shard in enumerate(shards):
            woven[index::number] = shard.problems
        taken += woven
        cursor = shards[0].cursor
    whole = stream.take(0, sum(count for count, _ in steps))
    assert taken == whole.problems
    assert cursor == whole.cursor


def test_prepared_problems_are_drawn_like_a_list(tmp_path):
    """The order is a function of the seed and the length: the source may change its storage."""
    rows = [{"problem": f"What is {i}?", "answer": str(i)} for i in range(23)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_prepared(prepare([str(path)], tmp_path / "out").folder)
    listed = read_problems(path)
    draw = ProblemStream(source, 3).take(0, 17)
    assert draw.problems == ProblemStream(listed, 3).take(0, 17).problems
    rest = ProblemStream(source, 3).take(draw.cursor, 40, (1, 2)).problems
    assert rest == ProblemStream(listed, 3).take(0, 57).problems[18::2]


@pytest.mark.parametrize("shard", [(0, 0), (2, 2), (-1, 2)])
def test_no_such_shard(shard):
    with pytest.raises(ValueError, match="shard"):
        ProblemStream(problems(2), 0).take(0, 1, shard)


def test_import_is_light():
    """grain takes seconds to import: importing the stream must not pay for it."""
    code = "import sys, attnrl_jax.datasets.stream; sys.exit('grain' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
