"""Figures are drawn for every kind of run, and show what they are given."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from vaefeat import plots
from vaefeat.drawing import sheet
from vaefeat.generation import Manifold, Sweep
from vaefeat.model_card import reconstruction_picture

HISTORY = [{"epoch": i, "train_elbo": -100 / i, "heldout_elbo": -110 / i} for i in range(1, 9)]


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_overview_of_images_is_drawn(channels: int) -> None:
    random = np.random.default_rng(0)
    drawn = pixels(
        plots.png(
            plots.overview(
                history=HISTORY,
                pairs=random.uniform(0, 255, (8, channels, 6, 6)),
                samples=random.uniform(0, 255, (9, channels, 6, 6)),
                points=random.normal(size=(100, 2)),
                labels=random.integers(0, 12, 100),
                low=0,
                high=255,
            )
        )
    )
    assert drawn.shape[1] > 1000
    assert drawn.std() > 10


def test_overview_of_a_table_without_labels_is_drawn() -> None:
    made = plots.overview(history=HISTORY[:1], pairs=None, samples=None, points=np.eye(2), labels=None, low=0, high=1)
    assert len(made.axes) == 2
    assert pixels(plots.png(made)).std() > 5


def test_curve_shows_the_last_epochs_in_full() -> None:
    made, axes = plots.figure()
    plots.draw_curve(axes, HISTORY)
    low, high = axes.get_ylim()
    assert low < HISTORY[-1]["heldout_elbo"] < high
    assert len(axes.get_lines()) == 2
    assert plots.png(made) == plots.png(made)


def test_sheet_keeps_order_range_and_what_is_missing() -> None:
    images = np.stack([np.full((1, 2, 3), value, dtype=np.float64) for value in (0, 5, 10)])
    images[1, 0, 0, 0] = np.nan
    drawn = sheet(images, columns=2, low=0, high=10)
    assert drawn.shape == (2 * 3 - 1, 2 * 4 - 1, 3)
    np.testing.assert_array_equal(drawn[:2, :3], 0)
    np.testing.assert_array_equal(drawn[1, 4:], 0.5)
    np.testing.assert_array_equal(drawn[3:, :3], 1)
    assert np.ptp(drawn[0, 4]) > 0.1  # no grey
    np.testing.assert_array_equal(drawn[2], 1)


def test_sheet_shows_colours_and_leaves_out_alpha() -> None:
    image = np.array([200, 100, 0, 255], dtype=np.uint8).reshape(1, 4, 1, 1)
    np.testing.assert_allclose(sheet(image, columns=1, low=0, high=200)[0, 0], [1, 0.5, 0])


def shown(made: Figure) -> NDArray[Any]:
    """Give the picture in a figure's only axes."""
    (axes,) = made.axes
    picture: NDArray[Any] = np.asarray(axes.get_images()[0].get_array())
    return picture


