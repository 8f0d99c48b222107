"""Parquet files in blocks: each row group is one, or several where it is large. Needs pyarrow (the extra ``parquet``).

Row groups are compressed column by column and can be read from their start only. A group that is cut into k blocks is
therefore decoded (k + 1) / 2 times in an epoch, and a block of a narrow group costs less than one of a wide group. What
streams best are row groups of a few megabytes: some thousand rows of numbers, some hundred images. One line rewrites
files of any size so (``max_rows_per_file`` keeps groups from being gathered in memory)::

    pyarrow.dataset.write_dataset(pyarrow.dataset.dataset("wide.parquet"), "folder", format="parquet",
                                  max_rows_per_group=5_000, max_rows_per_file=1_000_000)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaefeat.arrays import as_rows
from vaefeat.blocks_arrays import Blocks, Stamp, changed, even_sizes
from vaefeat.blocks_images import look_at
from vaefeat.errors import InputError
from vaefeat.images import decode_images
from vaefeat.parquet import (
    DEFAULT_IMAGE_COLUMN,
    DEFAULT_LABEL_COLUMN,
    IMAGE_BATCH,
    Parts,
    encoded_cells,
    fill_numbers,
    has_images,
    numeric_columns,
    numeric_dtype,
    open_parquet,
    open_parts,
    row_width,
)

__all__ = ["ParquetBlocks"]

#: Larger than elsewhere, because every block of a row group costs its decoding from the start. Encoded images are only
#: skipped on the way there; smaller blocks of them let more threads decode.
_NUMBERS_BLOCK_BYTES = 8 << 20
_IMAGES_BLOCK_BYTES = 2 << 20
#: Row groups of more blocks would be read so many times an epoch that rewriting them is faster.
_MAX_NUMBERS_BLOCKS = 64
_MAX_IMAGES_BLOCKS = 256
#: What pyarrow keeps of a column while it reads on: a page of 1 MiB, as it came and as it was decompressed.
_PAGE_BYTES = 2 << 20
_VALUE_BYTES = 8


class _Place(NamedTuple):
    """Where a block lies."""

    file: int
    group: int
    first_row_of_group: int
    """Counted in its file."""

    start: int
    """Counted in its group, as is `stop`."""

    stop: int


class ParquetBlocks(Blocks):
    """Row groups of Parquet files.

    Parameters
    ----------
    files : sequence of Path
        At least one, all of the same columns.
    columns, image_column, label_column, image_size
        As in :func:`vaefeat.parquet.read_parquet`. No labels are read; their column is no feature.
    block_bytes : int, optional
        Larger row groups are cut into several blocks. By default 8 MiB, and 2 MiB (decoded) for images.
    source : str, optional

    Attributes
    ----------
    files : tuple of Path
    columns : tuple of str
        What rows are made of: numbers, or one column of images or of lists of numbers.

    Raises
    ------
    InputError
        As :func:`vaefeat.parquet.read_parquet`; or row groups of more than 64 blocks, 256 of images.
    MissingExtraError
        pyarrow is not installed.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        columns: Sequence[str] | None = None,
        image_column: str = DEFAULT_IMAGE_COLUMN,
        label_column: str | None = DEFAULT_LABEL_COLUMN,
        image_size: tuple[int, int] | None = None,
        block_bytes: int | None = None,
        source: str | None = None,
    ) -> None:
        self._stamps = tuple(Stamp.of(path.stat()) for path in files)
        parts = open_parts(files)
        self.files = tuple(files)
        self.source = source or str(files[0])
        self._metadata = tuple(map(_metadata, files))
        self._image_size = image_size
        if label_column is not None and label_column != DEFAULT_LABEL_COLUMN:
            parts.require(label_column)
        self._images = columns is None and has_images(parts, image_column)
        if self._images:
            self.columns: tuple[str, ...] = (image_column,)
            self.dtype = np.dtype(np.uint8)
            self._reference, self.row_shape = look_at(list(self._first_cells(parts)), image_size)
        else:
            if image_size is not None:
                raise InputError(
                    f"got image_size for numeric columns of {files[0]}; it applies to encoded images, leave it out"
                )
            self.columns = numeric_columns(parts, columns, label_column)
            self.dtype = numeric_dtype(parts, self.columns)
            self.row_shape = (row_width(parts, self.columns),)
            # A list of numbers has one name for all of them.
            self.names = self.columns if (len(self.columns),) == self.row_shape else None
        self._block_bytes = block_bytes or (_IMAGES_BLOCK_BYTES if self._images else _NUMBERS_BLOCK_BYTES)
        self._places = self._cut()
        self.sizes = np.array([place.stop - place.start for place in self._places], np.int64)

    def read(self, block: int) -> NDArray[Any]:
        """Decode one block; of a row group that was cut, everything before it, too."""
        return self._checked(self._places[block], None)

    def take(self, block: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Decode only some images of a block."""
        return self._checked(self._places[block], rows) if self._images else super().take(block, rows)

    def _checked(self, place: _Place, rows: NDArray[np.int64] | None) -> NDArray[Any]:
        start = place.first_row_of_group + place.start
        what = f"{self.files[place.file]}[{start}:{start + place.stop - place.start}]"
        try:
            content = self._read_images(place, rows) if self._images else self._read_numbers(place)
        except InputError as error:
            self._refuse_changed(place, error)
            raise
        self._refuse_changed(place, None)
        return as_rows(content, what=what, columns=self.columns if (len(self.columns),) == self.row_shape else None)

    def _cut(self) -> list[_Place]:
        places = []
        for file, metadata in enumerate(self._metadata):
            first = 0
            for group in range(metadata.num_row_groups):
                n_rows = metadata.row_group(group).num_rows
                sizes = self._sizes(n_rows)
                self._refuse_large(file, n_rows, len(sizes))
                stops = np.cumsum(sizes).tolist()
                places += [_Place(file, group, first, a, b) for a, b in zip([0, *stops[:-1]], stops, strict=False)]
                first += n_rows
        return places

    def _sizes(self, n_rows: int) -> NDArray[np.int64]:
        return even_sizes(n_rows, self._block_bytes, row_bytes=self.row_bytes) if n_rows else np.zeros(0, np.int64)

    def _refuse_large(self, file: int, n_rows: int, n_blocks: int) -> None:
        limit = _MAX_IMAGES_BLOCKS if self._images else _MAX_NUMBERS_BLOCKS
        if n_blocks > limit:
            advised = max(1, self._block_bytes // self.row_bytes)
            raise InputError(
                f"got {self.files[file]} with a row group of {n_rows:,} rows ({n_rows * self.row_bytes / 2**20:,.0f} "
                f"MiB), wanted at most {limit * advised:,}: row groups are read from their start, so "
                "every block would cost a good part of the group; rewrite the file once with pyarrow.dataset."
                f"write_dataset(..., max_rows_per_group={advised})"
            )

    def _first_cells(self, parts: Parts) -> Iterator[tuple[str, bytes | None]]:
        """Yield the images that the first of each of some files begins with."""
        spread = np.unique(np.linspace(0, len(parts.files) - 1, 16).round().astype(int))
        for path in (parts.files[index] for index in spread):
            with open_parquet(path) as file:
                batch = next(file.iter_batches(batch_size=16, columns=list(self.columns), use_threads=False), None)
                if batch is not None:
                    yield from encoded_cells(batch.column(self.columns[0]), path, 0)

    def _batches(self, place: _Place, columns: Sequence[str], batch_size: int) -> Iterator[tuple[int, Any]]:
        """Yield (row in the group, record batch), cut to the block."""
        # Several blocks are read at a time in threads; pyarrow's own would hold memory that nobody has counted.
        position = 0
        with open_parquet(self.files[place.file], self._metadata[place.file]) as file:
            for batch in file.iter_batches(
                batch_size=batch_size, row_groups=[place.group], columns=list(columns), use_threads=False
            ):
                first, last = max(place.start - position, 0), min(place.stop - position, batch.num_rows)
                if first < last:
                    wanted = batch.slice(first, last - first)
                    wanted.validate(full=True)
                    yield position + first, wanted
                position += batch.num_rows
                if position >= place.stop:
                    return
        raise InputError(
            f"got {position} rows in row group {place.group} of {self.files[place.file]}, wanted the "
            f"{self._metadata[place.file].row_group(place.group).num_rows} that it announces; fetch or write it again"
        )

    def _read_numbers(self, place: _Place) -> NDArray[Any]:
        rows = np.empty((place.stop - place.start, *self.row_shape), self.dtype)
        if len(self.columns) == 1:
            # A list may be a whole row.
            for position, batch in self._batches(place, self.columns, max(1, self._block_bytes // self.row_bytes)):
                start, path = position - place.start, self.files[place.file]
                held = rows[start : start + batch.num_rows]
                fill_numbers(held, batch, self.columns, path, place.first_row_of_group + position)
            return rows
        # pyarrow holds a page of each column that it reads, which for a thousand columns is more than the block.
        in_group = self._metadata[place.file].row_group(place.group).num_rows
        width = max(1, self._block_bytes // min(in_group * _VALUE_BYTES, _PAGE_BYTES))
        batch_rows = max(1, self._block_bytes // (_VALUE_BYTES * min(width, len(self.columns))))
        for left in range(0, len(self.columns), width):
            names = self.columns[left : left + width]
            for position, batch in self._batches(place, names, batch_rows):
                start = position - place.start
                fill_numbers(
                    rows[start : start + batch.num_rows, left : left + width],
                    batch,
                    names,
                    self.files[place.file],
                    place.first_row_of_group + position,
                )
        return rows

    def _read_images(self, place: _Place, rows: NDArray[np.int64] | None) -> NDArray[Any]:
        path, n_rows = self.files[place.file], place.stop - place.start
        wanted = np.ones(n_rows, bool) if rows is None else np.isin(np.arange(n_rows), rows)
        cells = (
            cell
            for position, batch in self._batches(place, self.columns, min(n_rows, IMAGE_BATCH))
            for cell in encoded_cells(batch.column(self.columns[0]), path, place.first_row_of_group + position)
        )
        return decode_images(
            compress(cells, wanted),
            count=int(wanted.sum()),
            image_size=self._image_size,
            reference=self._reference,
            n_threads=1,
        ).array

    def _refuse_changed(self, place: _Place, error: BaseException | None) -> None:
        """Say so where the file is no longer the one that was opened, which explains whatever went wrong."""
        path, stamp = self.files[place.file], self._stamps[place.file]
        try:
            if Stamp.of(path.stat()) == stamp:
                return
            got = f"{_metadata(path).num_rows} rows"
        except OSError:
            got = "no rows: it is gone"
        except InputError:
            got = "no rows that can be read"
        raise changed(path, got, self._metadata[place.file].num_rows) from error


def _metadata(path: Path) -> Any:
    with open_parquet(path) as file:
        return file.metadata
