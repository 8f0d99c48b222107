"""Columns of data frames and of arrays of Python objects, read in one form whatever library they come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import InputError

__all__ = [
    "Cells",
    "Kind",
    "Label",
    "Library",
    "as_labels",
    "as_numbers",
    "column_names",
    "compare_names",
    "differences",
    "few",
    "is_frame",
    "is_missing",
    "library_of",
    "read_columns",
]

Kind = Literal["number", "boolean", "category"]
#: Of data frames; ``numpy`` are arrays of Python objects.
Library = Literal["pandas", "polars", "pyarrow", "numpy"]
#: What a category can be called, so that JSON holds it.
Label = str | int | float | bool
#: The missing values of pandas, which is not imported here.
_MISSING_TYPES = {"NAType", "NaTType", "MaskedConstant"}
_NAMED_AT_MOST = 8
_READABLE = "numbers, booleans, text or categories"


class Cells(NamedTuple):
    """One column.

    Attributes
    ----------
    name : str
        ``x0``, ``x1`` and so on in arrays.
    kind : {"number", "boolean", "category"}
        What its type says it is.
    values : ndarray of shape (n,)
        float64 with NaN for missing values, or objects where it holds labels.
    categories : tuple of str, int, float or bool, or None
        In their order, where the type has them.
    """

    name: str
    kind: Kind
    values: NDArray[Any]
    categories: tuple[Label, ...] | None = None


def is_frame(X: Any) -> bool:
    """Whether `X` is a data frame of pandas or polars, or a table of pyarrow."""
    if isinstance(X, np.ndarray) or not hasattr(X, "columns"):
        return False
    import narwhals.stable.v2 as nw

    return isinstance(nw.from_native(X, eager_only=True, pass_through=True), nw.DataFrame)


def column_names(X: Any) -> tuple[str, ...] | None:
    """Name the columns of a data frame; None of anything else, and where not every name is a text."""
    if not is_frame(X):
        return None
    # What pyarrow calls columns are the values.
    names = tuple(getattr(X, "column_names", X.columns))
    return names if all(isinstance(name, str) for name in names) else None


def compare_names(got: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse columns of other names, or in another order.

    Raises
    ------
    InputError
        With the names that are missing and that are too much, as scikit-learn says them.
    """
    if list(got) != list(wanted):
        difference = differences(got, wanted) or ", which are in another order"
        raise InputError(f"got the columns {few(got)}{difference}, wanted {few(wanted)}; pass them as in training")


def differences(got: Sequence[str], wanted: Sequence[str]) -> str:
    """Name what is missing and what is too much, in brackets; nothing where it is only the order."""
    missing = [name for name in wanted if name not in got]
    unexpected = [name for name in got if name not in wanted]
    texts = [f"{what} {few(names)}" for what, names in (("without", missing), ("with", unexpected)) if names]
    return f" ({', '.join(texts)})" if texts else ""


def few(texts: Sequence[str]) -> str:
    """Join the first texts, and count the others."""
    more = f" and {len(texts) - _NAMED_AT_MOST} more" if len(texts) > _NAMED_AT_MOST else ""
    return ", ".join(texts[:_NAMED_AT_MOST]) + more


def library_of(X: Any) -> Library | None:
    """Name what holds text as it is; None for numbers."""
    if not is_frame(X):
        return "numpy" if isinstance(X, np.ndarray) and X.dtype.kind in "OUST" else None
    import narwhals.stable.v2 as nw

    name = nw.from_native(X, eager_only=True).implementation.value
    return cast("Library", name) if name in get_args(Library) else "pandas"


def read_columns(X: Any) -> tuple[Cells, ...]:
    """Read all columns.

    Parameters
    ----------
    X : data frame, or array-like of shape (n, columns)

    Raises
    ------
    InputError
        A column of another type than numbers, booleans, text or categories; or no columns.
    """
    if is_frame(X):
        return tuple(_frame_columns(X))
    array = np.asarray(X, dtype=object)
    if array.ndim != 2:
        raise InputError(f"got an array of shape {array.shape}, wanted a table of shape (n, columns)")
    return tuple(_guessed(f"x{number}", array[:, number]) for number in range(array.shape[1]))


