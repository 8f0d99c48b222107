"""Arrays and NumPy files as rows: their shape, their dtype, and the proof that every value is finite.

Axes, where a comment names them: n rows, C channels, H height, W width.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import InputError

__all__ = ["as_labels", "as_rows", "read_npy", "read_npz"]

CHANNELS = (1, 3, 4)
ROWS_IN_NPZ = ("X", "x", "images", "data")
LABELS_IN_NPZ = ("y", "labels")

_WANTED_SHAPE = "(n, features), (n, H, W), or (n, C, H, W) with C in {1, 3, 4}"
# Values are converted and checked in pieces of this size, so that a memory map is never pulled in whole.
_PIECE_BYTES = 16 << 20

# What NumPy and zipfile raise on damaged files. The header of an array is a Python literal, hence the first three;
# an encrypted member of an archive is a RuntimeError; a .npy file named .npz is no context manager, a TypeError.
_UNREADABLE = (
    SyntaxError,
    tokenize.TokenError,
    OverflowError,
    TypeError,
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def as_rows(
    source: Any, *, what: str, max_rows: int | None = None, columns: Sequence[str] | None = None
) -> NDArray[Any]:
    """Check an array and bring it into the shape and the dtype of rows.

    Parameters
    ----------
    source : array-like of shape (n, features), (n, H, W) or (n, C, H, W)
        Anything that :func:`numpy.asarray` takes, of a real numeric dtype. Four axes are read as (n, C, H, W)
        whenever the second can be C.
    what : str
        What it was read from, for error messages.
    max_rows : int, optional
        Only the first `max_rows` rows are looked at.
    columns : sequence of str, optional
        Names of the features, for error messages.

    Returns
    -------
    ndarray of shape (n, features) or (n, C, H, W)
        uint8 stays uint8. Every other dtype becomes float32, with its precision of 24 bits; so does bool, as 0.0 and
        1.0, because uint8 stands for the range from 0 to 255. A view of `source` (and still a memory map) where nothing
        had to be converted.

    Raises
    ------
    InputError
        Another shape, no rows, a dtype that is not real numbers, or values that are NaN or infinite in float32.
    """
    rows = _as_array(source, what)[:max_rows]
    if 0 in rows.shape:
        raise InputError(f"got {what} of shape {rows.shape}, wanted at least one row and one feature")
    return _as_uint8_or_float32(_in_row_shape(rows, what), what, columns)


def _as_array(source: Any, what: str) -> NDArray[Any]:
    """Turn anything into an array of real numbers with at least one axis."""
    if np.ma.is_masked(source):
        raise InputError(f"got {what} with masked values, wanted every value; fill them first with X.filled(...)")
    try:
        # np.asarray would demote a memory map to a plain array, and people could not see that it still is one.
        array = source if isinstance(source, np.memmap) else np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; torch tensors on a GPU or with a gradient
        raise InputError(
            f"got {what} of type {type(source).__name__} that NumPy cannot read ({error}), wanted {_WANTED_SHAPE}"
        ) from error
    if array.dtype.kind not in "buif":
        hint = "X.toarray()" if hasattr(source, "toarray") else "df.select_dtypes('number') or X.astype(np.float32)"
        raise InputError(
            f"got {what} of type {type(source).__name__} and dtype {array.dtype}, wanted real numbers; "
            f"convert every column first, for instance with {hint}"
        )
    if array.ndim == 0:
        raise InputError(f"got {what} of shape (), a single number, wanted {_WANTED_SHAPE}")
    return array


def _in_row_shape(rows: NDArray[Any], what: str) -> NDArray[Any]:
    """View rows as (n, features) or (n, C, H, W), and refuse what could be read in two ways."""
    got = f"got {what} of shape {rows.shape}, wanted {_WANTED_SHAPE}"
    if rows.ndim == 1:
        raise InputError(f"{got}; use X.reshape(-1, 1) for rows of one feature, X.reshape(1, -1) for a single row")
    if rows.ndim == 3:
        return rows[:, None]
    if rows.ndim == 4 and rows.shape[1] not in CHANNELS:
        last = "; the channels seem to come last, pass X.transpose(0, 3, 1, 2)" if rows.shape[3] in CHANNELS else ""
        raise InputError(got + last)
    if rows.ndim > 4:
        raise InputError(f"{got}; flatten other rows with X.reshape(len(X), -1)")
    return rows


def _as_uint8_or_float32(rows: NDArray[Any], what: str, columns: Sequence[str] | None) -> NDArray[Any]:
    """Convert what needs it, piece by piece, and count what is not finite afterwards."""
    if rows.dtype == np.uint8:
        return rows
    # A float32 array of the other byte order does not equal np.float32 and is converted, too.
    converted = rows if rows.dtype == np.float32 else np.empty(rows.shape, np.float32)
    step = max(1, _PIECE_BYTES * len(rows) // rows.nbytes)
    n_bad = 0
    first_bad: tuple[int, ...] = ()
    for start in range(0, len(rows), step):
        piece = converted[start : start + step]
        if converted is not rows:
            with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite or NaN, and is reported below
                piece[...] = rows[start : start + step]
        finite = np.isfinite(piece)
        if not finite.all():
            bad = np.argwhere(~finite)
            first_bad = first_bad or (start + int(bad[0][0]), *map(int, bad[0][1:]))
            n_bad += len(bad)
    if n_bad:
        raise InputError(
            f"got {n_bad} NaN or infinite values in {what} (first in row {first_bad[0]}, "
            f"{_place(first_bad[1:], columns)}), wanted finite float32; impute or drop these rows first, "
            "for instance with sklearn.impute.SimpleImputer"
        )
    return converted


def _place(position: tuple[int, ...], columns: Sequence[str] | None) -> str:
    if len(position) == 1:
        return f"column {position[0] if columns is None else repr(columns[position[0]])}"
    return "channel {}, y {}, x {}".format(*position)


def as_labels(labels: NDArray[Any], *, what: str, count: int) -> NDArray[Any]:
    """Check labels, one for each row.

    Parameters
    ----------
    labels : ndarray of shape (n,)
        Integers, booleans or strings.
    what : str
        What they were read from, for error messages.
    count : int
        Number of rows that want a label.

    Returns
    -------
    ndarray of shape (n,)
        int64, so that there is room for scikit-learn's -1 (unlabelled) whatever the file used; or strings.

    Raises
    ------
    InputError
        Another number of labels, or labels of another dtype.
    """
    if labels.shape != (count,):
        raise InputError(f"got labels of shape {labels.shape} in {what}, wanted one for each of the {count} rows")
    if labels.dtype.kind not in "biuU":
        raise InputError(
            f"got labels of dtype {labels.dtype} in {what}, wanted integers or strings; convert them first"
        )
    return labels if labels.dtype.kind == "U" else labels.astype(np.int64)


def read_npy(path: Path) -> NDArray[Any]:
    """Open a ``.npy`` file as a read-only memory map; pickled objects are refused.

    Raises
    ------
    InputError
        The file is not in NumPy's format, is shorter than its header says, or holds Python objects.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except _UNREADABLE as error:
        raise InputError(f"got {path}, which is no readable .npy file ({error}); write it with np.save") from error


