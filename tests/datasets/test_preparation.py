"""Preparing problems once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attnrl_jax.datasets import preparation
from attnrl_jax.datasets.cleaning import CleaningConfig, PromptLimit
from attnrl_jax.datasets.files import FieldNames, read_problems
from attnrl_jax.datasets.preparation import prepare
from attnrl_jax.datasets.prepared import find_prepared, open_prepared, read_report
from attnrl_jax.tasks.problems import DataError, Problem

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count, start=0):
    return [{"problem": f"What is {i} and {i}?", "answer": str(2 * i)} for i in range(start, count)]


def test_the_same_input_is_prepared_once(tmp_path):
    name = write_rows(tmp_path / "a.jsonl", [*rows(10), *rows(3)])
    first = prepare([name], tmp_path / "out")
    written = sorted((path, path.stat().st_mtime_ns) for path in first.folder.iterdir())
    again = prepare([name], tmp_path / "out")
    assert (first.cached, again.cached) == (False, True)
    assert again.folder == first.folder
    assert again.report == first.report == read_report(first.folder)
    assert (first.report.read, first.report.kept) == (13, 10)
    assert sorted((path, path.stat().st_mtime_ns) for path in again.folder.iterdir()) == written
    # Nothing else is left in the folder.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["problems"]
    assert [path.name for path in first.folder.parent.iterdir()] == ["1.0.0"]


def test_the_same_content_elsewhere_is_the_same_version(tmp_path):
    (tmp_path / "inner").mkdir()
    names = [write_rows(folder / "a.jsonl", rows(4)) for folder in (tmp_path, tmp_path / "inner")]
    made = [prepare([name], tmp_path / "out") for name in names]
    assert made[0].folder == made[1].folder


def test_any_change_of_the_input_is_a_new_version(tmp_path):
    name, bench = tmp_path / "a.jsonl", tmp_path / "bench.jsonl"
    write_rows(name, rows(10))
    write_rows(bench, rows(60, 50))
    other = write_rows(tmp_path / "b.jsonl", rows(10))
    out, names = tmp_path / "out", [str(name)]
    by_length = PromptLimit(lambda problem: len(problem.text), 40)
    made = [
        prepare(names, out),
        prepare([other], out),  # its problems have other ids
        prepare([str(name), other], out),
        prepare([other, str(name)], out),
        prepare(names, out, fields=FieldNames("problem", "answer")),
        prepare(names, out, cleaning=CleaningConfig(ngram=5)),
        prepare(names, out, benchmarks=[str(bench)]),
        prepare(names, out, prompt_limit=by_length, prompt_version="1"),
        prepare(names, out, prompt_limit=by_length, prompt_version="2"),
        prepare(names, out, prompt_limit=PromptLimit(by_length.length, 41), prompt_version="1"),
        prepare(names, out, held_out=1),
    ]
    write_rows(bench, rows(60, 51))
    made.append(prepare(names, out, benchmarks=[str(bench)]))
    write_rows(name, rows(11))
    made.append(prepare(names, out))
    assert not any(one.cached for one in made)
    assert len({one.folder for one in made}) == len(made)
    assert [len(open_prepared(made[i].folder)) for i in (0, 2, 10, 12)] == [10, 10, 9, 11]


def test_cleaning_and_limits_are_applied(tmp_path):
    long = {"problem": "What is the sum " + "of one and one " * 20, "answer": "2"}
    name = write_rows(tmp_path / "a.jsonl", [*rows(10), long, {"problem": "none?", "answer": ""}])
    words = "The quick brown fox jumps over the lazy dog of seven farmers"
    write_rows(tmp_path / "b.jsonl", [{"problem": words, "answer": "1"}])
    again = write_rows(tmp_path / "c.jsonl", [{"problem": f"{words} again", "answer": "1"}])
    made = prepare(
        [name, again],
        tmp_path / "out",
        benchmarks=[str(tmp_path / "b.jsonl")],
        prompt_limit=PromptLimit(lambda problem: len(problem.text), 100),
        prompt_version="characters",
    )
    assert list(open_prepared(made.folder)) == read_problems(name)[:10]
    removed = {fault: count for fault, count in made.report.removed.items() if count}
    assert removed == {"empty_answers": 1, "long_prompts": 1, "overlap": 1}
    assert made.report.benchmarks["b"].overlapping == 1


def test_benchmarks_of_one_name_stay_apart(tmp_path):
    (tmp_path / "inner").mkdir()
    write_rows(tmp_path / "test.jsonl", rows(3))
    write_rows(tmp_path / "inner" / "test.jsonl", rows(5))
    name = write_rows(tmp_path / "a.jsonl", [{"problem": "one", "answer": "1"}])
    benchmarks = [str(tmp_path / "test.jsonl"), str(tmp_path / "inner")]
    report = prepare([name], tmp_path / "out", benchmarks=benchmarks).report
    assert [one.problems for one in report.benchmarks.values()] == [3, 5]


def test_held_out_problems_do_not_depend_on_the_order(tmp_path):
    listed = rows(50)
    made = [
        prepare([write_rows(tmp_path / f"{i}.jsonl", order)], tmp_path / "out", held_out=7).folder
        for i, order in enumerate((listed, listed[::-1]))
    ]
    texts = [[p.text for p in open_prepared(folder, "held_out")] for folder in made]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 7
    trained = [p.text for p in open_prepared(made[0])]
    assert trained == [row["problem"] for row in listed if row["problem"] not in texts[0]]


def test_held_out_texts_are_not_trained_on(tmp_path):
    """Copies that cleaning was told to keep go with the text; at most a fifth is set aside."""
    name = write_rows(tmp_path / "a.jsonl", rows(10) * 2)
    keep = CleaningConfig(duplicates=False)
    folder = prepare([name], tmp_path / "out", cleaning=keep, held_out=100).folder
    held_out, train = list(open_prepared(folder, "held_out")), list(open_prepared(folder))
    assert len(held_out) == 4
    assert not {p.text for p in held_out} & {p.text for p in train}
    assert len(train) == 20 - 4


def test_what_cannot_be_prepared(tmp_path):
    name = write_rows(tmp_path / "a.jsonl", rows(4))
    with pytest.raises(DataError, match="4 problems are too few to set held-out ones aside"):
        prepare([name], tmp_path / "out", held_out=1)
    empty = write_rows(tmp_path / "b.jsonl", [{"problem": "p", "answer": ""}])
    with pytest.raises(DataError, match=r"leaves none of 1 problems; removed: empty_answers 1"):
        prepare([empty], tmp_path / "out")
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        prepare([name], tmp_path / "out", benchmarks=[str(tmp_path / "none.jsonl")])
    with pytest.raises(ValueError, match="no names"):
        prepare([], tmp_path / "out")
    with pytest.raises(ValueError, match="held_out"):
        prepare([name], tmp_path / "out", held_out=-1)
    with pytest.raises(ValueError, match="prompt_version"):
        prepare([name], tmp_path / "out", prompt_limit=PromptLimit(len, 1))
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be prepared into"):
        prepare([name], name)


def test_a_damaged_version_is_not_taken_for_prepared(tmp_path):
    name = write_rows(tmp_path / "a.jsonl", rows(4))
    folder = prepare([name], tmp_path / "out").folder
    next(folder.glob("*.array_record*")).unlink()
    with pytest.raises(DataError, match="damaged"):
        prepare([name], tmp_path / "out")


def test_a_crash_in_the_middle_leaves_nothing_that_counts(tmp_path, monkeypatch):
    name = write_rows(tmp_path / "a.jsonl", rows(10))

    def to_record(problem, working=preparation.to_record):
        if problem.id.endswith("7"):
            raise KeyboardInterrupt
        return working(problem)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "to_record", to_record)
        with pytest.raises(KeyboardInterrupt):
            prepare([name], tmp_path / "out")
    assert find_prepared(tmp_path / "out") is None
    made = prepare([name], tmp_path / "out")
    assert not made.cached
    assert len(open_prepared(tmp_path / "out")) == 10


def test_another_process_is_faster(tmp_path, monkeypatch):
    """Its folder appears while this one is still writing."""
    name = write_rows(tmp_path / "a.jsonl", rows(10))
    faster = []

    def to_record(problem, working=preparation.to_record):
        if not faster:
            faster.append(None)
            faster.append(prepare([name], tmp_path / "out"))
        return working(problem)

    monkeypatch.setattr(preparation, "to_record", to_record)
    slower = prepare([name], tmp_path / "out")
    assert slower.cached
    assert not faster[1].cached
    assert slower.folder == faster[1].folder
    assert [path.name for path in slower.folder.parent.iterdir()] == ["1.0.0"]
    assert len(open_prepared(slower.folder)) == 10


PREPARE = """
import sys
from attnrl_jax.datasets import preparation

