"""Encoded images as rows of a model, by the same steps as when an image folder is read for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import InputError
from vaefeat.images import decode_image
from vaefeat.input_spec import InputSpec

__all__ = ["decode_into"]


def decode_into(rows: NDArray[Any], start: int, encoded: Sequence[bytes], spec: InputSpec) -> dict[int, str]:
    """Decode images into their rows; in a thread.

    Parameters
    ----------
    rows : ndarray of shape (n, C, H, W)
        Written from `start` on. Rows of images that cannot be read are left as they are.
    start : int
    encoded : sequence of bytes
        PNG, JPEG or WebP files; another size than the model's is resized as :mod:`vaefeat.images` describes.
    spec : InputSpec
        Of images.

    Returns
    -------
    dict of int to str
        Position in `rows` and reason, of those that cannot be read.
    """
    n_channels, height, width = spec.shape
    # Pixels are 0 to 255 in a file; a model of pixels up to 1 was trained on them divided.
    scale = np.float32(1 / 255) if spec.dtype == "float32" and spec.high <= 1 else None
    errors: dict[int, str] = {}
    for position, content in enumerate(encoded, start):
        try:
            pixels = decode_image(content, name=f"item {position}", shape=(n_channels, height, width))
        except InputError as error:
            errors[position] = str(error)
            continue
        rows[position] = pixels * scale if scale is not None else pixels
    return errors
