"""Rows in blocks that are read one by one: what a block source is, and those that need no decoding.

A block is the smallest piece that is read at once: some megabyte of a file, a Parquet row group, a handful of images.
"""

from __future__ import annotations

import math
import os
import tokenize
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from vaefeat.arrays import as_rows
from vaefeat.data import fingerprint
from vaefeat.errors import InputError
from vaefeat.idx import is_gzipped, read_idx_header

__all__ = [
    "BLOCK_BYTES",
    "ArrayBlocks",
    "Blocks",
    "FileBlocks",
    "Stamp",
    "changed",
    "even_sizes",
    "open_idx",
    "open_npy",
]

#: Small enough for many of them to lie in a shuffling buffer, large enough for a disk to read them at full speed.
BLOCK_BYTES = 1 << 20
_FINGERPRINT_BLOCKS = 8


class Blocks(ABC):
    """Rows of one shape and dtype in blocks, which can be read in any order and from several threads.

    Attributes
    ----------
    row_shape : tuple of int
        (features,) or (C, H, W).
    dtype : dtype
        uint8 or float32.
    sizes : ndarray of shape (n_blocks,), int64
        Rows in each block, at least one.
    source : str
        What the rows are read from, for people.
    names : tuple of str or None
        Of the features, where they are columns of numbers that have names.
    """

    names: tuple[str, ...] | None = None
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sizes: NDArray[np.int64]
    source: str

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @abstractmethod
    def read(self, block: int) -> NDArray[Any]:
        """Read one block.

        Returns
        -------
        ndarray of shape (sizes[block], *row_shape)
            Of :attr:`dtype`, finite, and nobody else's: never a view of the source.

        Raises
        ------
        InputError
            Rows that cannot be read, are not finite, or are not those that were there when the source was opened.
        """

    def take(self, block: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Read only some rows of a block: their numbers counted from its first one, ascending."""
        return self.read(block)[rows]

    def fingerprint(self) -> str:
        """Tell sets of rows apart by a digest, in the form of :func:`vaefeat.data.fingerprint`.

        Over the shape, the dtype and at most eight evenly spaced blocks, the first and the last among them; so it also
        depends on how the rows are cut into blocks. Sources in which single rows are cheap to read give
        :func:`vaefeat.data.fingerprint` of the whole array instead.
        """
        chosen = np.unique(np.linspace(0, len(self.sizes) - 1, _FINGERPRINT_BLOCKS).round().astype(np.int64))
        return fingerprint(cast("NDArray[Any]", _ChosenBlocks(self, chosen)))


class ArrayBlocks(Blocks):
    """Rows of an array that is in memory, or that the system maps into it.

    Parameters
    ----------
    array : ndarray of shape (n, features), (n, H, W) or (n, C, H, W)
        Of real numbers. A memory map is not read before its blocks are; its file must not shrink meanwhile, for which
        the system would end the process: give the path of the file instead of the map.
    block_bytes : int
    source : str
    """

    def __init__(self, array: NDArray[Any], *, block_bytes: int = BLOCK_BYTES, source: str = "array") -> None:
        self.source = source
        self.row_shape, self.dtype = _row_form(array.shape, array.dtype, source)
        self.sizes = even_sizes(len(array), block_bytes, row_bytes=self.row_bytes)
        self._starts = _starts(self.sizes)
        self._array = array

    def read(self, block: int) -> NDArray[Any]:
        """Copy one block."""
        return self._rows(int(self._starts[block]), int(self._starts[block + 1]))

    def fingerprint(self) -> str:
        """Return :func:`vaefeat.data.fingerprint` of the rows."""
        return fingerprint(cast("NDArray[Any]", _SingleRows(self)))

    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        rows = as_rows(self._array[start:stop], what=f"{self.source}[{start}:{stop}]")
        return np.array(rows) if np.may_share_memory(rows, self._array) else rows


class FileBlocks(Blocks):
    """Rows that lie one after the other in a file, read with ordinary reads: nothing is mapped.

    Parameters
    ----------
    path : Path
    dtype : dtype
        Of the values in the file, in any byte order.
    shape : tuple of int
        Of the whole array, in C order.
    offset : int
        Bytes before the first value.
    stamp : Stamp
        Of the file when its header was read.
    block_bytes : int

    Raises
    ------
    InputError
        A shape or a dtype that is not that of rows, or a file that is shorter than they need.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        offset: int,
        stamp: Stamp,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.source = str(path)
        self.row_shape, self.dtype = _row_form(shape, dtype, str(path))
        self._path, self._stored, self._offset, self._stamp = path, dtype, offset, stamp
        self._stored_bytes = math.prod(shape[1:]) * dtype.itemsize
        if self._rows_in(stamp) < shape[0]:
            raise InputError(
                f"got {path} with {self._rows_in(stamp)} rows in {stamp.size} bytes, wanted the {shape[0]} that it "
                "announces; the file is cut short, fetch or write it again"
            )
        self._stored_shape = shape[1:]
        self.sizes = even_sizes(shape[0], block_bytes, row_bytes=max(self.row_bytes, self._stored_bytes))
        self._starts = _starts(self.sizes)

    def read(self, block: int) -> NDArray[Any]:
        """Read one block from the file."""
        return self._rows(int(self._starts[block]), int(self._starts[block + 1]))

    def fingerprint(self) -> str:
        """Return :func:`vaefeat.data.fingerprint` of the rows."""
        return fingerprint(cast("NDArray[Any]", _SingleRows(self)))

    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        content = np.empty((stop - start) * self._stored_bytes, np.uint8)
        try:
            # Opened each time: several threads read at once, and no file stays open between epochs.
            with self._path.open("rb", buffering=0) as file:
                file.seek(self._offset + start * self._stored_bytes)
                n_read = _read_into(file, content)
                stamp = Stamp.of(os.fstat(file.fileno()))
        except OSError as error:
            raise InputError(
                f"got {self._path}, which can no longer be read ({error}), wanted rows {start} to {stop} of "
                f"{len(self)}; put it back, and start again"
            ) from error
        if stamp != self._stamp or n_read < len(content):
            raise changed(self._path, f"{min(self._rows_in(stamp), len(self))} of {len(self)} rows", len(self))
        rows = content.view(self._stored).reshape(stop - start, *self._stored_shape)
        return as_rows(rows, what=f"{self._path}[{start}:{stop}]")

    def _rows_in(self, stamp: Stamp) -> int:
        return max(0, stamp.size - self._offset) // self._stored_bytes


class Stamp(NamedTuple):
    """What shows that a file is still the one that was opened."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Take it from what the system says about a file."""
        return cls(status.st_size, status.st_mtime_ns)


def changed(path: Path, got: str, n_rows: int) -> InputError:
    """Say that a file is no longer the one that was opened with `n_rows` rows."""
    return InputError(
        f"got {path} with {got}, wanted it as it was when it was opened with {n_rows} rows: it was written to while it "
        "was read; write new data to another file, and start again"
    )


def even_sizes(n_rows: int, block_bytes: int, *, row_bytes: int) -> NDArray[np.int64]:
    """Cut rows into blocks of nearly the same size, each of at most `block_bytes`, or of a single row."""
    n_blocks = math.ceil(n_rows / max(1, block_bytes // row_bytes))
    base, extra = divmod(n_rows, n_blocks)
    return base + (np.arange(n_blocks) < extra).astype(np.int64)


def open_npy(path: Path, *, block_bytes: int = BLOCK_BYTES) -> FileBlocks:
    """Open a ``.npy`` file in blocks.

    Raises
    ------
    InputError
        A damaged file, one in Fortran order, or one that holds something else than rows of real numbers.
    """
    try:
        with path.open("rb") as file:
            shape, fortran_order, dtype = _read_npy_header(file)
            offset, stamp = file.tell(), Stamp.of(os.fstat(file.fileno()))
    # The header is a Python literal, of which a damaged file may make anything.
    except (OSError, EOFError, SyntaxError, tokenize.TokenError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"got {path}, which is no readable .npy file ({error}); write it with np.save") from error
    if fortran_order and sum(side > 1 for side in shape) > 1:
        raise InputError(
            f"got {path} in Fortran order, in which each row is spread over the whole file, wanted C order; "
            f"write it once with np.save(path, np.ascontiguousarray(np.load({path.name!r}, mmap_mode='r')))"
        )
    return FileBlocks(path, dtype=dtype, shape=shape, offset=offset, stamp=stamp, block_bytes=block_bytes)


def open_idx(path: Path, *, block_bytes: int = BLOCK_BYTES) -> FileBlocks:
    """Open an uncompressed IDX file in blocks.

    Raises
    ------
    InputError
        A damaged or a gzipped file.
    """
    if is_gzipped(path):
        raise InputError(
            f"got {path}, which is gzipped and can be read from its start only, wanted it uncompressed; "
            f"unpack it once with: gunzip -k {path.name}"
        )
    stamp = Stamp.of(path.stat())
    dtype, shape, offset = read_idx_header(path)
    blocks = FileBlocks(path, dtype=dtype, shape=shape, offset=offset, stamp=stamp, block_bytes=block_bytes)
    wanted = offset + dtype.itemsize * math.prod(shape)
    if stamp.size > wanted:
        raise InputError(
            f"got {path} of {stamp.size} bytes, wanted {wanted} for shape {shape} of {dtype.name}; "
            "the file is damaged, fetch or write it again"
        )
    return blocks


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in {(1, 0), (2, 0)}:
        raise ValueError(f"version {version[0]}.{version[1]} of the format, which is for arrays of records")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _read_into(file: IO[bytes], content: NDArray[np.uint8]) -> int:
    """Fill `content` as far as the file goes; the system may hand out less than it was asked for."""
    view, n_read = content.data, 0
    while n_read < len(view):
        n_more = file.readinto(view[n_read:])  # type: ignore[attr-defined]
        if not n_more:
            break
        n_read += n_more
    return n_read


def _row_form(shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Give the shape and the dtype that :func:`vaefeat.arrays.as_rows` makes of an array, without its values."""
    converted = as_rows(np.zeros((1, 1), dtype), what=what).dtype
    try:
        # Of no size, whatever the shape is; and uint8 holds nothing to check.
        empty = np.broadcast_to(np.zeros((), np.uint8), shape)
    except ValueError as error:
        raise InputError(f"got {what} of shape {shape} ({error}); fetch or write it again") from error
    return as_rows(empty, what=what).shape[1:], converted


def _starts(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(sizes)))


class _SingleRows:
    """As much of an array as a fingerprint needs, read row by row."""

    def __init__(self, blocks: ArrayBlocks | FileBlocks) -> None:
        self.shape, self.dtype = (len(blocks), *blocks.row_shape), blocks.dtype
        self._blocks = blocks

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self._blocks._rows(row, row + 1)[0]  # type: ignore[no-any-return]


class _ChosenBlocks:
    """Some blocks as the rows of an array: as much of it as a fingerprint needs."""

    def __init__(self, blocks: Blocks, chosen: NDArray[np.int64]) -> None:
        self.shape, self.dtype = (len(blocks), *blocks.row_shape), blocks.dtype
        self._blocks, self._chosen = blocks, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, position: int) -> NDArray[Any]:
        return self._blocks.read(int(self._chosen[position]))
