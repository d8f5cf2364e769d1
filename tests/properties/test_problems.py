"""Rows and files of anything: problems, or a DataError that names the place."""

from __future__ import annotations

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from attnrl_jax.datasets.cleaning import CleaningConfig, CleaningReport, PromptLimit, clean
from attnrl_jax.datasets.files import problem_from_row, read_problems
from attnrl_jax.datasets.preparation import prepare
from attnrl_jax.datasets.prepared import (
    METADATA_FILE,
    find_prepared,
    from_record,
    is_prepared,
    open_prepared,
    read_report,
    to_record,
)
from attnrl_jax.tasks.problems import DataError, Problem
from tests.properties.strategies import JSON_VALUES, STRANGE_TEXT, cases

NAMES = st.sampled_from(
    ["problem", "question", "prompt", "answer", "answers", "final_answer", "ground_truth",
     "reward_model", "id", "level", "role", "content"]
)  # fmt: skip
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content"]), st.sampled_from(["user", "a", None, 3]), max_size=2
    ),
    max_size=2,
)
VALUES = (
    JSON_VALUES | STRANGE_TEXT | MESSAGES | st.sampled_from([{"ground_truth": "5"}, "1 #### 2"])
)
ANY_ROWS = st.dictionaries(NAMES | STRANGE_TEXT, VALUES, max_size=6)
TEXTS = st.text(st.sampled_from("ab 1$\\{}né²"), min_size=1, max_size=8).filter(str.strip)
ROWS = ANY_ROWS | st.builds(
    lambda row, text, answer: {**row, "problem": text, "answer": answer}, ANY_ROWS, TEXTS, TEXTS
)


def is_text(value):
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def assert_problem(problem):
    assert is_text(problem.id)
    assert is_text(problem.text)
    assert problem.answers
    assert all(map(is_text, problem.answers))
    assert problem.level is None or type(problem.level) is int or is_text(problem.level)
    assert from_record(to_record(problem)) == problem


def read_or_refused(path):
    """The problems of a file, or None where it is refused, with its name."""
    refusal = None
    try:
        problems = read_problems(path)
    except DataError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith(str(path))
        return None
    assert problems
    for problem in problems:
        assert_problem(problem)
    return problems


@cases(900)
@given(ROWS)
def test_a_row_is_a_problem_or_refused(row):
    try:
        problem = problem_from_row(row, "somewhere", "default")
    except DataError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert refusal.startswith("somewhere: ")
        texts = [name for name in ("problem", "answer") if is_text(row.get(name))]
        # A row that has both, and only them, is never refused.
        assert texts != ["problem", "answer"] or len(row) > 2
        return
    assert_problem(problem)
    if row.get("id") is None:
        assert problem.id == "default"
    if "answers" not in row and is_text(row.get("answer")) and row["answer"].strip():
        assert problem.answers == (row["answer"].rpartition("####")[2].strip(),) or (
            problem.answers == (row["answer"],)
        )
    if is_text(row.get("problem")) and row["problem"].strip():
        assert problem.text == row["problem"]


def expected(rows, stem):
    """What a file of the rows holds, row by row; None where one of them is refused."""
    try:
        return [
            problem_from_row(row, "here", f"{stem}-{number:06d}")
            for number, row in enumerate(rows, start=1)
        ] or None
    except DataError:
        return None


@cases(300)
@given(st.lists(ROWS, max_size=4), st.sampled_from(["jsonl", "jsonl.gz", "json"]))
def test_files_hold_what_their_rows_hold(tmp_path, rows, ending):
    path = tmp_path / f"rows.{ending}"
    # Digits that JSON's parser refuses cannot be written either.
    lines = [json.dumps(row) for row in rows]
    text = f"[{','.join(lines)}]" if ending == "json" else "\n".join(lines)
    data = text.encode()
    path.write_bytes(gzip.compress(data, 1) if ending.endswith("gz") else data)
    assert read_or_refused(path) == expected([json.loads(line) for line in lines], "rows")


GOOD_ROWS = [
    {"problem": f"What is {i} + {i}?", "answer": str(2 * i), "level": i} for i in range(40)
]


def written(ending):
    """A file of good rows as bytes."""
    lines = "".join(json.dumps(row) + "\n" for row in GOOD_ROWS).encode()
    if ending == "jsonl.gz":
        return gzip.compress(lines, mtime=0)
    if ending == "json":
        return json.dumps(GOOD_ROWS).encode()
    if ending == "parquet":
        stream = io.BytesIO()
        table = pa.table({name: [row[name] for row in GOOD_ROWS] for name in GOOD_ROWS[0]})
        pq.write_table(table, stream, write_page_checksum=True)
        return stream.getvalue()
    return lines


FILES = {ending: written(ending) for ending in ("jsonl", "jsonl.gz", "json", "parquet")}


