"""`experiments.plot` on hand-made run folders: which runs are one line, and what is drawn."""

from __future__ import annotations

import json
import warnings

import matplotlib.figure as figures
import numpy as np
import pytest

from experiments.pictures import plot_history
from experiments.plot import PlotError, find, grouped, paths_of
from experiments.run_pictures import PANELS, plot_runs, series, stage_seconds


def make_run(folder, seed=0, method="attnrl", steps=4, gain=0.1, **settings):
    folder.mkdir(parents=True)
    config = {"method": method, "seed": seed, "steps": steps, "judging": {"workers": 2}}
    (folder / "config.json").write_text(json.dumps(config | settings))
    lines = [{"step": 0, "held_out/accuracy": 0.4, "tokens/sampled_total": 50,
              "seconds/warm_up": 30.0, "seconds/evaluate": 30.0}]  # fmt: skip
    for step in range(1, steps + 1):
        lines.append({
            "step": step, "held_out/accuracy": 0.4 + gain * step, "train/accuracy": 0.3,
            "tokens/sampled_total": 50 + 100 * step, "rows/with_advantage": 0.9,
            "problems/drawn": 8, "problems/kept": 8 - step % 3, "train/entropy": 0.5 / step,
            "update/approx_kl": 0.01 * seed, "update/kl": 0.0, "train/response_length": 60.0 + seed,
            "seconds/step": 120.0, "seconds/generate": 90.0 if step > 1 else 900.0,
            "seconds/update": 30.0, "seconds/evaluate": 0.0,
        })  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    return folder


def figure_of(monkeypatch, tmp_path, folders):
    """The figure that is drawn of the folders."""
    drawn = []
    saved = figures.Figure.savefig

    def save(figure, *arguments, **options):
        saved(figure, *arguments, **options)
        drawn.append(figure)

    monkeypatch.setattr(figures.Figure, "savefig", save)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_runs(paths_of(tmp_path), "a $run$", grouped(find(folders)))
    assert drawn[0] is drawn[1]
    return drawn[0]


def test_runs_that_differ_in_their_seed_are_a_line(tmp_path, monkeypatch):
    for seed in range(3):
        make_run(tmp_path / "sweep" / f"a{seed}", seed, gain=0.1 + 0.01 * seed)
        # What does not change a step does not tell runs apart.
        workers = {"judging": {"workers": seed}}
        make_run(tmp_path / "sweep" / f"g{seed}", seed, "grpo", gain=0.05, **workers)
    figure = figure_of(monkeypatch, tmp_path, [tmp_path / "sweep"])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["method=attnrl (3)", "method=grpo (3)"]
    assert len(figure.axes) == len(PANELS) + 1
    for panel in figure.axes[:-1]:
        attnrl, grpo = panel.get_lines()
        # Told apart without colour.
        assert attnrl.get_marker() != grpo.get_marker()
        assert attnrl.get_linestyle() != grpo.get_linestyle()
        assert len(panel.collections) == 2
    accuracy = figure.axes[0].get_lines()[0]
    np.testing.assert_allclose(accuracy.get_ydata(), 0.4 + 0.11 * np.arange(5))
    np.testing.assert_allclose(figure.axes[1].get_lines()[0].get_xdata(), 50 + 100 * np.arange(5))
    # A minute before the first step, two for each.
    np.testing.assert_allclose(figure.axes[2].get_lines()[0].get_xdata(), 1 + 2 * np.arange(5))
    np.testing.assert_allclose(
        figure.axes[4].get_lines()[0].get_ydata(), np.array([7, 6, 8, 7]) / 8
    )
    bars = figure.axes[-1].patches
    # Two stages of two groups; of each the mean without the first step.
    assert [bar.get_width() for bar in bars] == [90.0, 90.0, 30.0, 30.0]
    assert [bar.get_x() for bar in bars] == [0.0, 0.0, 90.0, 90.0]


def test_a_run_alone_and_the_same_run_twice(tmp_path, monkeypatch):
    first = make_run(tmp_path / "first")
    [alone] = grouped(find([first, first]))
    assert len(alone.histories) == 1
    again = make_run(tmp_path / "again")
    figure = figure_of(monkeypatch, tmp_path, [first, again])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["run=first (1)", "run=again (1)"]
    # Nothing is said of seeds where there is one.
    assert figure.get_suptitle() == "a $run$"


def test_long_runs_are_averaged_over_windows_but_for_evaluations():
    history = [{"step": s, "train/entropy": s % 2, "held_out/accuracy": 0.5} for s in range(1000)]
    [(_, axis, entropy)] = [panel for panel in PANELS if panel[0].startswith("entropy")]
    places, values = series(history, axis, entropy)
    np.testing.assert_allclose(values, 0.5)
    np.testing.assert_allclose(places[:2], [4.5, 14.5])
    assert len(series(history, "step", PANELS[0][2])[0]) == 1000
    assert series(history, "step", PANELS[4][2]) is None


def test_the_first_step_of_each_run_compiles():
    history = [{"step": 0}, {"step": 1, "seconds/score": 60.0}, {"step": 2, "seconds/score": 2.0}]
    assert stage_seconds([history, history])["score"] == 2.0
    assert stage_seconds([history[:2]])["score"] == 60.0


def test_folders_that_cannot_be_drawn(tmp_path):
    with pytest.raises(PlotError, match="is neither the folder of a run nor one that holds some"):
        find([tmp_path])
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(PlotError, match="has no metrics yet"):
        find([run])
    (run / "config.json").write_text("{")
    with pytest.raises(PlotError, match=r"config.json is not valid JSON"):
        find([run])


def test_names_of_pictures(tmp_path):
    assert [p.name for p in paths_of(tmp_path)] == ["plot.png", "plot.svg"]
    for name in ("a.svg", "a.png", "a"):
        assert paths_of(tmp_path / name) == [tmp_path / "a.png", tmp_path / "a.svg"]
    assert paths_of(tmp_path / "v1.5")[0].name == "v1.5.png"


def test_the_curve_of_a_run_has_the_same_look(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("experiments.pictures.write", lambda figure, path: found.append(figure))
    plot_history([{"step": 0, "held_out/accuracy": 0.1}, {"step": 1, "train/accuracy": 0.3}], "c")
    held_out, train = found[0].axes[0].get_lines()
    assert (held_out.get_marker(), train.get_marker()) == ("o", "s")
    assert train.get_ydata().tolist() == [0.3]
