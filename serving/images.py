"""Encoded images as rows of a model, by the same steps as when an image folder is read for training.

A file of some kilobytes can hold as many pixels as its header likes to say. So the header is read first, and pixels are
only decoded where there is room for them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from serving.errors import too_late
from vaefeat.errors import InputError
from vaefeat.images import decode_image
from vaefeat.input_spec import InputSpec

__all__ = ["PixelRoom", "decode_into"]

#: Images below this many pixels find room always: all threads together hold few of them.
_SMALL_PIXELS = 2**20


class PixelRoom:
    """Pixels that are in memory at a time, over all threads that decode; one takes up to twenty bytes.

    Parameters
    ----------
    max_pixels : int
        Also the most that one image may have.
    """

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._left = max_pixels
        self._changed = threading.Condition()

    @contextmanager
    def take(self, n_pixels: int) -> Iterator[None]:
        """Wait until there is room for an image, and keep it meanwhile."""
        if n_pixels <= _SMALL_PIXELS:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._left >= n_pixels)
            self._left -= n_pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += n_pixels
                self._changed.notify_all()


def decode_into(
    rows: NDArray[Any], start: int, encoded: Sequence[bytes], spec: InputSpec, room: PixelRoom, deadline: float
) -> dict[int, str]:
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
    room : PixelRoom
    deadline : float
        On :func:`time.perf_counter`'s clock; images whose turn comes later are not decoded.

    Returns
    -------
    dict of int to str
        Position in `rows` and reason, of those that cannot be read.

    Raises
    ------
    RequestError
        504.
    """
    n_channels, height, width = spec.shape
    errors: dict[int, str] = {}
    for position, content in enumerate(encoded, start):
        if time.perf_counter() > deadline:
            raise too_late(f"item {position} was not decoded")
        try:
            pixels = decode_image(
                content,
                name=f"item {position}",
                shape=(n_channels, height, width),
                max_pixels=room.max_pixels,
                room=room.take,
            )
        except InputError as error:
            errors[position] = str(error)
            continue
        rows[position] = spec.of_pixels(pixels)
    return errors
