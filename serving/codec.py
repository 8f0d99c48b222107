"""Bytes to arrays and back: npy and JSON, strict in what is accepted.

Nothing here trusts its input. An npy header is matched by a pattern and never evaluated; the announced shape must
account for exactly the bytes that follow, before any of them is looked at; only plain numbers are read, so that pickled
objects have no way in. A JSON body is bounded in its number of lists before it is parsed, because an empty list takes
two bytes on the wire and sixty in memory.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from serving.errors import CodecError, shown
from serving.protocols.number_lists import count, innermost, read_numbers, with_gaps
from vaefeat.input_spec import InputSpec

__all__ = [
    "INLINE_VALUES",
    "EmbedBody",
    "decode_json",
    "decode_npy",
    "decode_raw",
    "encode_json",
    "encode_npy",
    "is_plain",
    "plain",
    "view_npy",
]

#: Values that are written as JSON on the event loop; more take a thread.
INLINE_VALUES = 16_384
_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 4096
_MAX_DIMENSIONS = 8
# numpy.save and the writers of other languages all put the keys in this order.
_HEADER = re.compile(
    rb"\{ *'descr': *'(?P<dtype>[^'\\]{1,32})', *'fortran_order': *(?P<fortran>True|False), *"
    rb"'shape': *\((?P<shape>[0-9, ]{0,200})\),? *\} *\n?"
)
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_JSON_KEYS = {"rows", "model", "output"}
#: Three keys and two texts take ten quotes and one brace; a few more may stand in the texts.
_MAX_JSON_QUOTES = 16
_MAX_JSON_BRACES = 4


@dataclass(frozen=True)
class EmbedBody:
    """What the body of a request to embed says."""

    rows: NDArray[Any]
    model: str | None = None
    output: str | None = None


def decode_raw(body: bytes | memoryview, spec: InputSpec) -> NDArray[Any]:
    """Read rows without any header: the model's dtype, little-endian, row after row.

    Raises
    ------
    CodecError
        Not a whole number of rows.
    """
    n_rows, left = divmod(len(body), spec.row_bytes)
    if left:
        raise CodecError(f"got {len(body)} bytes, wanted a multiple of {spec.row_bytes}, which one of {spec} takes")
    if spec.dtype == "uint8":
        return np.frombuffer(body, np.uint8).reshape(n_rows, *spec.shape)
    rows = np.frombuffer(body, np.dtype(spec.dtype).newbyteorder("<")).reshape(n_rows, *spec.shape)
    return np.require(rows.astype(spec.dtype, copy=False), requirements=["C", "A"])


def decode_npy(body: bytes | memoryview) -> NDArray[Any]:
    """Read one array of numbers in NumPy's npy format: :func:`view_npy`, made :func:`plain`."""
    return plain(view_npy(body))


