"""Means over seeds, and a picture that can be read."""

from __future__ import annotations

import warnings

import matplotlib.figure as figures
import numpy as np

from experiments.curves import LONGEST_LABEL, Line, Point, interval, labels, mean_curve
from experiments.pictures import plot
from experiments.search import grid
from experiments.sweeps import learning_rate


def points(*given):
    return [Point(step, accuracy, tokens, 0, 60.0) for step, tokens, accuracy in given]


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
        points((0, 0, 0.2), (2, 100, 0.4), (4, 200, 0.8)),
        points((0, 50, 0.4), (2, 150, 0.8), (3, 180, 0.7)),
    ]
    places, accuracy = mean_curve(runs, "step")
    assert places.tolist() == [0, 2, 3]
    np.testing.assert_allclose(accuracy, [[0.2, 0.4, 0.6], [0.4, 0.8, 0.7]])
    places, accuracy = mean_curve(runs, "sampled_tokens")
    assert places.tolist() == [50, 100, 150, 180]
    np.testing.assert_allclose(accuracy, [[0.3, 0.4, 0.6, 0.72], [0.4, 0.6, 0.8, 0.7]])
    apart = [points((0, 0, 0.2)), points((0, 50, 0.4))]
    assert mean_curve(apart, "sampled_tokens") is None


def test_labels_tell_groups_apart_and_are_short():
    """Bug: labels with everything in them did not fit the picture of the project's own sweep."""
    assert labels([{"optimizer.b1": 0.8, "method": "grpo"}]) == ["method=grpo, b1=0.8"]
    # What all share is left out; what not all name stays.
    assert labels([{"a.rate": 1, "b": 2, "seed": 0}, {"a.rate": 3, "b": 2}, {"b": 2}]) == [
        "rate=1", "rate=3", "default",
    ]  # fmt: skip
    # Last names that two settings share are no names.
    assert labels([{"a.rate": 1, "b.rate": 1}, {"a.rate": 2, "b.rate": 2}]) == [
        "a.rate=1, b.rate=1", "a.rate=2, b.rate=2",
    ]  # fmt: skip
    long = labels(grid({"t": ["x" * 99 + end for end in "ab"]}, **{f"s{i}": [1, 2] for i in "yz"}))
    assert len(set(long)) == 8
    assert long[0].startswith("sy=1, sz=1, t=xxx")
    assert long[0].endswith("...xxxxxxxxxxxxxxa")
    many = labels([{f"setting_{i}": k for i in range(30)} for k in range(2)])
    assert all(len(label) <= LONGEST_LABEL for label in many)
    # Alike but for what was cut.
    alike = labels([{"t": "x" * 60 + c + "x" * 60} for c in "ab"])
    assert [label.split(":")[0] for label in alike] == ["line 1", "line 2"]


def drawn(tmp_path, monkeypatch, groups):
    """The figure of groups with two made-up runs each, and the width of its legend in it."""
    found = []
    saved = figures.Figure.savefig

    def save(figure, *arguments, **options):
        saved(figure, *arguments, **options)
        found.append(figure)

    monkeypatch.setattr(figures.Figure, "savefig", save)
    lines = []
    for number, group in enumerate(groups):
        runs = [
            points(*((s, 9 * s, (number + seed) * s / 999) for s in range(9))) for seed in (0, 1)
        ]
        lines.append(Line(group, runs, True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot(tmp_path / "curves.png", "s", lines)
    [figure] = found
    return figure, figure.legends[0].get_window_extent().width / figure.bbox.width


def test_the_project_s_search_fits_its_picture(tmp_path, monkeypatch):
    """Bug: four columns of long labels ran off both edges."""
    groups = [run for run in learning_rate.get_sweep() if run["seed"] == 0]
    figure, width = drawn(tmp_path, monkeypatch, groups)
    assert width < 1
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 8
    assert texts[0] == "learning_rate=0.0025, warmup_updates=10 (2)"
    curves = figure.axes[0].get_lines()
    # Told apart without colour, and without bands that cover each other.
    assert len({line.get_marker() for line in curves}) == 8
    assert not figure.axes[0].collections
    assert all(line.get_markevery()[-1] == 8 for line in curves)


def test_the_longest_labels_fit(tmp_path, monkeypatch):
    """Bug: as above, for any texts."""
    groups = grid(
        {f"setting_{i}": ["Reason about it " * 4 + end for end in "ab"] for i in range(3)}
    )
    _, width = drawn(tmp_path, monkeypatch, groups)
    assert width < 1


def test_of_many_groups_the_best_are_told_apart(tmp_path, monkeypatch):
    """Bug: markers and line styles were used twice from the ninth group on."""
    figure, _ = drawn(tmp_path, monkeypatch, [{"b": number} for number in range(30)])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        *(f"b={number} (2)" for number in range(20, 30)), "20 other groups, which end lower"
    ]  # fmt: skip
    assert len(figure.axes[0].get_lines()) == 30


def test_bands_of_few_groups(tmp_path, monkeypatch):
    figure, _ = drawn(tmp_path, monkeypatch, [{"b": number} for number in range(3)])
    assert [len(panel.collections) for panel in figure.axes] == [3, 3]


def test_labels_that_begin_with_an_underscore_are_in_the_legend(tmp_path, monkeypatch):
    """Of a setting of one's own configuration file; matplotlib leaves out such labels."""
    figure, _ = drawn(tmp_path, monkeypatch, [{"_b": 1}, {"_b": 2}])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["_b=1 (2)", "_b=2 (2)"]


def test_a_single_evaluation_is_drawn(tmp_path):
    line = Line({"b": 1}, [points((0, 10, 0.5))], False)
    assert plot(tmp_path / "curves.png", "s", [line, Line({"b": 2}, [], False)])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not plot(tmp_path / "none.png", "s", [Line({"b": 2}, [], False)])
    assert not (tmp_path / "none.png").exists()
