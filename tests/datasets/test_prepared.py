"""Prepared folders: what is read is what went in, and damage is named."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnrl_jax.datasets.cleaning import CleaningConfig
from attnrl_jax.datasets.files import read_problems
from attnrl_jax.datasets.preparation import _write, prepare
from attnrl_jax.datasets.prepared import (
    FORMAT,
    find_prepared,
    from_record,
    is_prepared,
    open_prepared,
    read_report,
    to_record,
)
from attnrl_jax.tasks.problems import DataError, Problem

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "data" / "problems" / "small.jsonl"
KEEP_ALL = CleaningConfig(False, False, False, False, overlap=0.0)

TEXTS = st.text(st.characters(codec=None))  # half surrogate pairs too
PROBLEMS = st.builds(
    Problem,
    id=TEXTS,
    text=TEXTS,
    answers=st.lists(TEXTS, max_size=5).map(tuple),
    level=st.none() | TEXTS | st.integers(),
)


@given(PROBLEMS)
def test_a_record_holds_all_of_a_problem(problem):
    read = from_record(to_record(problem))
    assert read == problem
    assert type(read.level) is type(problem.level)


def strange_problems():
    """One of every kind that a file of records might change."""
    texts = ["", " ", "Größe ∠ABC 中文 🙂", "a\x00b\r\n", "\ud800", "null", "3", "x" * 100_000]
    levels = [None, 3, "3", "null", "", "None", -(2**80), "leicht\n"]
    return [
        Problem(f"{i} {text[:5]}", text, tuple(texts[:i]), level)
        for i, (text, level) in enumerate(zip(texts, levels, strict=True))
    ]


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    out = tmp_path_factory.mktemp("strange")
    folder = out / "problems" / "abc" / "1.0.0"
    rows = strange_problems()
    splits = {"train": rows, "held_out": rows[::-1]}
    about = {"attnrl_jax": FORMAT, "report": {}, "problems": {"train": 8, "held_out": 8}}
    _write(out, folder, splits, about)
    return folder


def test_files_hold_all_of_a_problem_in_order(strange):
    source = open_prepared(strange)
    assert len(source) == 8
    assert [source[i] for i in range(8)] == strange_problems()
    assert [source[-i] for i in range(1, 9)] == strange_problems()[::-1]
    assert list(open_prepared(strange, "held_out")) == strange_problems()[::-1]


def test_places_outside_are_refused(strange):
    source = open_prepared(strange)
    for index in (8, -9):
        with pytest.raises(IndexError, match=f"problem {index} of 8"):
            source[index]


def test_a_source_is_sent_to_other_processes(strange):
    copy = pickle.loads(pickle.dumps(open_prepared(strange, "held_out")))
    assert (copy.split, copy[0]) == ("held_out", strange_problems()[-1])


def test_unknown_split(strange):
    with pytest.raises(DataError, match="no split 'test' was prepared; there are: train, held_out"):
        open_prepared(strange, "test")


@pytest.fixture
def made(tmp_path):
    """A prepared folder to be damaged."""
    rows = [{"problem": f"What is {i}? " + "?" * 2000, "answer": "1"} for i in range(100)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare([str(path)], tmp_path / "out", cleaning=KEEP_ALL).folder


def records(folder):
    return next(folder.glob("*.array_record*"))


def cut(folder):
    records(folder).write_bytes(records(folder).read_bytes()[:-1000])


def remove(folder):
    records(folder).unlink()


def break_metadata(folder):
    (folder / "metadata.json").write_text(json.dumps({"attnrl_jax": FORMAT}))


def break_info(folder):
    (folder / "dataset_info.json").write_text("{")


def break_features(folder):
    (folder / "features.json").write_text("[]")


@pytest.mark.parametrize("damage", [cut, remove, break_metadata, break_info, break_features])
def test_damage_is_found_when_opened(made, damage):
    damage(made)
    with pytest.raises(DataError) as error:
        open_prepared(made)
    assert str(error.value).startswith(f"{made}: damaged (")
    assert "delete the folder" in str(error.value)


def test_a_damaged_record_is_named_and_never_read_wrongly(made):
    path = records(made)
    content = bytearray(path.read_bytes())
    middle = content.index(b"What is 50?")
    content[middle : middle + 5] = b"Wrong"
    path.write_bytes(content)
    source = open_prepared(made)
    assert source[3].text.startswith("What is 3?")
    with pytest.raises(DataError, match=r"problem 50 of split 'train' cannot be read") as error:
        source[50]
    assert str(made) in str(error.value)


def test_the_folder_above_is_enough_while_there_is_one_version(made):
    out = made.parents[2]
    for folder in (out, made.parents[1], made.parent, made):
        assert find_prepared(folder) == made
        assert len(open_prepared(folder)) == 100
    other = prepare([str(SMALL)], out).folder
    with pytest.raises(DataError, match="2 versions") as error:
        open_prepared(out)
    assert all(str(folder) in str(error.value) for folder in (made, other))
    assert f"({SMALL}, prepared 2" in str(error.value)


def test_what_is_not_prepared(made, tmp_path):
    assert not is_prepared(tmp_path / "nowhere")
    assert find_prepared(tmp_path / "nowhere") is None
    assert not is_prepared(made.parent)
    with pytest.raises(DataError, match="no prepared problems here"):
        open_prepared(tmp_path / "nowhere")
    # What a process that was killed leaves, all files of it written.
    left = made.with_name("incomplete.ABC_1.0.0")
    shutil.copytree(made, left)
    assert not is_prepared(left)
    assert find_prepared(made.parents[2]) == made
    # A data set of another program.
    (left / "metadata.json").write_text("{}")
    shutil.copytree(left, tmp_path / "foreign")
    with pytest.raises(DataError, match="foreign: no prepared problems here"):
        read_report(tmp_path / "foreign")


def test_small_file_comes_back(tmp_path):
    made = prepare([str(SMALL)], tmp_path)
    assert list(open_prepared(made.folder)) == read_problems(SMALL)
