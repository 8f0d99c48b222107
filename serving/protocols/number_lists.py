"""Nested lists of numbers in JSON: how many there may be before it is parsed, and packed afterwards.

Nothing but the numbers' own packers looks at each of them: they refuse what is no number of their kind, and they take
a tenth of the time of a loop, and a third of that of NumPy, which also makes texts of numbers that stand beside a text.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import CodecError

__all__ = ["count", "innermost", "pack", "read_numbers", "with_gaps"]


_PIECE_BYTES = 2**20


def count(text: bytes, mark: bytes) -> int:
    """Count a character, in less than a fifth of the time that ``bytes.count`` takes."""
    characters = np.frombuffer(text, np.uint8)
    pieces = range(0, len(text), _PIECE_BYTES)
    return sum(int(np.count_nonzero(characters[start : start + _PIECE_BYTES] == mark[0])) for start in pieces)


def innermost(data: object) -> tuple[list[list[Any]], tuple[int, ...]]:
    """Give the innermost lists of nested lists, and the shape of the array that they are.

    Returns
    -------
    lists : list of list
        At least one, all of one length; of what is in them only the first is known to be no list.
    shape : tuple of int

    Raises
    ------
    CodecError
        No list, or lists of different lengths or depths.
    """
    if not isinstance(data, list):
        raise CodecError(f"got data of type {type(data).__name__}, wanted a list of numbers, nested or flat")
    lists, shape = [data], [len(data)]
    while lists[0] and type(lists[0][0]) is list:
        lists = list(chain.from_iterable(lists))
        if set(map(type, lists)) != {list} or len(lengths := set(map(len, lists))) != 1:
            raise CodecError("got data with lists of different lengths or depths, wanted one shape throughout")
        shape += lengths
    return lists, tuple(shape)


def pack(lists: Sequence[Sequence[Any]], typecode: str) -> bytes:
    """Pack the numbers of lists of one length one after the other, little-endian.

    Parameters
    ----------
    lists : sequence of sequence
        At least one.
    typecode : str
        Of :mod:`struct`.

    Raises
    ------
    TypeError, ValueError, OverflowError
        Something that is no number of that type.
    """
    if typecode == "B":
        return b"".join(map(bytearray, lists))  # does it in less than half the time
    packer = struct.Struct(f"<{len(lists[0])}{typecode}")
    try:
        return b"".join([packer.pack(*numbers) for numbers in lists])
    except struct.error as error:
        raise ValueError(str(error)) from error


def with_gaps(lists: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Take null for NaN, a missing value."""
    return [[math.nan if value is None else value for value in values] for values in lists]


def read_numbers(lists: Sequence[Sequence[Any]], shape: Sequence[int]) -> NDArray[np.uint8] | NDArray[np.float64]:
    """Read numbers that nobody has named a type for: as uint8 where all are, else as doubles.

    Raises
    ------
    TypeError, ValueError, OverflowError
        Something that is no number, or more axes than NumPy has.
    """
    try:
        return np.ndarray(tuple(shape), np.uint8, pack(lists, "B"))
    except (TypeError, ValueError):  # which a first fraction is reason enough for
        return np.ndarray(tuple(shape), np.dtype("<f8"), pack(lists, "d"))
