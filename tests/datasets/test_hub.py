"""Files from the hub: a server on this machine speaks the endpoints that are used."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from attnrl_jax.datasets.hub import data_files, model_folder
from attnrl_jax.tasks.problems import DataError

ROOT = Path(__file__).parents[2]
ROW = b'{"problem": "One and one?", "answer": "2"}\n'
SHA = "a" * 40

REPOSITORIES = {
    "datasets/owner/maths": {
        "README.md": b"about",
        "data/train-1.jsonl": ROW * 2,
        "data/train-0.jsonl": ROW,
        "data/test.jsonl": ROW * 3,
        "data/extra.jsonl": ROW * 4,
        "dataset_infos.json": b"{}",
        "train.csv": b"problem,answer",
    },
    "datasets/owner/plain": {
        "one.jsonl": ROW,
        "odd[1].jsonl": ROW * 2,
        "script.py": b"1 / 0",
        "dataset_infos.json": b"{}",
    },
    "datasets/owner/useless": {"train.csv": b"", "notes.txt": b""},
    "datasets/owner/hostile": {"../../../train.jsonl": ROW},
    "datasets/owner/absolute": {"/tmp/train.jsonl": ROW},
    "owner/model": {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "tokenizer.json": b"{}",
        "merges.txt": b"",
        "chat_template.jinja": b"",
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"1 / 0",
        "onnx/config.json": b"{}",
    },
    "owner/pickles": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
}
# Answers without content: status and the hub's own code.
REFUSED = {
    "datasets/owner/gated": (403, "GatedRepo"),
    "datasets/owner/private": (401, "RepoNotFound"),
    "datasets/owner/busy": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    """`/api/KIND/OWNER/NAME/tree|revision/...` and `/KIND/OWNER/NAME/resolve/...`."""

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/")
        is_api = path.startswith("api/")
        path = path.removeprefix("api/").removeprefix("models/")
        parts = path.split("/")
        depth = 3 if parts[0] == "datasets" else 2
        repository, (what, revision, *rest) = (
            "/".join(parts[:depth]),
            parts[depth:] or ("revision", "main"),
        )
        files = REPOSITORIES.get(repository)
        if files is None:
            self._refuse(*REFUSED.get(repository, (404, "RepoNotFound")))
        elif revision not in ("main", "v1", SHA):
            self._refuse(404, "RevisionNotFound")
        elif is_api and what == "tree":
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{len(name):040x}"}
                for name, content in files.items()
            ]
            self._answer(json.dumps(listing).encode())
        elif is_api:
            siblings = [{"rfilename": name} for name in files]
            name = repository.removeprefix("datasets/")
            about = {"id": name, "sha": SHA, "siblings": siblings}
            self._answer(json.dumps(about).encode())
        else:
            name = "/".join(rest)
            self._answer(files[name], {"ETag": f'"{abs(hash(name)):x}"', "X-Repo-Commit": SHA})

    def do_HEAD(self):
        self.do_GET()

    def _refuse(self, status, code):
        self._answer(b"{}", {"X-Error-Code": code} if code else {}, status)

    def _answer(self, content, headers=None, status=200):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextmanager
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


ASK = """
import json, sys
from attnrl_jax.datasets.hub import data_files, model_folder
from attnrl_jax.datasets.names import read_names
from attnrl_jax.tasks.problems import DataError
said = {}
for kind, name in json.loads(sys.argv[1]):
    try:
        if kind == "files":
            said[name] = [str(path) for path in data_files(name, (".jsonl", ".json", ".parquet"))]
        elif kind == "read":
            said[name] = len(read_names([name]))
        else:
            folder = model_folder(name)
            said[name] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    except DataError as error:
        said[name] = f"error: {error}"
