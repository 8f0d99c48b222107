"""Encoded images (PNG, JPEG, WebP) as uint8 rows, and folders of them.

What is done to an image on the way, in this order:

1. Its EXIF orientation is applied.
2. 16-bit grey keeps the high byte, as Pillow does for 16-bit colour. Keep the full depth in a ``.npy`` file.
3. Transparent pixels are laid on white.
4. Black-and-white, grey and grey with alpha become one channel; everything else (palettes and CMYK, too) becomes RGB.
5. With `image_size`, it is resized (bilinear, antialiased) to exactly that size, whatever its aspect ratio was.

Axes, where a comment names them: n rows, C channels, H height, W width.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DecodedImages", "OnError", "Reference", "class_folders", "decode_image", "decode_images", "find_images"]

OnError = Literal["raise", "skip"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")
_GREY_MODES = ("1", "L", "LA", "I;16")
# Small blocks keep the threads busy with tiny images and bound what is in flight with large ones.
_BLOCK = 32
#: A camera writes ten; a small file of thousands takes hours, because each is a pass over all pixels.
_MAX_JPEG_SCANS = 100
_START_OF_SCAN = b"\xff\xda"


class DecodedImages(NamedTuple):
    """What :func:`decode_images` returns."""

    array: NDArray[np.uint8]
    """Of shape (n, 1, H, W) where all images are grey, else (n, 3, H, W)."""

    kept: NDArray[np.intp]
    """Of shape (n,): which of the inputs each row is."""

    skipped: tuple[str, ...]
    """Names of the unreadable inputs."""


class Reference(NamedTuple):
    """The image whose form all others must have; without one, the first that is read sets the size."""

    name: str

    size: tuple[int, ...]
    """Height and width."""

    channels: int | None = None
    """1 refuses colour, 3 repeats grey, None takes what there is."""


class _UnreadableError(Exception):
    """An image that Pillow could read and this library refuses."""


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
        channels = self._channels(name, pixels)
        if self.array is None:
            self.array = np.empty((self._count, channels, *pixels.shape[:2]), np.uint8)
        elif channels > self.array.shape[1]:
            grey = self.array
            self.array = np.empty((self._count, channels, *pixels.shape[:2]), np.uint8)
            self.array[: self._filled] = grey[: self._filled]
        # Broadcasting repeats grey over the channels, here and above.
        self.array[self._filled] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        self._filled += 1

    def _channels(self, name: str, pixels: NDArray[np.uint8]) -> int:
        found = 1 if pixels.ndim == 2 else 3
        wanted = None if self._reference is None else self._reference.channels
        if self._reference is not None and wanted is not None and found > wanted:
            raise InputError(
                f"got {name} in colour, wanted grey as {self._reference.name} and the other images that were looked at "
                "first; convert them all to colour, or this one to grey"
            )
        return wanted or found


def _blocks(items: Iterable[tuple[str, Path | bytes | None]]) -> Iterator[list[tuple[str, Path | bytes | None]]]:
    iterator = iter(items)
    while block := list(islice(iterator, _BLOCK)):
        yield block


def decode_image(
    encoded: bytes,
    *,
    name: str,
    shape: tuple[int, int, int],
    max_pixels: int | None = None,
    room: Callable[[int], AbstractContextManager[object]] | None = None,
) -> NDArray[np.uint8]:
    """Decode one image to a row of a given shape.

    Parameters
    ----------
    encoded : bytes
        PNG, JPEG or WebP.
    name : str
        For error messages.
    shape : (int, int, int)
        Channels (1 or 3), height and width; another size is resized to it, grey is repeated over three channels.
    max_pixels : int, optional
        Most pixels of an image, as its header says; by default as many as Pillow allows.
    room : callable, optional
        Called with the number of pixels, once the header is read; what it returns is entered while they are in memory.

    Raises
    ------
    InputError
        An image that cannot be read, or one in colour where `shape` is grey.
    """
    n_channels, *size = shape
    try:
        _check_scans(encoded)
        pixels = _decode(name, encoded, (size[0], size[1]), None, max_pixels=max_pixels, room=room)
    except InputError:
        raise
    except _unreadable() as error:
        # What Pillow says of a file that it does not know is the address of an object.
        reason = "it is none of them" if isinstance(error, _unidentified()) else error
        raise InputError(f"got {name} that cannot be read ({reason}), wanted a PNG, JPEG or WebP file") from error
    if pixels.ndim == 3 and n_channels == 1:
        raise InputError(f"got {name} in colour, wanted grey as the rows that the encoder was trained on; convert it")
    return np.ascontiguousarray(np.broadcast_to(pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1), shape))


def _decode_block(
    block: list[tuple[str, Path | bytes | None]],
    image_size: tuple[int, int] | None,
    on_error: OnError,
    reference: Reference | None,
) -> list[tuple[str, NDArray[np.uint8] | None]]:
    """Decode in a thread; None stands for an image that is left out."""
    unreadable = _unreadable()
    decoded: list[tuple[str, NDArray[np.uint8] | None]] = []
    for name, encoded in block:
        try:
            pixels = _decode(name, encoded, image_size, reference)
        except InputError:
            raise
        except unreadable as error:
            if on_error == "raise":
                raise InputError(
                    f"got an unreadable image {name} ({error}), wanted PNG, JPEG or WebP; "
                    "mend or remove it, or leave such images out with on_error='skip'"
                ) from error
            decoded.append((name, None))
        else:
            reference = reference or Reference(name, pixels.shape[:2])
            decoded.append((name, pixels))
    return decoded


def _unreadable() -> tuple[type[Exception], ...]:
    """List what Pillow's readers raise on damaged files."""
    from PIL import Image

    return (
        _UnreadableError,
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,  # raised where warnings are errors
    )


