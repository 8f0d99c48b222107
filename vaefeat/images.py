"""Encoded images (PNG, JPEG, WebP) as uint8 rows, and folders of them; :mod:`vaefeat.image_decoding` does one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import InputError

if TYPE_CHECKING:
    from vaefeat.image_decoding import Reference

__all__ = ["DecodedImages", "OnError", "class_folders", "decode_images", "find_images"]

OnError = Literal["raise", "skip"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Small blocks keep the threads busy with tiny images and bound what is in flight with large ones.
_BLOCK = 32


class DecodedImages(NamedTuple):
    """What :func:`decode_images` returns."""

    array: NDArray[np.uint8]
    """Of shape (n, 1, H, W) where all images are grey, else (n, 3, H, W)."""

    kept: NDArray[np.intp]
    """Of shape (n,): which of the inputs each row is."""

    skipped: tuple[str, ...]
    """Names of the unreadable inputs."""


def find_images(folder: Path) -> list[Path]:
    """List the image files in and below `folder`, sorted by their path.

    Hidden files and folders are left out. Links to folders are followed, unless they lead back up.

    Raises
    ------
    InputError
        A folder that cannot be listed.
    """
    return sorted(_walk(folder), key=lambda path: path.relative_to(folder).parts)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the sub-folders of `folder` that hold images, sorted."""
    children = (child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return tuple(sorted(child.name for child in children if any(True for _ in _walk(child))))


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"got {folder}, in which a folder cannot be listed ({error}); make it readable") from error

    # Path.rglob would pass over a folder without the right to read it.
    for place, inner, files in os.walk(folder, onerror=refuse, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".") and not _leads_back(Path(place, name))]
        for name in files:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(place, name)


def _leads_back(folder: Path) -> bool:
    """Whether a link leads to a folder that is just being walked, so that following it would never end."""
    return folder.is_symlink() and folder.resolve() in {parent.resolve() for parent in folder.parents}


def decode_images(
    items: Iterable[tuple[str, Path | bytes | None]],
    *,
    count: int,
    image_size: tuple[int, int] | None = None,
    on_error: OnError = "raise",
    reference: Reference | None = None,
    n_threads: int | None = None,
) -> DecodedImages:
    """Decode images into one array, with a few threads and a bounded number of images in flight.

    Parameters
    ----------
    items : iterable of (name, encoded)
        A name for error messages; and a file, its content, or None where there is none. It is consumed as it is needed.
    count : int
        Number of items, for which the array is allocated.
    image_size : (int, int), optional
        Height and width to resize every image to.
    on_error : {"raise", "skip"}, default="raise"
        Whether an unreadable image is an error, or left out and named in the result.
    reference : Reference, optional
        For images that are read in several calls: the form that all of them share.
    n_threads : int, optional
        By default one for each processor, and at most eight.

    Returns
    -------
    DecodedImages

    Raises
    ------
    InputError
        An unreadable image (with ``on_error="raise"``), no readable image, images of different sizes without
        `image_size`, or colour where `reference` is grey.
    """
    from vaefeat.image_decoding import Reference

    canvas = _Canvas(count, reference)
    kept: list[int] = []
    skipped: list[str] = []
    position = 0
    blocks = _blocks(items)
    pending: deque[Future[list[tuple[str, NDArray[np.uint8] | None]]]] = deque()
    n_threads = n_threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(n_threads, thread_name_prefix="vaefeat-decode") as pool:
        while True:
            # Until the size is known, one block at a time: the other threads would not know what to refuse.
            in_flight = 1 if reference is None else 2 * n_threads
            for block in islice(blocks, in_flight - len(pending)):
                pending.append(pool.submit(_decode_block, block, image_size, on_error, reference))
            if not pending:
                break
            for name, pixels in pending.popleft().result():
                if pixels is None:
                    skipped.append(name)
                else:
                    reference = reference or Reference(name, pixels.shape[:2])
                    canvas.add(name, pixels)
                    kept.append(position)
                position += 1
    if canvas.array is None:
        raise InputError(
            f"got {position} images of which none can be read (first: {skipped[0]}), wanted PNG, JPEG or WebP; "
            "on_error='raise' tells why"
        )
    return DecodedImages(canvas.array[: len(kept)], np.array(kept, np.intp), tuple(skipped))


class _Canvas:
    """The array that is filled: grey as long as all images are, widened to RGB by the first that is not."""

    def __init__(self, count: int, reference: Reference | None) -> None:
        self._count = count
        self._reference = reference
        self._filled = 0
        self.array: NDArray[np.uint8] | None = None

    def add(self, name: str, pixels: NDArray[np.uint8]) -> None:
        """Put down one image of shape (H, W) or (H, W, 3)."""
        pixels = self._grey_if_wanted(name, pixels)
        channels = (self._reference and self._reference.channels) or (1 if pixels.ndim == 2 else 3)
        if self.array is None:
            self.array = np.empty((self._count, channels, *pixels.shape[:2]), np.uint8)
        elif channels > self.array.shape[1]:
            grey = self.array
            self.array = np.empty((self._count, channels, *pixels.shape[:2]), np.uint8)
            self.array[: self._filled] = grey[: self._filled]
        # Broadcasting repeats grey over the channels, here and above.
        self.array[self._filled] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        self._filled += 1

    def _grey_if_wanted(self, name: str, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        from vaefeat.image_decoding import grey_of

        if self._reference is None or self._reference.channels != 1 or pixels.ndim == 2:
            return pixels
        grey = grey_of(pixels)
        if grey is None:
            raise InputError(
                f"got {name} in colour, wanted grey as {self._reference.name} and the other images that were looked at "
                "first; convert them all to colour, or this one to grey"
            )
        return grey


def _blocks(items: Iterable[tuple[str, Path | bytes | None]]) -> Iterator[list[tuple[str, Path | bytes | None]]]:
    iterator = iter(items)
    while block := list(islice(iterator, _BLOCK)):
        yield block


def _decode_block(
    block: list[tuple[str, Path | bytes | None]],
    image_size: tuple[int, int] | None,
    on_error: OnError,
    reference: Reference | None,
) -> list[tuple[str, NDArray[np.uint8] | None]]:
    """Decode in a thread; None stands for an image that is left out."""
    from vaefeat.image_decoding import UNREADABLE, Reference, decode_pixels

    decoded: list[tuple[str, NDArray[np.uint8] | None]] = []
    for name, encoded in block:
        try:
            pixels = decode_pixels(name, encoded, image_size, reference=reference)
        except InputError:
            raise
        except UNREADABLE as error:
            if on_error == "raise":
                raise InputError(
                    f"got an unreadable image {name} ({error}), wanted PNG, JPEG or WebP; "
                    "mend or remove it (load_rows with on_error='skip', and the job embed, leave such images out)"
                ) from error
            decoded.append((name, None))
        else:
            reference = reference or Reference(name, pixels.shape[:2])
            decoded.append((name, pixels))
    return decoded
