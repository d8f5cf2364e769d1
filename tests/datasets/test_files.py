"""Files of problems."""

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest

from attnrl_jax.datasets.files import FORMATS, FieldNames, read_problems
from attnrl_jax.tasks.problems import DataError, Problem

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "data" / "problems" / "small.jsonl"
MESSAGES = ROOT / "tests" / "data" / "problems" / "messages.jsonl"
SHARED = ROOT.parent / "shared" / "data"


def test_reads_every_field():
    rows = read_problems(SMALL)
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
    assert read_problems(packed) == read_problems(SMALL)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"problem": "p", "answer": "1"', "not a JSON object"),
        ("[1, 2]", "not a JSON object but list"),
        ('{"answer": "1"}', "no field problem or question or prompt (fields: ['answer'])"),
        ('{"problem": "p"}', "no field answers or answer or final_answer or ground_truth"),
        ('{"problem": 3, "answer": "1"}', "'problem' must be a string"),
        ('{"prompt": [{"role": "user"}], "answer": "1"}', "'prompt' must be a string"),
        ('{"problem": "p", "answers": {"a": 1}}', "'answers' must hold strings or numbers"),
        ('{"problem": "p", "reward_model": "5"}', "no field answers"),
        ('{"prompt": [{"role": "system", "content": "p"}], "answer": "1"}', "one of the user"),
        ('{"problem": "\\ud800", "answer": "1"}', "surrogate"),
        ('{"problem": "p", "answer": true}', "'answer' must hold strings or numbers"),
        ('{"problem": "p", "answer": NaN}', "'answer' must be finite"),
        ('{"problem": "p", "answer": 1e400}', "'answer' must be finite"),
        ('{"problem": "p", "answer": ["1", {}]}', "'answer' must hold strings or numbers"),
        ("{}", "no field problem or question or prompt (fields: [])"),
        ("[" * 100_000, "not a JSON object"),
    ],
)
def test_broken_line_is_named(tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n\n' + line + "\n")
    with pytest.raises(DataError) as error:
        read_problems(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert said in str(error.value)


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"problem": "Größe", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1: .*UTF-8"):
        read_problems(path)


def test_empty_missing_and_truncated_files(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no problems"):
        read_problems(empty)
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        read_problems(tmp_path / "none.jsonl")
    packed = gzip.compress(SMALL.read_bytes() * 500)
    for name, content in (("cut", packed[:-100]), ("plain", SMALL.read_bytes())):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.jsonl.gz: cannot be read"):
            read_problems(path)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    (tmp_path / "flipped.jsonl.gz").write_bytes(flipped)
    with pytest.raises(DataError, match="flipped"):
        read_problems(tmp_path / "flipped.jsonl.gz")


def test_empty_gold_is_read(tmp_path):
    """Rows with an empty answer exist in the wild: cleaning counts them, reading keeps them."""
    path = tmp_path / "empty_gold.jsonl"
    path.write_text('{"problem": "p", "answer": ""}')
    assert read_problems(path)[0].answers == ("",)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answer": None}, ("",)),
        ({"answers": []}, ("",)),
        ({"answers": [None, None]}, ("",)),
        ({"answers": ["1", None]}, ("1",)),
        ({"answers": [], "answer": "5"}, ("5",)),
        ({"answers": [None, ""], "answer": None, "final_answer": 6}, ("6",)),
        ({"answer": "", "reward_model": {"ground_truth": "7"}}, ("7",)),
        ({"reward_model": {"ground_truth": None}}, ("",)),
        ({"answer": 10**400}, (str(10**400),)),
    ],
)
def test_empty_answers_are_read(tmp_path, row, answers):
    """Bug: null and [] stopped the whole file, a 401-digit integer by a bare OverflowError."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "p", **row}))
    assert read_problems(path) == [Problem("rows-000001", "p", answers)]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"problem": ""}, ""),
        ({"problem": None}, ""),
        ({"problem": " ", "question": "q"}, "q"),
        ({"prompt": []}, ""),
        ({"prompt": [{"role": "user", "content": None}]}, ""),
    ],
)
def test_empty_problems_are_read(tmp_path, row, text):
    """Bug: one row without a problem stopped the whole file."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"answer": "1", **row}))
    assert read_problems(path) == [Problem("rows-000001", text, ("1",))]


@pytest.mark.parametrize(
    ("written", "level"),
    [
        ("3", 3),
        ("3.0", 3),
        ("2.5", "2.5"),
        ('"hard"', "hard"),
        *((other, None) for other in ("[1]", "{}", "NaN", "1e400", "true", "null")),
    ],
)
def test_levels(tmp_path, written, level):
    """Bug: a level of 2.5 or a list stopped the whole file."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"problem": "p", "answer": "1", "level": {written}}}')
    [row] = read_problems(path)
    assert (row.level, type(row.level)) == (level, type(level))


def test_fields_of_other_collections():
    dapo, gsm8k, olympiad = read_problems(MESSAGES)
    assert (dapo.text, dapo.answers) == ("What is 2 + 3?", ("5",))
    assert (gsm8k.text[:3], gsm8k.answers) == ("Tom", ("72",))
    assert olympiad.answers == ("2", "-2")


def test_named_fields_win_and_must_be_there(tmp_path):
    path = tmp_path / "named.jsonl"
    line = {"problem": "p", "answer": "1", "task": {"text": "q", "gold": [2, 3.0]}, "a.b": "4"}
    path.write_text(json.dumps(line) + "\n" + '{"problem": "p", "answer": "1"}')
    with pytest.raises(
        DataError, match=r"named\.jsonl:2: no field task\.text \(fields: \['answer'"
    ):
        read_problems(path, FieldNames("task.text"))
    path.write_text(json.dumps(line))
    [row] = read_problems(path, FieldNames("task.text", "task.gold"))
    assert (row.text, row.answers) == ("q", ("2", "3"))
    assert read_problems(path, FieldNames(answer="a.b"))[0].answers == ("4",)
    assert read_problems(path, FieldNames(answer="task.gold"))[0].text == "p"
    with pytest.raises(DataError, match="no field id_of_none"):
        read_problems(path, FieldNames(answer="id_of_none"))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("42.0", "42"),
        ("-0.0", "0"),
        ("7.5", "7.5"),
        ("105263157894736842", "105263157894736842"),
        ("9007199254740991.0", "9007199254740991"),
        ("1e22", "1e+22"),
        ('"42.0"', "42.0"),
        ('"so 1 #### 2\\n#### 1,000 "', "1,000"),
        ('"####"', ""),
    ],
)
def test_how_answers_are_written(tmp_path, written, read):
    path = tmp_path / "one.jsonl"
    path.write_text(f'\ufeff{{"problem": "p", "answer": {written}}}', encoding="utf-8")
    assert read_problems(path)[0].answers == (read,)


def write_parquet(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, write_page_checksum=True, row_group_size=3000)
    return path


def test_parquet_reads_what_jsonl_reads(tmp_path):
    import pyarrow as pa

    rows = [json.loads(line) for line in SMALL.read_text().splitlines() if line]
    for row in rows:
        row["answers"] = [str(gold) for gold in row.get("answers", [row["answer"]])]
        row["level"] = None if row.get("level") is None else str(row["level"])
    names = ("id", "problem", "answers", "level")
    columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
    read = read_problems(write_parquet(tmp_path / "small.parquet", columns))
    kept = read_problems(SMALL)
    assert [(row.text, row.answers) for row in read] == [(row.text, row.answers) for row in kept]
    assert [row.id for row in read][:3] == ["apples", "half", "small-000003"]
    assert [row.level for row in read] == ["1", "easy", None, "2", None, None]


def test_parquet_of_chat_messages_in_many_batches(tmp_path):
    """The shape of DAPO's file: messages, and the answer inside `reward_model`."""
    count = 10_000
    columns = {
        "prompt": [[{"content": f"What is {i}?", "role": "user"}] for i in range(count)],
        "reward_model": [{"ground_truth": str(i), "style": "rule"} for i in range(count)],
        "extra_info": [{"index": str(i)} for i in range(count)],
    }
    read = read_problems(write_parquet(tmp_path / "dapo.parquet", columns))
    assert [row.answers for row in read] == [(str(i),) for i in range(count)]
    assert read[-1] == Problem("dapo-010000", "What is 9999?", ("9999",))


def test_parquet_numbers(tmp_path):
    import pyarrow as pa

    large = 2**62 + 1
    for values, read in (
        (pa.array([large, 7], pa.int64()), [str(large), "7"]),
        (pa.array([42.0, 0.1], pa.float64()), ["42", "0.1"]),
        (pa.array([42.0, 0.1], pa.float32()), ["42", "0.1"]),
        (pa.array([Decimal("1.50"), Decimal("2.00")]), ["1.50", "2.00"]),
    ):
        columns = {"question": ["p", "q"], "answer": values, "level": pa.array([1.0, None])}
        problems = read_problems(write_parquet(tmp_path / "numbers.parquet", columns))
        assert [row.answers[0] for row in problems] == read
        assert [row.level for row in problems] == [1, None]


def test_broken_parquet_rows_and_files_are_named(tmp_path):
    path = tmp_path / "bad.parquet"
    answers = [["1"]] * 4321 + [None, []] + [["1", None]] * 677
    columns = {"problem": ["p"] * 5000, "answer": answers, "other": [1] * 5000}
    read = read_problems(write_parquet(path, columns))
    assert [row.answers for row in read] == [("1",)] * 4321 + [("",)] * 2 + [("1",)] * 677
    columns["answer"] = [True] * 5000
    columns["answers"] = [1.0] * 4321 + [float("inf")] * 679
    with pytest.raises(DataError, match=r"bad\.parquet, row 4322: field 'answers' must be finite"):
        read_problems(write_parquet(path, columns))
    columns = {"task": ["p"], "answer": ["1"], "other": [1]}
    said = r"bad\.parquet.*: no field problem.* \(fields: \['answer', 'other', 'task'\]\)"
    with pytest.raises(DataError, match=said):
        read_problems(write_parquet(path, columns))
    with pytest.raises(DataError, match=r"bad\.parquet: no field problem"):
        read_problems(write_parquet(path, {"task": ["p"]}))
    with pytest.raises(DataError, match=r"bad\.parquet: no problems"):
        read_problems(write_parquet(path, {"problem": [], "answer": []}))
    with pytest.raises(DataError, match=r"none\.parquet: cannot be read"):
        read_problems(tmp_path / "none.parquet")
    texts = [f"What is {i} + {i * i}?" for i in range(5000)]
    whole = write_parquet(path, {"problem": texts, "answer": texts}).read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 0xFF
    for content in (whole[:-100], whole[: len(whole) // 2], b"", b"PAR1", bytes(middle)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.parquet: cannot be read after row"):
            read_problems(path)


def test_json_arrays_read_what_jsonl_reads(tmp_path):
    rows = [json.loads(line) for line in SMALL.read_text().splitlines() if line.strip()]
    path = tmp_path / "small.json"
    path.write_text(json.dumps(rows))
    assert read_problems(path) == read_problems(SMALL)
    for text, said in (
        ("{}", "not a JSON array of rows but dict"),
        ("[1]", "row 1: not a JSON object but int"),
        ('[{"problem": "p", "answer": "1"}, {"problem": "p"}]', "row 2: no field answer"),
        ("[", "not JSON in UTF-8"),
        ("[]", "no problems in this file"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=f"small.json.*{said}"):
            read_problems(path)


def test_other_formats_are_refused_by_name(tmp_path):
    for name in ("problems.txt", "problems.csv", "problems.parquet.gz", "problems"):
        with pytest.raises(DataError) as error:
            read_problems(tmp_path / name)
        assert name in str(error.value)
        assert all(suffix in str(error.value) for suffix in FORMATS)


@pytest.mark.skipif(not SHARED.is_dir(), reason="problem files are not here")
@pytest.mark.parametrize(
    ("name", "rows"),
    [("eval/aime24.jsonl", 30), ("eval/minerva.jsonl", 272), ("train/gsm8k_train.jsonl.gz", 7473)],
)
def test_real_files(name, rows):
    read = read_problems(SHARED / name)
    assert len(read) == rows
    assert all(problem.answers and problem.text for problem in read)
    assert len({problem.id for problem in read}) == rows
