"""Whether ids are unique, found out before anything is embedded, in as much memory as there are ids in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.embedding.csv_files import read_texts
from pipelines.embedding.sources import Source
from vaefeat.errors import InputError

__all__ = ["refuse_doubtful_ids"]

#: Eight bytes each; more ids take more passes over their column.
PASS_IDS = 1 << 26
_BATCH_ROWS = 1 << 17


def refuse_doubtful_ids(source: Source, *, pass_ids: int = PASS_IDS) -> None:
    """Read the column of ids and refuse nulls and ids that come twice.

    Parameters
    ----------
    source : Source
    pass_ids : int
        How many are held in memory at a time, about.

    Raises
    ------
    InputError
        An id is missing or comes twice; files and rows are named.
    """
    if source.columns is None or source.columns.id is None:
        return
    n_rows = sum(map(sum, source.groups))
    n_passes = -(-n_rows // pass_ids)
    for number in range(n_passes):
        hashes = np.concatenate(
            [one[one % n_passes == number] for _, _, ids in _ids(source) for one in (_hashed(ids),)]
        )
        hashes.sort()
        twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        if len(twice):
            _refuse_same(source, twice)


def _refuse_same(source: Source, hashes: NDArray[np.uint64]) -> None:
    """Look at the ids of these hashes, of which two different ones may share one."""
    seen: dict[Any, tuple[str, int]] = {}
    for name, start, ids in _ids(source):
        for position in np.flatnonzero(np.isin(_hashed(ids), hashes)).tolist():
            value, row = ids[position].as_py(), start + position
            if value in seen:
                file, first = seen[value]
                raise InputError(
                    f"got the id {value!r} twice: in row {first} of {file} and in row {row} of {name}; ids must be "
                    "unique, or leave out --id-column to count rows"
                )
            seen[value] = (name, row)


def _ids(source: Source) -> Iterator[tuple[str, int, Any]]:
    """Yield (file, row of the first, ids)."""
    assert source.columns is not None
    assert source.columns.id is not None
    for found, sizes in zip(source.files, source.groups, strict=True):
        start = 0
        for ids in _columns_of(source, found.name, source.columns.id, n_rows=sum(sizes)):
            if ids.null_count:
                row = start + int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
                raise InputError(
                    f"got no id in row {row} of {found.name}, column {source.columns.id!r}; every row needs one"
                )
            yield found.name, start, ids
            start += len(ids)


def _columns_of(source: Source, name: str, column: str, *, n_rows: int) -> Iterator[Any]:
    if source.kind == "csv":
        for batch in read_texts(source.place, name, [column], start=0, stop=n_rows, batch_rows=_BATCH_ROWS):
            yield batch.column(0)
        return
    with source.place.reading(name), source.place.open(name) as opened, pq.ParquetFile(opened) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column], use_threads=False):
            yield batch.column(0)


def _hashed(ids: Any) -> NDArray[np.uint64]:
    hashes: NDArray[np.uint64] = pd.util.hash_array(ids.to_numpy(zero_copy_only=False), categorize=False)
    return hashes
