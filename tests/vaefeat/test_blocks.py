"""Sources block by block: the rows that :func:`load_rows` gives, from files that are whole, damaged, or changing."""

from __future__ import annotations

import gzip
import os
import re
import struct
import subprocess
import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vaefeat.blocks import ArrayBlocks, Blocks, FileBlocks, ImageBlocks, ParquetBlocks, open_blocks
from vaefeat.data import Split, fingerprint, load_rows
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


def _save_images(folder: Path, count: int, shape: tuple[int, ...] = (6, 5)) -> list[NDArray[np.uint8]]:
    folder.mkdir(exist_ok=True)
    images = [_pixels(seed, shape) for seed in range(count)]
    for index, pixels in enumerate(images):
        (folder / f"{index:04}.png").write_bytes(_png(pixels))
    return images


def _write_idx(path: Path, rows: NDArray[np.uint8]) -> bytes:
    content = struct.pack(f">HBB{rows.ndim}I", 0, 8, rows.ndim, *rows.shape) + rows.tobytes()
    path.write_bytes(content)
    return content


def _touch_later(path: Path) -> None:
    """Give a file another time of change, which a quick test on a coarse clock would not."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_import_in_a_fresh_process_loads_no_heavy_package() -> None:
    heavy = "{'torch', 'onnxruntime', 'sklearn', 'pyarrow', 'PIL', 'pandas'}"
    code = f"import sys, vaefeat.streams, vaefeat.blocks; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Arrays and .npy files


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(1, 1), (7, 3), (50, 2), (9, 4, 5), (8, 3, 2, 2), (200, 1)]),
    dtype=st.sampled_from(["u1", "?", "<i2", ">i8", "<f2", ">f4", "<f4", "<f8", ">f8", "longdouble"]),
    block_bytes=st.integers(1, 400),
    in_file=st.booleans(),
)
def test_array_or_npy_in_blocks_is_what_load_rows_reads(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, block_bytes: int, in_file: bool
) -> None:
    array = np.random.default_rng(0).integers(0, 2 if dtype == "?" else 100, shape).astype(dtype)
    source: Any = array
    if in_file:
        source = tmp_path / "rows.npy"
        np.save(source, array)
    expected = load_rows(source)
    blocks = open_blocks(source, block_bytes=block_bytes)
    assert isinstance(blocks, FileBlocks if in_file else ArrayBlocks)
    assert len(blocks) == len(array)
    assert blocks.source == expected.source
    assert blocks.sizes.max() - blocks.sizes.min() <= 1
    assert blocks.sizes.max() == 1 or blocks.sizes.max() * blocks.row_bytes <= block_bytes
    np.testing.assert_array_equal(_joined(blocks), expected.array)
    assert blocks.fingerprint() == fingerprint(expected.array)


def test_memory_map_in_blocks_gives_copies(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    np.save(tmp_path / "rows.npy", array)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    blocks = open_blocks(mapped, block_bytes=300)
    np.testing.assert_array_equal(_joined(blocks), array)
    assert not np.shares_memory(blocks.read(0), mapped)


def test_array_block_is_nobody_elses() -> None:
    array = _pixels(0, (10, 4))
    blocks = open_blocks(array, block_bytes=12)
    blocks.read(1)[:] = 0
    np.testing.assert_array_equal(array, _pixels(0, (10, 4)))


def test_npy_blocks_map_nothing_into_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", _pixels(0, (100, 4)))
    blocks = open_blocks(tmp_path / "rows.npy")
    blocks.read(0)
    assert "rows.npy" not in Path("/proc/self/maps").read_text()


def test_take_reads_the_rows_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", _pixels(0, (20, 4)))
    blocks = open_blocks(tmp_path / "rows.npy", block_bytes=20)
    np.testing.assert_array_equal(blocks.take(1, np.array([0, 3])), _pixels(0, (20, 4))[[5, 8]])


def test_npy_in_fortran_order_says_how_to_rewrite_it(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.asfortranarray(_pixels(0, (6, 4))))
    with pytest.raises(InputError, match=r"rows\.npy in Fortran order.*wanted C order.*np\.ascontiguousarray"):
        open_blocks(tmp_path / "rows.npy")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5), r"of shape \(5,\)"),
        (np.zeros((0, 4)), r"of shape \(0, 4\)"),
        (np.zeros((4, 0)), r"of shape \(4, 0\)"),
        (np.zeros(()), r"of shape \(\)"),
        (np.zeros((5, 8, 8, 3)), r"of shape \(5, 8, 8, 3\).*X\.transpose\(0, 3, 1, 2\)"),
        (np.zeros((5, 2), complex), "dtype complex128"),
        (np.array([["a", "b"]]), "dtype <U1"),
        (np.zeros((3, 2), [("é", "f4")]), "dtype|version 3"),
    ],
)
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0:UserWarning")
def test_npy_of_no_rows_is_refused_when_it_is_opened(tmp_path: Path, array: NDArray[Any], message: str) -> None:
    np.save(tmp_path / "rows.npy", array)
    with pytest.raises(InputError, match=message):
        open_blocks(tmp_path / "rows.npy")


def test_npy_with_objects_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.array([[{}, []]], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"dtype object"):
        open_blocks(tmp_path / "rows.npy")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 127), value=st.integers(0, 255))
def test_npy_with_a_damaged_header_is_refused_or_read_as_something_else(
    tmp_path: Path, position: int, value: int
) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, _pixels(0, (6, 4)))
    content = bytearray(path.read_bytes())
    content[position] = value
    path.write_bytes(content)
    with suppress(InputError):
        _joined(open_blocks(path))


def test_npy_cut_short_before_it_is_opened_tells_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", _pixels(0, (6, 4)))
    os.truncate(tmp_path / "rows.npy", 128 + 9)
    with pytest.raises(InputError, match=r"with 2 rows in 137 bytes, wanted the 6 that it announces; .* write it"):
        open_blocks(tmp_path / "rows.npy")


def test_npy_with_a_nan_names_file_rows_and_column(tmp_path: Path) -> None:
    array = np.zeros((30, 3))
    array[17, 2] = np.nan
    np.save(tmp_path / "rows.npy", array)
    blocks = open_blocks(tmp_path / "rows.npy", block_bytes=240)
    blocks.read(0)
    with pytest.raises(InputError, match=r"rows\.npy\[10:20\] \(first in row 7, column 2\)"):
        blocks.read(1)


def test_npy_that_shrinks_while_it_is_read_tells_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, _pixels(0, (100, 4)))
    blocks = open_blocks(path, block_bytes=40)
    blocks.read(9)
    os.truncate(path, 128 + 4 * 55)
    with pytest.raises(InputError, match=r"rows\.npy with 55 of 100 rows.*100 rows: it was written to.*start again"):
        blocks.read(9)
    with pytest.raises(InputError, match="55 of 100 rows"):
        blocks.read(0)


def test_npy_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, _pixels(0, (100, 4)))
    blocks = open_blocks(path, block_bytes=40)
    np.save(path, _pixels(1, (100, 4)))
    _touch_later(path)
    with pytest.raises(InputError, match=r"rows\.npy .*it was written to while it was read; .*start again"):
        blocks.read(0)


def test_npy_that_is_removed_while_it_is_read_says_so(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", _pixels(0, (100, 4)))
    blocks = open_blocks(tmp_path / "rows.npy", block_bytes=40)
    (tmp_path / "rows.npy").unlink()
    with pytest.raises(InputError, match=r"can no longer be read .*wanted rows 10 to 20 of 100; put it back"):
        blocks.read(1)


# IDX


@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
def test_mnist_folder_in_blocks_is_what_load_rows_reads(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    _write_idx(tmp_path / place / "train-images-idx3-ubyte", _pixels(0, (11, 3, 4)))
    _write_idx(tmp_path / place / "t10k-images-idx3-ubyte", _pixels(1, (7, 3, 4)))
    for split in get_args(Split):
        expected = load_rows(tmp_path, split=split)
        blocks = open_blocks(tmp_path, split=split, block_bytes=50)
        np.testing.assert_array_equal(_joined(blocks), expected.array)
        assert (blocks.source, blocks.fingerprint()) == (expected.source, expected.fingerprint())
        assert len(blocks.sizes) > 1


def test_idx_file_of_big_endian_floats_is_converted(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(9, 5)).astype(">f8")
    (tmp_path / "rows.idx").write_bytes(struct.pack(">HBBII", 0, 0x0E, 2, 9, 5) + values.tobytes())
    np.testing.assert_array_equal(_joined(open_blocks(tmp_path / "rows.idx", block_bytes=90)), values.astype("f4"))


@pytest.mark.parametrize("whole_folder", [True, False])
def test_gzipped_idx_says_how_to_unpack_it(tmp_path: Path, whole_folder: bool) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(_write_idx(tmp_path / "other", _pixels(0, (3, 2, 2)))))
    with pytest.raises(InputError, match=r"which is gzipped.*gunzip -k train-images-idx3-ubyte\.gz"):
        open_blocks(tmp_path if whole_folder else path)


def test_idx_file_of_another_length_is_refused(tmp_path: Path) -> None:
    content = _write_idx(tmp_path / "a-idx3-ubyte", _pixels(0, (3, 2, 2)))
    (tmp_path / "a-idx3-ubyte").write_bytes(content[:-1])
    with pytest.raises(InputError, match="with 2 rows in 27 bytes, wanted the 3"):
        open_blocks(tmp_path / "a-idx3-ubyte")
    (tmp_path / "a-idx3-ubyte").write_bytes(content + b"!")
    with pytest.raises(InputError, match="of 29 bytes, wanted 28 for shape"):
        open_blocks(tmp_path / "a-idx3-ubyte")


# Parquet


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


# Folders of images


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
@pytest.mark.parametrize("image_size", [None, 4])
def test_folder_of_images_in_blocks_is_what_load_rows_reads(tmp_path: Path, shape: Any, image_size: Any) -> None:
    _save_images(tmp_path / "images", 23, shape)
    blocks = open_blocks(tmp_path / "images", image_size=image_size, block_bytes=200)
    expected = load_rows(tmp_path / "images", image_size=image_size)
    assert isinstance(blocks, ImageBlocks)
    assert len(blocks.sizes) > 1
    np.testing.assert_array_equal(_joined(blocks), expected.array)
    assert blocks.source == expected.source
    rows = np.arange(blocks.sizes[1])[::-2]
    np.testing.assert_array_equal(blocks.take(1, rows), blocks.read(1)[rows])


def test_folder_of_classes_and_splits_is_what_load_rows_reads(tmp_path: Path) -> None:
    for index, place in enumerate(("train/a", "train/b", "test/a")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "one.png").write_bytes(_png(_pixels(index, (3, 3))))
    for split in get_args(Split):
        blocks = open_blocks(tmp_path, split=split)
        np.testing.assert_array_equal(_joined(blocks), load_rows(tmp_path, split=split).array)


def test_grey_images_among_colour_are_widened_in_every_block(tmp_path: Path) -> None:
    images = _save_images(tmp_path / "images", 12)
    (tmp_path / "images" / "0007.png").write_bytes(_png(_pixels(7, (6, 5, 3))))
    rows = _joined(open_blocks(tmp_path / "images", block_bytes=200))
    np.testing.assert_array_equal(rows, load_rows(tmp_path / "images").array)
    np.testing.assert_array_equal(rows[3], np.repeat(images[3][None], 3, axis=0))


def test_late_colour_image_among_grey_is_named(tmp_path: Path) -> None:
    _save_images(tmp_path / "images", 400, (2, 2))
    blocks = open_blocks(tmp_path / "images", block_bytes=40)
    (tmp_path / "images" / "0333.png").write_bytes(_png(_pixels(0, (2, 2, 3))))
    with pytest.raises(InputError, match=r"got .*0333\.png in colour, wanted grey as .*0000\.png.*convert"):
        _joined(blocks)


def test_image_of_another_size_in_a_later_block_is_named(tmp_path: Path) -> None:
    _save_images(tmp_path / "images", 12)
    blocks = open_blocks(tmp_path / "images", block_bytes=90)
    (tmp_path / "images" / "0010.png").write_bytes(_png(_pixels(0, (7, 5))))
    with pytest.raises(InputError, match=r"0000\.png is 6 high and 5 wide, .*0010\.png is 7 high.*image_size="):
        _joined(blocks)


def test_folder_of_images_that_shrinks_while_it_is_read_tells_how_many(tmp_path: Path) -> None:
    _save_images(tmp_path / "images", 12)
    blocks = open_blocks(tmp_path / "images", block_bytes=90)
    for index in (4, 5):
        (tmp_path / "images" / f"{index:04}.png").unlink()
    blocks.read(0)
    with pytest.raises(InputError, match=r"got 1 of 3 images of a block of .*held 12 .*0004\.png is gone: put it back"):
        blocks.read(1)


def test_image_that_is_damaged_while_the_folder_is_read_is_named(tmp_path: Path) -> None:
    _save_images(tmp_path / "images", 12)
    blocks = open_blocks(tmp_path / "images", block_bytes=90)
    os.truncate(tmp_path / "images" / "0005.png", 40)
    with pytest.raises(InputError, match=r"unreadable image .*0005\.png"):
        blocks.read(1)


# Arguments and other sources


def test_npz_says_how_to_unpack_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", X=np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"rows\.npz, an archive .*wanted a \.npy file; unpack it once with np\.save"):
        open_blocks(tmp_path / "rows.npz")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"split": "validation"}, "got split='validation', wanted 'train' or 'test'"),
        ({"split": "test"}, "got split='test' for an array"),
        ({"image_size": 8}, "got image_size for an array"),
        ({"columns": ["a"]}, "got columns for an array"),
        ({"columns": "a"}, "pass columns=['a']"),
        ({"block_bytes": 0}, "got block_bytes=0, wanted a positive integer"),
    ],
)
def test_open_blocks_impossible_argument_is_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        open_blocks(np.zeros((2, 2)), **argument)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "which does not exist"), ("rows.csv", "uncompressed IDX"), ("one.png", "the folder that holds")],
)
def test_source_that_is_none_says_what_is_wanted(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    (tmp_path / "one.png").write_bytes(_png(_pixels(0, (2, 2))))
    with pytest.raises(InputError, match=message):
        open_blocks(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="without anything to read"):
        open_blocks(tmp_path / "empty")


def test_dataframe_and_list_in_blocks_are_what_load_rows_reads() -> None:
    for source in (pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [4, 5, 6]}), [[1, 2], [3, 4]]):
        np.testing.assert_array_equal(_joined(open_blocks(source, block_bytes=8)), load_rows(source).array)


def test_fingerprints_of_other_rows_differ(tmp_path: Path) -> None:
    prints = set()
    for seed in range(3):
        _save_images(tmp_path / "images", 4 + seed)
        prints.add(open_blocks(tmp_path / "images").fingerprint())
        _frame(10 + seed).to_parquet(tmp_path / "rows.parquet")
        prints.add(open_blocks(tmp_path / "rows.parquet").fingerprint())
    assert len(prints) == 6
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in prints)