def read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Read rows, and labels where there are any, from an ``.npz`` file; pickled objects are refused.

    Parameters
    ----------
    path : Path
        Holds one array named ``X``, ``x``, ``images`` or ``data``, or only one array; and perhaps ``y`` or ``labels``.

    Returns
    -------
    rows : ndarray
    labels : ndarray or None

    Raises
    ------
    InputError
        The file cannot be read, or it is not clear which of its arrays holds the rows or the labels.
    """
    try:
        # Opened here, because np.load does not close what turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            rows_name, labels_name = _choose_arrays(archive.files, path)
            return archive[rows_name], None if labels_name is None else archive[labels_name]
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"got {path}, which is no readable .npz file ({error}); write it with np.savez") from error


def _choose_arrays(names: Sequence[str], path: Path) -> tuple[str, str | None]:
    labels = [name for name in names if name in LABELS_IN_NPZ]
    others = [name for name in names if name not in LABELS_IN_NPZ]
    rows = [name for name in others if name in ROWS_IN_NPZ] or others
    if len(rows) != 1 or len(labels) > 1:
        raise InputError(
            f"got {path} with the arrays {', '.join(names) or '(none)'}, wanted one named {' or '.join(ROWS_IN_NPZ)}, "
            f"or only one, and at most one named {' or '.join(LABELS_IN_NPZ)}; save it with np.savez(path, X=X, y=y)"
        )
    return rows[0], labels[0] if labels else None