def as_numbers(cells: Cells) -> NDArray[np.float64]:
    """Give a column's values as numbers, NaN where missing.

    Raises
    ------
    InputError
        Text among them, or a value that is infinite in float32.
    """
    values = cells.values
    if values.dtype == object:
        wrong = [value for value in values if not is_missing(value) and not isinstance(value, int | float | np.number)]
        if wrong:
            raise InputError(f"got {wrong[0]!r} in column {cells.name!r}, wanted numbers; convert the column")
        values = np.array([math.nan if is_missing(value) else float(value) for value in values])
    with np.errstate(over="ignore"):
        infinite = np.isinf(values.astype(np.float32))
    if infinite.any():
        row = int(infinite.argmax())
        raise InputError(
            f"got {values[row]:g} in column {cells.name!r} (row {row}), wanted numbers that are finite in float32, or "
            "NaN where the value is missing"
        )
    return cast("NDArray[np.float64]", values)


def as_labels(cells: Cells) -> list[Label | None]:
    """Give a column's values as what JSON can hold, None where missing; whole numbers become integers.

    Raises
    ------
    InputError
        Other things than text, numbers and booleans.
    """
    if cells.kind == "boolean":
        return [None if math.isnan(value) else bool(value) for value in cells.values.tolist()]
    return [None if is_missing(value) else _label(value, cells.name) for value in cells.values.tolist()]


def is_missing(value: object) -> bool:
    """Whether a value is None, NaN or pandas' NA or NaT."""
    if value is None or type(value).__name__ in _MISSING_TYPES:
        return True
    return isinstance(value, float | np.floating) and math.isnan(value)


def _label(value: Any, name: str) -> Label:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str | int | float) or value in (math.inf, -math.inf):
        raise InputError(
            f"got {value!r} of type {type(value).__name__} in column {name!r}, wanted {_READABLE}; convert the column"
        )
    return value


def _frame_columns(frame: Any) -> Iterator[Cells]:
    import narwhals.stable.v2 as nw

    read = nw.from_native(frame, eager_only=True)
    if not read.columns:
        raise InputError(f"got a {type(frame).__name__} without columns, wanted at least one")
    for name in read.columns:
        series = read[name]
        kind = series.dtype
        if kind == nw.Boolean:
            yield Cells(str(name), "boolean", _numbers(series))
        elif kind.is_numeric():
            yield Cells(str(name), "number", _numbers(series))
        elif kind in (nw.String, nw.Categorical, nw.Enum):
            yield Cells(str(name), "category", _objects(series.to_list()), _categories(series))
        elif kind == nw.Object:
            yield _guessed(str(name), _objects(series.to_list()))
        else:
            raise InputError(
                f"got column {name!r} of type {kind}, wanted {_READABLE}; convert it (a date to a number, for "
                "instance), or leave it out"
            )


def _numbers(series: Any) -> NDArray[np.float64]:
    import narwhals.stable.v2 as nw

    numbers: NDArray[np.float64] = np.asarray(series.cast(nw.Float64).to_numpy(), dtype=np.float64)
    return numbers


def _categories(series: Any) -> tuple[Label, ...] | None:
    """Give the categories of a type that is the column's own; polars' Categorical may know those of other columns."""
    import narwhals.stable.v2 as nw

    if series.dtype == nw.Enum or (series.dtype == nw.Categorical and series.implementation.is_pandas()):
        return tuple(_label(value, series.name) for value in series.cat.get_categories().to_list())
    return None


def _objects(values: Sequence[Any]) -> NDArray[Any]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _guessed(name: str, values: NDArray[Any]) -> Cells:
    """Tell from Python objects what a column is."""
    present = [value for value in values.tolist() if not is_missing(value)]
    if present and all(isinstance(value, bool | np.bool_) for value in present):
        kind: Kind = "boolean"
        values = np.array([math.nan if is_missing(value) else float(value) for value in values.tolist()])
    elif all(isinstance(value, int | float | np.number) and not isinstance(value, bool) for value in present):
        return Cells(name, "number", as_numbers(Cells(name, "number", values)))
    elif all(isinstance(value, str) for value in present):
        kind = "category"
    else:
        found = sorted({type(value).__name__ for value in present})
        raise InputError(
            f"got values of the types {', '.join(found)} in column {name!r}, wanted one of {_READABLE}; convert it"
        )
    return Cells(name, kind, values)