def _unidentified() -> type[Exception]:
    from PIL import UnidentifiedImageError

    return UnidentifiedImageError


def _decode(
    name: str,
    encoded: Path | bytes | None,
    image_size: tuple[int, int] | None,
    reference: Reference | None,
    *,
    max_pixels: int | None = None,
    room: Callable[[int], AbstractContextManager[object]] | None = None,
) -> NDArray[np.uint8]:
    """Decode one image to shape (H, W) or (H, W, 3)."""
    from PIL import Image, ImageOps

    if encoded is None:
        raise _UnreadableError("no image: the cell is null")
    with Image.open(encoded if isinstance(encoded, Path) else BytesIO(encoded), formats=_FORMATS) as image:
        _check_header(image, max_pixels=max_pixels)
        must_fit = reference if image_size is None else None
        # Before the pixels are decoded; the orientation, which in PNG can stand behind them, may yet swap the sides.
        if must_fit is not None and sorted(image.size) != sorted(must_fit.size):
            raise _size_error(name, image, must_fit)
        with nullcontext() if room is None else room(image.width * image.height):
            ImageOps.exif_transpose(image, in_place=True)
            if must_fit is not None and image.size[::-1] != must_fit.size:
                raise _size_error(name, image, must_fit)
            plain = _to_grey_or_rgb(image)
            if image_size is not None and plain.size != image_size[::-1]:
                plain = plain.resize(image_size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(plain)


def _check_scans(encoded: bytes) -> None:
    """Refuse a JPEG file of very many scans before any of them is read.

    Within a scan's data the marker cannot occur, because a byte 0xff is followed by a zero there.
    """
    if encoded[:2] == b"\xff\xd8" and (n_scans := encoded.count(_START_OF_SCAN)) > _MAX_JPEG_SCANS:
        raise _UnreadableError(f"a JPEG file of {n_scans} scans, wanted at most {_MAX_JPEG_SCANS}")


def _check_header(image: Image, *, max_pixels: int | None = None) -> None:
    """Refuse an image before its pixels are decoded."""
    from PIL import Image as Pillow

    if max_pixels is not None and image.width * image.height > max_pixels:
        raise _UnreadableError(
            f"{image.width} by {image.height} pixels, wanted at most {max_pixels} in all; make it smaller first"
        )
    # Pillow itself only warns between this limit and twice as much.
    limit = Pillow.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise _UnreadableError(f"{image.width * image.height} pixels, more than Pillow's MAX_IMAGE_PIXELS of {limit}")
    # MPO is what many telephones write: a JPEG photo with a preview or a depth map behind it, which is not wanted.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise _UnreadableError("animated, and it is not clear which picture is meant")


def _size_error(name: str, image: Image, reference: Reference) -> InputError:
    height, width = reference.size
    return InputError(
        f"got images of different sizes: {reference.name} is {height} high and {width} wide, {name} is {image.height} "
        f"high and {image.width} wide; wanted one size, pass image_size=(height, width) to resize them all"
    )


def _to_grey_or_rgb(image: Image) -> Image:
    """Convert to mode L or RGB."""
    from PIL import Image as Pillow

    mode = "L" if image.mode in _GREY_MODES else "RGB"
    if image.mode == "I;16":
        return Pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Pillow.new("RGBA", image.size, "white")
        return Pillow.alpha_composite(white, image.convert("RGBA")).convert(mode)
    return image if image.mode == mode else image.convert(mode)
