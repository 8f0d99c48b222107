"""Figures show what they are given: the figures' own numbers are read back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vaefeat import judging_plots
from vaefeat.plots import png
from vaefeat.table_schema import Column


def history(n_epochs: int) -> list[dict[str, Any]]:
    figures = ("train_elbo", "heldout_elbo", "train_kl", "heldout_kl")
    return [{"epoch": e, "active_units": e, **{name: -100.0 / e for name in figures}} for e in range(1, n_epochs + 1)]


@pytest.mark.parametrize("n_epochs", [1, 3, 30])
def test_training_curves_have_a_point_for_each_epoch(n_epochs: int) -> None:
    made = judging_plots.training_curves(history(n_epochs))
    assert [len(axes.lines) for axes in made.axes] == [2, 2, 1]
    assert made.axes[2].lines[0].get_ydata() == pytest.approx(range(1, n_epochs + 1))
    assert png(made).startswith(b"\x89PNG")


def test_class_errors_are_sorted_and_say_how_many_are_left_out() -> None:
    names = [f"class {index} of a long name without an end" for index in range(40)]
    made = judging_plots.class_errors(names, list(range(40)), [""] * 40)
    (axes,) = made.axes
    bars = [bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]  # bars are rectangles
    assert bars == list(range(39, 9, -1))
    assert "the worst 30 of 40" in axes.get_title(loc="left")
    assert max(len(label.get_text()) for label in axes.get_yticklabels()) == 22


def test_class_errors_near_all_have_no_tick_beyond_all() -> None:
    (axes,) = judging_plots.class_errors(["a", "b"], [90.0, 10.0], ["as b", "as a"]).axes
    assert axes.get_xlim()[1] > 100  # room for what is written
    assert max(axes.get_xticks()) == 100


def test_reliability_shows_each_bin_at_its_place() -> None:
    made = judging_plots.reliability([0.04, 0.55, 1.0], [0.0, 0.5, 1.0], [1, 2, 1], error=0.03, n_bins=10)
    upper, lower = made.axes
    places = [bar.get_x() + bar.get_width() / 2 for bar in upper.patches]  # type: ignore[attr-defined]
    assert places == pytest.approx([0.05, 0.55, 0.95])
    shares = [bar.get_height() for bar in lower.patches]  # type: ignore[attr-defined]
    assert shares == pytest.approx([0.25, 0.5, 0.25])
    assert "3.0 %" in upper.get_title(loc="left")


def test_few_label_maps_mark_the_chosen_rows_alone() -> None:
    labels = np.repeat(["a", "b", "c"], 10)
    points = np.random.default_rng(0).normal(size=(30, 2))
    few, full = judging_plots.few_label_maps(points, labels, chosen=np.arange(30) % 10 < 2).axes
    assert [len(drawn.get_offsets()) for drawn in few.collections] == [30, 2, 2, 2]  # type: ignore[arg-type]
    assert [len(drawn.get_offsets()) for drawn in full.collections] == [10, 10, 10]  # type: ignore[arg-type]


def test_known_labels_are_coloured_and_named_and_all_other_rows_grey() -> None:
    labels = np.array([None] * 12, dtype=object)
    labels[[1, 4, 7]] = ["10", "9", "9"]
    (axes,) = judging_plots.known_labels_map(np.random.default_rng(0).normal(size=(12, 2)), labels).axes
    assert [len(drawn.get_offsets()) for drawn in axes.collections] == [9, 2, 1]  # type: ignore[arg-type]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["9", "10"]
    assert axes.get_title(loc="left") == "12 rows, 3 of them with a label"
    (plain,) = judging_plots.known_labels_map(np.eye(2), None).axes
    assert [len(drawn.get_offsets()) for drawn in plain.collections] == [2]  # type: ignore[arg-type]
    assert plain.get_legend() is None


def test_legend_of_many_labels_says_how_many_are_not_in_it() -> None:
    labels = np.array([None, *(f"name {index}" for index in range(25))], dtype=object)
    (axes,) = judging_plots.known_labels_map(np.random.default_rng(0).normal(size=(26, 2)), labels).axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()][-1] == "and 5 more"
    assert len(legend.get_texts()) == 21


def test_columns_are_those_that_are_explained_least_and_differ_most() -> None:
    explained = np.linspace(1, -1, 41)
    (axes,) = judging_plots.columns_explained(explained).axes
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["40", "39"]
    assert min(bar.get_height() for bar in axes.patches) == 0  # type: ignore[attr-defined]
    random = np.random.default_rng(0)
    rows = random.normal(size=(500, 10))
    samples = random.normal(size=(400, 10)) + np.arange(10)
    shown = [axes.get_title() for axes in judging_plots.marginals(rows, samples).axes]
    assert shown == [f"column {index}" for index in range(9, 1, -1)]
    constant = judging_plots.marginals(np.ones((5, 2)), np.ones((5, 2)))
    assert png(constant).startswith(b"\x89PNG")


def test_columns_of_a_table_have_their_names_and_no_gaps() -> None:
    columns = (
        Column(name="height", kind="number", optional=True),
        Column(name="city", kind="category", categories=("Bonn", "Rome")),
        Column(name="empty", kind="number", optional=True),
    )
    rows = np.array([[1.0, 0, np.nan], [np.nan, 1, np.nan], [3, 1, np.nan]])
    samples = np.array([[2.0, 0, 1], [9, 0, 1]])
    made = judging_plots.marginals(rows, samples, columns)
    by_name = {axes.get_title(): axes for axes in made.axes}
    assert list(by_name) == ["height", "city", "empty"]
    assert [label.get_text() for label in by_name["city"].get_xticklabels()] == ["Bonn", "Rome"]
    shares = [bar.get_height() for bar in by_name["city"].patches[:2]]  # type: ignore[attr-defined]
    assert shares == pytest.approx([1 / 3, 2 / 3])
    assert png(made).startswith(b"\x89PNG")
    (axes,) = judging_plots.columns_explained(np.array([0.5, 0.1, 0.9]), columns).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["city", "height", "empty"]
