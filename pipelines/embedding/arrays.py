"""Array files wherever they lie: what ``.npy`` and IDX files announce, and ranges of their rows."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.embedding.storage import Place
from vaefeat.errors import InputError
from vaefeat.idx import parse_idx_header
from vaefeat.input_spec import InputSpec

__all__ = ["ArrayHeader", "read_array", "read_header"]

_GZIP_MAGIC = b"\x1f\x8b"
_SKIP_BYTES = 1 << 20


class ArrayHeader(NamedTuple):
    """What an array file announces."""

    dtype: str
    """NumPy's, in the file's byte order."""

    shape: tuple[int, ...]

    offset: int
    """Bytes before the first value, once unpacked."""

    packed: bool
    """Whether gzip has to be read from its beginning."""

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape[1:])


def read_header(place: Place, name: str, *, kind: str, spec: InputSpec) -> ArrayHeader:
    """Read what an array file below a folder announces, and whether its rows are those of the encoder.

    Parameters
    ----------
    place : Place
    name : str
    kind : {"npy", "idx"}
    spec : InputSpec

    Raises
    ------
    InputError
        It is damaged, cut short, in Fortran's order, or holds rows of another shape.
    """
    where = f"{place}/{name}"
    with place.reading(name), place.open(name) as file:
        packed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        file.seek(0)
        if kind == "npy":
            header = _npy_header(file, where)
        else:
            stream = gzip.GzipFile(fileobj=file) if packed else file
            idx = parse_idx_header(stream, name=where)
            header = ArrayHeader(idx.dtype.str, idx.shape, idx.offset, packed)
        wanted = header.offset + header.row_bytes * header.shape[0]
        if not packed and file.size() != wanted:
            raise InputError(
                f"got {where} of {file.size()} bytes, wanted {wanted} for shape {header.shape}; fetch or write it again"
            )
    if _row_shape(header.shape, spec) is None:
        raise InputError(
            f"got rows of shape {header.shape} in {where}, wanted {spec}; take a bundle that was trained on such rows"
        )
    return header


def _npy_header(file: Any, where: str) -> ArrayHeader:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise InputError(f"got {where}, which is no .npy file ({error}); fetch or write it again") from error
    if fortran and len(shape) > 1:
        raise InputError(f"got {where} in Fortran's order, wanted C order; write it with np.ascontiguousarray(X)")
    if dtype.kind not in "buif":
        raise InputError(f"got {where} of dtype {dtype}, wanted numbers")
    return ArrayHeader(dtype.str, shape, file.tell(), packed=False)


def _row_shape(shape: tuple[int, ...], spec: InputSpec) -> tuple[int, ...] | None:
    """Give the shape of a row as the encoder takes it: grey images may come without an axis for their channel."""
    accepted = {spec.shape, (spec.n_features,)} | ({spec.shape[1:]} if spec.shape[0] == 1 else set())
    return spec.shape if len(shape) > 1 and shape[1:] in accepted else None


def read_array(
    place: Place, name: str, header: ArrayHeader, *, start: int, stop: int, batch_rows: int
) -> Iterator[NDArray[Any]]:
    """Read a range of rows, some at a time.

    Parameters
    ----------
    place : Place
    name : str
    header : ArrayHeader
    start, stop : int
    batch_rows : int

    Yields
    ------
    ndarray of shape (k, ...)
        In the order of the file; as they are there.
    """
    with place.reading(name), place.open(name) as file:
        stream = gzip.GzipFile(fileobj=file) if header.packed else file
        begin = header.offset + start * header.row_bytes
        if header.packed:
            _skip(stream, begin)
        else:
            file.seek(begin)
        for first in range(start, stop, batch_rows):
            n_rows = min(batch_rows, stop - first)
            content = stream.read(n_rows * header.row_bytes)
            if len(content) < n_rows * header.row_bytes:
                raise EOFError(f"it ends in row {first + len(content) // header.row_bytes} of {header.shape[0]}")
            yield np.frombuffer(content, header.dtype).reshape(n_rows, *header.shape[1:])


def _skip(stream: Any, n_bytes: int) -> None:
    while n_bytes > 0 and (piece := stream.read(min(_SKIP_BYTES, n_bytes))):
        n_bytes -= len(piece)
