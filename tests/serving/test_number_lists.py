from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from serving.errors import CodecError
from serving.protocols import number_lists
from serving.protocols.number_lists import count, innermost, pack, read_numbers

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)
BYTES = hnp.arrays(np.uint8, SHAPES)
DOUBLES = hnp.arrays(np.float64, SHAPES, elements=st.floats(allow_nan=False, allow_infinity=False))


def read(text: bytes) -> NDArray[Any]:
    return read_numbers(*innermost(orjson.loads(text)))


@given(BYTES)
def test_read_numbers_of_bytes_gives_them_as_uint8(array: NDArray[np.uint8]) -> None:
    got = read(orjson.dumps(array.tolist()))
    assert (got.dtype.name, got.shape) == ("uint8", array.shape)
    assert got.tobytes() == array.tobytes()


@given(DOUBLES)
def test_read_numbers_of_doubles_gives_their_bits(array: NDArray[np.float64]) -> None:
    got = read(orjson.dumps(array.tolist()))
    assert (got.dtype.name, got.shape) == ("float64", array.shape)
    assert got.tobytes() == array.tobytes()


@pytest.mark.parametrize("numbers", [[-1, 0], [0, 256], [255, 0.5], [1.0, 2], [2**53, -(2**53)]])
def test_read_numbers_beyond_bytes_or_with_a_fraction_gives_doubles(numbers: list[float]) -> None:
    got = read(orjson.dumps([numbers]))
    assert got.dtype == np.float64
    assert got.tolist() == [numbers]


@pytest.mark.parametrize("other", ["1", None, [1], {}, "x" * 100_000])
@pytest.mark.parametrize("number", [1, 0.5])
def test_read_numbers_with_something_else_among_them_raises(number: float, other: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        read_numbers(*innermost([[number, number], [number, other]]))


@pytest.mark.parametrize("lists", [[[1, 2], [3]], [[1], 2], [[[1]], [2]], [[[1, 2]], [[3], [4]]], [[], [1]]], ids=repr)
def test_innermost_of_lists_of_several_forms_raises_codec_error(lists: list[Any]) -> None:
    with pytest.raises(CodecError, match="different lengths or depths"):
        innermost(lists)


@pytest.mark.parametrize(("lists", "shape"), [([], (0,)), ([[], []], (2, 0)), ([1], (1,)), ([[[7]]], (1, 1, 1))])
def test_innermost_of_empty_or_small_lists_gives_their_shape(lists: list[Any], shape: tuple[int, ...]) -> None:
    assert innermost(lists)[1] == shape
    assert read_numbers(*innermost(lists)).tolist() == lists


@pytest.mark.parametrize(("typecode", "number"), [("B", 256), ("b", 128), ("H", -1), ("q", 2**63), ("i", 0.5)])
def test_pack_of_a_number_that_the_type_cannot_hold_raises(typecode: str, number: float) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        pack([[0, number]], typecode)


@given(st.binary(max_size=200))
def test_count_over_several_pieces_counts_as_bytes_do(text: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(number_lists, "_PIECE_BYTES", 7)
        assert count(text, b",") == text.count(b",")
        assert count(text + b",", b",") == text.count(b",") + 1
