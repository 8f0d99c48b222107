"""Tensors of the Open Inference Protocol: what one claims to be, checked, and its bytes or values as an array.

A bundle takes one of two tensors: ``rows``, numbers of shape [n, *row] or flat [n, n_features], and, where rows are
images, ``images``, BYTES of shape [n], each of which is a PNG, JPEG or WebP file.
"""

from __future__ import annotations

import binascii
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import CodecError, RequestError, shown
from serving.protocols.number_lists import innermost, pack, with_gaps
from vaefeat.input_spec import InputSpec

__all__ = [
    "IMAGES",
    "NUMPY",
    "ROWS",
    "check_input",
    "check_outputs",
    "images_from_bytes",
    "images_from_texts",
    "rows_from_bytes",
    "rows_from_numbers",
    "rows_from_values",
    "tensor_of",
]

ROWS = "rows"
IMAGES = "images"
#: NumPy's name of each datatype that is a number; all are little-endian on the wire.
NUMPY: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
#: As they are read: any byte may have been sent for a BOOL.
_STORED = {**NUMPY, "BOOL": np.dtype("u1")}
#: Of :mod:`struct`, whose items refuse what they cannot hold; but what FP32 cannot hold is infinity, and told later.
_TYPECODES = dict(zip(NUMPY, "BBHIQbhiqedd", strict=True))


def tensor_of(spec: InputSpec) -> tuple[str, tuple[int, ...]]:
    """Give the datatype and shape of a row."""
    return {"uint8": "UINT8", "float32": "FP32"}[spec.dtype], spec.shape


def check_input(name: object, datatype: object, shape: Sequence[Any], *, spec: InputSpec, max_rows: int) -> int:
    """Check what the one input tensor claims to be.

    Parameters
    ----------
    name, datatype : object
        As they came.
    shape : sequence
        As it came; whether its items are integers is checked here.
    spec : InputSpec
        What the bundle takes.
    max_rows : int
        Most rows or images in one request.

    Returns
    -------
    int
        Number of rows or images, at least 1.

    Raises
    ------
    CodecError
        A name, datatype or shape that the bundle does not take.
    RequestError
        413 for more than `max_rows`.
    """
    if name == ROWS:
        if not isinstance(datatype, str) or datatype not in NUMPY:
            raise CodecError(f"got rows of datatype {shown(datatype)}, wanted UINT8, FP32 or another of {[*NUMPY]}")
    elif name == IMAGES and spec.kind == "image":
        if datatype != "BYTES":
            raise CodecError(f"got images of datatype {shown(datatype)}, wanted BYTES; pixels are sent as {ROWS!r}")
    else:
        raise CodecError(f"got an input named {shown(name)}, wanted {_taken(spec)}")
    # `type`, because True is an int to isinstance.
    whole = set(map(type, shape)) == {int}
    row = tuple(shape[1:])
    fits = row == () if name == IMAGES else row in (spec.shape, (spec.n_features,))
    if not (whole and fits):
        wanted = "[n], one file each" if name == IMAGES else f"that of {spec}"
        raise CodecError(f"got {name} of shape {shown(list(shape))}, wanted {wanted}")
    n = int(shape[0])
    if n < 1:
        raise CodecError(f"got {n} {name}, wanted at least one")
    if n > max_rows:
        raise RequestError(
            413, "too_large", f"got {n} {name}, wanted at most {max_rows} at a time; send them in several requests"
        )
    return n


def _taken(spec: InputSpec) -> str:
    rows = f"{ROWS!r}, {spec}"
    return f"{rows}; or {IMAGES!r}, BYTES of shape (n,), PNG, JPEG or WebP files" if spec.kind == "image" else rows


def check_outputs(names: Sequence[object], *, outputs: Collection[str]) -> None:
    """Refuse outputs that the bundle has not, and those that are asked for twice.

    Raises
    ------
    CodecError
    """
    for index, name in enumerate(names):
        if not isinstance(name, str) or name not in outputs:
            raise CodecError(f"got the output {shown(name)}, wanted one of {[*outputs]}")
        if name in names[:index]:
            raise CodecError(f"got the output {name!r} twice, wanted every output at most once")


def rows_from_bytes(
    blob: bytes, *, offset: int = 0, datatype: str, shape: Sequence[int], spec: InputSpec
) -> NDArray[Any]:
    """Read row-major, little-endian numbers without padding, from `offset` to the end.

    Parameters
    ----------
    blob : bytes
    offset : int
        Where the tensor starts.
    datatype : str
        A key of :data:`NUMPY`.
    shape : sequence of int
        Checked by :func:`check_input`.
    spec : InputSpec

    Returns
    -------
    ndarray of that shape and datatype
        A read-only view of `blob` where it is aligned. :meth:`InputSpec.prepare` has yet to look at the values.

    Raises
    ------
    CodecError
        Fewer or more bytes than the shape takes.
    """
    # The row's own size: products of what the client sent could be anything.
    wanted = shape[0] * spec.n_features * NUMPY[datatype].itemsize
    if len(blob) - offset != wanted:
        raise CodecError(
            f"got {len(blob) - offset} bytes for {datatype} of shape {shown(list(shape))}, wanted {wanted}; "
            "the body was cut off or holds something more"
        )
    return _of_bytes(blob, datatype=datatype, shape=shape, offset=offset)