def view_npy(body: bytes | memoryview) -> NDArray[Any]:
    """Look at one array of numbers in NumPy's npy format, without copying it.

    Parameters
    ----------
    body : bytes or memoryview
        The whole file: header and data, nothing after it.

    Returns
    -------
    ndarray
        A read-only view of `body`, in the byte order and the order of axes that it came in.

    Raises
    ------
    CodecError
        Not npy, objects or other things that are not numbers, or fewer or more bytes than the header announces.
    """
    if body[:6] != _MAGIC or len(body) < 12:
        raise CodecError(
            f"got a body that is not npy{_resembles(bytes(body[:64]))}; send what numpy.save(file, rows) writes"
        )
    width = {1: 2, 2: 4, 3: 4}.get(body[6])
    if width is None:
        raise CodecError(f"got npy version {body[6]}.{body[7]}, wanted 1.0, 2.0 or 3.0")
    start = 8 + width + int.from_bytes(body[8 : 8 + width], "little")
    dtype, fortran, shape = _npy_header(bytes(body[8 + width : min(start, 9 + width + _MAX_HEADER_BYTES)]))
    wanted = math.prod(shape) * dtype.itemsize
    if len(body) - start != wanted:
        raise CodecError(
            f"got {len(body) - start} bytes after the npy header, wanted {wanted} for {dtype} of shape {shape}; "
            "the body was cut off or holds something more"
        )
    try:
        array = np.frombuffer(body, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    except ValueError as error:  # for instance no rows of more than 2**63 values
        raise CodecError(f"got an npy header of shape {shape}, which NumPy cannot hold: {error}") from error
    return array


def is_plain(array: NDArray[Any]) -> bool:
    """Tell whether :func:`plain` has nothing to do, which takes as long as there is data otherwise."""
    flags = array.flags
    return bool(flags.c_contiguous and flags.aligned and array.dtype.isnative and array.dtype.kind != "b")


def plain(array: NDArray[Any]) -> NDArray[Any]:
    """Bring an array into native byte order and C order.

    Raises
    ------
    CodecError
        Truth values that are neither 0 nor 1, of which NumPy would make other numbers each time.
    """
    if array.dtype.kind == "b" and array.size and (found := int(array.view(np.uint8).max())) > 1:
        raise CodecError(f"got npy truth values up to {found}, wanted only 0 and 1")
    # Aligned, because the header's length is the client's choice and ONNX Runtime gets the address.
    return np.require(array.astype(array.dtype.newbyteorder("="), copy=False), requirements=["C", "A"])


@lru_cache(maxsize=1024)  # a client's requests mostly have one of a few headers
def _npy_header(header: bytes) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    """Dtype, Fortran order and shape."""
    match = _HEADER.fullmatch(header) if len(header) <= _MAX_HEADER_BYTES else None
    if match is None:
        raise CodecError(f"got the npy header {header[:120]!r}, wanted one array of numbers, as numpy.save has it")
    name = match["dtype"].decode("latin-1")
    if not _NUMBERS.fullmatch(name):
        raise CodecError(f"got an npy array of dtype {name!r}, wanted numbers of at most 64 bits; convert it first")
    sizes = [size for size in match["shape"].replace(b" ", b"").split(b",") if size]
    if len(sizes) > _MAX_DIMENSIONS:
        raise CodecError(f"got an npy array of {len(sizes)} dimensions, wanted at most {_MAX_DIMENSIONS}")
    return np.dtype(name), match["fortran"] == b"True", tuple(map(int, sizes))


def _resembles(body: bytes) -> str:
    """Say what a body that is not npy may be; these are what people send by mistake."""
    if not body:
        return " but empty"
    if body.startswith(b"PK"):
        return " but looks like an npz archive"
    if body.startswith(b"\x80"):
        return " but looks like a pickle, which is never read"
    if body.lstrip()[:1] in {b"{", b"["}:
        return " but looks like JSON (its content type is application/json)"
    return ""


def encode_npy(array: NDArray[Any]) -> bytes:
    """Write one array in NumPy's npy format, as :func:`numpy.save` does."""
    return _npy_beginning(array.dtype, array.shape) + array.tobytes()


@lru_cache(maxsize=4096)  # by number of rows; NumPy takes longer for it than for everything else
def _npy_beginning(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def decode_json(body: bytes, *, max_lists: int, max_values: int) -> EmbedBody:
    """Read ``{"rows": [[...], ...], "model": "...", "output": "..."}``; the last two may be left out.

    Parameters
    ----------
    body : bytes
        UTF-8.
    max_lists : int
        Most lists that a body may hold: one, and one or more for each row.
    max_values : int
        Most numbers that all rows may hold together. A number of two bytes takes forty in memory.

    Raises
    ------
    CodecError
        Not JSON (NaN and numbers beyond a double are not), other keys, or rows that are not numbers of one shape; null
        is a number that is missing.
    """
    if count(body, b"[") > max_lists:
        raise CodecError(f"got more than {max_lists} lists, which is more than the allowed rows hold; send fewer rows")
    if count(body, b",") > max_values + _MAX_JSON_QUOTES:
        raise CodecError(
            f"got more than {max_values} numbers, which is more than the allowed rows hold; send fewer rows"
        )
    # An empty object takes two bytes on the wire and sixty in memory, an empty text fifty.
    if count(body, b"{") > _MAX_JSON_BRACES or count(body, b'"') > _MAX_JSON_QUOTES:
        raise CodecError('got texts or objects among the rows, wanted {"rows": [[...], ...]} with numbers only')
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise CodecError(f"got a body that is not JSON: {error}; NaN and Infinity have no JSON form") from error
    if not isinstance(values, dict) or "rows" not in values or not values.keys() <= _JSON_KEYS:
        got = f"the keys {shown(sorted(values))}" if isinstance(values, dict) else f"a {type(values).__name__}"
        raise CodecError(f'got JSON with {got}, wanted {{"rows": [[...], ...]}}, and "model" and "output" if need be')
    for key in ("model", "output"):
        if not isinstance(values.get(key), str | None):
            raise CodecError(f"got {key} of type {type(values[key]).__name__}, wanted a string")
    return EmbedBody(rows=_numbers(values["rows"]), model=values.get("model"), output=values.get("output"))


def _numbers(rows: Any) -> NDArray[Any]:
    if not isinstance(rows, list):
        raise CodecError(f"got rows of type {type(rows).__name__}, wanted a list with one nested list per row")
    lists, shape = innermost(rows)
    if len(shape) > _MAX_DIMENSIONS:
        raise CodecError(f"got rows nested {len(shape)} deep, wanted at most {_MAX_DIMENSIONS}")
    try:
        return read_numbers(lists, shape)
    except (TypeError, ValueError, OverflowError) as error:
        if any(None in numbers for numbers in lists):
            # A number that is missing, which InputSpec.prepare refuses but in tables.
            return _numbers_with_gaps(lists, shape)
        raise _no_numbers() from error


def _numbers_with_gaps(lists: list[list[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return read_numbers(with_gaps(lists), shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise _no_numbers() from error


def _no_numbers() -> CodecError:
    return CodecError("got rows that hold other things than numbers, wanted numbers only; null is a missing one")


def encode_json(array: NDArray[np.float32], *, name: str = "embeddings", **fields: Any) -> bytes:
    """Write ``{**fields, "shape": [...], name: [[...], ...]}``.

    Every float32 comes out as the shortest decimal that reads back as the same float32.

    Parameters
    ----------
    array : ndarray of float32
        Finite throughout: JSON would turn NaN into null.
    name : str
        What it is called.
    **fields : JSON values
        Come before the array.
    """
    assert np.isfinite(array).all()  # the caller answers with an error instead
    body = {**fields, "shape": list(array.shape), name: np.ascontiguousarray(array)}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
