"""Columns of Parquet whose cells are whole rows: lists of numbers, all of one length."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import InputError

__all__ = ["is_list", "list_values"]


def is_list(arrow_type: Any) -> bool:
    """Whether cells are lists of numbers."""
    from pyarrow import types

    if not any(check(arrow_type) for check in (types.is_list, types.is_large_list, types.is_fixed_size_list)):
        return False
    return bool(types.is_integer(arrow_type.value_type) or types.is_floating(arrow_type.value_type))


def list_values(column: Any, *, width: int, what: str, start: int) -> NDArray[Any]:
    """Give the lists of a column as rows.

    Parameters
    ----------
    column : pyarrow.Array of shape (n,)
        Of lists, none of which is null.
    width : int
        Of every list.
    what : str
        Column and file, for people.
    start : int
        The first row's number in the file.

    Returns
    -------
    ndarray of shape (n, width)

    Raises
    ------
    InputError
        A list of another length, or with a null.
    """
    from pyarrow import compute

    lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
    if (other := np.flatnonzero(lengths != width)).size:
        raise InputError(
            f"got a list of {lengths[other[0]]} numbers in {what} (row {start + int(other[0])}), wanted {width} as in "
            "the first row; make them equally long, or name the columns to read with columns=[...]"
        )
    values = column.flatten()
    if values.null_count:
        first = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // width
        raise InputError(f"got a null in a list in {what} (row {start + first}), wanted numbers; fill or drop them")
    rows: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(len(column), width)
    return rows
