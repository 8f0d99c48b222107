"""From a table as people have it to its schema and its rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import InputError
from vaefeat.settings import unknown_name
from vaefeat.table_columns import Cells, Label, as_labels, as_numbers, is_frame, read_columns
from vaefeat.table_schema import MOST_CATEGORIES, Column, HandleUnknown, TableSchema, holds_labels

__all__ = ["fit_table", "is_table"]


def is_table(X: Any, *, categorical: Sequence[str | int] | None = None) -> bool:
    """Tell tables from rows of plain numbers.

    A table is what has categories, by its types or by `categorical`, booleans in a data frame, or missing values in two
    dimensions. Anything else is left to other checks.
    """
    if categorical:
        return True
    if is_frame(X):
        return any(cells.kind != "number" or bool(np.isnan(cells.values).any()) for cells in read_columns(X))
    if holds_labels(X):
        return np.ndim(X) == 2 and any(
            isinstance(value, str) or value is None for row in np.asarray(X, dtype=object).tolist() for value in row
        )
    if isinstance(X, list | tuple) and np.asarray(X, dtype=object).ndim == 2:
        X = np.asarray(X)
    array = X if isinstance(X, np.ndarray) else np.empty(0)
    return array.ndim == 2 and array.dtype.kind == "f" and bool(np.isnan(array).any())


def fit_table(
    X: Any, *, categorical: Sequence[str | int] | None = None, handle_unknown: HandleUnknown = "error"
) -> tuple[TableSchema, NDArray[np.float32]]:
    """Find out what the columns of a table are, and encode its rows.

    Text and categorical types are categories, in the order of the type or else sorted; booleans are booleans; the rest
    are numbers. A column is optional where a value is missing (None, NaN, NA).

    Parameters
    ----------
    X : data frame of pandas or polars, table of pyarrow, or array-like of shape (n, columns)
        A numeric array holds the categories' numbers, from 0 on without a gap in their meaning: it is what
        :class:`sklearn.preprocessing.OrdinalEncoder` gives.
    categorical : sequence of str or int, optional
        Names or numbers of columns that are categories though they hold numbers or booleans.
    handle_unknown : {"error", "ignore"}

    Returns
    -------
    schema : TableSchema
    rows : ndarray of shape (n, columns), float32

    Raises
    ------
    InputError
        A column without any value, of more than 1,000 categories, or of another type; a name that is none; no rows.
    """
    if hasattr(X, "toarray"):
        raise InputError(f"got a sparse {type(X).__name__}, wanted a dense table; pass X.toarray()")
    if np.ma.is_masked(X):
        raise InputError("got a table with masked values, wanted NaN where a value is missing; pass X.filled(np.nan)")
    named = is_frame(X)
    if not named and not holds_labels(X):
        return _fit_numbers(np.asarray(X, dtype=np.float64), categorical or (), handle_unknown)
    read = read_columns(X)
    if not len(read[0].values):
        raise InputError("got a table of 0 rows, wanted at least one")
    chosen = _chosen([cells.name for cells in read], categorical or ())
    columns = tuple(_fitted(cells, told=number in chosen) for number, cells in enumerate(read))
    schema = TableSchema(columns=columns, named=named, handle_unknown=handle_unknown)
    return schema, schema.encode(X)


def _fit_numbers(
    array: NDArray[np.float64], categorical: Sequence[str | int], handle_unknown: HandleUnknown
) -> tuple[TableSchema, NDArray[np.float32]]:
    if array.ndim != 2 or not array.size:
        raise InputError(f"got an array of shape {array.shape}, wanted a table of shape (n, columns)")
    names = [f"x{number}" for number in range(array.shape[1])]
    chosen = _chosen(names, categorical)
    columns = []
    for number, name in enumerate(names):
        cells = Cells(name, "number", array[:, number])
        values = as_numbers(cells)
        missing = np.isnan(values)
        _refuse_empty(name, bool(missing.all()))
        if number not in chosen:
            columns.append(Column(name=name, kind="number", optional=bool(missing.any())))
            continue
        codes = values[~missing]
        if (codes < 0).any() or (codes != np.rint(codes)).any():
            raise InputError(
                f"got {codes[(codes < 0) | (codes != np.rint(codes))][0]:g} in column {name!r}, wanted the numbers of "
                "categories, from 0 on; number them with sklearn.preprocessing.OrdinalEncoder, or give a data frame"
            )
        _refuse_many(name, int(codes.max()) + 1)
        labels = tuple(range(int(codes.max()) + 1))
        columns.append(Column(name=name, kind="category", categories=labels, optional=bool(missing.any())))
    schema = TableSchema(columns=tuple(columns), named=False, handle_unknown=handle_unknown)
    return schema, schema.checked(array.astype(np.float32))


def _fitted(cells: Cells, *, told: bool) -> Column:
    if cells.kind != "category" and not told:
        missing = np.isnan(cells.values)
        _refuse_empty(cells.name, bool(missing.all()))
        return Column(name=cells.name, kind=cells.kind, optional=bool(missing.any()))
    labels = as_labels(cells)
    present = {label for label in labels if label is not None}
    _refuse_empty(cells.name, not present)
    categories = cells.categories or _in_order(present)
    _refuse_many(cells.name, len(categories))
    return Column(name=cells.name, kind="category", categories=categories, optional=None in labels)


def _in_order(labels: Collection[Label]) -> tuple[Label, ...]:
    # Text after numbers, where a column has both.
    return tuple(sorted(labels, key=lambda label: (isinstance(label, str), label)))


def _chosen(names: Sequence[str], categorical: Sequence[str | int]) -> set[int]:
    """Give the numbers of the columns that are said to be categorical."""
    if isinstance(categorical, str):
        raise InputError(f"got categorical={categorical!r}, wanted a list of columns; pass [{categorical!r}]")
    chosen = set()
    for column in categorical:
        if isinstance(column, str):
            if column not in names:
                raise unknown_name("the categorical column", column, names)
            chosen.add(names.index(column))
        elif isinstance(column, int | np.integer) and not isinstance(column, bool) and 0 <= column < len(names):
            chosen.add(int(column))
        else:
            raise InputError(
                f"got the categorical column {column!r}, wanted a name, or a number from 0 to {len(names) - 1}"
            )
    return chosen


def _refuse_empty(name: str, empty: bool) -> None:
    if empty:
        raise InputError(f"got column {name!r} without a single value, wanted at least one; leave the column out")


def _refuse_many(name: str, n_categories: int) -> None:
    if n_categories > MOST_CATEGORIES:
        raise InputError(
            f"got {n_categories:,} categories in column {name!r}, wanted at most {MOST_CATEGORIES:,}; leave out what "
            "identifies a row, and group rare categories"
        )
