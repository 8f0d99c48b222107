"""One encoded image (PNG, JPEG, WebP) as uint8 pixels: the decoder of training and of the service.

What is done to an image on the way, in this order:

1. Its EXIF orientation is applied.
2. 16-bit grey keeps the high byte, as Pillow does for 16-bit colour. Keep the full depth in a ``.npy`` file.
3. Transparent pixels are laid on white.
4. Black-and-white, grey and grey with alpha become one channel; everything else (palettes and CMYK, too) becomes RGB.
   Where rows are grey, RGB whose channels are equal (as in WebP, which has no grey) is taken for grey, too.
5. With `image_size`, it is resized (bilinear, antialiased) to exactly that size, whatever its aspect ratio was.

Small images take longer in Python than in the decoders, so that what is not needed of Pillow's ways is left out; and
plain JPEG files (:mod:`vaefeat.jpeg`) go past it.

Axes, where a comment names them: n rows, C channels, H height, W width.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vaefeat.errors import InputError
from vaefeat.jpeg import plain_jpeg

__all__ = ["UNREADABLE", "Reference", "decode_image", "decode_pixels", "grey_of"]

_FORMATS = ("PNG", "JPEG", "WEBP")
_GREY_MODES = ("1", "L", "LA", "I;16")
#: A camera writes ten; a small file of thousands takes hours, because each is a pass over all pixels.
_MAX_JPEG_SCANS = 100
#: A photo may have a film behind it.
_MAX_JPEG_BYTES = 64 * 2**20
_JPEG, _START_OF_SCAN = b"\xff\xd8", b"\xff\xda"
#: Where Pillow looks for an orientation.
_ORIENTED = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
#: By which the channels of grey may differ: lossy WebP rounds each by itself.
_GREY_ROUNDING = 1


class Reference(NamedTuple):
    """The image whose form all others must have; without one, the first that is read sets the size."""

    name: str

    size: tuple[int, ...]
    """Height and width."""

    channels: int | None = None
    """1 refuses colour (and takes RGB that is grey), 3 repeats grey, None takes what there is."""


class _UnreadableError(Exception):
    """An image that Pillow could read and this library refuses."""


#: What Pillow's readers raise on damaged files, and what is raised here.
UNREADABLE: tuple[type[Exception], ...] = (
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

    Returns
    -------
    ndarray of that shape
        To be copied or read: a view, not always contiguous.

    Raises
    ------
    InputError
        An image that cannot be read, or one in colour where `shape` is grey.
    """
    n_channels, *size = shape
    try:
        _check_scans(encoded)
        pixels = decode_pixels(name, encoded, (size[0], size[1]), max_pixels=max_pixels, room=room)
    except InputError:
        raise
    except UNREADABLE as error:
        # What Pillow says of a file that it does not know is the address of an object.
        reason = "it is none of them" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"got {name} that cannot be read ({reason}), wanted a PNG, JPEG or WebP file") from error
    if pixels.ndim == 3 and n_channels == 1:
        grey = grey_of(pixels)
        if grey is None:
            raise InputError(
                f"got {name} in colour, wanted grey as the rows that the encoder was trained on; convert it"
            )
        pixels = grey
    row = pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return row if row.shape == shape else np.broadcast_to(row, shape)


