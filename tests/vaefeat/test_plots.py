"""Figures are drawn for every kind of run, and show what they are given."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vaefeat import plots
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


def test_reconstruction_picture_puts_rows_above_reconstructions() -> None:
    black, white = np.zeros((3, 1, 10, 10), dtype=np.uint8), np.full((3, 1, 10, 10), 255.0, dtype=np.float32)
    black[0, 0, 0, 0] = 255  # so that the rows have a range
    drawn = pixels(reconstruction_picture(black, white))
    half = drawn.shape[0] // 2
    middle: Any = slice(10, -10)
    assert drawn[: half - 4, middle].mean() < 100
    assert drawn[half + 4 :].mean() > 250
