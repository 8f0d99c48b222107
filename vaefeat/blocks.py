"""Where rows come from when they do not fit into memory: the sources of :mod:`vaefeat.data`, block by block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike

from vaefeat.arrays import as_rows
from vaefeat.blocks_arrays import BLOCK_BYTES, ArrayBlocks, Blocks, FileBlocks, open_idx, open_npy
from vaefeat.blocks_images import ImageBlocks
from vaefeat.blocks_parquet import ParquetBlocks
from vaefeat.data import Request, Split, as_names, as_positive, as_size, one_of, split_folder
from vaefeat.errors import InputError
from vaefeat.idx import find_idx, is_idx
from vaefeat.images import SUFFIXES as IMAGE_SUFFIXES
from vaefeat.images import find_images
from vaefeat.parquet import DEFAULT_IMAGE_COLUMN, DEFAULT_LABEL_COLUMN, find_parquet
from vaefeat.parquet import SUFFIXES as PARQUET_SUFFIXES

__all__ = ["ArrayBlocks", "Blocks", "FileBlocks", "ImageBlocks", "ParquetBlocks", "open_blocks"]


def open_blocks(
    source: ArrayLike | str | os.PathLike[str],
    *,
    split: Split = "train",
    image_size: int | Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    label_column: str | None = DEFAULT_LABEL_COLUMN,
    image_column: str = DEFAULT_IMAGE_COLUMN,
    block_bytes: int | None = None,
) -> Blocks:
    """Open a source of rows without reading it.

    Parameters
    ----------
    source : array-like, str or path-like
        As :func:`vaefeat.data.load_rows` takes it: an array or a memory map; a ``.npy`` file in C order; an
        uncompressed IDX file, or a folder with MNIST's; a Parquet file, or a folder of them, for which small row
        groups are best, see :mod:`vaefeat.blocks_parquet`; a folder of images of one size. The rows and their order are
        those of :func:`~vaefeat.data.load_rows`.
    split, image_size, columns, label_column, image_column
        As in :func:`vaefeat.data.load_rows`. Labels are not read.
    block_bytes : int, optional
        What a block takes in memory, at most, unless a single row takes more. By default 1 MiB; for Parquet 8 MiB of
        numbers or 2 MiB of images. Small blocks are shuffled better, large ones are read faster from slow disks.

    Returns
    -------
    Blocks
        Labels and unreadable rows are not looked for: an unreadable image is an error when its block is read.

    Raises
    ------
    InputError
        As :func:`vaefeat.data.load_rows`; or a source that cannot be read in pieces: ``.npz``, gzip, Fortran order.
    MissingExtraError
        Parquet without pyarrow.

    Examples
    --------
    >>> import numpy as np
    >>> from vaefeat.blocks import open_blocks
    >>> blocks = open_blocks(np.zeros((1000, 784), np.uint8), block_bytes=100_000)
    >>> blocks.sizes.tolist(), blocks.read(0).shape
    ([125, 125, 125, 125, 125, 125, 125, 125], (125, 784))
    """
    request = Request(
        split=one_of("split", split, get_args(Split)),
        image_size=as_size(image_size),
        columns=as_names(columns),
        label_column=label_column,
        image_column=image_column,
        on_error="raise",
        max_rows=None,
    )
    size = None if block_bytes is None else as_positive("block_bytes", block_bytes)
    if not isinstance(source, str | os.PathLike):
        request.refuse("an array", image_size=True, columns=True, split=True)
        array: Any = source if isinstance(source, np.ndarray) else as_rows(source, what="array")
        return ArrayBlocks(array, block_bytes=size or BLOCK_BYTES)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, request, size)
    if path.is_file():
        return _open_file(path, request, size)
    raise InputError(f"got {path}, which does not exist; wanted a folder or a file, see vaefeat.blocks.open_blocks")


def _open_file(path: Path, request: Request, block_bytes: int | None) -> Blocks:
    suffix = path.suffix.lower()
    request.refuse(str(path), split=True)
    if suffix in PARQUET_SUFFIXES:
        return _open_parquet(path, [path], request, block_bytes)
    request.refuse(str(path), image_size=True, columns=True)
    if suffix == ".npy":
        return open_npy(path, block_bytes=block_bytes or BLOCK_BYTES)
    if suffix == ".npz":
        raise InputError(
            f"got {path}, an archive whose arrays can only be read whole, wanted a .npy file; "
            f"unpack it once with np.save('rows.npy', np.load({path.name!r})['X'])"
        )
    if is_idx(path):
        return open_idx(path, block_bytes=block_bytes or BLOCK_BYTES)
    hint = "pass the folder that holds the images" if suffix in IMAGE_SUFFIXES else "convert it to one of these"
    raise InputError(f"got {path}, wanted a .npy, .parquet or uncompressed IDX file, or a folder; {hint}")


def _open_folder(folder: Path, request: Request, block_bytes: int | None) -> Blocks:
    """Try the formats in the order of :func:`vaefeat.data.load_rows`."""
    if idx := find_idx(folder, request.split):
        request.refuse(str(folder), image_size=True, columns=True)
        return open_idx(idx[0], block_bytes=block_bytes or BLOCK_BYTES)
    inner = split_folder(folder, request.split)
    files, has_splits = find_parquet(inner, request.split)
    images = [] if files else find_images(inner)
    if not files and not images:
        raise InputError(
            f"got {inner} without anything to read; wanted train-images-idx3-ubyte (also in raw/ or MNIST/raw/), "
            f"*.parquet, or images ({', '.join(IMAGE_SUFFIXES)}) at any depth"
        )
    request.refuse(str(folder), split=inner is folder and not has_splits)
    if files:
        return _open_parquet(inner, files, request, block_bytes)
    request.refuse(str(folder), columns=True)
    return ImageBlocks(inner, images, image_size=request.image_size, block_bytes=block_bytes or BLOCK_BYTES)


def _open_parquet(source: Path, files: Sequence[Path], request: Request, block_bytes: int | None) -> ParquetBlocks:
    return ParquetBlocks(
        files,
        columns=request.columns,
        image_column=request.image_column,
        label_column=request.label_column,
        image_size=request.image_size,
        block_bytes=block_bytes,
        source=str(source),
    )
