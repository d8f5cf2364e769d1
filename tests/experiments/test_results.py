"""Tables and curves of hand-made run folders."""

from __future__ import annotations

import csv
import json

import pytest

from experiments.curves import Point
from experiments.results import (
    EXIT_CODE,
    Result,
    groups,
    log_path,
    read_result,
    write_results,
)


def write_run(folder, accuracies, tokens=100, warm_up=50):
    """A run folder of a step per accuracy after the first; None is a step without evaluation.

    The run has ended after its last step.
    """
    (folder / "checkpoints" / str(len(accuracies) - 1)).mkdir(parents=True)
    (folder / "curve.png").touch()
    (folder / "config.json").write_text("{}")
    lines = []
    for step, accuracy in enumerate(accuracies):
        metrics = {"step": step, "tokens/sampled_total": warm_up, "seconds/warm_up": 2.0}
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


def test_a_run_is_finished_when_it_has_ended(tmp_path):
    """Bug: a run that was killed between the metrics of its last step and its checkpoint counted
    as finished: it was never continued, and had no final checkpoint and no curve."""
    folder = write_run(tmp_path / "run", [0.2, None, 0.6])

    def state():
        return read_result(folder, {}, 2, 0).state

    assert state() == "finished"
    checkpoints = folder / "checkpoints"
    # What Orbax calls a checkpoint that it has not finished.
    (checkpoints / "2").rename(checkpoints / "2.orbax-checkpoint-tmp")
    assert state() == "unfinished"
    (checkpoints / "2.orbax-checkpoint-tmp").rename(checkpoints / "2")
    (folder / "curve.png").unlink()
    assert state() == "unfinished"
    (folder / "curve.png").touch()
    # Who makes room on the disk must not lose the run.
    (checkpoints / "2").rmdir()
    assert state() == "unfinished"
    checkpoints.rmdir()
    assert state() == "finished"


def test_longer_runs_are_cut_where_the_sweep_ends_now(tmp_path):
    """Bug: after `steps` was lowered, runs of the old and the new length were in one mean."""
    long = write_run(tmp_path / "long", [0.2, 0.4, 0.8, 0.9])
    short = write_run(tmp_path / "short", [0.3, 0.6])
    both = [read_result(long, {"seed": 0}, 1, 0), read_result(short, {"seed": 1}, 1, 0)]
    assert [(r.state, r.steps, r.sampled_tokens, r.seconds) for r in both] == [
        ("finished", 1, 150, 14.0), ("finished", 1, 150, 14.0),
    ]  # fmt: skip
    assert [p.accuracy for p in both[0].points] == [0.2, 0.4]
    row = cells(write_results(tmp_path, "s", both).splitlines()[4])
    assert row == [
        "2", "0.250", "0.500", "0.400 to 0.600", "0.500", "1", "150", "7", "0.2",
    ]  # fmt: skip
    # By tokens: the first step that has sampled them is the last, 250 after step 2.
    by_tokens = read_result(long, {}, 9, 151)
    assert (by_tokens.state, by_tokens.steps, by_tokens.points[-1].accuracy) == ("finished", 2, 0.8)
    assert read_result(long, {}, 1, 151).steps == 1
    assert read_result(long, {}, 9, 50).steps == 0


def test_a_cut_run_without_an_evaluation_at_its_new_end_is_marked(tmp_path):
    """Bug: as above; where the sweep ends now, the longer run was not evaluated."""
    long = write_run(tmp_path / "long", [0.2, 0.4, None, 0.9])
    text = write_results(tmp_path, "s", [read_result(long, {"seed": 0}, 2, 0)])
    assert cells(text.splitlines()[4])[:3] == ["1+", "0.200", "0.400"]
    assert "+: a run of the line was longer than the sweep now says" in text
    assert "*: " not in text
    text = write_results(tmp_path, "s", [read_result(long, {"seed": 0}, 3, 0)])
    assert "+: " not in text


def test_groups_do_not_depend_on_the_order_of_settings():
    """Bug: seeds of the same settings, named in another order, were two groups."""
    first = Result("x", {"seed": 0, "a": 1, "b": 2}, "finished")
    second = Result("y", {"b": 2, "a": 1, "seed": 1}, "finished")
    third = Result("z", {"b": 1, "a": 2, "seed": 1}, "finished")
    assert groups([first, third, second]) == [[first, second], [third]]


def test_groups_differ_by_values_and_not_by_how_they_read():
    """Bug: None and the text "None" were one group, as were texts with ", name=" in them."""
    given = [{"a": None}, {"a": "None"}, {"a": "1, b=2"}, {"a": "1", "b": "2"}]
    assert len(groups([Result("x", overrides, "finished") for overrides in given])) == 4


def test_half_a_line_is_not_read(tmp_path):
    folder = write_run(tmp_path / "run", [0.2, 0.3])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "held_out/accu')
    assert read_result(folder, {}, 2, 0).steps == 1


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


def test_texts_with_dollars_are_drawn_as_they_are(tmp_path, monkeypatch):
    r"""Bug: `$\boxed{}$` in a setting is no mathtext: the sweep ended without results.md."""
    values = [r"Put it in $\boxed{}$.", "$x_1$", "two\nlines"]
    results = [
        result("finished", (0, 0, 0.2), (4, 100, 0.8), **{"prompt.instruction": value})
        for value in values
    ]
    import matplotlib.figure as figures

    saved = figures.Figure.savefig
    drawn = []

    def save(figure, *arguments, **options):
        drawn.extend(figure.legends[0].get_texts())
        saved(figure, *arguments, **options)

    monkeypatch.setattr(figures.Figure, "savefig", save)
    text = write_results(tmp_path, "a $x_1$", results)
    assert "Curves: curves.png" in text
    assert [written.get_text() for written in drawn] == [
        r"instruction=Put it in $\boxed{}$. (1)", "instruction=$x_1$ (1)",
        r"instruction=two\nlines (1)",
    ]  # fmt: skip
    assert not any(written.get_parse_math() for written in drawn)
    # Another bug: the line break went on in the table.
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert len({len(line) for line in table}) == 1


def test_a_picture_that_fails_costs_the_picture_alone(tmp_path, monkeypatch):
    """Bug: results.md was written after the curves, and not at all where these failed."""
    results = [result("finished", (0, 0, 0.2), (4, 100, 0.8), seed=0)]
    write_results(tmp_path, "s", results)
    assert (tmp_path / "curves.png").exists()
    import matplotlib

    # Not installed here, or not found: the same for all that may go wrong in drawing.
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setenv("PATH", str(tmp_path))
    text = write_results(tmp_path, "s", results)
    assert text == (tmp_path / "results.md").read_text()
    assert "| 0.200 | 0.800 |" in text
    assert "\nNo curves: " in text
    # The one that is there would be of other results.
    assert not (tmp_path / "curves.png").exists()
    assert (tmp_path / "results.csv").exists()


def test_nothing_to_draw_leaves_no_picture(tmp_path):
    text = write_results(tmp_path, "s", [result("not started", seed=0)])
    assert not (tmp_path / "curves.png").exists()
    assert "curves.png" not in text
    assert "| 0 of 1 |" in text
