"""MNIST's images made small, and into a table: what :mod:`benchmarks.methods` trains some likelihoods on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vaefeat.table_schema import Column, TableSchema

__all__ = ["SMALL_SIDE", "TABLE", "shrink", "tabulated"]

#: Likelihoods with hundreds of parameters a pixel get 7 by 7 pixels, each the mean of 4 by 4.
SMALL_SIDE = 7
#: Pixels of 7 by 7 by turns as quantities, as bright or not, and as one of four shades; each is missing now and then.
TABLE = TableSchema(
    columns=tuple(
        (
            Column(name=f"pixel{number}", kind="number", optional=True),
            Column(name=f"pixel{number}", kind="boolean", optional=True),
            Column(
                name=f"pixel{number}", kind="category", categories=("black", "dark", "grey", "white"), optional=True
            ),
        )[number % 3]
        for number in range(SMALL_SIDE**2)
    ),
    named=True,
)
_MISSING, _SEED = 0.1, 0


def shrink(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average blocks of pixels of (n, 1, 28, 28), so that (n, 1, 7, 7) are left, still of 256 levels."""
    n, _, height, width = rows.shape
    blocks = rows.reshape(n, 1, SMALL_SIDE, height // SMALL_SIDE, SMALL_SIDE, width // SMALL_SIDE)
    small: NDArray[np.uint8] = blocks.mean(axis=(3, 5)).round().astype(np.uint8)
    return small


def tabulated(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Give the rows of :data:`TABLE` that images (n, 1, 28, 28) are, (n, 49): a tenth of their values is NaN."""
    pixels = shrink(images).reshape(len(images), -1)
    rows = pixels.astype(np.float32)
    rows[:, 1::3], rows[:, 2::3] = pixels[:, 1::3] > 127, pixels[:, 2::3] // 64
    rows[np.random.default_rng(_SEED).random(rows.shape) < _MISSING] = np.nan
    return rows