print(json.dumps(said))
"""


def ask(endpoint, home, *questions, **environment):
    """Answers to names, from a process of its own: the client reads its settings when imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        cwd=ROOT,
        env=kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What is said with the hub, and then, with the same cache, without it."""
    home = tmp_path_factory.mktemp("hub")
    with hub() as endpoint:
        online = ask(
            endpoint,
            home,
            ("files", "hf:owner/maths"),
            ("files", "hf:owner/maths@v1:*test*"),
            ("read", "hf:owner/plain"),
            ("files", "hf:owner/plain:odd?1*"),
            ("files", "hf:owner/maths:*.parquet"),
            ("files", "hf:owner/maths@v7"),
            *(
                ("files", f"hf:owner/{name}")
                for name in ("useless", "hostile", "absolute", "gated", "private", "none", "busy")
            ),
            ("model", "hf:owner/model"),
            ("model", "hf:owner/pickles"),
        )
    offline = ask(
        endpoint,
        home,
        ("files", "hf:owner/maths"),
        ("files", "hf:owner/maths:*.jsonl"),
        ("read", "hf:owner/plain"),
        ("files", "hf:owner/plain@v1"),
        ("model", "hf:owner/model"),
        ("model", "hf:owner/other"),
    )
    return home, endpoint, online, offline


def inner(paths):
    return [path.split(f"{SHA}/")[1] for path in paths]


def test_training_files_are_taken(answers):
    home, _, online, _ = answers
    paths = online["hf:owner/maths"]
    assert inner(paths) == ["data/train-0.jsonl", "data/train-1.jsonl"]
    assert all(Path(path).is_relative_to(home) for path in paths)
    assert Path(paths[1]).read_bytes() == ROW * 2


def test_pattern_and_revision(answers):
    _, _, online, _ = answers
    assert inner(online["hf:owner/maths@v1:*test*"]) == ["data/test.jsonl"]
    assert inner(online["hf:owner/plain:odd?1*"]) == ["odd[1].jsonl"]


def test_all_files_where_none_is_for_training(answers):
    assert answers[2]["hf:owner/plain"] == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("maths:*.parquet", "no file of the repository matches '*.parquet'"),
        ("maths@v7", "no such revision"),
        ("useless", "no file of the repository ends in .jsonl"),
        ("hostile", "a file outside of itself: '../../../train.jsonl'"),
        ("absolute", "a file outside of itself: '/tmp/train.jsonl'"),
        ("gated", "access to this dataset"),
        ("private", "no such dataset"),
        ("none", "no such dataset"),
        ("busy", "cannot be reached"),
        ("pickles", "config.json and *.safetensors are needed"),
    ],
)
def test_what_cannot_be_used_is_named(answers, name, said):
    home, _, online, _ = answers
    error = online[f"hf:owner/{name}"]
    assert error.startswith(f"error: hf:owner/{name}: ")
    assert said in error
    assert "\n" not in error
    assert not [path for path in home.rglob("train.jsonl") if "snapshots" not in path.parts]


def test_a_model_is_downloaded_without_what_could_run(answers):
    _, _, online, offline = answers
    expected = [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert online["hf:owner/model"] == offline["hf:owner/model"] == expected


def test_without_network_the_cache_is_used(answers):
    _, _, online, offline = answers
    assert offline["hf:owner/maths"] == online["hf:owner/maths"]
    assert offline["hf:owner/plain"] == 3


def test_without_network_a_part_is_not_taken_for_the_whole(answers):
    """Only some files that match are in the cache."""
    home, endpoint, _, offline = answers
    for name in ("hf:owner/maths:*.jsonl", "hf:owner/plain@v1", "hf:owner/other"):
        assert name in offline[name]
        assert f"the hub at {endpoint} cannot be reached" in offline[name]
        assert str(home) in offline[name]
    assert "give a local file instead" in offline["hf:owner/plain@v1"]
    assert "give a local folder instead" in offline["hf:owner/other"]


@pytest.mark.parametrize(
    "name", ["hf:maths", "hf:", "hf:a/b/c", "hf:a/b@", "hf:../b/c", "hf:a b/c"]
)
def test_other_names_are_refused(name):
    for read in (lambda n: data_files(n, (".jsonl",)), model_folder):
        with pytest.raises(DataError, match="hf:OWNER/NAME"):
            read(name)


def test_model_paths_stay_as_they_are(tmp_path):
    assert model_folder(str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="without a pattern"):
        model_folder("hf:a/b:*.json")
