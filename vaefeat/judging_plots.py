"""Figures of how features were judged: by class, by confidence, on a map with few labels; and of tables' columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vaefeat.drawing import BLUE, GREY, INK, ORANGE, PALE, draw_title, style
from vaefeat.latent_plots import draw_map
from vaefeat.table_schema import Column

__all__ = [
    "class_errors",
    "columns_explained",
    "few_label_maps",
    "known_labels_map",
    "marginals",
    "reliability",
    "training_curves",
]

_MOST_CLASSES = 30
_MOST_COLUMNS = 24
_MOST_PANELS = 8
#: Of a column's categories, beneath its bars.
_MOST_NAMES = 5


def training_curves(history: Sequence[dict[str, Any]]) -> Figure:
    """Show the bound, its two parts and the active units over epochs.

    Parameters
    ----------
    history : sequence of mapping
        Each with the keys of :class:`vaefeat.observers.EpochRecord`.
    """
    epochs = [record["epoch"] for record in history]
    with style():
        made = Figure(figsize=(10.4, 3.1), layout="constrained")
        panels = made.subplots(1, 3)
    for axes, key, title in (
        (panels[0], "elbo", "ELBO (nats per row)"),
        (panels[1], "kl", "KL divergence (nats per row)"),
    ):
        for part, colour, name in (("train", GREY, "training"), ("heldout", BLUE, "held-out")):
            values = np.array([record[f"{part}_{key}"] for record in history])
            axes.plot(epochs, values, color=colour, label=name, marker="o" if len(epochs) == 1 else "")
        if len(epochs) > 4 and key == "elbo":
            _leave_out_the_beginning(axes, np.array([[r["heldout_elbo"], r["train_elbo"]] for r in history]))
        draw_title(axes, title)
    panels[0].legend(loc="lower right", frameon=False)
    panels[2].plot(epochs, [r["active_units"] for r in history], color=BLUE, marker="o" if len(epochs) == 1 else "")
    panels[2].set_ylim(0, 1.08 * max(1, *(record["active_units"] for record in history)))
    panels[2].yaxis.set_major_locator(MaxNLocator(integer=True))
    draw_title(panels[2], "Active latents")
    for axes in panels:
        axes.set_xlabel("epoch")
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return made


def few_label_maps(points: NDArray[Any], labels: NDArray[Any], *, chosen: NDArray[np.bool_]) -> Figure:
    """Show rows in two dimensions twice: with the few labels alone, and with all that are known.

    Parameters
    ----------
    points : ndarray of shape (n, 2)
    labels : ndarray of shape (n,)
        Names of classes.
    chosen : ndarray of shape (n,)
        Rows whose label was given away.
    """
    names = np.unique(labels)
    colours = mpl.colormaps["tab10" if len(names) <= 10 else "tab20"]
    with style():
        made = Figure(figsize=(10.4, 5.2), layout="constrained")
        few, full = made.subplots(1, 2)
    few.scatter(points[:, 0], points[:, 1], s=4, color=PALE, linewidths=0)
    for index, name in enumerate(names):
        own = points[chosen & (labels == name)]
        few.scatter(own[:, 0], own[:, 1], s=46, color=colours(index % colours.N), edgecolors=INK, linewidths=0.7)
    few.set(xticks=[], yticks=[])
    few.spines[:].set_visible(False)
    draw_title(few, f"The {int(chosen.sum())} labels of one draw, by their class")
    draw_map(full, points, labels, title="All labels, which no one was shown")
    return made


def known_labels_map(points: NDArray[Any], labels: NDArray[Any] | None) -> Figure:
    """Show rows in two dimensions, with the labels that are known.

    Parameters
    ----------
    points : ndarray of shape (n, 2)
    labels : ndarray of shape (n,) or None
        Names of classes, and None for rows without one; None in the place of all where nothing is known.
    """
    with style():
        made = Figure(figsize=(7.4, 5.6), layout="constrained")
        axes = made.add_subplot()
    n_known = 0 if labels is None else sum(label is not None for label in labels)
    shown = f"{len(points):,} rows" + (f", {n_known:,} of them with a label" if n_known else "")
    draw_map(axes, points, labels, title=shown)
    return made


def class_errors(names: Sequence[str], errors: Sequence[float], taken_for: Sequence[str]) -> Figure:
    """Show the error of each class, the worst first, and what it is most often taken for.

    Parameters
    ----------
    names : sequence of str
    errors : sequence of float
        In percent.
    taken_for : sequence of str
        Written beside each bar; may be empty.
    """
    order = np.argsort(-np.asarray(errors), kind="stable")[:_MOST_CLASSES]
    places = np.arange(len(order))[::-1]
    with style():
        made = Figure(figsize=(5.6, max(2.2, 0.9 + 0.27 * len(order))), layout="constrained")
        axes = made.add_subplot()
    values = np.asarray(errors)[order]
    axes.barh(places, values, color=BLUE, height=0.7)
    for place, index in zip(places, order, strict=True):
        axes.annotate(
            f"{errors[index]:.1f}  {taken_for[index]}",
            (errors[index], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=9,
            color=INK,
        )
    axes.set_yticks(places, [_shortened(names[index]) for index in order])
    # Room for what is written beside the longest bar.
    axes.set_xlim(0, max(values.max() * 1.75, 1e-9))
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 100])
    axes.set(xlabel="test error (%)")
    shown = f", the worst {len(order)} of {len(names)}" if len(order) < len(names) else ""
    draw_title(axes, f"Error by class{shown}")
    return made


def reliability(
    confidence: Sequence[float], accuracy: Sequence[float], counts: Sequence[int], *, error: float, n_bins: int
) -> Figure:
    """Show how often decisions of each confidence are right, and how many there are.

    Parameters
    ----------
    confidence, accuracy : sequence of float
        Means over each bin that is not empty, in 0 to 1.
    counts : sequence of int
    error : float
        The expected calibration error.
    n_bins : int
        Of confidence, from 0 to 1.
    """
    with style():
        made = Figure(figsize=(4.6, 4.4), layout="constrained")
        upper, lower = made.subplots(2, 1, height_ratios=[3.4, 1], sharex=True)
    places = (np.ceil(np.asarray(confidence) * n_bins).clip(1) - 0.5) / n_bins
    upper.plot([0, 1], [0, 1], color=INK, lw=1, ls="--", zorder=3)
    upper.bar(places, accuracy, width=0.92 / n_bins, color=PALE)
    upper.plot(confidence, accuracy, color=BLUE, marker="o", ms=5, lw=1.4, zorder=4)
    upper.set(ylabel="share that is right", ylim=(0, 1.02), xlim=(0, 1))
    draw_title(upper, f"Calibration: expected error {100 * error:.1f} %")
    lower.bar(places, np.asarray(counts) / sum(counts), width=0.92 / n_bins, color=BLUE)
    lower.set(xlabel="confidence", ylabel="decisions")
    lower.yaxis.set_major_locator(MaxNLocator(3))
    return made


def columns_explained(explained: NDArray[np.floating[Any]], columns: Sequence[Column] | None = None) -> Figure:
    """Show for each column of a table which share of its variance the reconstruction has, the least first.

    Parameters
    ----------
    explained : ndarray of shape (n_columns,)
        One minus the squared error over the variance, or, of categories, the errors over those of always saying the
        commonest; below 0 is shown as 0.
    columns : sequence of Column, optional
        What they are, where they are not all numbers.
    """
    order = np.argsort(explained, kind="stable")[:_MOST_COLUMNS]
    values = np.clip(explained[order], 0, 1)
    with style():
        made = Figure(figsize=(max(4.6, 0.32 * len(order) + 1.4), 3.0), layout="constrained")
        axes = made.add_subplot()
    axes.bar(np.arange(len(order)), values, color=[ORANGE if value < 0.1 else BLUE for value in values], width=0.75)
    if columns is None:
        axes.set_xticks(np.arange(len(order)), [str(index) for index in order], size=9)
        axes.set(xlabel="column", ylabel="share of variance", ylim=(0, 1))
    else:
        names = [_shortened(columns[index].name) for index in order]
        axes.set_xticks(np.arange(len(order)), names, size=9, rotation=40, ha="right", rotation_mode="anchor")
        axes.set(ylabel="share of variance,\nor of wrong guesses", ylim=(0, 1))
    axes.tick_params(axis="x", length=0)
    shown = f", the least {len(order)} of {len(explained)}" if len(order) < len(explained) else ""
    draw_title(axes, f"What reconstructions keep of each column{shown}")
    return made


def marginals(rows: NDArray[Any], samples: NDArray[Any], columns: Sequence[Column] | None = None) -> Figure:
    """Show the columns of a table, of rows and of samples: at most eight, those that differ most.

    Parameters
    ----------
    rows : ndarray of shape (n, n_columns)
        NaN where a value is missing.
    samples : ndarray of shape (m, n_columns)
    columns : sequence of Column, optional
        What they are, where they are not all numbers.
    """
    there = [rows[~np.isnan(rows[:, index]), index] for index in range(rows.shape[1])]
    gaps = [_gap(values, samples[:, index]) if len(values) else 0.0 for index, values in enumerate(there)]
    order = np.argsort(-np.array(gaps), kind="stable")[:_MOST_PANELS]
    n_wide = min(4, len(order))
    n_lines = -(-len(order) // n_wide)
    with style():
        made = Figure(figsize=(10.4 * n_wide / 4, 1.9 * n_lines + 0.4), layout="constrained")
        panels = made.subplots(n_lines, n_wide, squeeze=False).ravel()
    for axes, index in zip(panels, order, strict=False):
        column = None if columns is None else columns[index]
        bins = _bins(there[index], column)
        for values, look in (
            (there[index], {"color": PALE, "label": "rows"}),
            (samples[:, index], {"histtype": "step", "color": BLUE, "lw": 1.4, "label": "samples"}),
        ):
            axes.hist(np.clip(values, bins[0], bins[-1]), bins=bins, density=len(values) > 0, **look)
        axes.set_title(f"column {index}" if column is None else _shortened(column.name), size=10)
        axes.set(yticks=[])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if column is not None and 0 < column.n_codes <= _MOST_NAMES:
            names = [_shortened(str(name), most=9) for name in column.categories or (False, True)]
            axes.set_xticks(np.arange(column.n_codes), names, size=8)
        axes.spines["left"].set_visible(False)
    for axes in panels[len(order) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    return made


def _gap(values: NDArray[Any], samples: NDArray[Any]) -> float:
    """Say how far two distributions are apart, in standard deviations of the first."""
    quantiles = np.linspace(0.05, 0.95, 19)
    apart = np.abs(np.quantile(values, quantiles) - np.quantile(samples, quantiles)).mean()
    return float(apart / (values.std() + 1e-12))


def _bins(values: NDArray[Any], column: Column | None) -> list[float]:
    if column is not None and column.n_codes:
        return list(np.arange(column.n_codes + 1) - 0.5)
    low, high = np.quantile(values, [0.005, 0.995]) if len(values) else (0.0, 1.0)
    return list(np.linspace(low, high if high > low else low + 1, 31))


def _leave_out_the_beginning(axes: Axes, values: NDArray[Any]) -> None:
    # The first epochs are far below the rest, and would press everything else into a line.
    floor, top = np.quantile(values[:, 0], 0.1), values.max()
    axes.set_ylim(floor - 0.3 * (top - floor), top + 0.08 * (top - floor))


def _shortened(name: str, *, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