def decode_pixels(
    name: str,
    encoded: Path | bytes | None,
    image_size: tuple[int, int] | None,
    *,
    reference: Reference | None = None,
    max_pixels: int | None = None,
    room: Callable[[int], AbstractContextManager[object]] | None = None,
) -> NDArray[np.uint8]:
    """Decode one image to shape (H, W) or (H, W, 3).

    Parameters
    ----------
    name : str
        For error messages.
    encoded : Path or bytes or None
        None where there is none, which is refused.
    image_size : (int, int), optional
        Height and width to resize to.
    reference : Reference, optional
        Whose size the image must have where it is not resized.
    max_pixels, room
        As for :func:`decode_image`.

    Raises
    ------
    InputError
        An image of another size than that of `reference`.
    Exception
        One of :data:`UNREADABLE`.
    """
    if encoded is None:
        raise _UnreadableError("no image: the cell is null")
    if isinstance(encoded, Path):
        encoded = _content(encoded)
    must_fit = reference if image_size is None else None
    enter = room or _any_room
    plain = plain_jpeg(encoded) if isinstance(encoded, bytes) else None
    # Pillow resizes its own image without a copy, which for large ones is more than its Python takes.
    if plain is not None and image_size in (None, (plain.height, plain.width)):
        _check_pixels(plain.width, plain.height, max_pixels=max_pixels)
        if must_fit is not None and (plain.height, plain.width) != must_fit.size:
            raise _size_error(name, (plain.height, plain.width), must_fit)
        with enter(plain.width * plain.height):
            if (pixels := plain.pixels()) is not None:
                return pixels
    with Image.open(encoded if isinstance(encoded, Path) else BytesIO(encoded), formats=_FORMATS) as image:
        _check_header(image, max_pixels=max_pixels)
        # Before the pixels are decoded; the orientation, which in PNG can stand behind them, may yet swap the sides.
        if must_fit is not None and sorted(image.size) != sorted(must_fit.size):
            raise _size_error(name, image.size[::-1], must_fit)
        with enter(image.width * image.height):
            image.load()
            if not _ORIENTED.isdisjoint(image.info):
                ImageOps.exif_transpose(image, in_place=True)
            if must_fit is not None and image.size[::-1] != must_fit.size:
                raise _size_error(name, image.size[::-1], must_fit)
            return _pixels(_resized(_to_grey_or_rgb(image), image_size))


def _content(path: Path) -> Path | bytes:
    """Read a JPEG file; of others, and of what only begins like one, Pillow reads what it needs."""
    with path.open("rb") as file:
        begin = file.read(len(_JPEG))
        if begin != _JPEG or os.fstat(file.fileno()).st_size > _MAX_JPEG_BYTES:
            return path
        return begin + file.read()


def _any_room(n_pixels: int) -> AbstractContextManager[object]:
    return nullcontext()


def _resized(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """Resize an image of mode L or RGB to height and width, where they are given."""
    if size is None or image.size == size[::-1]:
        return image
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    shape = (image.height, image.width) if image.mode == "L" else (image.height, image.width, 3)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(shape)


def grey_of(pixels: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """Give the one channel, (H, W), of an RGB image (H, W, 3) that is grey; None where it is in colour."""
    # The range of three bytes, without a step that could overflow.
    if (pixels.max(axis=2) - pixels.min(axis=2)).max() > _GREY_ROUNDING:
        return None
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))


def _check_scans(encoded: bytes) -> None:
    """Refuse a JPEG file of very many scans before any of them is read.

    Within a scan's data the marker cannot occur, because a byte 0xff is followed by a zero there.
    """
    if encoded.startswith(_JPEG) and (n_scans := encoded.count(_START_OF_SCAN)) > _MAX_JPEG_SCANS:
        raise _UnreadableError(f"a JPEG file of {n_scans} scans, wanted at most {_MAX_JPEG_SCANS}")


def _check_header(image: Image.Image, *, max_pixels: int | None = None) -> None:
    """Refuse an image before its pixels are decoded."""
    _check_pixels(image.width, image.height, max_pixels=max_pixels)
    # MPO is what many telephones write: a JPEG photo with a preview or a depth map behind it, which is not wanted.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise _UnreadableError("animated, and it is not clear which picture is meant")


def _check_pixels(width: int, height: int, *, max_pixels: int | None) -> None:
    if max_pixels is not None and width * height > max_pixels:
        raise _UnreadableError(f"{width} by {height} pixels, wanted at most {max_pixels} in all; make it smaller first")
    # Pillow itself only warns between this limit and twice as much.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise _UnreadableError(f"{width * height} pixels, more than Pillow's MAX_IMAGE_PIXELS of {limit}")


def _size_error(name: str, size: tuple[int, int], reference: Reference) -> InputError:
    height, width = reference.size
    return InputError(
        f"got images of different sizes: {reference.name} is {height} high and {width} wide, {name} is {size[0]} "
        f"high and {size[1]} wide; wanted one size, pass image_size=(height, width), or --image-size, or, in a "
        "job's TOML file, data.image_size = [height, width], to resize them all"
    )


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """Convert to mode L or RGB."""
    mode = "L" if image.mode in _GREY_MODES else "RGB"
    if image.mode == "I;16":
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert(mode)
    return image if image.mode == mode else image.convert(mode)
