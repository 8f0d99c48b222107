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
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vaefeat.blocks import ArrayBlocks, Blocks, FileBlocks, ImageBlocks, open_blocks
from vaefeat.data import Split, fingerprint, load_rows
from vaefeat.errors import InputError


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
    rows = np.arange(blocks.sizes[1])[::2]
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


def test_fingerprints_of_other_images_differ(tmp_path: Path) -> None:
    prints = set()
    for count in (4, 5, 6):
        _save_images(tmp_path / "images", count)
        prints.add(open_blocks(tmp_path / "images").fingerprint())
    assert len(prints) == 3
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in prints)
