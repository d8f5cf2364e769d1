"""Tables and curves of hand-made run folders."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from experiments.results import (
    EXIT_CODE,
    Point,
    Result,
    interval,
    log_path,
    mean_curve,
    read_result,
    write_results,
)


def write_run(folder, accuracies, tokens=100, warm_up=50):
    """A run folder of a step per accuracy after the first; None is a step without evaluation."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    lines = []
    for step, accuracy in enumerate(accuracies):
        metrics = {"step": step, "seconds/warm_up": 2.0}
        if step:
            metrics = {
                "step": step,
                "tokens/sampled": tokens,
                "tokens/trained": 7,
                "tokens/sampled_total": warm_up + tokens * step,
                "tokens/trained_total": 7 * step,
                "seconds/step": 10.0,
                "seconds/update": 6.0,
            }
        if accuracy is not None:
            metrics |= {"held_out/accuracy": accuracy, "seconds/evaluate": 1.0}
        lines.append(json.dumps(metrics) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def result(state, *points, **overrides):
    made = tuple(Point(step, accuracy, tokens, 0, 60.0) for step, tokens, accuracy in points)
    last = made[-1] if made else Point(0, 0, 0, 0, 0)
    name = ",".join(f"{n}={v}" for n, v in overrides.items())
    return Result(name, overrides, state, last.step, last.sampled_tokens, 0, 60.0, made)


def test_a_run_folder_is_read(tmp_path):
    folder = write_run(tmp_path / "seed=1", [0.2, None, 0.6, 0.5])
    read = read_result(folder, {"seed": 1}, steps=3, max_sampled_tokens=0)
    # Before step 1 the warm-up has sampled; a step's stages are not counted beside the step.
    assert read == Result(
        name="seed=1",
        overrides={"seed": 1},
        state="finished",
        steps=3,
        sampled_tokens=350,
        trained_tokens=21,
        seconds=2 + 3 * 10 + 3 * 1,
        points=(
            Point(0, 0.2, 50, 0, 3.0),
            Point(2, 0.6, 250, 14, 24.0),
            Point(3, 0.5, 350, 21, 35.0),
        ),
    )
    assert read.best == read.points[1]


@pytest.mark.parametrize(
    ("steps", "tokens", "state"),
    [(3, 0, "unfinished"), (2, 0, "finished"), (1, 0, "finished"), (9, 250, "finished"),
     (9, 251, "unfinished"), (2, 10**9, "finished")],
)  # fmt: skip
def test_a_run_is_finished_by_its_steps_or_its_tokens(tmp_path, steps, tokens, state):
    folder = write_run(tmp_path / "run", [0.2, None, 0.6])
    assert read_result(folder, {}, steps, tokens).state == state


def test_a_run_that_failed_says_so_until_it_goes_on(tmp_path):
    folder = tmp_path / "run"
    assert read_result(folder, {}, 3, 0).state == "not started"
    log_path(folder).write_text("error: no\n" + EXIT_CODE.format(2) + "\n")
    assert read_result(folder, {}, 3, 0).state == "failed"
    assert read_result(folder, {}, 3, 0).points == ()
    write_run(folder, [0.2, 0.3])
    assert read_result(folder, {}, 3, 0).state == "failed"
    assert read_result(folder, {}, 3, 0).steps == 1
    # The next attempt has begun.
    with log_path(folder).open("a") as log:
        log.write("$ python -m experiments.run\n")
    assert read_result(folder, {}, 3, 0).state == "unfinished"
    # What has all its steps has finished, whatever became of its process afterwards.
    log_path(folder).write_text(EXIT_CODE.format(-9) + "\n")
    assert read_result(folder, {}, 1, 0).state == "finished"


def test_half_a_line_is_not_read(tmp_path):
    folder = write_run(tmp_path / "run", [0.2, 0.3])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "held_out/accu')
    assert read_result(folder, {}, 2, 0).steps == 1


def test_intervals():
    few = np.array([[0.5, 0.1], [0.7, 0.3], [0.6, 0.2]])
    low, high = interval(few)
    np.testing.assert_array_equal(low, [0.5, 0.1])
    np.testing.assert_array_equal(high, [0.7, 0.3])
    # Many normal draws: the bootstrap's interval is the textbook's, mean +- 1.96 s / sqrt(n).
    many = np.random.default_rng(3).normal(0.6, 0.05, size=(200, 1))
    low, high = interval(many)
    half = 1.96 * many.std() / np.sqrt(200)
    np.testing.assert_allclose(low, many.mean() - half, atol=0.1 * half)
    np.testing.assert_allclose(high, many.mean() + half, atol=0.1 * half)
    assert interval(np.full(5, 0.25)) == (0.25, 0.25)


def test_a_mean_curve_is_of_where_all_runs_were():
    runs = [
        result("finished", (0, 0, 0.2), (2, 100, 0.4), (4, 200, 0.8)),
        result("finished", (0, 50, 0.4), (2, 150, 0.8), (3, 180, 0.7)),
    ]
    places, accuracy = mean_curve(runs, "step")
    assert places.tolist() == [0, 2, 3]
    np.testing.assert_allclose(accuracy, [[0.2, 0.4, 0.6], [0.4, 0.8, 0.7]])
    places, accuracy = mean_curve(runs, "sampled_tokens")
    assert places.tolist() == [50, 100, 150, 180]
    np.testing.assert_allclose(accuracy, [[0.3, 0.4, 0.6, 0.72], [0.4, 0.6, 0.8, 0.7]])
    apart = [result("finished", (0, 0, 0.2)), result("finished", (0, 50, 0.4))]
    assert mean_curve(apart, "sampled_tokens") is None


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_shows_means_of_finished_runs(tmp_path):
    results = [
        result("finished", (0, 0, 0.2), (4, 100, 0.8), (8, 200, 0.7), method="attnrl", seed=0),
        result("finished", (0, 0, 0.3), (6, 300, 0.8), method="attnrl", seed=1),
        result("unfinished", (0, 0, 0.9), (1, 50, 0.9), method="attnrl", seed=2),
        result("unfinished", (0, 0, 0.4), (1, 70, 0.5), method="grpo", seed=0),
        result("failed", method="grpo", seed=1),
        result("not started", method="random", seed=0),
    ]
    text = write_results(tmp_path, "methods", results)
    assert text == (tmp_path / "results.md").read_text()
    assert "| method |" in text
    by_method = {cells(line)[0]: cells(line) for line in text.splitlines() if line[:1] == "|"}
    assert by_method["method"] == [
        "method", "seeds", "start", "end", "interval", "best", "steps", "sampled tokens",
        "trained tokens", "minutes",
    ]  # fmt: skip
    assert by_method["attnrl"] == [
        "attnrl", "2 of 3", "0.250", "0.750", "0.700 to 0.800", "0.800", "7", "250", "0", "1.0",
    ]  # fmt: skip
    assert by_method["grpo"][:5] == ["grpo", "0 of 2*", "0.400", "0.500", "-"]
    assert by_method["random"] == ["random", "0 of 1", *["-"] * 8]
    assert "*: no run of the line has finished" in text
    assert "Not finished, 4 of 6 runs:" in text
    assert by_method["method=attnrl,seed=2"] == [
        "method=attnrl,seed=2", "unfinished", "1", "0.900",
    ]  # fmt: skip
    assert by_method["method=grpo,seed=1"] == ["method=grpo,seed=1", "failed", "0", "-"]
    # Columns are aligned for who reads it as text.
    table = [line for line in text.split("\n\n")[1].splitlines()]
    assert len({len(line) for line in table}) == 1
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_for_every_run(tmp_path):
    results = [
        result("finished", (0, 0, 0.2), (4, 100, 0.8), (8, 200, 0.7), a=(1, 2), seed=0),
        result("not started", b="x,y", seed=0),
    ]
    write_results(tmp_path, "s", results)
    with (tmp_path / "results.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first == {
        "run": "a=(1, 2),seed=0", "a": "(1, 2)", "seed": "0", "b": "", "state": "finished",
        "steps": "8", "first_accuracy": "0.2", "last_accuracy": "0.7", "best_accuracy": "0.8",
        "best_step": "4", "sampled_tokens": "200", "trained_tokens": "0", "seconds": "60.0",
    }  # fmt: skip
    assert (second["a"], second["b"], second["last_accuracy"]) == ("", "x,y", "")
    first, second = json.loads((tmp_path / "results.json").read_text())
    assert first["overrides"] == {"a": [1, 2], "seed": 0}
    assert first["held_out"][1] == [4, 0.8, 100, 0, 60.0]
    assert second["last_accuracy"] is None


def test_nothing_to_draw_leaves_no_picture(tmp_path):
    text = write_results(tmp_path, "s", [result("not started", seed=0)])
    assert not (tmp_path / "curves.png").exists()
    assert "curves.png" not in text
    assert "| 0 of 1 |" in text
