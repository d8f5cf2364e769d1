"""What a run is built from: problems of files, prepared folders, held-out sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnrl_jax.datasets.preparation import prepare
from attnrl_jax.datasets.prepared import open_prepared
from attnrl_jax.sharding import make_mesh
from experiments.configs import attnrl_hf
from experiments.settings import build
from experiments.tasks import build_task, load_policy

TINY_MODEL = Path(__file__).resolve().parents[1] / "data" / "golden" / "models" / "qwen2_tied"


def write(path: Path, texts, problem="problem", answer="answer") -> Path:
    rows = [{problem: text, answer: str(number)} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count: int, start: int = 0) -> list[str]:
    return [f"How many legs have {n} cats and {n + 7} birds together?" for n in range(start, count)]


@pytest.fixture(scope="module")
def policy():
    config = attnrl_hf.get_config()
    config.model.path = str(TINY_MODEL)
    config.data.train = "FILE.jsonl"
    config.response_budget = 64
    settings = build(config)
    return load_policy(settings, make_mesh(settings.mesh))


def built(policy, cache: Path, **data):
    config = attnrl_hf.get_config()
    config.model.path = str(TINY_MODEL)
    config.prompt_budget = 256
    config.data.update(data)
    config.data.cache = str(cache)
    task = build_task(build(config), policy)
    task.task.judge.close()
    return task


def trained(task) -> set[str]:
    source = open_prepared(task.prepared.folder)
    return {source[i].text for i in range(len(source))}


def held_out(task) -> set[str]:
    return {problem.text for problem in task.task.held_out}


def test_how_attention_is_computed_reaches_the_model():
    """What `ModelSettings` says of it, and a route that these devices lack is refused."""
    config = attnrl_hf.get_config()
    config.model.path = str(TINY_MODEL)
    config.data.train = "FILE.jsonl"
    config.response_budget = 64
    config.model.update(dtype="bfloat16", attention="blockwise", block_length=96, remat="dots")
    settings = build(config)
    mesh = make_mesh(settings.mesh)
    model = load_policy(settings, mesh).model
    assert (model.dtype, model.attention) == ("bfloat16", "blockwise")
    assert (model.block_length, model.remat) == (96, "dots")
    config.model.attention = "splash"
    with pytest.raises(ValueError, match=r"splash.*tpu.*cpu"):
        load_policy(build(config), mesh)


def test_a_prepared_folder_keeps_its_own_held_out_problems(policy, tmp_path):
    train = write(tmp_path / "train.jsonl", texts(50))
    prepared = prepare([str(train)], tmp_path / "out", held_out=7)
    task = built(policy, tmp_path / "cache", train=str(prepared.folder))
    own = open_prepared(prepared.folder, "held_out")
    assert held_out(task) == {own[i].text for i in range(7)}
    assert trained(task) == set(texts(50)) - held_out(task)


def test_what_is_held_out_leaves_a_prepared_folder(policy, tmp_path):
    """A bug: only equal texts were left out, and benchmarks had no effect on prepared problems."""
    train = write(tmp_path / "train.jsonl", texts(40))
    prepared = prepare([str(train)], tmp_path / "out")
    other = write(tmp_path / "held.jsonl", [text.upper() for text in texts(3)])
    bench = write(tmp_path / "bench.jsonl", [f"  {text}" for text in texts(6, start=4)])
    task = built(
        policy, tmp_path / "cache", train=str(prepared.folder), held_out=str(other),
        benchmarks=str(bench),
    )  # fmt: skip
    assert len(held_out(task)) == 3
    assert trained(task) == set(texts(40)) - set(texts(3)) - set(texts(6, start=4))


def test_a_prepared_folder_is_cleaned_no_further(policy, tmp_path):
    train = write(tmp_path / "train.jsonl", ["", *texts(20), *texts(1)][1:])
    with train.open("a") as file:
        file.write(json.dumps({"problem": texts(2)[1], "answer": "1"}) + "\n")
    from attnrl_jax.datasets.cleaning import CleaningConfig

    keep = CleaningConfig(duplicates=False, conflicting_answers=False)
    prepared = prepare([str(train)], tmp_path / "out", cleaning=keep)
    other = write(tmp_path / "held.jsonl", texts(60, start=55))
    task = built(policy, tmp_path / "cache", train=str(prepared.folder), held_out=str(other))
    assert len(open_prepared(task.prepared.folder)) == 22


@pytest.mark.parametrize("same_fields", [True, False])
def test_held_out_files_may_have_the_usual_fields(policy, tmp_path, same_fields):
    """A bug: a held-out file had to have both the given and the usual fields."""
    train = write(tmp_path / "train.jsonl", texts(30), "body", "gold")
    names = ("body", "gold") if same_fields else ("problem", "answer")
    other = write(tmp_path / "held.jsonl", texts(32, start=29), *names)
    task = built(
        policy, tmp_path / "cache", train=str(train), held_out=str(other),
        fields={"problem": "body", "answer": "gold"},
    )  # fmt: skip
    assert held_out(task) == set(texts(32, start=29))
    assert trained(task) == set(texts(29))


def test_a_cache_among_the_files_is_no_source(policy, tmp_path):
    """A bug: problems prepared into the folder of the files were taken for these ever after."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", texts(30))
    before = built(policy, folder, train=str(folder))
    write(folder / "b.jsonl", texts(40, start=30))
    after = built(policy, folder, train=str(folder))
    assert trained(before) | held_out(before) == set(texts(30))
    assert trained(after) | held_out(after) == set(texts(40))
