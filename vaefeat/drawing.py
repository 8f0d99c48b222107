"""What every figure is made of: one style, a sheet of images, titles.

Together with :mod:`vaefeat.plots` and :mod:`vaefeat.latent_plots` the only room that imports matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = [
    "BLUE",
    "GREY",
    "INK",
    "ORANGE",
    "PALE",
    "draw_images",
    "draw_title",
    "figure",
    "label_lines",
    "png",
    "sheet",
    "style",
]

#: Apart for every kind of colour vision, and in grey.
BLUE, ORANGE, GREY, PALE, INK = "#1f5fbf", "#d9730d", "#9aa5b1", "#b8c1cc", "#1c2733"

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_GAP_PIXELS = 1
#: What is not there: no shade of grey, and calm.
_MISSING = np.array([0.93, 0.76, 0.70])


def style() -> AbstractContextManager[None]:
    """Hold the style while a figure is made: it counts when axes are, not when they are drawn."""
    held: AbstractContextManager[None] = mpl.rc_context(_STYLE)
    return held


def figure(*, width: float = 6.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """Make a figure of `width` by `height` inches with one pair of axes."""
    with style():
        made = Figure(figsize=(width, height), layout="constrained")
        return made, made.add_subplot()


def png(made: Figure, *, dpi: int = 110) -> bytes:
    """Render a figure."""
    file = io.BytesIO()
    with style():
        # The date that matplotlib writes by default would make equal pictures differ.
        made.savefig(file, format="png", dpi=dpi, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.06)
    return file.getvalue()


def draw_title(axes: Axes, title: str) -> None:
    """Write a title in the manner of all figures."""
    # Said here and not in the style: a style counts when text is made, not when the figure is.
    axes.set_title(title, loc="left", weight="bold", size=11)


def sheet(images: NDArray[Any], *, columns: int, low: float, high: float, gap: int = _GAP_PIXELS) -> NDArray[Any]:
    """Lay images (n, C, H, W) out as one picture.

    Parameters
    ----------
    images : ndarray of shape (n, C, H, W)
        NaN is shown as pale red: a value that is missing.
    columns : int
    low, high : float
        Black and white.
    gap : int
        White pixels between images.

    Returns
    -------
    ndarray of shape (height, width, 3), float64 in [0, 1]
    """
    n_rows = -(-len(images) // columns)
    height, width = images.shape[2] + gap, images.shape[3] + gap
    canvas = np.ones((n_rows * height - gap, columns * width - gap, 3))
    for index, image in enumerate(images):
        y, x = (index // columns) * height, (index % columns) * width
        unit = np.clip((image.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1).transpose(1, 2, 0)
        # Grey is broadcast to three channels; a fourth (alpha) is not shown.
        colours = np.broadcast_to(unit[..., :3] if unit.shape[2] >= 3 else unit[..., :1], (*unit.shape[:2], 3))
        missing = np.isnan(colours).any(axis=2, keepdims=True)
        canvas[y : y + image.shape[1], x : x + image.shape[2]] = np.where(missing, _MISSING, colours)
    return canvas


def draw_images(axes: Axes, images: NDArray[Any], *, columns: int, title: str, low: float, high: float) -> None:
    """Draw images (n, C, H, W) as a grid, black at `low` and white at `high`; what is NaN is pale red."""
    axes.imshow(sheet(images, columns=columns, low=low, high=high), interpolation="nearest")
    if title:
        draw_title(axes, title)
    axes.set_axis_off()


def label_lines(axes: Axes, labels: Sequence[str], *, image_height: int) -> None:
    """Name the lines of a drawn sheet on its left."""
    step = image_height + _GAP_PIXELS
    for index, label in enumerate(labels):
        axes.annotate(
            label,
            (-0.5, index * step + (image_height - 1) / 2),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=INK,
            annotation_clip=False,
        )