def write(*arguments, written=preparation._write):
    print("ready", flush=True)
    sys.stdin.readline()
    return written(*arguments)

preparation._write = write
made = preparation.prepare([sys.argv[1]], sys.argv[2])
print(made.cached, made.folder)
assert "tensorflow" not in sys.modules
"""


def test_two_processes_prepare_the_same_at_once(tmp_path):
    """Both have seen that nothing is prepared when they start to write. Neither says anything of
    its own, and neither needs TensorFlow."""
    name = write_rows(tmp_path / "a.jsonl", rows(500))
    out = tmp_path / "out"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, name, str(out)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 2
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    folder = find_prepared(out)
    assert sorted(words for words, _ in said) == [f"False {folder}\n", f"True {folder}\n"]
    assert [words for _, words in said] == ["", ""]
    assert list(open_prepared(folder)) == read_problems(name)
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]


NO_NETWORK = """
import socket, sys

def refused(*arguments):
    raise AssertionError(f"a connection was tried: {arguments}")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refused
from attnrl_jax.datasets.preparation import prepare
from attnrl_jax.datasets.prepared import open_prepared
assert "tensorflow_datasets" not in sys.modules, "heavy import"
print(open_prepared(prepare([sys.argv[1]], sys.argv[2]).folder)[2].id)
"""


def test_nothing_is_asked_of_the_network(tmp_path):
    name = write_rows(tmp_path / "a.jsonl", rows(4))
    command = [sys.executable, "-c", NO_NETWORK, name, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("a-000003\n", "")


@pytest.mark.skipif(not SHARED.is_dir(), reason="problem files are not here")
def test_real_files(tmp_path):
    listed = read_problems(SHARED / "train" / "dapo_math_train.jsonl.gz")[::40]
    values = [{"id": p.id, "problem": p.text, "answers": list(p.answers)} for p in listed]
    name = write_rows(tmp_path / "slice.jsonl", values)
    benchmarks = [str(SHARED / "eval" / f"{n}.jsonl") for n in ("aime24", "amc23")]
    made = prepare([name], tmp_path / "out", benchmarks=benchmarks, held_out=64)
    train, held_out = open_prepared(made.folder), open_prepared(made.folder, "held_out")
    assert len(train) + len(held_out) == made.report.kept <= made.report.read == len(listed)
    assert {"aime24", "amc23", "held_out"} == set(made.report.benchmarks)
    by_id: dict[str, Problem] = {p.id: p for p in listed}
    assert all(by_id[p.id] == p for source in (train, held_out) for p in source)
