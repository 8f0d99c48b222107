from __future__ import annotations

import io
import pickle
import tracemalloc
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from serving.codec import decode_json, decode_npy, encode_json, encode_npy, is_plain, plain, view_npy
from serving.errors import CodecError
from vaefeat.errors import InputError
from vaefeat.input_spec import InputSpec

NUMBERS = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="?")
    | hnp.unsigned_integer_dtypes(endianness="?")
    | hnp.floating_dtypes(endianness="?")
)
ARRAYS: st.SearchStrategy[NDArray[Any]] = NUMBERS.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


def saved(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("order", ["C", "F"])
def test_decode_npy_of_truth_values_that_are_neither_0_nor_1_is_refused(order: Literal["C", "F"]) -> None:
    body = bytearray(saved(np.ones((3, 4), bool, order=order)))
    assert decode_npy(bytes(body)).all()
    body[-5] = 2
    with pytest.raises(CodecError, match="truth values up to 2"):
        decode_npy(bytes(body))


def test_npy_is_plain_only_where_nothing_has_to_be_copied() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert is_plain(view_npy(saved(array)))
    assert is_plain(view_npy(saved(array.astype(np.uint8))))
    for other in (np.asfortranarray(array), array.astype(">f4"), array > 3):
        viewed = view_npy(saved(other))
        assert not is_plain(viewed)
        np.testing.assert_array_equal(plain(viewed), other)


@given(ARRAYS, st.booleans())
def test_decode_npy_of_any_array_of_numbers_gives_its_bits_back(array: NDArray[Any], fortran: bool) -> None:
    decoded = decode_npy(saved(np.array(array, order="F") if fortran else array))
    assert decoded.shape == array.shape
    assert decoded.dtype == array.dtype.newbyteorder("=")
    assert decoded.dtype.isnative
    assert decoded.flags.c_contiguous
    assert decoded.flags.aligned
    assert decoded.tobytes() == array.astype(decoded.dtype).tobytes()


def test_decode_npy_in_native_order_copies_nothing() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert decode_npy(saved(rows)).base is not None


@given(hnp.arrays(np.float32, (3, 2)))
def test_encode_npy_is_read_back_by_numpy_bit_for_bit(array: NDArray[np.float32]) -> None:
    assert np.load(io.BytesIO(encode_npy(array)), allow_pickle=False).tobytes() == array.tobytes()


@given(ARRAYS, st.data())
def test_decode_npy_cut_off_anywhere_raises_codec_error(array: NDArray[Any], data: st.DataObject) -> None:
    body = saved(array)
    cut = data.draw(st.integers(0, len(body) - 1))
    if cut == len(body) - array.nbytes and array.nbytes == 0:
        return
    with pytest.raises(CodecError):
        decode_npy(body[:cut])


@given(ARRAYS, st.binary(min_size=1, max_size=20))
def test_decode_npy_with_bytes_after_the_data_raises_codec_error(array: NDArray[Any], extra: bytes) -> None:
    with pytest.raises(CodecError, match="something more"):
        decode_npy(saved(array) + extra)


@settings(max_examples=500)
@given(ARRAYS, st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=6))
def test_decode_npy_of_mutated_bytes_gives_an_array_or_codec_error(
    array: NDArray[Any], mutations: list[tuple[int, int]]
) -> None:
    body = bytearray(saved(array))
    for position, value in mutations:
        body[position % len(body)] = value
    try:
        decoded = decode_npy(bytes(body))
    except CodecError:
        return
    assert decoded.dtype.kind in "buif"
    assert decoded.nbytes <= len(body)


@given(st.binary(max_size=300))
def test_decode_npy_of_any_bytes_after_the_magic_raises_nothing_but_codec_error(tail: bytes) -> None:
    try:
        decode_npy(b"\x93NUMPY\x01\x00" + tail)
    except CodecError:
        pass


