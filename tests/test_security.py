"""Nothing that is read is executed, and names in what is read lead nowhere else.

Model folders, problems, checkpoints and responses come from elsewhere. Configuration and sweep
files do not: they are Python by design, like the program itself.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from attnrl_jax.datasets.files import FieldNames, read_problems
from attnrl_jax.datasets.hub import model_folder
from attnrl_jax.datasets.prepared import open_prepared
from attnrl_jax.models.config import ModelError, read_config
from attnrl_jax.models.weights import INDEX_FILE, SINGLE_FILE, load_params, save_folder
from attnrl_jax.tasks.problems import DataError
from attnrl_jax.tasks.prompts import PromptConfig, build_prompt
from attnrl_jax.tasks.tokenizer import load_tokenizer
from attnrl_jax.training.checkpoint import Checkpointer
from attnrl_jax.training.state import init_state
from experiments.plan import run_name
from experiments.tasks import shipped_policy
from tests.conftest import ROOT
from tests.training.tiny import fresh_state, tiny_setup

SOURCES = sorted([*(ROOT / "attnrl_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def plant(folder: Path, sung: Path) -> None:
    """Files that would run if anything unpickled or imported them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "tokenizer.pkl",
                 "model.ckpt", "checkpoint.pickle"):  # fmt: skip
        (folder / name).write_bytes(pickle.dumps(Canary(sung)))
    np.save(folder / "arrays.npy", np.array([Canary(sung)], object), allow_pickle=True)
    program = f"import os\nos.mkdir({str(sung)!r})\n"
    for name in ("modeling_custom.py", "tokenization_custom.py", "configuration_custom.py",
                 "__init__.py", "sitecustomize.py", "conftest.py"):  # fmt: skip
        (folder / name).write_text(program)


@pytest.fixture
def hostile(tmp_path):
    """A copy of the shipped policy with canaries, whose files name code of its own."""
    folder, sung = tmp_path / "model", tmp_path / "sung"
    shutil.copytree(shipped_policy(), folder)
    plant(folder, sung)
    for name, classes in (
        ("config.json", {"AutoConfig": "configuration_custom.C", "AutoModel": "modeling_custom.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_custom.T", None]}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": classes}))
    return folder, sung


def test_the_canary_sings(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "sung")))
    assert (tmp_path / "sung").exists()


def test_a_model_folder_is_read_and_copied_without_its_code(hostile, tmp_path):
    folder, sung = hostile
    config = read_config(model_folder(str(folder)))
    params = load_params(folder, config)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    assert len(build_prompt("h= 9 ? h", tokenizer, PromptConfig(instruction=""))) > 2
    save_folder(tmp_path / "out", params, config, source=folder)
    assert not sung.exists()
    # Nor is it published with the weights.
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", SINGLE_FILE} <= copied
    assert not [name for name in copied if not name.endswith((".json", ".safetensors"))]


def test_weights_that_are_pickled_are_no_weights(hostile):
    folder, sung = hostile
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_params(folder, read_config(folder))
    (folder / SINGLE_FILE).write_bytes(pickle.dumps(Canary(sung)))
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_params(folder, read_config(folder))
    assert not sung.exists()


def test_a_tokenizer_of_its_own_class_is_not_loaded(hostile):
    """Without tokenizer.json the class that its files name would be needed."""
    folder, sung = hostile
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer files cannot be read"):
        load_tokenizer(folder, 1000)
    assert not sung.exists()


TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('SUNG') }}",
    "{{ self.__init__.__globals__['__builtins__']['eval']('1') }}",
    "{{ messages.append.__self__.__class__.__base__ }}",
    "{{ lipsum.__globals__['os'].mkdir('SUNG') }}",
    "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
    "{% include '/etc/passwd' %}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_stay_in_the_sandbox(hostile, template):
    folder, sung = hostile
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["chat_template"] = template.replace("SUNG", str(sung))
    path.write_text(json.dumps(values))
    tokenizer = load_tokenizer(folder, read_config(folder).vocab_size)
    text, refusal = "", ""
    try:
        text = tokenizer.decode(build_prompt("h= 9 ? h", tokenizer, PromptConfig()))
    except ValueError as error:
        refusal = str(error)
    # Refused; or the sandbox gives an undefined value, which prints as nothing.
    assert refusal.startswith("the chat template refuses the roles") or text == ""
    assert not sung.exists()


def test_data_is_read_without_running_any(tmp_path):
    folder, sung = tmp_path / "data", tmp_path / "sung"
    plant(folder, sung)
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.jsonl.gz"):
        (folder / name).write_bytes(pickle.dumps(Canary(sung)))
        with pytest.raises(DataError):
            list(read_problems(folder / name, FieldNames()))
    with pytest.raises(DataError):
        open_prepared(folder)
    assert not sung.exists()


