"""A folder of images in blocks of consecutive files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vaefeat.blocks_arrays import BLOCK_BYTES, Blocks, even_sizes
from vaefeat.errors import InputError
from vaefeat.images import decode_images

if TYPE_CHECKING:
    from vaefeat.image_decoding import Reference

__all__ = ["ImageBlocks", "look_at"]

_LOOKED_AT = 256
_LOOKED_AT_BYTES = 32 << 20


class ImageBlocks(Blocks):
    """Images of one size, each in its file.

    Whether they are grey or in colour is learnt from some of them, evenly spaced: where one is in colour, grey ones
    become so, too; where all are grey, a colour image that is found later is refused.

    Parameters
    ----------
    folder : Path
    files : sequence of Path
        In the order of the rows; at least one.
    image_size : (int, int), optional
        Height and width to resize every image to.
    block_bytes : int

    Attributes
    ----------
    files : tuple of str
        One for each row.

    Raises
    ------
    InputError
        Images that were looked at cannot be read, or are of different sizes without `image_size`.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        *,
        image_size: tuple[int, int] | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.source = str(folder)
        self.dtype = np.dtype(np.uint8)
        # Of millions of paths, strings take a fraction of the memory.
        self.files = tuple(str(file) for file in files)
        self._image_size = image_size
        spread = np.unique(np.linspace(0, len(files) - 1, _LOOKED_AT).round().astype(int))
        self._reference, self.row_shape = look_at([(self.files[i], files[i]) for i in spread], image_size)
        self.sizes = even_sizes(len(files), block_bytes, row_bytes=self.row_bytes)
        self._starts = np.concatenate(([0], np.cumsum(self.sizes)))

    def read(self, block: int) -> NDArray[Any]:
        """Decode the images of one block."""
        return self._decode(self.files[self._starts[block] : self._starts[block + 1]])

    def take(self, block: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Decode only some images of a block."""
        return self._decode([self.files[self._starts[block] + row] for row in rows])

    def _decode(self, files: Sequence[str]) -> NDArray[Any]:
        try:
            return decode_images(
                ((file, Path(file)) for file in files),
                count=len(files),
                image_size=self._image_size,
                reference=self._reference,
                n_threads=1,
            ).array
        except InputError as error:
            gone = [file for file in files if not Path(file).is_file()]
            if not gone:
                raise
            raise InputError(
                f"got {len(files) - len(gone)} of {len(files)} images of a block of {self.source}, which held "
                f"{len(self)} when it was opened; {gone[0]} is gone: put it back, or start again"
            ) from error


def look_at(
    items: Sequence[tuple[str, Path | bytes | None]], image_size: tuple[int, int] | None
) -> tuple[Reference, tuple[int, ...]]:
    """Learn the form of all images from some of them.

    Parameters
    ----------
    items : sequence of (name, encoded)
        As :func:`vaefeat.images.decode_images` takes them; at least one. Fewer are decoded where they are large.
    image_size : (int, int), optional

    Returns
    -------
    reference : Reference
    row_shape : (C, H, W)
    """
    first = decode_images(items[:1], count=1, image_size=image_size).array
    count = max(1, min(len(items), _LOOKED_AT_BYTES // (3 * math.prod(first.shape[-2:]))))
    spread = np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))
    row_shape = decode_images([items[i] for i in spread], count=len(spread), image_size=image_size).array.shape[1:]
    from vaefeat.image_decoding import Reference

    return Reference(items[0][0], row_shape[1:], row_shape[0]), row_shape