def rows_from_values(data: object, *, datatype: str, shape: Sequence[int], spec: InputSpec) -> NDArray[Any]:
    """Read numbers from nested or flat lists, as JSON has them.

    Parameters
    ----------
    data : object
        Should be lists of numbers.
    datatype : str
        A key of :data:`NUMPY`.
    shape : sequence of int
        Checked by :func:`check_input`.
    spec : InputSpec

    Returns
    -------
    ndarray of that shape and datatype
        :meth:`InputSpec.prepare` has yet to look at the values.

    Raises
    ------
    CodecError
        Other things than numbers, another number of them than the shape takes, or numbers that are not of `datatype`.
    """
    if datatype == "FP16":
        raise CodecError("got FP16 in JSON, which the protocol does not allow; send FP32, or send it as binary data")
    lists, nesting = innermost(data)
    if len(nesting) > 1 and nesting != tuple(shape):
        raise CodecError(f"got data nested as {shown(list(nesting))}, wanted {shown(list(shape))} or one flat list")
    if spec.table is not None and datatype in {"FP32", "FP64"}:
        lists = with_gaps(lists)
    return rows_from_numbers(lists, datatype=datatype, shape=shape, spec=spec)


def rows_from_numbers(
    lists: Sequence[Sequence[Any]], *, datatype: str, shape: Sequence[int], spec: InputSpec
) -> NDArray[Any]:
    """Read numbers in row-major order, in lists of one length whatever that is; else as :func:`rows_from_values`."""
    wanted, n_values = shape[0] * spec.n_features, len(lists) * len(lists[0])
    if n_values != wanted:
        raise CodecError(f"got {n_values} values for the shape {shown(list(shape))}, wanted {wanted}")
    try:
        packed = pack(lists, _TYPECODES[datatype])
    except (TypeError, ValueError, OverflowError) as error:
        raise CodecError(f"got data that {datatype} cannot hold ({error}), wanted numbers of that datatype") from error
    if datatype == "FP32":
        with np.errstate(over="ignore"):
            return np.ndarray(tuple(shape), "<f8", packed).astype("<f4")
    return _of_bytes(packed, datatype=datatype, shape=shape)


def _of_bytes(buffer: bytes, *, datatype: str, shape: Sequence[int], offset: int = 0) -> NDArray[Any]:
    rows: NDArray[Any] = np.ndarray(tuple(shape), _STORED[datatype], buffer, offset)
    if datatype == "BOOL":
        if rows.max() > 1:
            raise CodecError(f"got BOOL values up to {rows.max()}, wanted only 0 and 1")
        return rows.view(bool)
    # ONNX Runtime gets the address, and the length of what comes before the values is the client's choice.
    return rows if rows.flags.aligned else rows.copy()


def images_from_bytes(blob: bytes, *, offset: int = 0, n: int) -> list[bytes]:
    """Read `n` texts of BYTES, each after its length (uint32, little-endian), from `offset` to the end.

    Raises
    ------
    CodecError
        A length past the end, or fewer or more texts than `n`.
    """
    images: list[bytes] = []
    end = len(blob)
    while offset < end:
        start = offset + 4
        offset = start + int.from_bytes(blob[offset:start], "little")
        if offset > end or start > end:
            raise CodecError(f"got BYTES whose item {len(images)} reaches past the end; each is a uint32 and its bytes")
        if len(images) == n:
            raise CodecError(f"got more than {n} items of BYTES, wanted as many as the shape says")
        images.append(blob[start:offset])
    if len(images) != n:
        raise CodecError(f"got {len(images)} items of BYTES, wanted {n}, as the shape says")
    return images


def images_from_texts(data: object, *, n: int) -> list[bytes]:
    """Read `n` base64 texts, the form that files have in JSON.

    Raises
    ------
    CodecError
        Another number of texts, or something else than base64.
    """
    if not isinstance(data, list) or len(data) != n:
        got = f"{len(data)} items" if isinstance(data, list) else f"data of type {type(data).__name__}"
        raise CodecError(f"got {got}, wanted a list of {n} base64 texts, as the shape says")
    images = []
    for index, text in enumerate(data):
        if not isinstance(text, str):
            raise CodecError(f"got image {index} of type {type(text).__name__}, wanted a base64 text")
        try:
            images.append(binascii.a2b_base64(text, strict_mode=True))
        except ValueError as error:
            raise CodecError(
                f"got image {index} that is not base64 ({error}), wanted the file in base64; "
                "or send it as binary data, which needs none"
            ) from error
    return images
