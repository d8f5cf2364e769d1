"""Sources of problems by name."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from attnrl_jax.datasets.cleaning import CleaningConfig
from attnrl_jax.datasets.files import FieldNames, read_problems
from attnrl_jax.datasets.names import read_names, resolve, split_names
from attnrl_jax.datasets.preparation import prepare
from attnrl_jax.datasets.prepared import open_prepared
from attnrl_jax.tasks.problems import DataError, Problem

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "data" / "problems" / "small.jsonl"


def test_names_are_separated_by_commas():
    assert split_names("a.jsonl, hf:x/y@main:*.parquet,tfds:z@train") == (
        "a.jsonl",
        "hf:x/y@main:*.parquet",
        "tfds:z@train",
    )
    assert split_names("") == split_names("  ") == ()
    for text in ("a,", ",a", "a,,b", ","):
        with pytest.raises(DataError, match="empty name"):
            split_names(text)


def test_files_and_folders_in_order(tmp_path):
    (tmp_path / "folder").mkdir()
    line = '{{"problem": "{}", "answer": "1"}}\n'
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / "folder" / name).write_text(line.format(name))
    (tmp_path / "folder" / "c.jsonl.gz").write_bytes(gzip.compress(line.format("c").encode()))
    (tmp_path / "folder" / "notes.txt").write_text("no problems")
    (tmp_path / "single.jsonl").write_text(line.format("single"))
    names = [str(tmp_path / "single.jsonl"), str(tmp_path / "folder")]
    read = read_names(names)
    assert [p.text for p in read] == ["single", "a.jsonl", "b.jsonl", "c"]
    assert [p.id for p in read] == ["single-000001", "a-000001", "b-000001", "c-000001"]
    assert [part for part, _ in resolve(names[1]).read_parts()] == ["a", "b", "c"]


def test_files_beside_prepared_problems_are_the_source(tmp_path):
    """A folder that is prepared into itself stays the same source."""
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "answer": "1"}')
    made = prepare([str(tmp_path)], tmp_path)
    assert resolve(str(tmp_path)).files == (tmp_path / "a.jsonl",)
    assert prepare([str(tmp_path)], tmp_path).folder == made.folder


def test_fields_are_passed_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "no", "task": "yes", "answer": "no", "gold": "7"}\n')
    assert read_names([str(path)], FieldNames("task", "gold")) == [
        Problem("a-000001", "yes", ("7",))
    ]


def test_what_is_no_source(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for name, said in (
        (tmp_path / "none.jsonl", "no such file or folder .* tfds:NAME or hf:OWNER/NAME"),
        (tmp_path / "notes.txt", r"files of problems end in \.jsonl, .*\.parquet"),
        (tmp_path, "neither prepared problems nor files"),
        ("tfds:", r"tfds:NAME\[/CONFIG\]"),
        ("tfds:a b", r"tfds:NAME\[/CONFIG\]"),
        ("tfds:../a", r"tfds:NAME\[/CONFIG\]"),
    ):
        with pytest.raises(DataError, match=said) as error:
            resolve(str(name))
        assert str(error.value).startswith(f"{name}: ")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder of tensorflow-datasets with problems of ours and a data set of someone else's."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    prepare([str(SMALL)], folder, held_out=1)

    class SchoolMaths(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")
        url_infos = None

        def _info(self):
            features = {
                "question": tfds.features.Text(),
                "answer": tfds.features.Text(),
                "level": np.int64,
                "about": {"golds": tfds.features.Sequence(tfds.features.Text())},
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(3), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                about = {"golds": [str(i), f"{i}.0"]}
                text = f"Größe {i} von {count}?"
                yield i, {"question": text, "answer": f"so #### {i}", "level": i, "about": about}

    for name in ("school_maths", "broken_maths"):
        SchoolMaths.name = name
        builder = SchoolMaths(data_dir=folder)
        builder.download_and_prepare(file_format="array_record", download_dir=folder / "downloads")
    for path in (folder / "broken_maths").rglob("*train.array_record*"):
        path.write_bytes(b"")
    return folder


def test_prepared_problems_by_path_and_by_name(data_dir):
    folder = next(data_dir.glob("problems/*"))
    train = list(open_prepared(folder))
    assert len(train) == 5
    assert read_names([str(folder)]) == train
    assert [p.level for p in train] == [p.level for p in read_problems(SMALL) if p in train]
    name = f"tfds:problems/{folder.name}"
    assert read_names([name], data_dir=data_dir) == train
    assert read_names([f"{name}:1.0.0@held_out"], data_dir=data_dir) == list(
        open_prepared(folder, "held_out")
    )


def test_data_sets_of_others(data_dir):
    name = "tfds:school_maths"
    expected = [
        Problem(f"school_maths-00000{i + 1}", f"Größe {i} von 3?", (str(i),), i) for i in range(3)
    ]
    assert read_names([name], data_dir=data_dir) == expected
    assert [p.text for p in read_names([f"{name}:2.0.0@test"], data_dir=data_dir)] == [
        "Größe 0 von 2?",
        "Größe 1 von 2?",
    ]
    assert [p.level for p in read_names([f"{name}@train[1:]"], data_dir=data_dir)] == [1, 2]
    golds = read_names([name], FieldNames("question", "about.golds"), data_dir)
    assert [p.answers for p in golds] == [("0", "0.0"), ("1", "1.0"), ("2", "2.0")]
    with pytest.raises(DataError, match=r"school_maths, row 1: .*task"):
        read_names([name], FieldNames("task", ""), data_dir)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tfds:no_such_maths", "knows no data set of this name"),
        ("tfds:school_maths:9.9.9", "tfds:school_maths:9.9.9: "),
        ("tfds:school_maths@validation", "no such split; there are: test, train"),
        ("tfds:school_maths@train[", "cannot be read"),
        ("tfds:broken_maths", "cannot be read"),
    ],
)
def test_what_data_sets_do_not_have(data_dir, name, said):
    with pytest.raises(DataError) as error:
        read_names([name], data_dir=data_dir)
    assert str(error.value).startswith(name)
    assert said in str(error.value)


def test_what_is_known_is_prepared_when_it_is_first_asked_for(tmp_path, capsys):
    import tensorflow_datasets as tfds

    class NumbersOnly(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = tuple(
            tfds.core.BuilderConfig(name=name) for name in ("two", "offline", "needy")
        )
        url_infos = None

        def _info(self):
            texts = {"problem": tfds.features.Text(), "answer": np.float32}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(texts))

        def _split_generators(self, dl_manager):
            if self.builder_config.name == "offline":
                # Nobody listens there: what a download without network comes to.
                dl_manager.download("http://127.0.0.1:9/numbers.jsonl")
            if self.builder_config.name == "needy":
                raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"problem": f"Number {i}?", "answer": i}) for i in range(2))

    name = "tfds:numbers_only/two"
    assert {p.answers for p in read_names([name], data_dir=tmp_path)} == {("0",), ("1",)}
    assert capsys.readouterr().out == ""
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    assert len(read_names([name], data_dir=tmp_path)) == 2
    assert written == {path: path.stat().st_mtime_ns for path in written}
    with pytest.raises(DataError, match=r"numbers_only/offline: .*Connection refused.*; .* local"):
        read_names(["tfds:numbers_only/offline"], data_dir=tmp_path)
    with pytest.raises(DataError, match="its builder needs tensorflow; prepare it elsewhere"):
        read_names(["tfds:numbers_only/needy"], data_dir=tmp_path)


def test_the_environment_says_where_data_sets_are(data_dir):
    code = (
        "import sys; from attnrl_jax.datasets.names import read_names\n"
        "assert 'tensorflow_datasets' not in sys.modules, 'heavy import'\n"
        "print(len(read_names(['tfds:school_maths'])))\n"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TFDS_DATA_DIR": str(data_dir)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "3\n", done.stderr


def test_prepared_problems_are_prepared_again_as_any_other_source(data_dir, tmp_path):
    folder = next(data_dir.glob("problems/*"))
    made = prepare([str(folder)], tmp_path, cleaning=CleaningConfig(overlap=0.0))
    assert list(open_prepared(made.folder)) == list(open_prepared(folder))
    assert prepare([str(folder)], tmp_path, cleaning=CleaningConfig(overlap=0.0)).cached
