"""Encoded images as rows of a model, by the same steps as when an image folder is read for training.

A file of some kilobytes can hold as many pixels as its header likes to say. So the header is read first, and pixels are
only decoded where there is room for them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import overloaded, too_large, too_late
from vaefeat.errors import InputError
from vaefeat.image_decoding import decode_image
from vaefeat.input_spec import InputSpec

__all__ = ["ImageDecoder", "PixelRoom", "decode_into", "part_images", "spread"]

#: Images below this many pixels find room always: all threads together hold few of them.
_SMALL_PIXELS = 2**20
#: Encoded images of so many bytes together are worth a thread of their own.
_BYTES_PER_TASK = 65_536
_ROOM_FOR_SMALL = nullcontext()


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

    def take(self, n_pixels: int) -> AbstractContextManager[None]:
        """Wait until there is room for an image, and keep it meanwhile."""
        return _ROOM_FOR_SMALL if n_pixels <= _SMALL_PIXELS else self._take(n_pixels)

    @contextmanager
    def _take(self, n_pixels: int) -> Iterator[None]:
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
        PNG, JPEG or WebP files; another size than the model's is resized as :mod:`vaefeat.image_decoding` describes.
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


def part_images(encoded: Sequence[bytes], *, most: int) -> Iterator[tuple[int, int]]:
    """Part images among threads: from where to where each task goes.

    Of a small image most of the time is Python's, which one thread at a time can have; handing over would add to it.

    Parameters
    ----------
    encoded : sequence of bytes
    most : int
        Images in a task.
    """
    start, n_bytes = 0, 0
    for position, content in enumerate(encoded):
        n_bytes += len(content)
        if n_bytes >= _BYTES_PER_TASK or position - start + 1 >= most:
            yield start, position + 1
            start, n_bytes = position + 1, 0
    if start < len(encoded):
        yield start, len(encoded)


class ImageDecoder:
    """Decodes the images of many requests in a pool of threads, within bounds; on one event loop.

    Parameters
    ----------
    max_pixels : int
        See :class:`PixelRoom`.
    max_bytes : int
        Of the rows that are being made.
    images_per_task : int
        Images that a thread decodes before others get a turn.
    tasks : int
        Threads that one request may use at a time.
    off_loop : callable
        Calls a function in a thread.
    """

    def __init__(
        self,
        *,
        max_pixels: int,
        max_bytes: int,
        images_per_task: int,
        tasks: int,
        off_loop: Callable[..., Awaitable[dict[int, str]]],
    ) -> None:
        self._room = PixelRoom(max_pixels)
        self._max_bytes, self._images_per_task, self._tasks = max_bytes, images_per_task, tasks
        self._off_loop = off_loop
        self._bytes = 0

    async def decode(
        self, encoded: Sequence[bytes], spec: InputSpec, *, deadline: float
    ) -> tuple[NDArray[Any], dict[int, str]]:
        """Decode the images of one request.

        Returns
        -------
        rows : ndarray of shape (n, ...)
            Zeros where an image cannot be read.
        errors : dict of int to str
            Why not, by position.

        Raises
        ------
        RequestError
            413, 503 where the rows would take more than there is room for; 504 after the deadline.
        """
        n_bytes = len(encoded) * spec.row_bytes
        self._keep_room(n_bytes)
        try:
            return await self._decode(encoded, spec, deadline)
        finally:
            self._bytes -= n_bytes

    def _keep_room(self, n_bytes: int) -> None:
        """Keep room for decoded rows: a file of a hundred bytes can become a row of a megabyte."""
        if n_bytes > self._max_bytes:
            raise too_large(
                f"got images that make rows of {n_bytes} bytes, wanted at most {self._max_bytes}; send fewer at a time"
            )
        if self._bytes + n_bytes > self._max_bytes:
            raise overloaded("as many images as there is room for are being decoded")
        self._bytes += n_bytes

    async def _decode(
        self, encoded: Sequence[bytes], spec: InputSpec, deadline: float
    ) -> tuple[NDArray[Any], dict[int, str]]:
        rows = np.zeros((len(encoded), *spec.shape), spec.dtype)
        tasks = list(part_images(encoded, most=self._images_per_task))
        waiting = iter(tasks)
        errors: dict[int, str] = {}

        async def work() -> None:
            for start, stop in waiting:
                part = encoded[start:stop]
                errors.update(await self._off_loop(decode_into, rows, start, part, spec, self._room, deadline))

        n_workers = min(self._tasks, len(tasks))
        if n_workers == 1:
            await work()
            return rows, errors
        workers = [asyncio.ensure_future(work()) for _ in range(n_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        return rows, errors


def spread(features: NDArray[Any], good: NDArray[np.intp], n_rows: int) -> NDArray[Any]:
    """Put features of the images that could be read, at places `good`, among zeros for the others."""
    whole = np.zeros((n_rows, *features.shape[1:]), features.dtype)
    whole[good] = features
    return whole
