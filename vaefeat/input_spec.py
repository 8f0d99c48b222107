"""What rows a bundle takes, and the one place where rows are checked against it.

The encoder on this machine, the HTTP client before it sends, and the server after it received all call
:meth:`InputSpec.prepare`, so that a row is accepted, converted or refused in the same way wherever it enters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vaefeat.errors import BundleError, InputError
from vaefeat.table_columns import column_names, compare_names
from vaefeat.table_schema import TableSchema, holds_labels

__all__ = ["InputSpec"]

#: A resampled picture may overshoot its range a little; one that was not scaled is far off.
_FAR_BEYOND_ONE = 2.0
#: Values; a part and what it becomes stay in the processor's cache until they are compared.
_CONVERTED_AT_A_TIME = 50_000


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """Kind, shape, dtype and training range of one row.

    Parameters
    ----------
    kind : {"image", "vector"}
        Images have the shape (C, H, W), vectors (F,).
    shape : tuple of int
        Shape of one row, without the batch axis.
    dtype : {"uint8", "float32"}
        What the ONNX graph takes. Scaling happens inside the graph.
    low, high : float
        Smallest and largest value among the training rows, in the units of the rows.
    table : TableSchema or None
        What the columns are, of a table that has others than numbers, or missing values.
    names : tuple of str or None
        Names of the columns, where the training rows were a data frame of numbers, or columns of Parquet. Data frames
        have to have the same, in this order; arrays have none, and are taken as they come.

    Raises
    ------
    BundleError
        Fields that no bundle of ours has.
    """

    kind: Literal["image", "vector"]
    shape: tuple[int, ...]
    dtype: Literal["uint8", "float32"]
    low: float
    high: float
    table: TableSchema | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        known = self.kind in ("image", "vector") and self.dtype in ("uint8", "float32")
        n_axes = 3 if self.kind == "image" else 1
        sizes = len(self.shape) == n_axes and all(isinstance(size, int) and size > 0 for size in self.shape)
        fits = self.table is None or (self.dtype == "float32" and self.shape == (len(self.table.columns),))
        if self.names is not None:
            texts = all(isinstance(name, str) for name in self.names)
            fits = fits and texts and self.table is None and sizes and len(self.names) == math.prod(self.shape)
        if not (known and sizes and fits and isinstance(self.low, int | float) and isinstance(self.high, int | float)):
            raise BundleError(f"got an input described by {self.to_dict()}, wanted one of our kinds of rows")

    @classmethod
    def of(cls, rows: NDArray[Any], *, table: TableSchema | None = None, names: tuple[str, ...] | None = None) -> Self:
        """Describe training rows of shape (n, F) or (n, C, H, W), dtype uint8 or float32; NaN only in a table's."""
        return cls(
            kind="image" if rows.ndim == 4 else "vector",
            shape=tuple(int(size) for size in rows.shape[1:]),
            dtype="uint8" if rows.dtype == np.uint8 else "float32",
            low=float(np.nanmin(rows)),
            high=float(np.nanmax(rows)),
            table=table,
            names=names,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`'s JSON form."""
        table = {"table": TableSchema.from_dict(values["table"])} if "table" in values else {}
        names = {"names": tuple(values["names"])} if "names" in values else {}
        return cls(**{**values, "shape": tuple(values["shape"]), **table, **names})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; the table's columns, and names, only where there are some."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        table = {} if self.table is None else {"table": self.table.to_dict()}
        names = {} if self.names is None else {"names": list(self.names)}
        del values["table"], values["names"]
        return {**values, "shape": list(self.shape), **table, **names}

    @cached_property  # asked for with every request
    def n_features(self) -> int:
        """Number of values in one row."""
        return math.prod(self.shape)

    @cached_property
    def row_bytes(self) -> int:
        """Size of one row in the graph's dtype, in bytes."""
        return self.n_features * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        if self.table is not None:
            return (
                f"{self.table}, as a data frame or as float32 rows of shape (n, {self.n_features}) with codes and NaN"
            )
        shape = ", ".join(map(str, self.shape))
        flat = f", or flat (n, {self.n_features})" if self.kind == "image" else ""
        return f"{self.dtype} rows of shape (n, {shape}){flat}"

    def of_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Give decoded images in the units of the rows: pixels are 0 to 255 in a file, whatever they were in training.

        Parameters
        ----------
        pixels : ndarray of shape (..., C, H, W)

        Returns
        -------
        ndarray of the same shape and dtype ``self.dtype``
            Divided by 255 for a model that was trained on floats up to 1.
        """
        if self.dtype == "float32" and self.high <= 1:
            return pixels * np.float32(1 / 255)
        return pixels.astype(self.dtype, copy=False)

    def prepare(self, X: ArrayLike, *, holes: bool = False) -> NDArray[Any]:
        """Check rows and convert them, without loss, to what the graph takes.

        Parameters
        ----------
        X : array-like of shape (n, ...), or flat (n, n_features)
            uint8 or any real numeric dtype. Floats are accepted by a uint8 bundle where every value is an integer
            from 0 to 255 (which is what :func:`sklearn.datasets.fetch_openml` returns for images). Of a table also a
            data frame, or an array of Python objects; see :meth:`vaefeat.table_schema.TableSchema.encode`.
        holes : bool
            Of a table: take missing values in any column.

        Returns
        -------
        ndarray of shape (n, ...) and dtype ``self.dtype``, C-contiguous
            A view of `X` where nothing had to be changed.

        Raises
        ------
        InputError
            Other columns than in training, or in another order, where both have names.
            Wrong shape or dtype, no rows, NaN or infinite values, or values that the conversion would change.
        """
        if (
            type(X) is np.ndarray
            and self.dtype == "uint8"
            and X.dtype == np.uint8
            and X.shape[1:] == self.shape
            and len(X)
        ):
            # What there is nothing to say of, as most rows that a server gets.
            return np.ascontiguousarray(X)
        if self.table is not None and holds_labels(X):
            return self.table.encode(X, holes=holes)
        self.compare_names(X)
        if hasattr(X, "toarray"):
            raise InputError(f"got a sparse {type(X).__name__}, wanted {self}; pass X.toarray()")
        if np.ma.is_masked(X):
            raise InputError(f"got rows with masked values, wanted {self}; fill them first with X.filled(...)")
        try:
            rows = np.asarray(X)
        except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, torch tensors on a GPU
            raise InputError(
                f"got rows of type {type(X).__name__} that NumPy cannot read ({error}), wanted {self}"
            ) from error
        if rows.dtype.kind not in "buif":
            raise InputError(f"got rows of dtype {rows.dtype}, wanted {self}; convert every column to numbers first")
        rows = self._shaped(rows)
        if self.table is not None:
            with np.errstate(over="ignore"):
                return self.table.checked(np.ascontiguousarray(rows, dtype=np.float32), holes=holes)
        if self.dtype == "uint8":
            return np.ascontiguousarray(self._as_uint8(rows))
        return np.ascontiguousarray(self._as_float32(rows))

    def named(self, names: tuple[str, ...] | None) -> InputSpec:
        """Say what the columns are called, where they are numbers and nobody knew."""
        known = self.table is not None or self.names is not None
        return self if known or names is None or len(names) != self.n_features else replace(self, names=names)

    def compare_names(self, X: Any) -> None:
        """Raise InputError where `X` is a data frame whose columns have other names, or another order."""
        if self.names is not None and (got := column_names(X)) is not None:
            compare_names(got, self.names)

    def _shaped(self, rows: NDArray[Any]) -> NDArray[Any]:
        if rows.ndim < 2 or rows.shape[1:] not in {self.shape, (self.n_features,)}:
            hint = "; pass a single row as rows[None]" if rows.shape in {self.shape, (self.n_features,)} else ""
            raise InputError(f"got rows of shape {rows.shape}, wanted {self}{hint}")
        if rows.shape[0] == 0:
            raise InputError(f"got 0 rows, wanted at least one of {self}")
        return rows.reshape(-1, *self.shape)

    def _as_uint8(self, rows: NDArray[Any]) -> NDArray[Any]:
        if rows.dtype == np.uint8:
            return rows
        converted = np.empty(rows.shape, dtype=np.uint8)
        step = -(-_CONVERTED_AT_A_TIME // self.n_features)
        for start in range(0, len(rows), step):
            part, into = rows[start : start + step], converted[start : start + step]
            with np.errstate(invalid="ignore"):
                into[...] = part
                # The comparison is also false for NaN, infinity, fractions, negatives and overflow.
                same = into == part
            if not same.all():
                self._refuse_scaled_images(rows, rows.max())
                row = start + int(np.argwhere(~same)[0][0])
                raise InputError(
                    f"got {rows.dtype} rows that are not whole numbers from 0 to 255 (first in row {row}), wanted "
                    f"{self}; the bundle scales inside its graph, so pass the values as they were in training"
                )
        self._refuse_scaled_images(rows, converted.max())
        return converted

    def _refuse_scaled_images(self, rows: NDArray[Any], highest: np.number[Any]) -> None:
        """Catch floats up to 1 on their way into a bundle of pixels up to 255: they may be whole, black and white."""
        if rows.dtype.kind == "f" and self.kind == "image" and 0 < highest <= 1 < self.high:
            raise InputError(
                f"got {rows.dtype} rows with values up to {highest:g}, wanted {self} with values as in training, "
                f"up to {self.high:g}; the bundle scales inside its graph: leave out the division by 255"
            )

    def _as_float32(self, rows: NDArray[Any]) -> NDArray[Any]:
        if rows.dtype == np.uint8 and self.low >= 0 and self.high <= 1 < rows.max():
            raise InputError(
                f"got uint8 rows, wanted {self} with values as in training, from {self.low:g} to {self.high:g}; "
                "divide by 255 if that is what was done there"
            )
        with np.errstate(over="ignore"):
            converted = rows.astype(np.float32, copy=False)
        # Either is NaN where a value is, and infinite where one is. A sum would overflow, or has to be in float64,
        # which takes twice as long as both.
        with np.errstate(invalid="ignore"):
            lowest, highest = converted.min(), converted.max()
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            bad = np.argwhere(~np.isfinite(converted))
            raise InputError(
                f"got {len(bad)} NaN or infinite values (first in row {bad[0][0]}), wanted finite float32; "
                "impute or drop these rows first, for instance with sklearn.impute.SimpleImputer"
            )
        self._refuse_unscaled_images(highest)
        return converted

    def _refuse_unscaled_images(self, highest: np.float32) -> None:
        """Catch pixels up to 255 on their way into a bundle of pixels up to 1, which would embed without a word."""
        if self.kind == "image" and 0 <= self.low <= self.high <= 1 and highest > _FAR_BEYOND_ONE:
            raise InputError(
                f"got values up to {highest:g}, wanted {self} with values as in training, from {self.low:g} to "
                f"{self.high:g}; divide by 255 if that is what was done there"
            )
