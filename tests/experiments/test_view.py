"""The page of a run's trees: what is in it, how large it gets, what is refused."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest

from experiments.view import command, serve, view
from experiments.viewer.recorded import ViewError, open_run, read_step
from tests.experiments.made_runs import make_run, problem

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 ${x} {{ y }}"


def index_of(html):
    found = re.search(r'<script type="application/json" id="index">(.*?)</script>', html, re.DOTALL)
    return json.loads(found[1])


def unpacked(html, blob):
    [packed] = re.findall(rf'<script type="text/plain" id="blob-{blob}">(.*?)</script>', html)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", {k: [problem(k), problem(k + 10)] for k in (1, 2, 4)})


def test_a_page_holds_what_was_recorded(run, tmp_path):
    page = view(run, tmp_path / "page.html")
    assert (page.shown, page.recorded) == (3, 3)
    html = (tmp_path / "page.html").read_text()
    index = index_of(html)
    [shown] = index["runs"]
    assert (shown["name"], shown["method"], shown["delta"]) == ("run", "attnrl", 1)
    assert [p["step"] for p in shown["problems"]] == [1, 1, 2, 2, 4, 4]
    assert shown["accuracies"][-1] == [4, pytest.approx(0.7)]
    for entry in shown["problems"]:
        tree = unpacked(html, entry["blob"])
        [recorded] = [
            p
            for p in read_step(run / "trees" / f"step_{entry['step']:06d}.json")
            if p["problem"]["id"] == entry["id"]
        ]
        assert len(tree["leaves"]) == len(recorded["leaves"]) == entry["leaves"] == 30
        assert entry["branches"] == 24
        for leaf, theirs in zip(tree["leaves"], recorded["leaves"], strict=True):
            assert "tokens" not in leaf
            assert [s["text"] for s in leaf["steps"]] == [s["text"] for s in theirs["steps"]]
            known = [(s["fci"], t["fci"]) for s, t in zip(leaf["steps"], theirs["steps"])]  # noqa: B905
            for ours, exact in known:
                assert ours == exact if exact is None else ours == pytest.approx(exact, rel=1e-3)


def test_a_page_needs_nothing_and_runs_only_its_own_script(run, tmp_path):
    view(run, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    without_data = re.sub(
        r'<script type="[^"]*" id="[^"]*">.*?</script>', "", html, flags=re.DOTALL
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for kind in ("script", "style"):
        [own] = re.findall(rf"<{kind}>(.*?)</{kind}>", without_data, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    tags = re.sub(r"<(script|style)>.*?</\1>", "", without_data, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#|data:)', tags)
    assert not re.search(r"\son\w+=", tags)


def test_text_of_models_and_problems_stays_text(tmp_path):
    made = problem(1, name=HOSTILE, text=HOSTILE)
    made["leaves"][0]["steps"][0]["text"] = HOSTILE
    run = make_run(tmp_path / "<b>run", {1: [made]})
    view(run, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert html.count("</script>") == html.count("<script")
    assert "alert(1)</script>" not in html
    assert "<b>run" not in html
    tree = unpacked(html, 0)
    assert tree["problem"]["text"] == HOSTILE
    assert tree["leaves"][0]["steps"][0]["text"] == HOSTILE


def test_what_does_not_fit_is_left_out_evenly(tmp_path, capsys):
    steps = range(1, 42)
    run = make_run(tmp_path / "run", {k: [problem(k, length=2000)] for k in steps})
    whole = view(run, tmp_path / "whole.html")
    assert whole.shown == 41
    size = (tmp_path / "whole.html").stat().st_size
    for share in (0.9, 0.7, 0.5):
        page = view(run, tmp_path / "part.html", max_bytes=int(size * share))
        assert (tmp_path / "part.html").stat().st_size <= size * share
        html = (tmp_path / "part.html").read_text()
        kept = [p["step"] for p in index_of(html)["runs"][0]["problems"]]
        assert (kept[0], kept[-1]) == (1, 41)
        gaps = np.diff(kept)
        assert gaps.max() - gaps.min() <= 1
        assert page.shown == len(kept) < 41
        assert index_of(html)["recorded"] == 41
    command([f"--workdir={run}", f"--max-mb={0.5 * size / 2**20}"])
    said = capsys.readouterr().out
    assert re.search(r"\d+ of 41 steps are left out, evenly: --max-mb is", said)
    with pytest.raises(ValueError, match="raise --max-mb"):
        view(run, tmp_path / "none.html", max_bytes=300_000)


def test_thirty_leaves_of_eight_thousand_tokens_fit(tmp_path):
    """With room for many steps of them."""
    run = make_run(tmp_path / "run", {1: [problem(1, length=8000, step_tokens=40)]})
    tokens = sum(leaf["length"] for leaf in read_step(run / "trees/step_000001.json")[0]["leaves"])
    assert tokens > 30 * 6000
    view(run, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 1.5 * 2**20


def test_an_accuracy_that_is_no_number_is_left_out(run, tmp_path):
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "held_out/accuracy": NaN}\n')
    view(run, tmp_path / "page.html")
    index = index_of((tmp_path / "page.html").read_text())
    assert index["runs"][0]["accuracies"][-1] == [4, pytest.approx(0.7)]


def test_another_run_of_the_same_problems(tmp_path):
    one = make_run(tmp_path / "one", {1: [problem(1)], 5: [problem(2)]})
    other = make_run(tmp_path / "other", {3: [problem(1, branching=False)]}, method="grpo")
    view(one, tmp_path / "page.html", compare=other)
    index = index_of((tmp_path / "page.html").read_text())
    assert [run["name"] for run in index["runs"]] == ["one", "other"]
    assert [p["id"] for p in index["runs"][1]["problems"]] == ["problem-1"]
    assert index["runs"][1]["problems"][0]["branches"] == 0


def test_what_is_left_out_is_of_the_run_that_is_looked_at(tmp_path):
    """Steps of the other run alone once took the room, and the page came up empty."""
    one = make_run(tmp_path / "one", {k: [problem(4, length=800)] for k in (50, 60, 70)})
    theirs = {k: [problem(4 + k % 2, length=800)] for k in range(1, 100)}
    other = make_run(tmp_path / "other", theirs)
    alone = view(one, tmp_path / "page.html", max_bytes=700_000)
    beside = view(one, tmp_path / "page.html", compare=other, max_bytes=700_000)
    assert (beside.shown, beside.recorded) == (alone.shown, alone.recorded) == (3, 3)
    index = index_of((tmp_path / "page.html").read_text())
    # Of the other run only what stands beside these: problem 4 is that of its even steps.
    assert [p["step"] for p in index["runs"][1]["problems"]] == [50, 60, 70]
    least = (tmp_path / "page.html").stat().st_size - 40_000
    assert view(one, tmp_path / "page.html", compare=other, max_bytes=least).shown == 2
    index = index_of((tmp_path / "page.html").read_text())
    for run in index["runs"]:
        assert [p["step"] for p in run["problems"]] == [50, 70]


def test_numbers_and_letters_that_no_file_holds(tmp_path):
    """A reward that is not finite, half a surrogate pair: the page was not written, or was empty.

    What the browser parses is JSON without NaN, in UTF-8.
    """
    made = problem(1, text="half a pair: \ud800")
    made["leaves"][0]["reward"] = float("nan")
    made["leaves"][0]["segments"][0]["value"] = float("inf")
    made["leaves"][0]["steps"][0]["text"] = "\udfff."
    view(make_run(tmp_path / "run", {1: [made]}), tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    leaf = unpacked(html, 0)["leaves"][0]
    assert leaf["reward"] is None
    assert leaf["segments"][0]["value"] is None
    assert leaf["steps"][0]["text"] == "?."
    assert index_of(html)["runs"][0]["problems"][0]["text"] == "half a pair: ?"


def test_what_is_no_run_is_refused_by_name(run, tmp_path):
    with pytest.raises(ViewError, match="nowhere is no run folder"):
        open_run(tmp_path / "nowhere")
    empty = make_run(tmp_path / "empty", {1: [problem(1)]})
    (empty / "trees" / "step_000001.json").unlink()
    with pytest.raises(ViewError, match="has no trees yet"):
        open_run(empty)
    path = run / "trees" / "step_000002.json"
    whole = json.loads(path.read_text())
    for damage, message in (
        (lambda: path.write_text(path.read_text()[:100]), "cannot be shown"),
        (lambda: path.write_text(json.dumps(whole["problems"][0])), "earlier versions"),
        (lambda: path.write_text(json.dumps({"problems": [{"leaves": []}]})), "'problem' is miss"),
    ):
        damage()
        with pytest.raises(ViewError, match=f"step_000002.json.*{message}"):
            view(run, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    (run / "config.json").write_text("{")
    with pytest.raises(ViewError, match=r"config\.json is not the configuration"):
        open_run(run)


def test_arguments_that_make_no_sense_are_refused(run, tmp_path, capsys):
    for argument, message in (
        ("--attention=-1", "a number from 0 on"),
        ("--max-mb=nan", "a number above 0"),
        ("--port=99999", "a number from 0 to 65535"),
        (f"--out={tmp_path}", "is a folder; give a file as --out"),
        (f"--out={tmp_path}/nowhere/page.html", "in a folder that does not exist"),
    ):
        with pytest.raises(SystemExit) as ended:
            command([f"--workdir={run}", argument])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    view(run, tmp_path / "page.html")
    with serve(tmp_path / "page.html", 0) as server:
        taken = server.server_address[1]
        with pytest.raises(ViewError, match=f"port {taken} cannot be had .*; give another"):
            serve(tmp_path / "page.html", taken)


def test_it_is_served_to_this_machine_alone(run, tmp_path):
    view(run, tmp_path / "page.html")
    with serve(tmp_path / "page.html", 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}"
            with urllib.request.urlopen(f"{address}/", timeout=30) as answer:
                assert answer.read() == (tmp_path / "page.html").read_bytes()
            for other in ("/metrics.jsonl", "/../run/config.json", "/page.html"):
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    urllib.request.urlopen(address + other, timeout=30)
        finally:
            server.shutdown()
            thread.join()


def test_attention_is_that_of_the_newest_checkpoint(finished, tmp_path):
    """And of the steps that the run recorded; the newest two of three."""
    folder, _ = finished
    view(folder, tmp_path / "page.html", attention=2)
    html = (tmp_path / "page.html").read_text()
    seen = []
    for entry in index_of(html)["runs"][0]["problems"]:
        tree = unpacked(html, entry["blob"])
        leaves = {str(leaf["row"]): leaf for leaf in tree["leaves"]}
        for row, found in tree["attention"].items():
            seen.append(entry["step"])
            ranges = len(leaves[row]["steps"]) + 1
            assert found["parameters"] == 3
            mean, strongest = np.array(found["mean"]), np.array(found["strongest"])
            assert mean.shape == strongest.shape == (ranges, ranges)
            ahead = np.tri(ranges, k=-found["delta"])
            np.testing.assert_allclose((strongest * ahead).sum(0), found["fci"], atol=2e-3)
    assert sorted(set(seen)) == [2, 3]
    assert seen.count(3) == 2
