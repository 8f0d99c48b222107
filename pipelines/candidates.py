"""The rows that somebody could label: what names them, and reading some of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaefeat.blocks import ArrayBlocks, Blocks, ImageBlocks, ParquetBlocks, open_blocks
from vaefeat.data import Split, load_rows
from vaefeat.errors import InputError
from vaefeat.parquet import open_parquet

__all__ = ["Candidates", "open_candidates"]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Rows that are read when they are asked for.

    Attributes
    ----------
    blocks : Blocks
    ids : sequence of str
        One for each row, all different: of a column, the path of an image below the data's folder, or the row's number.
    columns : tuple of str
        Names of the values of a row; empty for images.
    """

    blocks: Blocks
    ids: Sequence[str]
    columns: tuple[str, ...]

    def read(self, positions: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """Read rows block by block.

        Parameters
        ----------
        positions : ndarray of shape (n,), int64
            Ascending.

        Yields
        ------
        ndarray of shape (m, ...)
            The next m of them.
        """
        starts = np.concatenate(([0], np.cumsum(self.blocks.sizes)))
        block_of = np.searchsorted(starts, positions, side="right") - 1
        for block in np.unique(block_of):
            yield self.blocks.take(int(block), positions[block_of == block] - starts[block])


def open_candidates(
    data: Path, *, split: Split = "train", image_size: int | None = None, id_column: str | None = None
) -> Candidates:
    """Open a source of rows; what cannot be read in pieces (.npz, gzip) is read whole.

    Parameters
    ----------
    data : Path
        As :func:`vaefeat.data.load_rows` takes it.
    split : {"train", "test"}
    image_size : int, optional
        Of encoded images, height and width.
    id_column : str, optional
        Of Parquet files; no feature.

    Raises
    ------
    InputError
        As :func:`vaefeat.blocks.open_blocks`; or ids that are missing or come twice.
    """
    blocks = _open(data, split=split, image_size=image_size)
    if id_column is None:
        return Candidates(blocks=blocks, ids=_names(blocks, data), columns=_columns(blocks))
    if not isinstance(blocks, ParquetBlocks):
        raise InputError(f"got the id column {id_column!r} for {data}, wanted Parquet; leave it out")
    ids = _column(blocks.files, id_column)
    if id_column in blocks.columns:
        features = [name for name in blocks.columns if name != id_column]
        blocks = open_blocks(data, split=split, columns=features)
    return Candidates(blocks=blocks, ids=ids, columns=_columns(blocks))


def _open(data: Path, *, split: Split, image_size: int | None) -> Any:
    try:
        return open_blocks(data, split=split, image_size=image_size)
    except InputError:
        # What cannot be read in pieces; of everything else that is wrong this says the same.
        rows = load_rows(data, split=split, image_size=image_size, label_column=None)
        return ArrayBlocks(rows.array, source=rows.source)


def _names(blocks: Blocks, data: Path) -> Sequence[str]:
    if isinstance(blocks, ImageBlocks):
        return [Path(file).relative_to(data).as_posix() for file in blocks.files]
    return [str(number) for number in range(len(blocks))]


def _columns(blocks: Blocks) -> tuple[str, ...]:
    if len(blocks.row_shape) > 1:
        return ()
    if isinstance(blocks, ParquetBlocks) and (len(blocks.columns),) == blocks.row_shape:
        return blocks.columns
    return tuple(map(str, range(blocks.row_shape[0])))


def _column(files: Sequence[Path], name: str) -> list[str]:
    """Read a column of ids as texts."""
    ids: dict[str, None] = {}
    for path in files:
        with open_parquet(path) as file:
            if name not in file.schema_arrow.names:
                raise InputError(
                    f"got no column {name!r} in {path} for ids; there are: {', '.join(file.schema_arrow.names)}"
                )
            for value in file.read(columns=[name]).column(name).to_pylist():
                text = "" if value is None else str(value).strip()
                if not text or text in ids:
                    wrong = "twice" if text else "as a missing value"
                    raise InputError(f"got the id {value!r} {wrong} in column {name!r} of {path}, wanted one a row")
                ids[text] = None
    return list(ids)
