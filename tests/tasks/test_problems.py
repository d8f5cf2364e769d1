"""Files of problems, and the stream over them."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrl_jax.tasks.problems import DataError, Problem, ProblemStream, read_jsonl

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "data" / "problems" / "small.jsonl"
SHARED = ROOT.parent / "shared" / "data"


def problems(count):
    return [Problem(str(i), f"problem {i}", (str(i),)) for i in range(count)]


def test_reads_every_field():
    rows = read_jsonl(SMALL)
    assert [row.id for row in rows] == [
        "apples",
        "half",
        "small-000003",
        "roots",
        "count",
        "unicode",
    ]
    assert rows[0] == Problem(
        "apples", "A basket holds 3 rows of 4 apples. How many apples are in it?", ("12",), 1
    )
    assert rows[2].answers == ("7.5",)
    assert rows[3].answers == ("2", "-2")
    assert rows[4].answers == ("3600",)
    assert rows[5].text.startswith("Größe von ∠ABC")
    assert [row.level for row in rows] == [1, "easy", None, 2, None, None]


def test_gzip_reads_the_same(tmp_path):
    packed = tmp_path / "small.jsonl.gz"
    packed.write_bytes(gzip.compress(SMALL.read_bytes()))
    assert read_jsonl(packed) == read_jsonl(SMALL)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"problem": "p", "answer": "1"', "not a JSON object"),
        ("[1, 2]", "not a JSON object but list"),
        ('{"answer": "1"}', "'problem' is missing"),
        ('{"problem": "p"}', "'answer' (or 'answers') is missing"),
        ('{"problem": " ", "answer": "1"}', "'problem' must be a non-empty string"),
        ('{"problem": 3, "answer": "1"}', "'problem' must be a non-empty string"),
        ('{"problem": "p", "answers": []}', "'answers' must be a non-empty list"),
        ('{"problem": "p", "answer": null}', "'answer' must hold strings or numbers"),
        ('{"problem": "p", "answer": true}', "'answer' must hold strings or numbers"),
        ('{"problem": "p", "answer": NaN}', "'answer' must be finite"),
        ('{"problem": "p", "answer": "1", "level": [1]}', "'level' must be"),
        ("[" * 100_000, "not a JSON object"),
    ],
)
def test_broken_line_is_named(tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n\n' + line + "\n")
    with pytest.raises(DataError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert said in str(error.value)


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"problem": "Größe", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1: .*UTF-8"):
        read_jsonl(path)


def test_empty_missing_and_truncated_files(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no problems"):
        read_jsonl(empty)
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")
    packed = gzip.compress(SMALL.read_bytes() * 500)
    for name, content in (("cut", packed[:-100]), ("plain", SMALL.read_bytes())):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.jsonl.gz: cannot be read"):
            read_jsonl(path)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    (tmp_path / "flipped.jsonl.gz").write_bytes(flipped)
    with pytest.raises(DataError, match="flipped"):
        read_jsonl(tmp_path / "flipped.jsonl.gz")


def test_empty_gold_is_read(tmp_path):
    """Rows with an empty answer exist in the wild: cleaning counts them, reading keeps them."""
    path = tmp_path / "empty_gold.jsonl"
    path.write_text('{"problem": "p", "answer": ""}')
    assert read_jsonl(path)[0].answers == ("",)


@pytest.mark.skipif(not SHARED.is_dir(), reason="problem files are not here")
@pytest.mark.parametrize(
    ("name", "rows"),
    [("eval/aime24.jsonl", 30), ("eval/minerva.jsonl", 272), ("train/gsm8k_train.jsonl.gz", 7473)],
)
def test_real_files(name, rows):
    read = read_jsonl(SHARED / name)
    assert len(read) == rows
    assert all(problem.answers and problem.text for problem in read)
    assert len({problem.id for problem in read}) == rows


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
    stream = ProblemStream(problems(7), 0, {"odd": lambda p: int(p.id) % 2 == 0})
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


def test_import_is_light():
    """grain takes seconds to import: reading a file must not pay for it."""
    code = "import sys, attnrl_jax.tasks.problems; sys.exit('grain' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
