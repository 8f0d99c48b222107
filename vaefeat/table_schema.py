"""What the columns of a table are: fitted once, kept in the bundle, and asked wherever rows come in or go out.

An encoder takes tables in one form, which travels as npy, JSON or raw bytes like any other rows: a float32 matrix with
a column for each of the table's, in which quantities are themselves, booleans 0 and 1, categories their numbers in
:attr:`Column.categories`, and missing values NaN. A :class:`TableSchema` turns data frames, and arrays of Python
objects, into it and back. Scaling and one-hot are inside the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import InputError
from vaefeat.table_columns import (
    Cells,
    Kind,
    Label,
    Library,
    as_labels,
    as_numbers,
    compare_names,
    differences,
    few,
    is_frame,
    read_columns,
)

__all__ = ["Column", "HandleUnknown", "TableSchema", "holds_labels"]

HandleUnknown = Literal["error", "ignore"]
#: As the decoder gives a probability for each. What has more is an identifier, or wants grouping.
MOST_CATEGORIES = 1000


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Parameters
    ----------
    name : str
    kind : {"number", "boolean", "category"}
    categories : tuple of str, int, float or bool
        In the order of their numbers; of other kinds empty.
    optional : bool
        Whether values were missing in training; the encoder then has a channel that says so.
    mean, std : float or None
        Of a number's values in training: what the graph scales by. None before.
    """

    name: str
    kind: Kind
    categories: tuple[Label, ...] = ()
    optional: bool = False
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        texts = isinstance(self.name, str) and self.kind in get_args(Kind) and isinstance(self.optional, bool)
        plain = all(isinstance(label, str | int | float) for label in self.categories)
        numbers = all(value is None or isinstance(value, int | float) for value in (self.mean, self.std))
        if not (texts and plain and numbers and (self.kind == "category") == bool(self.categories)):
            raise InputError(f"got the description {self!r}, which is of no column")

    @property
    def n_codes(self) -> int:
        """How many whole numbers from 0 on it may hold; 0 where it holds quantities."""
        return {"number": 0, "boolean": 2, "category": len(self.categories)}[self.kind]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; only those that its kind has."""
        fields: dict[str, Any] = {"name": self.name, "kind": self.kind, "optional": self.optional}
        if self.kind == "category":
            fields["categories"] = list(self.categories)
        if self.mean is not None and self.std is not None:
            fields |= {"mean": self.mean, "std": self.std}
        return fields


@dataclass(frozen=True, kw_only=True)
class TableSchema:
    """The columns of a table, in order.

    Parameters
    ----------
    columns : tuple of Column
    named : bool
        Whether their names are a data frame's. Those of arrays are made up, and not compared.
    handle_unknown : {"error", "ignore"}
        What a category means that training had not: an error, or a missing value.

    Raises
    ------
    InputError
        No columns, or two of one name.
    """

    columns: tuple[Column, ...]
    named: bool
    handle_unknown: HandleUnknown = "error"

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        if not names or len(set(names)) < len(names) or self.handle_unknown not in get_args(HandleUnknown):
            raise InputError(
                f"got the columns {names} and handle_unknown={self.handle_unknown!r}, which are no table's"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`'s JSON form."""
        columns = (
            Column(**{**column, "categories": tuple(column.get("categories", ()))}) for column in fields["columns"]
        )
        return cls(**{**fields, "columns": tuple(columns)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        columns = [column.to_dict() for column in self.columns]
        return {"columns": columns, "named": self.named, "handle_unknown": self.handle_unknown}

    def __str__(self) -> str:
        kinds = [column.kind for column in self.columns]
        counts = [f"{kinds.count(kind)} {kind}" for kind in get_args(Kind) if kind in kinds]
        return f"a table of {len(kinds)} columns ({', '.join(counts)})"

    @property
    def sizes(self) -> tuple[int, ...]:
        """What :class:`vaefeat.config.ModelConfig` has as ``columns``."""
        # A column of one category has its second one never.
        kinds = {"number": 0, "boolean": 1}
        return tuple(kinds.get(column.kind, max(2, column.n_codes)) for column in self.columns)

    @property
    def optional_columns(self) -> tuple[int, ...]:
        """Numbers of the columns that were not always there."""
        return tuple(number for number, column in enumerate(self.columns) if column.optional)

    @property
    def allows_missing(self) -> bool:
        """Whether any column takes missing values."""
        return any(self._allowed)

    def scaled(self, means: Sequence[float], stds: Sequence[float]) -> Self:
        """Say by what the graph scales numbers, given a figure for each column."""
        columns = zip(self.columns, means, stds, strict=True)
        return replace(
            self,
            columns=tuple(replace(c, mean=mean, std=std) if c.kind == "number" else c for c, mean, std in columns),
        )

    def encode(self, X: Any, *, holes: bool = False) -> NDArray[np.float32]:
        """Turn a data frame, or an array of Python objects, into rows.

        Parameters
        ----------
        X : data frame or array-like of shape (n, columns)
        holes : bool
            Take a missing value in any column: it is going to be filled.

        Returns
        -------
        ndarray of shape (n, columns), float32

        Raises
        ------
        InputError
            Other columns, or in another order; a value of another kind, or an unknown category; a value missing where
            none was in training; no rows.
        """
        read = read_columns(X)
        self._refuse_names([cells.name for cells in read], compared=self.named and is_frame(X))
        rows = [self._encoded(cells, column) for cells, column in zip(read, self.columns, strict=True)]
        return self.checked(np.stack(rows, axis=1).astype(np.float32), holes=holes)

    def checked(self, rows: NDArray[np.float32], *, holes: bool = False) -> NDArray[np.float32]:
        """Check rows (n, columns) that are encoded already; see :meth:`encode`.

        Under ``handle_unknown="ignore"`` numbers beyond the categories become NaN, in a copy.
        """
        if rows.shape[0] == 0:
            raise InputError(f"got 0 rows, wanted at least one of {self}")
        missing = np.isnan(rows)
        if not holes and (refused := missing & ~np.array(self._allowed)).any():
            row, number = np.argwhere(refused)[0]
            raise InputError(
                f"got no value in column {self.columns[number].name!r} (row {row}), where none was missing in "
                "training; fill it first, for instance with sklearn.impute.SimpleImputer, or train with such rows"
            )
        n_codes = np.array([column.n_codes for column in self.columns])
        coded = np.flatnonzero(n_codes)
        if (infinite := np.isinf(rows)).any():
            row, number = np.argwhere(infinite)[0]
            raise InputError(
                f"got an infinite value in column {self.columns[number].name!r} (row {row}), wanted finite float32, or "
                "NaN where the value is missing"
            )
        codes = rows[:, coded]
        beyond = ~missing[:, coded] & ((codes < 0) | (codes >= n_codes[coded]))
        fractions = ~missing[:, coded] & (codes != np.rint(codes))
        if beyond.any() and self.handle_unknown == "ignore":
            rows = rows.copy()
            rows[:, coded] = np.where(beyond, np.float32(np.nan), codes)
            beyond[...] = False
        if (wrong := beyond | fractions).any():
            row, place = (int(index) for index in np.argwhere(wrong)[0])
            column = self.columns[coded[place]]
            raise InputError(
                f"got {codes[row, place]:g} in column {column.name!r} (row {row}), wanted whole numbers from 0 to "
                f"{column.n_codes - 1}, which stand for {_listed(column)}; pass what training had, a data frame where "
                "it had one"
            )
        return rows

    def frame(self, rows: NDArray[Any], *, library: Library = "pandas") -> Any:
        """Turn rows back into a table: categories by their names, NaN as the library's missing value.

        Parameters
        ----------
        rows : ndarray of shape (n, columns)
            As :meth:`encode` gives them, or a decoder.
        library : {"pandas", "polars", "pyarrow", "numpy"}
            Of the data frame; ``numpy`` gives an array of Python objects, with None for missing values.
        """
        named = list(zip(self.columns, rows.T, strict=True))
        match library:
            case "pandas":
                import pandas

                return pandas.DataFrame({column.name: _pandas(pandas, column, values) for column, values in named})
            case "polars":
                import polars

                return polars.DataFrame([_polars(polars, column, values) for column, values in named])
            case "pyarrow":
                import pyarrow

                return pyarrow.table({column.name: _labels(column, values) for column, values in named})
            case "numpy":
                objects = np.empty(rows.shape, dtype=object)
                for number, (column, values) in enumerate(named):
                    objects[:, number] = _labels(column, values)
                return objects

    @property
    def _allowed(self) -> list[bool]:
        ignored = self.handle_unknown == "ignore"
        return [column.optional or (ignored and column.kind != "number") for column in self.columns]

    def _refuse_names(self, got: list[str], *, compared: bool) -> None:
        wanted = [column.name for column in self.columns]
        if len(got) != len(wanted):
            raise InputError(f"got {len(got)} columns{differences(got, wanted) if compared else ''}, wanted {self}")
        if compared:
            compare_names(got, wanted)

    def _encoded(self, cells: Cells, column: Column) -> NDArray[np.float64]:
        if column.kind != "category":
            numbers = as_numbers(cells)
            if column.kind == "boolean" and not np.isin(numbers[~np.isnan(numbers)], (0, 1)).all():
                raise InputError(f"got other values than true and false in column {column.name!r}; convert it")
            return numbers
        codes = {label: float(code) for code, label in enumerate(column.categories)}
        labels = as_labels(cells)
        found = np.array([codes.get(label, -1.0) if label is not None else math.nan for label in labels])
        if (unknown := found < 0).any() and self.handle_unknown == "error":
            row = int(unknown.argmax())
            raise InputError(
                f"got the category {labels[row]!r} in column {column.name!r} (row {row}), wanted {_listed(column)}; "
                "leave such rows out, or train with handle_unknown='ignore', which takes it for a missing value"
            )
        return found


def holds_labels(X: Any) -> bool:
    """Whether `X` is a data frame, or an array of text or Python objects: what a schema turns into rows."""
    if is_frame(X):
        return True
    if isinstance(X, np.ndarray):
        return X.dtype.kind in "OUST"
    # A list of lists; text among its numbers makes text of all in NumPy, and objects of none.
    return isinstance(X, list | tuple) and np.asarray(X, dtype=object).ndim == 2 and np.asarray(X).dtype.kind in "OUST"


def _labels(column: Column, values: NDArray[Any]) -> list[Any]:
    """Give a column's values as Python objects, None where missing."""
    if column.kind == "number":
        return [None if math.isnan(value) else value for value in values.tolist()]
    labels = column.categories or (False, True)
    return [None if math.isnan(value) else labels[int(value)] for value in values.tolist()]


def _pandas(pandas: Any, column: Column, values: NDArray[Any]) -> Any:
    if column.kind == "number":
        return values
    if column.kind == "boolean":
        return pandas.array(_labels(column, values), dtype="boolean")
    codes = np.where(np.isnan(values), -1, values).astype(np.int64)
    return pandas.Categorical.from_codes(codes, categories=list(column.categories))


def _polars(polars: Any, column: Column, values: NDArray[Any]) -> Any:
    if column.kind == "number":
        return polars.Series(column.name, values, nan_to_null=True)
    text = column.kind == "category" and all(isinstance(label, str) for label in column.categories)
    return polars.Series(column.name, _labels(column, values), dtype=polars.Enum(column.categories) if text else None)


def _listed(column: Column) -> str:
    return few([repr(label) for label in column.categories or (False, True)])
