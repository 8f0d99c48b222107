"""Figures; matplotlib is imported here and nowhere else.

Every function returns a new :class:`matplotlib.figure.Figure` that belongs to no window, or draws into the axes it is
given; :func:`png` turns a figure into bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["draw_curve", "draw_errors", "draw_images", "draw_map", "figure", "overview", "png"]

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_TRAIN, _HELDOUT, _OURS, _OTHERS = "#9aa5b1", "#1f5fbf", "#1f5fbf", "#b8c1cc"


def figure(*, width: float = 6.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """Make a figure of `width` by `height` inches with one pair of axes."""
    with mpl.rc_context(_STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        return made, made.add_subplot()


def png(made: Figure, *, dpi: int = 110) -> bytes:
    """Render a figure."""
    file = io.BytesIO()
    with mpl.rc_context(_STYLE):
        # The date that matplotlib writes by default would make equal pictures differ.
        made.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()


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
    axes.plot(epochs, [record["train_elbo"] for record in history], color=_TRAIN, label="training")
    axes.plot(epochs, [record["heldout_elbo"] for record in history], color=_HELDOUT, label="held-out")
    # The first epochs are far below the rest, and would press everything else into a line.
    heldout = np.array([record["heldout_elbo"] for record in history])
    if len(heldout) > 4:
        floor, top = np.quantile(heldout, 0.1), max(heldout.max(), max(r["train_elbo"] for r in history))
        axes.set_ylim(floor - 0.3 * (top - floor), top + 0.08 * (top - floor))
    axes.set(xlabel="epoch", ylabel="ELBO (nats per row)")
    _title(axes, title)
    axes.legend(loc="lower right")


def draw_images(axes: Axes, images: NDArray[Any], *, columns: int, title: str, low: float, high: float) -> None:
    """Draw images (n, C, H, W) as a grid, black at `low` and white at `high`."""
    n_rows = -(-len(images) // columns)
    height, width = images.shape[2] + 1, images.shape[3] + 1
    canvas = np.ones((n_rows * height - 1, columns * width - 1, 3))
    for index, image in enumerate(images):
        y, x = (index // columns) * height, (index % columns) * width
        unit = np.clip((image.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1).transpose(1, 2, 0)
        canvas[y : y + height - 1, x : x + width - 1] = unit[..., :3] if unit.shape[2] >= 3 else unit[..., :1]
    axes.imshow(canvas, interpolation="nearest")
    _title(axes, title)
    axes.set_axis_off()


def draw_map(axes: Axes, points: NDArray[Any], labels: NDArray[Any] | None, *, title: str) -> None:
    """Draw points (n, 2), coloured by their labels where those are known, and named at each label's middle."""
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=5, color=_OURS, linewidths=0)
    else:
        colours = mpl.colormaps["tab10" if len(np.unique(labels)) <= 10 else "tab20"]
        for index, label in enumerate(np.unique(labels)):
            chosen = points[labels == label]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=6, color=colours(index % colours.N), linewidths=0, alpha=0.75)
            middle = np.median(chosen, axis=0)
            axes.annotate(
                str(label),
                middle,
                ha="center",
                va="center",
                weight="bold",
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
            )
    axes.set(xticks=[], yticks=[])
    _title(axes, title)
    axes.spines[:].set_visible(False)


def draw_errors(
    axes: Axes, names: Sequence[str], errors: Sequence[float], spreads: Sequence[float], *, ours: set[str], title: str
) -> None:
    """Draw test errors in percent as bars with their standard deviation, `ours` in colour."""
    places = np.arange(len(names))[::-1]
    axes.barh(
        places,
        errors,
        xerr=spreads,
        color=[_OURS if name in ours else _OTHERS for name in names],
        height=0.65,
        error_kw={"ecolor": "#555", "elinewidth": 1},
    )
    for name, place, error in zip(names, places, errors, strict=True):
        axes.annotate(
            f"{error:.1f}",
            (0, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color="white" if name in ours else "#1c2733",
            weight="bold",
        )
    axes.set_yticks(places, names)
    axes.set(xlabel="test error (%)")
    _title(axes, title)


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
    low, high : float
        Black and white.
    """
    with mpl.rc_context(_STYLE):
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


def _title(axes: Axes, title: str) -> None:
    # Said here and not in the style: a style counts when text is made, not when the figure is.
    axes.set_title(title, loc="left", weight="bold", size=11)
