"""Every part of docs/extending.md is run: as configuration files, and all parts in one run."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from attnrl_jax.models.config import FAMILIES, ModelError, read_config
from attnrl_jax.models.transformer import forward
from attnrl_jax.models.weights import load_params
from experiments.configs import attnrl_graph
from experiments.folders import FolderError
from experiments.parts import Parts, load_parts, with_parts
from experiments.settings import SettingError, build
from tests.conftest import GOLDEN, ROOT
from tests.experiments.runs import execute, small

DOCUMENT = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
NAMES = ("reward", "problems", "segmenter", "branch_rule")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The blocks of parts as configuration files, by the part they are of."""
    folder = tmp_path_factory.mktemp("extending")
    paths = {}
    for name, block in zip(NAMES, BLOCKS, strict=False):
        assert f"Parts({name}=" in block
        paths[name] = folder / f"my_{name}.py"
        paths[name].write_text(block)
    return paths


def test_every_kind_of_part_has_a_short_block():
    assert len(BLOCKS) == len(NAMES) + 1
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 20


@pytest.fixture(scope="module")
def run_with_all(files, tmp_path_factory):
    """A run with all parts, each read from its file."""
    given = {name: getattr(load_parts(path), name) for name, path in files.items()}
    parts = Parts(**given, held_out=load_parts(files["problems"]).held_out)
    folder = tmp_path_factory.mktemp("extended") / "run"
    return parts, folder, execute(config(), folder, parts=parts)


def config():
    made = small(attnrl_graph.get_config(), steps=2)
    made.checkpoint_every = 2
    return made


def test_a_run_uses_all_of_them(run_with_all):
    _, folder, history = run_with_all
    assert [m["step"] for m in history] == [0, 1, 2]
    assert history[-1]["judge/lost_total"] == 0
    trees = json.loads((folder / "trees" / "step_000002.json").read_text())["problems"]
    rewards = {leaf["reward"] for tree in trees for leaf in tree["leaves"]}
    assert rewards <= {np.float32(x) for x in (0.0, 0.1, 1.0)}
    assert {tree["problem"]["id"].split("-")[0] for tree in trees} == {"double"}
    steps = [step for tree in trees for leaf in tree["leaves"] for step in leaf["steps"]]
    assert max(step["end"] - step["start"] for step in steps) <= 8
    for tree in trees:
        roots = {leaf["row"]: leaf for leaf in tree["leaves"] if leaf["root"] == leaf["row"]}
        for leaf in tree["leaves"]:
            if leaf["root"] != leaf["row"]:
                # The two positions are at the longest steps behind the first.
                root = roots[leaf["root"]]["steps"][1:]
                longest = sorted((s["start"] - s["end"], s["start"]) for s in root)[:2]
                assert leaf["split"] in [start for _, start in longest]
    assert any(leaf["root"] != leaf["row"] for tree in trees for leaf in tree["leaves"])


def test_a_run_is_not_continued_with_other_parts(run_with_all):
    parts, folder, _ = run_with_all
    recorded = json.loads((folder / "config.json").read_text())
    assert recorded["parts"]["reward"] == "reward"
    assert recorded["parts"]["problems"] == "Doubles"
    assert recorded["branching"]["rule"] == "custom"
    without = Parts(problems=parts.problems, held_out=parts.held_out)
    with pytest.raises(FolderError, match=r"parts\.reward"):
        execute(config(), folder, parts=without)


def test_parts_that_make_no_sense_are_refused(files, tmp_path):
    rule = load_parts(files["branch_rule"])
    for changes, given, message in (
        ({"branching.rule": "random"}, rule, "branching.rule is 'random', but the parts have"),
        ({"branching.rule": "custom"}, Parts(), "needs a branch_rule among the parts"),
        ({"method": "grpo"}, rule, "method grpo has none"),
        ({"data.train": "x.jsonl"}, load_parts(files["problems"]), "data.train is given"),
    ):
        made = config()
        made.update_from_flattened_dict(changes)
        with pytest.raises(SettingError, match=re.escape(message)):
            build(with_parts(made, given))
    with pytest.raises(SettingError, match="reward must be a function"):
        Parts(reward=3)
    with pytest.raises(SettingError, match="given together"):
        Parts(problems=[])
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def get_parts():\n    return {}\n")
    with pytest.raises(SettingError, match=r"get_parts\(\) must return Parts; got dict"):
        load_parts(wrong)
    wrong.write_text("")
    assert load_parts(wrong) == Parts()


def test_a_family_is_an_entry(tmp_path, monkeypatch):
    """A Llama folder that calls itself a Mistral gives the same numbers."""
    monkeypatch.setattr("attnrl_jax.models.config.FAMILIES", FAMILIES.copy())
    source, folder = GOLDEN / "models" / "llama", tmp_path / "mistral"
    shutil.copytree(source, folder)
    raw = json.loads((folder / "config.json").read_text())
    mistral = raw | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(mistral))
    with pytest.raises(ModelError, match="unknown architecture 'mistral'"):
        read_config(folder)
    exec(compile(BLOCKS[-1], "extending.md", "exec"), {})
    ours, theirs = read_config(folder), read_config(source)
    assert (ours.family, theirs.family) == ("mistral", "llama")
    tokens, lengths = np.arange(20)[None] % ours.vocab_size, np.array([20])
    hidden = [
        forward(load_params(path, model), model, tokens, lengths).hidden
        for path, model in ((folder, ours), (source, theirs))
    ]
    np.testing.assert_array_equal(*hidden)
    (folder / "config.json").write_text(json.dumps(mistral | {"sliding_window": 4096}))
    with pytest.raises(ModelError, match="sliding-window"):
        read_config(folder)
