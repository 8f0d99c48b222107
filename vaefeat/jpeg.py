"""Plain JPEG files, decoded without Pillow, in which a small one takes six times as long in Python as in the decoder.

Plain is what needs nothing but decoding: grey or YCbCr, as every camera and library writes, and no word of an
orientation or of other pictures behind the first. Everything else, and every file of which something is wrong, is for
Pillow to read or to refuse. Both decode with libjpeg-turbo, to the same pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

__all__ = ["PlainJpeg", "plain_jpeg"]

#: What it must be decoded to, by what the file says it holds.
_SPACES = {"Gray": "GRAY", "YCbCr": "RGB"}
#: Exif and XMP may tell an orientation; MPF, of more pictures. Where a file has these bytes by chance, it costs time.
_MORE = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"MPF\0")


class PlainJpeg(NamedTuple):
    """A file that is plain as far as its header tells."""

    encoded: bytes

    height: int

    width: int

    space: str
    """simplejpeg's word for what it is decoded to."""

    def pixels(self) -> NDArray[np.uint8] | None:
        """Give the pixels, of shape (H, W) or (H, W, 3); None where something is wrong with the file."""
        try:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(self.encoded, self.space)
        except ValueError:
            return None
        return pixels[:, :, 0] if self.space == "GRAY" else pixels


def plain_jpeg(encoded: bytes) -> PlainJpeg | None:
    """Read a file's header, and no pixels.

    Parameters
    ----------
    encoded : bytes
        Of any file.

    Returns
    -------
    PlainJpeg or None
        None where it is something else.
    """
    if not encoded.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, found, _ = simplejpeg.decode_jpeg_header(encoded)
    except (ValueError, KeyError):  # a KeyError where it knows no name for how the colours are sampled
        return None
    space = _SPACES.get(found)
    if space is None or any(mark in encoded for mark in _MORE):
        return None
    return PlainJpeg(encoded, height, width, space)
