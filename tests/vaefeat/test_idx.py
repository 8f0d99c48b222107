"""The IDX reader against files that are written byte by byte."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from vaefeat.errors import InputError
from vaefeat.idx import is_idx, read_idx, read_idx_shape


def _idx(code: int, shape: tuple[int, ...], data: bytes) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape) + data


@pytest.mark.parametrize(
    ("code", "letter", "dtype"),
    [
        (0x08, "B", np.uint8),
        (0x09, "b", np.int8),
        (0x0B, "h", np.int16),
        (0x0C, "i", np.int32),
        (0x0D, "f", np.float32),
        (0x0E, "d", np.float64),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_read_idx_every_dtype_code_is_read_big_endian(
    tmp_path: Path, code: int, letter: str, dtype: type, zipped: bool
) -> None:
    values = [1, 2, 3, 100, 5, 6, 7, 8, 9, 10, 11, 12]
    content = _idx(code, (2, 3, 2), struct.pack(f">12{letter}", *values))
    (tmp_path / "file").write_bytes(gzip.compress(content) if zipped else content)
    array = read_idx(tmp_path / "file")
    assert array.dtype == dtype
    assert array.dtype.isnative
    np.testing.assert_array_equal(array, np.reshape(values, (2, 3, 2)))


@pytest.mark.parametrize("zipped", [True, False])
def test_read_idx_with_max_rows_reads_no_further(tmp_path: Path, zipped: bool) -> None:
    content = _idx(0x08, (1000, 2), bytes(6))  # cut short after three rows
    (tmp_path / "file").write_bytes(gzip.compress(content) if zipped else content)
    assert read_idx(tmp_path / "file", max_rows=3).shape == (3, 2)
    assert read_idx_shape(tmp_path / "file") == (1000, 2)


def test_read_idx_with_max_rows_beyond_the_end_reads_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(_idx(0x08, (3, 2), bytes(6)))
    assert read_idx(tmp_path / "file", max_rows=10).shape == (3, 2)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("n_bytes", [0, 5, 7, 3_000_000])
def test_read_idx_missing_or_trailing_bytes_are_counted(tmp_path: Path, zipped: bool, n_bytes: int) -> None:
    content = _idx(0x08, (3, 2), bytes(n_bytes))
    (tmp_path / "file").write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(InputError, match=re.escape(f"got {n_bytes} bytes of values in {tmp_path / 'file'}, wanted 6")):
        read_idx(tmp_path / "file")


def test_read_idx_header_that_announces_more_than_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(_idx(0x0E, (2**32 - 1,) * 3, bytes(8)))
    with pytest.raises(InputError, match="got 8 bytes of values"):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\0\0\x08", "starts with 000008"),
        (b"\0\1\x08\1\0\0\0\1a", "starts with 00010801"),
        (b"\0\0\x0a\1\0\0\0\1a", "starts with 00000a01"),
        (b"\0\0\x08\0", "at least one axis"),
        (b"\0\0\x08\3\0\0\0\1\0", "got 5 bytes of axis sizes"),
        (b"\0\0\x08\2\0\0\0\0\0\0\0\5", "of shape (0, 5), wanted at least one value"),
    ],
)
def test_read_idx_wrong_header_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_idx(tmp_path / "file")


def test_read_idx_damaged_gzip_is_refused(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    packed = gzip.compress(_idx(0x08, (5000,), values))
    (tmp_path / "short").write_bytes(packed[:-100])
    (tmp_path / "checksum").write_bytes(packed[:-8] + bytes(8))
    with pytest.raises(InputError, match="gzip ends too early"):
        read_idx(tmp_path / "short")
    with pytest.raises(InputError, match=r"cannot be read .*CRC"):
        read_idx(tmp_path / "checksum")


def test_is_idx_goes_by_mnist_names_and_by_content(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(_idx(0x08, (1,), b"a"))
    (tmp_path / "packed").write_bytes(gzip.compress(_idx(0x08, (1,), b"a")))
    (tmp_path / "x-images-idx3-ubyte.gz").write_bytes(b"damaged")
    (tmp_path / "other").write_bytes(b"\0\0\1\0\1\0\x10\x10")  # an icon
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8b\0\0")
    found = {path.name for path in tmp_path.iterdir() if is_idx(path)}
    assert found == {"plain", "packed", "x-images-idx3-ubyte.gz"}