@cases(300)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_a_file_cut_short_is_refused(tmp_path, ending, data):
    """Or, where it is cut between two lines, read up to there: nothing of it shows more."""
    whole = FILES[ending]
    size = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path / f"cut.{ending}"
    path.write_bytes(whole[:size])
    problems = read_or_refused(path)
    if ending != "jsonl":
        assert problems is None
    elif problems is not None:
        lines = whole[:size].count(b"\n")
        assert whole[size - 1 : size + 1].count(b"\n") or whole[size - 1 : size] == b"}"
        assert len(problems) in (lines, lines + 1)
        assert [p.text for p in problems] == [row["problem"] for row in GOOD_ROWS[: len(problems)]]


@cases(250)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_a_file_of_changed_bytes_is_read_or_refused(tmp_path, ending, changes):
    damaged = bytearray(FILES[ending])
    for place, byte in changes:
        damaged[int(place * len(damaged))] = byte
    path = tmp_path / f"changed.{ending}"
    path.write_bytes(damaged)
    problems = read_or_refused(path)
    if problems is not None and ending == "jsonl.gz":
        # Its checksum is of all that is in it.
        assert [problem.text for problem in problems] == [row["problem"] for row in GOOD_ROWS]


@cases(150)
@given(st.sampled_from(["jsonl", "json", "jsonl.gz", "parquet"]), st.binary(max_size=60))
def test_a_file_of_any_bytes_is_read_or_refused(tmp_path, ending, data):
    path = tmp_path / f"any.{ending}"
    path.write_bytes(data)
    assert read_or_refused(path) is None


@cases(40)
@given(st.integers(100, 1500), st.sampled_from(["[]", "{}"]), st.booleans())
@example(960, "[]", True)
def test_rows_nested_deeply_are_refused(tmp_path, depth, brackets, in_answer):
    """Bug: a list in a problem that the parser just takes was a bare RecursionError."""
    opening = "[" if brackets == "[]" else '{"a":'
    nested = f"{opening * depth}1{brackets[1] * depth}"
    row = {"problem": '"p"', "answer": '"1"'} | {"answer" if in_answer else "problem": nested}
    path = tmp_path / "deep.jsonl"
    path.write_text("{" + ",".join(f'"{name}": {value}' for name, value in row.items()) + "}")
    assert read_or_refused(path) is None


def test_the_deepest_rows_that_are_parsed_are_refused(tmp_path):
    """Bug: between what the parser takes and what can be looked into was a bare RecursionError."""
    path = tmp_path / "deep.jsonl"
    for depth in range(900, 1000):
        path.write_text('{"answer": 1, "problem": ' + "[" * depth + "1" + "]" * depth + "}")
        assert read_or_refused(path) is None


COLUMN_TYPES = [
    pa.timestamp("ns"), pa.timestamp("s"), pa.timestamp("us", tz="UTC"), pa.date32(),
    pa.time64("ns"), pa.duration("s"), pa.duration("ns"), pa.int8(), pa.uint64(), pa.float32(),
    pa.float64(), pa.bool_(), pa.string(), pa.large_string(), pa.binary(), pa.decimal128(38, 2),
    pa.list_(pa.int64()), pa.dictionary(pa.int32(), pa.string()),
    pa.struct([("role", pa.string()), ("a", pa.int64())]),
]  # fmt: skip


@cases(150)
@given(
    st.sampled_from(COLUMN_TYPES),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 100), min_size=1, max_size=3),
    st.sampled_from(["problem", "answer", "id", "level"]),
)
def test_columns_of_any_type_are_read_or_refused(tmp_path, kind, numbers, name):
    columns = {"problem": ["p"] * len(numbers), "answer": ["1"] * len(numbers)}
    values = list(numbers)
    if pa.types.is_nested(kind):
        values = [[n] if pa.types.is_list(kind) else {"role": "user", "a": n} for n in numbers]
    elif pa.types.is_dictionary(kind) or kind in (pa.string(), pa.large_string(), pa.binary()):
        values = [str(n) for n in numbers]
    path = tmp_path / "typed.parquet"
    try:
        array = (
            pa.array(values).cast(kind) if not pa.types.is_nested(kind) else pa.array(values, kind)
        )
        pq.write_table(pa.table({**columns, name: array}), path)
    except (pa.ArrowException, OverflowError):
        assume(False)
    problems = read_or_refused(path)
    assert problems is None or len(problems) == len(numbers)
    if kind == pa.string() and name != "level":
        assert problems is not None


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.duration("s"), pa.date32()])
def test_times_that_python_cannot_hold_are_refused(tmp_path, kind):
    """Bug: they ended in bare ValueErrors and OverflowErrors, by which no file is named."""
    path = tmp_path / "times.parquet"
    column = pa.array([2**30 + 1], pa.int32() if kind == pa.date32() else pa.int64())
    if kind == pa.duration("s"):
        column = pa.array([2**62], pa.int64())
    pq.write_table(pa.table({"problem": ["p"], "answer": ["1"], "id": column.cast(kind)}), path)
    with pytest.raises(DataError, match=r"times\.parquet: cannot be read after row 0: "):
        read_problems(path)


