"""Rows that are lists of numbers in a column of Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vaefeat.blocks_parquet import ParquetBlocks
from vaefeat.data import load_rows
from vaefeat.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (50, 7), dtype=np.uint8)


def written(path: Path, cells: Any, **others: Any) -> Path:
    table = pa.table({"number": np.arange(1000, 1000 + len(cells)), "pixels": cells, **others})
    pq.write_table(table, path, row_group_size=20)
    return path


@pytest.mark.parametrize(
    ("arrow_type", "dtype"),
    [
        (pa.list_(pa.uint8()), np.uint8),
        (pa.list_(pa.uint8(), 7), np.uint8),
        (pa.large_list(pa.float64()), np.float32),
        (pa.list_(pa.int64()), np.float32),
    ],
)
def test_lists_are_rows_whatever_stands_beside_them(arrow_type: Any, dtype: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", pa.array(PIXELS.tolist(), arrow_type), label=PIXELS[:, 0] % 2)
    rows = load_rows(path)
    assert rows.array.dtype == dtype
    np.testing.assert_array_equal(rows.array, PIXELS)
    np.testing.assert_array_equal(rows.labels, PIXELS[:, 0] % 2)
    np.testing.assert_array_equal(load_rows(path, max_rows=33).array, PIXELS[:33])
    np.testing.assert_array_equal(load_rows(path, columns=["number"]).array[:, 0], np.arange(1000, 1050))


def test_blocks_of_lists_hold_the_same_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", pa.array(PIXELS.tolist(), pa.list_(pa.uint8())))
    blocks = ParquetBlocks([path], block_bytes=7 * 6)
    assert len(blocks.sizes) > 6  # row groups are cut: lists are sliced
    assert blocks.row_shape == (7,)
    np.testing.assert_array_equal(np.concatenate([blocks.read(i) for i in range(len(blocks.sizes))]), PIXELS)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([1, 2], r"list of 2 numbers in column 'pixels' of .*rows.parquet \(row 30\), wanted 7"),
        (None, r"nulls in column 'pixels' .*row 30"),
        ([1, 2, 3, None, 5, 6, 7], r"null in a list in column 'pixels' of .*\(row 30\)"),
    ],
)
def test_list_that_is_no_row_is_named(cell: Any, message: str, tmp_path: Path) -> None:
    cells = PIXELS.tolist()
    cells[30] = cell
    path = written(tmp_path / "rows.parquet", pa.array(cells, pa.list_(pa.uint8())))
    for read in (load_rows, lambda path: [ParquetBlocks([path]).read(i) for i in range(3)]):
        with pytest.raises(InputError, match=message):
            read(path)