def test_manifold_has_its_first_latent_to_the_right_and_its_second_upwards() -> None:
    values = np.array([[0.0, 0.1, 0.2], [0.3, 0.4, 0.5], [0.6, 0.7, 1.0]])
    rows = np.tile(values[..., None, None, None], (1, 1, 1, 4, 4)).astype(np.float32)
    coordinates = np.array([[-1.0, 0.0, 1.0], [-10.0, 0.0, 10.0]])
    made = plots.manifold(Manifold(rows, (3, 1), coordinates), low=0, high=1)
    np.testing.assert_allclose(shown(made)[2::4, 2::4, 0], values[::-1], atol=1e-6)
    (axes,) = made.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latent 3", "latent 1")
    places = {label.get_text(): tick for label, tick in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)}
    assert places["0"] == 5.5  # the middle of the second of three rows of four pixels
    heights = {label.get_text(): tick for label, tick in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
    assert heights["-10"] == 9.5
    assert heights["10"] == 1.5


def test_sweeps_name_their_lines_and_values() -> None:
    rows = np.zeros((5, 1, 4, 4), dtype=np.float32)
    lines = [Sweep(f"latent {latent}", np.linspace(-2, 2, 5), rows) for latent in (7, 2)]
    (axes,) = plots.sweeps(lines, low=0, high=1).axes
    assert [text.get_text() for text in axes.texts] == ["latent 7", "latent 2"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-2", "-1", "0", "1", "2"]
    mixed = [*lines, Sweep("categories 0", np.arange(3.0), rows[:3])]
    (axes,) = plots.sweeps(mixed, low=0, high=1).axes
    assert len(axes.texts) == 3
    assert not axes.axison  # values that differ from line to line have no common axis
    np.testing.assert_array_equal(shown(plots.sweeps(mixed, low=0, high=1))[-1, -1], 1)


def test_pictures_of_lines_have_every_line_in_order() -> None:
    random = np.random.default_rng(0)
    clean, corrupted, denoised = random.uniform(0, 9, (3, 6, 1, 5, 5))
    for made, wanted in (
        (plots.denoising(clean, corrupted, denoised), [clean, corrupted, denoised]),
        (plots.interpolations(np.stack([clean, corrupted]), low=clean.min(), high=clean.max()), [clean, corrupted]),
        (
            plots.inpainting(clean, np.zeros(clean.shape, dtype=bool), corrupted, denoised),
            [clean, corrupted, denoised, clean],
        ),
    ):
        drawn = sheet(np.concatenate(wanted), columns=6, low=float(clean.min()), high=float(clean.max()))
        np.testing.assert_allclose(shown(made), drawn)
    (axes,) = plots.inpainting(clean, np.ones(clean.shape, dtype=bool), clean, clean).axes
    assert [text.get_text() for text in axes.texts] == ["observed", "posterior mean", "one draw", "truth"]


def test_samples_are_as_square_as_can_be_and_neighbours_have_three_panels() -> None:
    rows = np.random.default_rng(0).uniform(0, 255, (10, 3, 6, 8))
    assert shown(plots.samples(rows)).shape == (3 * 7 - 1, 4 * 9 - 1, 3)
    assert shown(plots.samples(rows, columns=10)).shape == (6, 10 * 9 - 1, 3)
    assert len(plots.neighbours(rows[0], rows[1], rows).axes) == 3


def test_anomalies_draw_scores_and_rows_where_there_are_images() -> None:
    random = np.random.default_rng(0)
    normal, unusual = random.normal(100, 10, 500), np.append(random.normal(150, 10, 499), 1e6)
    made = plots.anomalies(normal, unusual)
    (axes,) = made.axes
    # One score that is far off does not press the others into a bar.
    assert axes.get_xlim()[1] < 300
    rows = random.uniform(size=(12, 1, 6, 6))
    assert len(plots.anomalies(normal, unusual, most_likely=rows, least_likely=rows).axes) == 3
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["normal rows", "unusual rows"]


def test_aggregate_posterior_shows_the_latents_that_differ_most() -> None:
    random = np.random.default_rng(0)
    posterior, prior = random.normal(size=(2, 500, 20))
    posterior[:, 13] += 2
    made = plots.aggregate_posterior(posterior, prior)
    assert len(made.axes) == 12
    assert made.axes[0].get_title() == "latent 13"
    assert len(plots.aggregate_posterior(posterior[:, :5], prior[:, :5]).axes) == 8  # two lines of four, three empty
    (axes,) = plots.aggregate_posterior(posterior[:, :2], prior[:, :2]).axes
    assert len(axes.collections) == 2


def test_kl_per_latent_is_sorted_and_counts_what_is_active() -> None:
    kl = np.full(100, 1e-4)
    kl[[40, 7, 93]] = 1.5, 2.0, 0.5
    (axes,) = plots.kl_per_latent(kl).axes
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    assert heights[:3] == [2.0, 1.5, 0.5]
    assert len(heights) == 12
    assert [label.get_text() for label in axes.get_xticklabels()][:3] == ["7", "40", "93"]
    assert axes.get_title(loc="left").startswith("4.0 nats in 3 of 100 latents")


def test_rate_distortion_joins_points_by_rate_over_the_line_of_the_best_sum() -> None:
    made = plots.rate_distortion([20, 5, 10], [80, 120, 85], ["a", "b", "c"], kept=2)
    (axes,) = made.axes
    line, curve = axes.get_lines()
    np.testing.assert_array_equal(curve.get_xdata(), [5, 10, 20])
    np.testing.assert_allclose(np.add(line.get_xdata(), line.get_ydata()), 95)
    assert {"a", "b", "c", "sum 95.0"} == {text.get_text() for text in axes.texts}


def test_trade_off_colours_a_panel_by_each_setting_and_marks_the_least_error() -> None:
    settings: dict[str, list[Any]] = {"latent_dim": [16, 4, 16], "objective": ["elbo", "iwae", "elbo"]}
    made = plots.trade_off([-90, -80, -85], [12.0, 30.0, 8.0], [1.0, 2.0, 0.5], settings, n_labels=50)
    for axes, kinds, ends in zip(made.axes, (["4", "16"], ["elbo", "iwae"]), ([-80, -90], [-90, -80]), strict=True):
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == kinds
        *points, mark = axes.collections[1:]
        assert [np.asarray(drawn.get_offsets())[0, 0] for drawn in points] == ends
        np.testing.assert_array_equal(mark.get_offsets(), [[-85, 8]])
    assert made.axes[0].get_ylabel() == "error with 50 labels (%)"


def test_learning_curves_have_a_logarithmic_axis_and_names_apart() -> None:
    curves = {f"{size} latents": [(1e5, -150.0), (1e6, -100.0 - 0.01 * size)] for size in (3, 5, 10)}
    made = plots.learning_curves(curves)
    (axes,) = made.axes
    assert axes.get_xscale() == "log"
    made.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 3
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))


def test_latent_map_shows_the_scale_of_both_latents() -> None:
    points = np.random.default_rng(0).normal(size=(50, 2))
    (axes,) = plots.latent_map(points, np.arange(50) % 3, latents=(4, 0)).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latent 4", "latent 0")
    assert len(axes.get_xticks()) > 2
    assert len(axes.collections) == 3


def test_reconstruction_picture_puts_rows_above_reconstructions() -> None:
    black, white = np.zeros((3, 1, 10, 10), dtype=np.uint8), np.full((3, 1, 10, 10), 255.0, dtype=np.float32)
    black[0, 0, 0, 0] = 255  # so that the rows have a range
    drawn = pixels(reconstruction_picture(black, white))
    half = drawn.shape[0] // 2
    middle: Any = slice(10, -10)
    assert drawn[: half - 4, middle].mean() < 100
    assert drawn[half + 4 :].mean() > 250


def test_analogies_show_the_row_a_gap_and_every_class_by_name() -> None:
    random = np.random.default_rng(0)
    rows, made = random.uniform(0, 9, (2, 1, 5, 5)), random.uniform(0, 9, (2, 3, 1, 5, 5))
    drawn = plots.analogies(rows, made, ["a", "b", "c"], low=0, high=9)
    picture = shown(drawn)
    white = np.full((1, 5, 5), 9.0)
    lines = [tile for row, classes in zip(rows, made, strict=True) for tile in (row, white, *classes)]
    np.testing.assert_allclose(picture, sheet(np.stack(lines), columns=5, low=0, high=9))
    (axes,) = drawn.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["row", "a", "b", "c"]
    assert list(axes.get_xticks()) == [2, 14, 20, 26]
