"""Parquet block by block: the rows that :func:`load_rows` gives, whatever the row groups, and files that change."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vaefeat.blocks import Blocks, ParquetBlocks, open_blocks
from vaefeat.data import load_rows
from vaefeat.errors import InputError, MissingSplitError


def _joined(blocks: Blocks) -> NDArray[Any]:
    """Read every block, last first, and check what each promises."""
    pieces = []
    for block in reversed(range(len(blocks.sizes))):
        rows = blocks.read(block)
        assert rows.shape == (blocks.sizes[block], *blocks.row_shape)
        assert rows.dtype == blocks.dtype
        assert type(rows) is np.ndarray
        assert rows.flags.writeable
        pieces.append(rows)
    return np.concatenate(pieces[::-1])


def _pixels(seed: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _touch_later(path: Path) -> None:
    """Give a file another time of change, which a quick test on a coarse clock would not."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def _frame(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(n)
    return pd.DataFrame(
        {
            "width": rng.normal(size=n),
            "name": [f"row {index}" for index in range(n)],
            "count": rng.integers(-5, 5, n),
            "label": rng.integers(0, 3, n),
            "flag": rng.integers(0, 2, n).astype(bool),
        }
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any),
    group=st.integers(1, 30),
    block_bytes=st.integers(12, 1000),
)
def test_parquet_numbers_in_blocks_are_what_load_rows_reads(
    tmp_path: Path, counts: list[int], group: int, block_bytes: int
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for index, count in enumerate(counts):
        _frame(count).to_parquet(folder / f"{index}.parquet", row_group_size=group)
    expected = load_rows(folder)
    blocks = open_blocks(folder, block_bytes=block_bytes)
    assert isinstance(blocks, ParquetBlocks)
    np.testing.assert_array_equal(_joined(blocks), expected.array)
    assert blocks.source == expected.source
    assert blocks.sizes.max() <= max(1, min(group, block_bytes // 12))
    assert blocks.fingerprint() == open_blocks(folder, block_bytes=block_bytes).fingerprint()


def test_parquet_of_many_columns_is_read_a_few_at_a_time(tmp_path: Path) -> None:
    array = _pixels(0, (700, 300))
    path = tmp_path / "wide.parquet"
    pq.write_table(pa.table({f"c{index}": array[:, index] for index in range(300)}), path, row_group_size=500)
    blocks = open_blocks(path, block_bytes=40_000)
    assert (blocks.row_shape, blocks.dtype.name) == ((300,), "uint8")
    assert blocks.sizes.tolist() == [125, 125, 125, 125, 100, 100]
    np.testing.assert_array_equal(_joined(blocks), array)


def test_parquet_with_columns_and_splits_is_what_load_rows_reads(tmp_path: Path) -> None:
    for name in ("train", "test"):
        _frame(len(name)).to_parquet(tmp_path / f"{name}.parquet")
    chosen: dict[str, Any] = {"columns": ["label", "width"], "split": "test"}
    np.testing.assert_array_equal(_joined(open_blocks(tmp_path, **chosen)), load_rows(tmp_path, **chosen).array)
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(MissingSplitError, match=r"wanted test\.parquet"):
        open_blocks(tmp_path, split="test")


@pytest.mark.parametrize("layout", ["struct", "binary"])
@pytest.mark.parametrize("image_size", [None, (4, 3)])
def test_parquet_images_in_blocks_are_what_load_rows_reads(tmp_path: Path, layout: str, image_size: Any) -> None:
    # Grey ones among colour, the very first among them.
    cells = [_png(_pixels(seed, (6, 5) if seed % 3 == 0 else (6, 5, 3))) for seed in range(20)]
    column = [{"bytes": cell, "path": "x.png"} for cell in cells] if layout == "struct" else cells
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": column, "label": list(range(20))}), path, row_group_size=8)
    blocks = open_blocks(path, image_size=image_size, block_bytes=280)
    expected = load_rows(path, image_size=image_size).array
    assert blocks.row_shape == expected.shape[1:]
    assert len(blocks.sizes) > 3
    np.testing.assert_array_equal(_joined(blocks), expected)
    chosen = np.arange(1, blocks.sizes[1])
    np.testing.assert_array_equal(blocks.take(1, chosen), blocks.read(1)[chosen])


def test_parquet_with_a_huge_row_group_says_how_to_rewrite_it(tmp_path: Path) -> None:
    _frame(1000).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"row group of 1,000 rows .*wanted at most 640.*max_rows_per_group=10\)"):
        open_blocks(tmp_path / "rows.parquet", block_bytes=120)


def test_parquet_null_in_a_cut_row_group_is_counted_from_the_start_of_its_file(tmp_path: Path) -> None:
    values: list[float | None] = [float(index) for index in range(50)]
    values[37] = None
    pq.write_table(pa.table({"a": values, "b": values}), tmp_path / "rows.parquet", row_group_size=20)
    blocks = open_blocks(tmp_path / "rows.parquet", block_bytes=80)
    blocks.read(0)
    with pytest.raises(InputError, match=r"nulls in column 'a' of .*rows\.parquet \(first in row 37\)"):
        blocks.read(3)


def test_parquet_with_an_infinite_value_names_the_column(tmp_path: Path) -> None:
    pd.DataFrame({"a": [0.0, 1.0], "b": [1.0, np.inf]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows\.parquet\[0:2\] \(first in row 1, column 'b'\)"):
        open_blocks(tmp_path / "rows.parquet").read(0)


def test_parquet_with_damaged_pages_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"a": np.random.default_rng(0).normal(size=500)}).to_parquet(path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(200) + content[204:])
    blocks = open_blocks(path)
    with pytest.raises(InputError, match=r"rows\.parquet, which is no readable Parquet file"):
        blocks.read(0)


def test_parquet_that_announces_more_rows_than_it_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    _frame(30).to_parquet(path)
    blocks = open_blocks(path)
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: (b.slice(0, 20) for b in real(*a, **k)))
    with pytest.raises(InputError, match=r"got 20 rows in row group 0 of .*rows\.parquet, wanted the 30"):
        blocks.read(0)


@pytest.mark.parametrize("rows_left", [12, None])
def test_parquet_that_shrinks_or_is_damaged_while_it_is_read_tells_rows(tmp_path: Path, rows_left: int | None) -> None:
    path = tmp_path / "rows.parquet"
    _frame(30).to_parquet(path, row_group_size=10)
    blocks = open_blocks(path)
    blocks.read(2)
    if rows_left is None:
        os.truncate(path, path.stat().st_size // 2)
    else:
        _frame(rows_left).to_parquet(path)
    got = "no rows that can be read" if rows_left is None else "12 rows"
    with pytest.raises(InputError, match=rf"rows\.parquet with {got}, wanted it as .* with 30 rows.*start again"):
        blocks.read(2)


def test_parquet_that_is_replaced_or_removed_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    _frame(30).to_parquet(path)
    blocks = open_blocks(path)
    _touch_later(path)
    with pytest.raises(InputError, match="it was written to while it was read"):
        blocks.read(0)
    path.unlink()
    with pytest.raises(InputError, match="with no rows: it is gone, wanted it as"):
        blocks.read(0)


def test_parquet_with_image_size_for_numbers_is_refused(tmp_path: Path) -> None:
    _frame(3).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="image_size for numeric columns"):
        open_blocks(tmp_path / "rows.parquet", image_size=8)


def test_parquet_label_column_of_another_name_must_be_there(tmp_path: Path) -> None:
    _frame(3).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"no column 'lable'.*did you mean 'label'"):
        open_blocks(tmp_path / "rows.parquet", label_column="lable")


def test_fingerprints_of_other_rows_differ(tmp_path: Path) -> None:
    prints = set()
    for count in (10, 11, 12):
        _frame(count).to_parquet(tmp_path / "rows.parquet")
        prints.add(open_blocks(tmp_path / "rows.parquet").fingerprint())
    assert len(prints) == 3
