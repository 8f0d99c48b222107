"""Figures of runs and of rows; those of latents and of bounds are in :mod:`vaefeat.latent_plots` and named here, too.

Every function takes arrays, and returns a new :class:`matplotlib.figure.Figure` that belongs to no window, or draws
into the axes it is given; :func:`png` turns a figure into bytes. Rows are images (n, C, H, W), black at `low` and white
at `high`, both of the rows' own range where not given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vaefeat.drawing import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    draw_images,
    draw_title,
    figure,
    label_lines,
    png,
    sheet,
    style,
)
from vaefeat.latent_plots import (
    aggregate_posterior,
    draw_map,
    kl_per_latent,
    latent_map,
    learning_curves,
    rate_distortion,
    trade_off,
)

if TYPE_CHECKING:
    from vaefeat.generation import Manifold, Sweep

__all__ = [
    "aggregate_posterior",
    "analogies",
    "anomalies",
    "denoising",
    "draw_curve",
    "draw_errors",
    "draw_images",
    "draw_map",
    "figure",
    "inpainting",
    "interpolations",
    "kl_per_latent",
    "latent_map",
    "learning_curves",
    "manifold",
    "neighbours",
    "overview",
    "png",
    "rate_distortion",
    "samples",
    "sweeps",
    "trade_off",
]

#: Inches that one image takes in a figure of few, and the width that many must share.
_IMAGE_INCHES, _PAGE_INCHES = 0.62, 9.0
_TITLE_INCHES = 0.28


def samples(
    rows: NDArray[Any],
    *,
    columns: int | None = None,
    title: str = "Samples",
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Show rows (n, C, H, W) as a grid; as square as can be when `columns` is None."""
    columns = columns or int(np.ceil(len(rows) ** 0.5))
    made, axes = _canvas(rows, columns=columns, n_lines=-(-len(rows) // columns))
    draw_images(axes, rows, columns=columns, title=title, **_range(rows, low, high))
    return made


def neighbours(
    row: NDArray[Any],
    reconstruction: NDArray[Any],
    around: NDArray[Any],
    *,
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Show a row and its reconstruction, each (C, H, W), and samples (n, C, H, W) of the posterior around it."""
    columns = int(np.ceil(len(around) ** 0.5))
    n_lines = max(2, -(-len(around) // columns))
    scale = _range(np.concatenate([row[None], around]), low, high)
    width, height = _inches(around, columns + 3)
    # Both pictures on the left, with a title each, are as tall as the grid on the right.
    left = max(width, (n_lines * height - _TITLE_INCHES) / 2 * width / height)
    with style():
        made = Figure(figsize=(left + columns * width + 0.2, n_lines * height + _TITLE_INCHES), layout="constrained")
        axes = made.subplot_mosaic(
            [["row", "around"], ["reconstruction", "around"]], width_ratios=[left, columns * width]
        )
    draw_images(axes["row"], row[None], columns=1, title="Row", **scale)
    draw_images(axes["reconstruction"], reconstruction[None], columns=1, title="Reconstruction", **scale)
    draw_images(axes["around"], around, columns=columns, title="Samples of its posterior, decoded", **scale)
    return made


def interpolations(
    ways: NDArray[Any],
    *,
    title: str = "From one row to another through the latent space",
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Show ways between rows, (n, steps, C, H, W): one a line."""
    return _lines(list(ways), [], title=title, low=low, high=high)


def manifold(grid: Manifold, *, low: float | None = None, high: float | None = None) -> Figure:
    """Show rows over two latents, the first to the right and the second upwards, with the prior's quantiles."""
    side = len(grid.rows)
    rows = grid.rows[::-1].reshape(-1, *grid.rows.shape[2:])
    height, width = rows.shape[2:]
    with style():
        made = Figure(figsize=(7.4, 7.4 * height / width + 0.3), layout="constrained")
        axes = made.add_subplot()
    axes.imshow(sheet(rows, columns=side, gap=0, **_range(rows, low, high)), interpolation="nearest")
    draw_title(axes, "What two latents mean, evenly in the prior's probability")
    middles = np.arange(side) + 0.5
    for axis, values, size, places in (
        (axes.xaxis, grid.coordinates[0], width, middles),
        (axes.yaxis, grid.coordinates[1], height, side - middles),
    ):
        round_values = MaxNLocator(9).tick_values(values[0], values[-1])
        shown = [value for value in round_values if values[0] <= value <= values[-1]]
        # Between two rows where the value lies between theirs.
        axis.set_ticks(np.interp(shown, values, places) * size - 0.5, [f"{value:g}" for value in shown])
    axes.set(xlabel=f"latent {grid.latents[0]}", ylabel=f"latent {grid.latents[1]}")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return made


def sweeps(lines: Sequence[Sweep], *, low: float | None = None, high: float | None = None) -> Figure:
    """Show what each latent does to a row: one latent a line, named, with its values under the last."""
    rows, names = [line.rows for line in lines], [line.name for line in lines]
    in_common = all(np.array_equal(line.values, lines[0].values) for line in lines)
    footer = 0.4 * in_common
    made = _lines(rows, names, title="One latent at a time", low=low, high=high, footer=footer)
    (axes,) = made.axes
    width = lines[0].rows.shape[-1]
    if in_common:
        continuous = lines[0].name.startswith("latent")
        values = lines[0].values
        shown = np.arange(len(values)) if len(values) <= 12 else np.arange(0, len(values), -(-len(values) // 12))
        axes.set_axis_on()
        axes.set_yticks([])
        axes.set_xticks(shown * (width + 1) + (width - 1) / 2, [f"{values[i]:.2g}" for i in shown])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("standard deviations of the prior from its mean" if continuous else "category")
    return made


def analogies(
    rows: NDArray[Any],
    made: NDArray[Any],
    classes: Sequence[Any],
    *,
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Show each row on the left, and beside it the same style in every class.

    Parameters
    ----------
    rows : ndarray of shape (n, C, H, W)
    made : ndarray of shape (n, n_classes, C, H, W)
        As :meth:`vaefeat.VAEClassifier.analogies` gives them, in the shape of the rows.
    classes : sequence
        Their names, a column each.
    low, high : float, optional
    """
    # What is not there, between a row and its analogies, is white.
    between = np.full((len(rows), 1, *rows.shape[1:]), _range(rows, low, high)["high"])
    lines = np.concatenate([rows[:, None], between, made], axis=1)
    drawn = _lines(list(lines), [], title="Same style, other class", footer=0.25, **_range(rows, low, high))
    (axes,) = drawn.axes
    step = rows.shape[3] + 1
    places = np.array([0, *range(2, lines.shape[1])]) * step + (rows.shape[3] - 1) / 2
    axes.set_axis_on()
    axes.set_yticks([])
    axes.set_xticks(places, ["row", *map(str, classes)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return drawn


def denoising(
    clean: NDArray[Any],
    corrupted: NDArray[Any],
    denoised: NDArray[Any],
    *,
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Show rows as they were, as they came, and as the model gives them back: (n, C, H, W) each, a line each."""
    scale = _range(clean, low, high)
    return _lines([clean, corrupted, denoised], ["clean", "corrupted", "denoised"], title="Denoising", **scale)


def inpainting(
    truth: NDArray[Any],
    missing: NDArray[np.bool_],
    mean: NDArray[Any],
    draw: NDArray[Any],
    *,
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Show rows with their missing values left out, filled with the mean, filled with a draw, and as they were.

    All of shape (n, C, H, W), a line each.
    """
    masked = np.where(missing, np.nan, truth.astype(np.float64))
    labels = ["observed", "posterior mean", "one draw", "truth"]
    return _lines([masked, mean, draw, truth], labels, title="Missing values, filled", **_range(truth, low, high))


def anomalies(
    normal_scores: NDArray[np.floating[Any]],
    unusual_scores: NDArray[np.floating[Any]],
    *,
    most_likely: NDArray[Any] | None = None,
    least_likely: NDArray[Any] | None = None,
    unusual_name: str = "unusual rows",
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Show how the scores of normal and unusual rows differ, and the rows at both ends where they are images.

    Parameters
    ----------
    normal_scores, unusual_scores : ndarray of shape (n,), (m,)
        As :func:`vaefeat.inference.anomaly_scores` gives them: minus log-likelihoods, in nats.
    most_likely, least_likely : ndarray of shape (k, C, H, W), optional
        Normal rows at both ends.
    unusual_name : str
    """
    with style():
        if most_likely is None or least_likely is None:
            made, axes = figure()
            _draw_scores(axes, normal_scores, unusual_scores, unusual_name)
            return made
        made = Figure(figsize=(8.6, 3.7), layout="constrained")
        panels = made.subplot_mosaic([["scores", "most"], ["scores", "least"]], width_ratios=[1.45, 1])
    _draw_scores(panels["scores"], normal_scores, unusual_scores, unusual_name)
    scale = _range(most_likely, low, high)
    for name, rows, title in (("most", most_likely, "Most likely rows"), ("least", least_likely, "Least likely rows")):
        columns = int(np.ceil(len(rows) / max(1, round((len(rows) / 2.6) ** 0.5))))
        draw_images(panels[name], rows, columns=columns, title=title, **scale)
    return made


def draw_curve(axes: Axes, history: Sequence[Mapping[str, Any]], *, title: str = "Learning curve") -> None:
    """Draw the bound over epochs, training and held-out.

    Parameters
    ----------
    axes : Axes
    history : sequence of mapping
        Each with the keys of :class:`vaefeat.observers.EpochRecord`.
    title : str
    """
    epochs = [record["epoch"] for record in history]
    axes.plot(epochs, [record["train_elbo"] for record in history], color=GREY, label="training")
    axes.plot(epochs, [record["heldout_elbo"] for record in history], color=BLUE, label="held-out")
    # The first epochs are far below the rest, and would press everything else into a line.
    heldout = np.array([record["heldout_elbo"] for record in history])
    if len(heldout) > 4:
        floor, top = np.quantile(heldout, 0.1), max(heldout.max(), max(r["train_elbo"] for r in history))
        axes.set_ylim(floor - 0.3 * (top - floor), top + 0.08 * (top - floor))
    axes.set(xlabel="epoch", ylabel="ELBO (nats per row)")
    draw_title(axes, title)
    axes.legend(loc="lower right", frameon=False)


def draw_errors(
    axes: Axes, names: Sequence[str], errors: Sequence[float], spreads: Sequence[float], *, ours: set[str], title: str
) -> None:
    """Draw test errors in percent as bars with their standard deviation, `ours` in colour."""
    places = np.arange(len(names))[::-1]
    axes.barh(
        places,
        errors,
        xerr=spreads,
        color=[BLUE if name in ours else PALE for name in names],
        height=0.65,
        error_kw={"ecolor": INK, "elinewidth": 1.3},
    )
    for name, place, error in zip(names, places, errors, strict=True):
        axes.annotate(
            f"{error:.1f}",
            (0, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color="white" if name in ours else INK,
            weight="bold",
        )
    axes.set_yticks(places, names)
    axes.set(xlabel="test error (%)")
    draw_title(axes, title)


def overview(
    *,
    history: Sequence[Mapping[str, Any]],
    pairs: NDArray[Any] | None,
    samples: NDArray[Any] | None,
    points: NDArray[Any],
    labels: NDArray[Any] | None,
    low: float,
    high: float,
) -> Figure:
    """Put a run's pictures side by side: map of the latents, reconstructions, samples, learning curve.

    Parameters
    ----------
    history : sequence of mapping
    pairs : ndarray of shape (2k, C, H, W) or None
        k rows, then their reconstructions; None for tables.
    samples : ndarray of shape (m, C, H, W) or None
    points : ndarray of shape (n, 2)
    labels : ndarray of shape (n,) or None
        Names of classes, and None for a row of which none is known.
    low, high : float
        Black and white.
    """
    with style():
        made = Figure(figsize=(11, 5.2), layout="constrained")
        if pairs is None or samples is None:
            left, right = made.subplots(1, 2)
            draw_map(left, points, labels, title="Posterior means, in two dimensions")
            draw_curve(right, history)
            return made
        axes = made.subplot_mosaic(
            [["map", "pairs", "pairs"], ["map", "samples", "curve"]],
            width_ratios=[1.45, 0.8, 1.2],
            height_ratios=[1, 1.25],
        )
        draw_map(axes["map"], points, labels, title="Posterior means, in two dimensions")
        draw_images(
            axes["pairs"], pairs, columns=len(pairs) // 2, title="Rows, and their reconstructions", low=low, high=high
        )
        columns = round(len(samples) ** 0.5)
        draw_images(axes["samples"], samples, columns=columns, title="Samples", low=low, high=high)
        draw_curve(axes["curve"], history)
        return made


def _draw_scores(
    axes: Axes, normal: NDArray[np.floating[Any]], unusual: NDArray[np.floating[Any]], unusual_name: str
) -> None:
    both = np.concatenate([normal, unusual])
    # Likelihoods of unusual rows have long tails, which would press the rest into one bar.
    low, high = np.min(both), np.quantile(both, 0.99)
    bins = list(np.linspace(low, high, 41))
    for scores, colour, name in ((normal, BLUE, "normal rows"), (unusual, ORANGE, unusual_name)):
        axes.hist(np.clip(scores, low, high), bins=bins, color=colour, alpha=0.7, density=True, label=name)
    axes.set(xlabel=f"minus log-likelihood (nats per row; last bar: {high:.0f} and more)", yticks=[])
    axes.spines["left"].set_visible(False)
    draw_title(axes, "Anomaly scores")
    axes.legend(loc="upper right", frameon=False)


def _lines(
    lines: Sequence[NDArray[Any]],
    labels: Sequence[str],
    *,
    title: str,
    low: float | None,
    high: float | None,
    footer: float = 0.0,
) -> Figure:
    """Show each array of images as a line, named where there are names; shorter lines are filled with white."""
    columns = max(len(line) for line in lines)
    shape = lines[0].shape[1:]
    scale = _range(np.concatenate(list(lines)), low, high)
    images = np.full((len(lines), columns, *shape), scale["high"], dtype=np.float64)
    for filled, line in zip(images, lines, strict=True):
        filled[: len(line)] = line
    flat = images.reshape(-1, *shape)
    margin = 0.09 * max(map(len, labels), default=0)
    made, axes = _canvas(flat, columns=columns, n_lines=len(lines), margin=margin, footer=footer)
    draw_images(axes, flat, columns=columns, title=title, **scale)
    label_lines(axes, labels, image_height=shape[1])
    return made


def _canvas(
    rows: NDArray[Any], *, columns: int, n_lines: int, margin: float = 0.0, footer: float = 0.0
) -> tuple[Figure, Axes]:
    width, height = _inches(rows, columns)
    return figure(width=max(columns * width + margin, 3.2), height=n_lines * height + _TITLE_INCHES + footer)


def _inches(rows: NDArray[Any], columns: int) -> tuple[float, float]:
    width = min(_IMAGE_INCHES, _PAGE_INCHES / columns)
    return width, width * rows.shape[2] / rows.shape[3]


def _range(rows: NDArray[Any], low: float | None, high: float | None) -> dict[str, float]:
    return {
        "low": float(np.nanmin(rows)) if low is None else low,
        "high": float(np.nanmax(rows)) if high is None else high,
    }