class Exploding:
    """Would leave a trace if anything unpickled it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "empty"),
        (b"hello", "not npy"),
        (pickle.dumps(Exploding()), "pickle"),
        (saved(np.array([Exploding()], dtype=object), allow_pickle=True), "'|O'"),
        (saved(np.array([1 + 2j])), "'<c16'"),
        (saved(np.array(["a"])), "'<U1'"),
        (saved(np.array([b"a"])), "'|S1'"),
        (saved(np.array(["2026-01-01"], dtype="M8[D]")), "M8"),
        (saved(np.zeros(2, dtype=[("a", "<f4")])), "one array of numbers"),
        (saved(np.zeros((1,) * 9)), "9 dimensions"),
        (b'{"rows": [[1]]}', "application/json"),
        (saved(np.zeros(3))[:6] + b"\x09" + saved(np.zeros(3))[7:], "version 9"),
    ],
)
def test_decode_npy_of_something_else_says_what_it_looks_like(body: bytes, told: str) -> None:
    with pytest.raises(CodecError, match=told.replace("|", r"\|")):
        decode_npy(body)


def test_decode_npy_of_an_npz_archive_says_so() -> None:
    file = io.BytesIO()
    np.savez(file, rows=np.zeros(3))
    with pytest.raises(CodecError, match="npz"):
        decode_npy(file.getvalue())


@pytest.mark.parametrize("shape", ["(99999999999999999, 99999999999999999)", "(0, 99999999999999999999)", "(-1,)"])
def test_decode_npy_of_an_impossible_shape_raises_codec_error_without_allocating(shape: str) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    with pytest.raises(CodecError):
        decode_npy(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


@given(hnp.arrays(np.float32, (4, 3), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_encode_json_keeps_every_float32_exactly(array: NDArray[np.float32]) -> None:
    text = encode_json(array, model="digits")
    assert text.startswith(b'{"model":"digits","shape":[4,3],"embeddings":[[')
    body = decode_json(b'{"rows":' + text[text.index(b"[[") : -1] + b"}", max_lists=5, max_values=100_000)
    assert body.rows.astype(np.float32).tobytes() == array.tobytes()


def test_decode_json_with_everything_gives_all_three() -> None:
    body = decode_json(b'{"rows": [[1, 2.5], [3, 4]], "model": "m", "output": "mean"}', max_lists=3, max_values=100_000)
    assert (body.model, body.output) == ("m", "mean")
    np.testing.assert_array_equal(body.rows, [[1, 2.5], [3, 4]])


def test_decode_json_of_null_is_a_missing_number_which_only_tables_take() -> None:
    body = decode_json(b'{"rows": [[null, 2], [1, 2]]}', max_lists=10, max_values=10)
    np.testing.assert_array_equal(body.rows, [[np.nan, 2], [1, 2]])
    for dtype in ("uint8", "float32"):
        with pytest.raises(InputError, match="row 0"):
            InputSpec(kind="vector", shape=(2,), dtype=dtype, low=0, high=9).prepare(body.rows)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[[1, 2]]",
        b'{"rows": null}',
        b'{"rows": "1 2"}',
        b'{"rows": [[1, NaN]]}',
        b'{"rows": [[1, Infinity]]}',
        b'{"rows": [[1, 1e999]]}',
        b'{"rows": [[1, 2], [3]]}',
        b'{"rows": [[1, [2]]]}',
        b'{"rows": [["1", "2"]]}',
        b'{"rows": [[{}, 2]]}',
        b'{"rows": [[1]], "other": 1}',
        b'{"rows": [[1]], "model": 1}',
        b'{"rows": [[1]], "output": ["mean"]}',
        b'{"model": "digits"}',
        b'{"rows": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"rows": ' + b"[" * 100 + b"1" + b"]" * 100 + b"}",
        b'{"rows": [[1]]}\xff',
        b'\xef\xbb\xbf{"rows": [[1]]}',
    ],
)
def test_decode_json_of_anything_else_raises_codec_error(body: bytes) -> None:
    with pytest.raises(CodecError):
        decode_json(body, max_lists=10_000, max_values=100_000)


def test_decode_json_of_more_lists_than_allowed_is_refused_unparsed() -> None:
    with pytest.raises(CodecError, match="more than 4 lists"):
        decode_json(b"[" * 5, max_lists=4, max_values=100_000)


def test_decode_json_of_more_numbers_than_allowed_is_refused_unparsed() -> None:
    with pytest.raises(CodecError, match="more than 1000 numbers"):
        decode_json(b'{"rows": [[' + b"1," * 5000 + b"1]]}", max_lists=4, max_values=1000)


@given(st.binary(max_size=60))
def test_decode_json_of_any_bytes_raises_nothing_but_codec_error(tail: bytes) -> None:
    try:
        decode_json(b'{"rows":[[' + tail, max_lists=100, max_values=100_000)
    except CodecError:
        pass


@pytest.mark.parametrize(
    "body",
    [
        b'{"rows": [["' + b"x" * 100_000 + b'"' + b', "a"' * 2_000 + b"]]}",
        b'{"rows": [["' + b"x" * 100_000 + b'"' + b", 1" * 2_000 + b"]]}",
        b'{"rows": [' + b"{}," * 200_000 + b"{}]}",
    ],
    ids=["texts", "one text", "objects"],
)
def test_json_of_texts_or_objects_is_refused_without_taking_memory(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="numbers only"):
            decode_json(body, max_lists=100, max_values=1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000  # the parser's own, for a body of 0.1 MB
    finally:
        tracemalloc.stop()
