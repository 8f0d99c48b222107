"""The IDX format of MNIST, plain or gzipped.

Two zero bytes, a dtype code, the number of axes; then each axis as a big-endian uint32; then the values, big-endian,
the last axis fastest. The whole specification is on http://yann.lecun.com/exdb/mnist/ (section "The IDX file format").
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import InputError, MissingSplitError

__all__ = [
    "IdxHeader",
    "find_idx",
    "is_gzipped",
    "is_idx",
    "parse_idx_header",
    "read_idx",
    "read_idx_header",
    "read_idx_shape",
]

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"
_PIECE_BYTES = 1 << 20

# MNIST calls its test split "t10k". The last two places are where torchvision puts the files.
_PREFIXES = {"train": "train", "test": "t10k"}
_PLACES = (".", "raw", "MNIST/raw")


class IdxHeader(NamedTuple):
    """What an IDX file announces."""

    dtype: np.dtype[Any]
    """In the file's byte order."""

    shape: tuple[int, ...]

    offset: int
    """Bytes before the first value."""


def is_idx(path: Path) -> bool:
    """Tell an IDX file by a name like MNIST's, or else by its first bytes, behind gzip or not."""
    if re.search(r"idx\d-ubyte(\.gz)?$", path.name):
        return True
    try:
        with _open(path) as stream:
            magic = stream.read(4)
    except (OSError, EOFError, zlib.error):
        return False
    return len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in _DTYPES


def is_gzipped(path: Path) -> bool:
    """Tell gzip by the first bytes."""
    with _reading(path), path.open("rb") as file:
        return file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC


def read_idx_header(path: Path) -> IdxHeader:
    """Read only what an IDX file announces.

    Raises
    ------
    InputError
        The header is not an IDX header.
    """
    with _reading(path), _open(path) as stream:
        return parse_idx_header(stream, name=path)


def read_idx_shape(path: Path) -> tuple[int, ...]:
    """Read only the shape that an IDX file announces.

    Raises
    ------
    InputError
        The header is not an IDX header.
    """
    return read_idx_header(path).shape


def read_idx(path: Path, *, max_rows: int | None = None) -> NDArray[Any]:
    """Read an IDX file.

    Parameters
    ----------
    path : Path
        Plain or gzipped; the content decides, not the name.
    max_rows : int, optional
        Read only the first `max_rows` entries of the first axis. What follows is then neither read nor checked.

    Returns
    -------
    ndarray of the file's shape, in native byte order
        uint8, int8, int16, int32, float32 or float64.

    Raises
    ------
    InputError
        Not an IDX file, or one with more or fewer bytes than its header announces.
    """
    with _reading(path), _open(path) as stream:
        dtype, shape, _ = parse_idx_header(stream, name=path)
        if max_rows is not None and max_rows < shape[0]:
            data = _read_values(stream, path, dtype.itemsize * math.prod((max_rows, *shape[1:])))
            shape = (max_rows, *shape[1:])
        else:
            wanted = dtype.itemsize * math.prod(shape)
            data = _read_values(stream, path, wanted)
            # Reading to the end also lets gzip verify its checksum.
            trailing = sum(map(len, iter(lambda: stream.read(_PIECE_BYTES), b"")))
            if trailing:
                raise InputError(
                    f"got {wanted + trailing} bytes of values in {path}, wanted {wanted} for shape {shape} of "
                    f"{dtype.name}; the file is damaged, fetch or write it again"
                )
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def find_idx(folder: Path, split: str) -> tuple[Path, Path | None] | None:
    """Find the images and the labels of one MNIST split, in `folder` or where torchvision puts them below it.

    Parameters
    ----------
    folder : Path
    split : {"train", "test"}

    Returns
    -------
    (images, labels) or None
        `labels` is None where there is no such file; the whole is None where `folder` holds neither split.

    Raises
    ------
    InputError
        The folder holds the other split, but not this one.
    """
    for place in (folder / name for name in _PLACES):
        images = {name: _plain_or_gzipped(place / f"{prefix}-images-idx3-ubyte") for name, prefix in _PREFIXES.items()}
        if found := images[split]:
            return found, _plain_or_gzipped(place / f"{_PREFIXES[split]}-labels-idx1-ubyte")
        if any(images.values()):
            raise MissingSplitError(
                f"got {place} without {_PREFIXES[split]}-images-idx3-ubyte[.gz], which holds split={split!r}"
            )
    return None


def _plain_or_gzipped(path: Path) -> Path | None:
    # Plain first: torchvision leaves both side by side, and the plain one is faster to read.
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.is_file()), None)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise InputError(
            f"got {path} of {path.stat().st_size} bytes, in which gzip ends too early; fetch or write it again"
        ) from error
    except (OSError, zlib.error) as error:
        raise InputError(f"got {path}, which cannot be read ({error}); fetch or write it again") from error


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    with path.open("rb") as file:
        magic = file.read(2)
        file.seek(0)
        if magic != _GZIP_MAGIC:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as stream:
            yield stream


def parse_idx_header(stream: IO[bytes] | gzip.GzipFile, *, name: object) -> IdxHeader:
    """Read the header that an unpacked stream begins with, wherever it comes from.

    Parameters
    ----------
    stream : file-like
        Left at the first value.
    name : object
        What errors call it.

    Raises
    ------
    InputError
        It is not an IDX header.
    """
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES or magic[3] == 0:
        raise InputError(
            f"got {name} that starts with {magic.hex() or 'nothing'}, wanted an IDX file: 0000, "
            f"a dtype code ({', '.join(f'{code:02x}' for code in _DTYPES)}), and at least one axis"
        )
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise InputError(
            f"got {len(sizes)} bytes of axis sizes in {name}, wanted {4 * magic[3]}; the file is cut short"
        )
    shape = struct.unpack(f">{magic[3]}I", sizes)
    if 0 in shape:
        raise InputError(f"got {name} of shape {shape}, wanted at least one value")
    return IdxHeader(np.dtype(_DTYPES[magic[2]]), shape, len(magic) + len(sizes))


def _read_values(stream: IO[bytes] | gzip.GzipFile, path: Path, wanted: int) -> bytearray:
    # In pieces, because a damaged header may announce more than there is memory for.
    data = bytearray()
    while len(data) < wanted and (piece := stream.read(min(_PIECE_BYTES, wanted - len(data)))):
        data += piece
    if len(data) < wanted:
        raise InputError(f"got {len(data)} bytes of values in {path}, wanted {wanted}; fetch or write the file again")
    return data