def test_a_checkpoint_is_read_without_running_any(golden_model, tmp_path):
    golden = golden_model("qwen2_tied")
    setup = tiny_setup(golden, steps=0)
    state, sung = fresh_state(golden, setup), tmp_path / "sung"
    writer = Checkpointer(tmp_path / "run")
    writer.save(state)
    writer.close()
    for folder in (tmp_path / "run", *(tmp_path / "run").rglob("*")):
        if folder.is_dir():
            plant(folder, sung)
    reader = Checkpointer(tmp_path / "run")
    template = init_state(golden.params, setup.config.optimizer, None)
    restored, _ = reader.restore(template)
    reader.close()
    jax.tree.map(np.testing.assert_array_equal, restored.train, state.train)
    assert not sung.exists()


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "sympify", "parse_expr", "parse_latex"}
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "cloudpickle",
    "torch",
}
FORBIDDEN_ATTRIBUTES = {"os.system", "os.popen", "yaml.load"}
FORBIDDEN_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}


def offences(source: str) -> list[str]:
    """What a file does that may execute what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                found.append(node.func.id)
            name = ast.unparse(node.func)
            if name in FORBIDDEN_ATTRIBUTES or name.split(".")[-1] in ("sympify", "parse_expr"):
                found.append(name)
            for keyword in node.keywords:
                is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in FORBIDDEN_KEYWORDS and not is_off:
                    found.append(keyword.arg)
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [m for m in modules if m.split(".")[0] in FORBIDDEN_MODULES]
    return found


def test_no_source_evaluates_or_unpickles():
    """But for the bench's peers, which run other people's programs in an environment of theirs.

    A reward function of the user's goes to the judging workers by cloudpickle: from this program to
    its own processes, never from a file.
    """
    peers = ROOT / "experiments" / "bench" / "peers"
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in SOURCES
        if not path.is_relative_to(peers) and (wrong := offences(path.read_text()))
    }
    assert found == {"attnrl_jax/tasks/rewards.py": ["cloudpickle"] * 3}


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)", "import pickle", "from torch import load", "sympy.sympify(x)",
        "os.system(x)", "run(x, shell=True)", "f(trust_remote_code=flag)",
        "np.load(p, allow_pickle=True)",
        "import dill as d",
    ],
)  # fmt: skip
def test_the_rule_sees_offences(line):
    assert offences(line)
    assert not offences("f(trust_remote_code=False)\nmodel.eval\nre.compile('x')\nast.literal_eval")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..", "", "sub/part.safetensors"]
)
def test_names_in_an_index_stay_in_the_folder(tmp_path, golden_model, name):
    golden = golden_model("qwen2_tied")
    folder = tmp_path / "model"
    shutil.copytree(golden.folder, folder)
    (tmp_path / "secret.safetensors").write_bytes((folder / SINGLE_FILE).read_bytes())
    (folder / SINGLE_FILE).unlink()
    names = dict.fromkeys(["model.embed_tokens.weight", "model.norm.weight"], name)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"outside its folder|does not exist"):
        load_params(folder, golden.config)


def test_links_out_of_a_model_folder_are_not_published(tmp_path, golden_model):
    """A bug: copying followed them, so that a folder from elsewhere could carry a user's key into
    what the user exports and uploads."""
    golden = golden_model("qwen2_tied")
    folder, key = tmp_path / "model", tmp_path / "id_ed25519"
    shutil.copytree(golden.folder, folder)
    key.write_text("secret")
    (folder / "notes.txt").symlink_to(key)
    with pytest.raises(ModelError, match=r"notes.txt is a link out of its folder, to .*id_ed25519"):
        save_folder(tmp_path / "out", golden.params, golden.config, source=folder)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_links_that_are_a_users_own_are_followed(tmp_path, golden_model):
    """Of a folder that is reached by a link, inside of it, and to the blobs of the hub's cache."""
    golden = golden_model("qwen2_tied")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "revision"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in golden.folder.iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (snapshot / "again.json").symlink_to("config.json")
    (tmp_path / "mine").symlink_to(snapshot)
    save_folder(tmp_path / "out", golden.params, golden.config, source=tmp_path / "mine")
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"config.json", "again.json"}
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("value", ["../../x", "/etc/cron.d/x", "a\0b", "..", "~/x", "a\nb"])
def test_runs_of_a_sweep_stay_in_its_folder(value):
    name = run_name({"data.train": value, "seed": 1})
    assert "/" not in name
    assert "\0" not in name
    assert name not in (".", "..")
    assert (Path("/sweep") / name).resolve().parent == Path("/sweep")