def test_a_level_is_text(tmp_path):
    """Bug: half a surrogate pair in it, which nothing can print, was kept."""
    path = tmp_path / "level.jsonl"
    path.write_text('{"problem": "p", "answer": "1", "level": "\\ud800"}')
    assert [problem.level for problem in read_problems(path)] == [None]


# Texts and golds that readers of numbers and of mathematics may stumble over.
PARTS = st.sampled_from(
    [*"aA 12e0.,-/%^_{}$!()[]=#求Ж²½٣\x00\x01\n", "9" * 17, "9" * 400, "9" * 5000, "\\frac",
     "\\boxed{", "\\(", "\\)", "\\text{", "e999", "n/a", "none", "105263157894736848",
     "\\begin{align", "\\end{"]
)  # fmt: skip
TANGLED = st.lists(PARTS, max_size=6).map("".join) | STRANGE_TEXT
# Few texts, so that copies and conflicts are common.
PROBLEMS = st.lists(
    st.builds(
        Problem,
        st.just("id"),
        st.sampled_from(["p", "P", " ", "p q r", "q r s"]) | TANGLED,
        st.lists(TANGLED, min_size=1, max_size=2).map(tuple),
        st.none(),
    ),
    max_size=6,
)
FLAGS = ("duplicates", "conflicting_answers", "empty_answers", "corrupted_numbers", "non_latin",
         "empty_problems", "placeholder_answers")  # fmt: skip


@cases(500)
@given(
    PROBLEMS,
    PROBLEMS,
    st.builds(
        CleaningConfig,
        **{flag: st.booleans() for flag in FLAGS},
        overlap=st.sampled_from([0.0, 0.8, 1.0]),
        ngram=st.integers(1, 3),
    ),
    st.sampled_from([None, 1, 4]),
)
def test_cleaning_loses_nothing(problems, benchmark, config, limit):
    """Rows kept and rows removed, by their first fault, are the rows that were read."""
    limit = limit and PromptLimit(lambda problem: len(problem.text), limit)
    kept, report = clean(problems, config, {"benchmark": benchmark}, limit)
    rest = iter(problems)
    assert all(any(problem is one for one in rest) for problem in kept), "in their order"
    assert (report.read, report.kept) == (len(problems), len(kept))
    assert report.kept + sum(report.removed.values()) == report.read
    assert all(0 <= report.removed[f] <= report.found[f] <= report.read for f in report.found)
    for flag in FLAGS:
        assert getattr(config, flag) or not report.removed[flag]
    again, second = clean(kept, config, {"benchmark": benchmark}, limit)
    assert again == kept
    assert sum(second.removed.values()) == 0
    assert CleaningReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    # What it says can be counted by hand.
    assert report.found["empty_problems"] == sum(not p.text.strip() for p in problems)
    assert report.found["empty_answers"] == sum(
        not any(a.strip() for a in p.answers) for p in problems
    )
    if config.empty_problems:
        assert all(p.text.strip() for p in kept)
    if config.empty_answers:
        assert all(any(a.strip() for a in p.answers) for p in kept)
    if limit:
        assert all(1 <= len(p.text) <= limit.tokens for p in kept)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prepared folder, whose metadata is damaged."""
    path = tmp_path_factory.mktemp("made") / "rows.jsonl"
    path.write_bytes(FILES["jsonl"])
    folder = prepare([str(path)], path.parent / "out").folder
    return folder, json.loads((folder / METADATA_FILE).read_bytes())


METADATA = ["attnrl_jax", "prepared", "settings", "sources", "problems", "report", "files"]


@cases(120)
@given(
    st.sampled_from(METADATA) | STRANGE_TEXT,
    JSON_VALUES | st.just("gone"),
    st.none() | st.sampled_from(["train", "read", "removed", "benchmarks", "features.json"]),
)
def test_damaged_metadata_is_refused_or_read(made, name, value, inner):
    folder, metadata = made
    damaged = json.loads(json.dumps(metadata))
    if inner is not None and isinstance(damaged.get(name), dict):
        damaged[name][inner] = value
    elif value == "gone":
        damaged.pop(name, None)
    else:
        damaged[name] = value
    (folder / METADATA_FILE).write_text(json.dumps(damaged))
    if not is_prepared(folder):
        assert damaged.get("attnrl_jax") != metadata["attnrl_jax"]
        assert find_prepared(folder) is None
    for read in (open_prepared, read_report):
        try:
            found = read(folder)
        except DataError as error:
            refusal = str(error)
        else:
            assert len(found) == 40 if read is open_prepared else found.to_table()
            continue
        assert damaged != metadata
        assert refusal.startswith(str(folder))
