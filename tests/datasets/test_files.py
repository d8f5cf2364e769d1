"""Files of problems."""

import gzip
from pathlib import Path

import pytest

from attnrl_jax.datasets.files import read_jsonl
from attnrl_jax.tasks.problems import DataError, Problem

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "data" / "problems" / "small.jsonl"
SHARED = ROOT.parent / "shared" / "data"


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
