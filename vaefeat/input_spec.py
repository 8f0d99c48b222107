"""What rows a bundle takes, and the one place where rows are checked against it.

The encoder on this machine, the HTTP client before it sends, and the server after it received all call
:meth:`InputSpec.prepare`, so that a row is accepted, converted or refused in the same way wherever it enters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vaefeat.errors import BundleError, InputError

__all__ = ["InputSpec"]

#: A resampled picture may overshoot its range a little; one that was not scaled is far off.
_FAR_BEYOND_ONE = 2.0


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

    def __post_init__(self) -> None:
        known = self.kind in ("image", "vector") and self.dtype in ("uint8", "float32")
        n_axes = 3 if self.kind == "image" else 1
        sizes = len(self.shape) == n_axes and all(isinstance(size, int) and size > 0 for size in self.shape)
        if not (known and sizes and isinstance(self.low, int | float) and isinstance(self.high, int | float)):
            raise BundleError(f"got an input described by {self.to_dict()}, wanted one of our kinds of rows")

    @classmethod
    def of(cls, rows: NDArray[Any]) -> Self:
        """Describe training rows of shape (n, F) or (n, C, H, W), dtype uint8 or float32."""
        return cls(
            kind="image" if rows.ndim == 4 else "vector",
            shape=tuple(int(size) for size in rows.shape[1:]),
            dtype="uint8" if rows.dtype == np.uint8 else "float32",
            low=float(rows.min()),
            high=float(rows.max()),
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`'s JSON form."""
        return cls(**{**fields, "shape": tuple(fields["shape"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**asdict(self), "shape": list(self.shape)}

    @cached_property  # asked for with every request
    def n_features(self) -> int:
        """Number of values in one row."""
        return math.prod(self.shape)

    @cached_property
    def row_bytes(self) -> int:
        """Size of one row in the graph's dtype, in bytes."""
        return self.n_features * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
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

    def prepare(self, X: ArrayLike) -> NDArray[Any]:
        """Check rows and convert them, without loss, to what the graph takes.

        Parameters
        ----------
        X : array-like of shape (n, ...), or flat (n, n_features)
            uint8 or any real numeric dtype. Floats are accepted by a uint8 bundle where every value is an integer
            from 0 to 255 (which is what :func:`sklearn.datasets.fetch_openml` returns for images).

        Returns
        -------
        ndarray of shape (n, ...) and dtype ``self.dtype``, C-contiguous
            A view of `X` where nothing had to be changed.

        Raises
        ------
        InputError
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
        if self.dtype == "uint8":
            return np.ascontiguousarray(self._as_uint8(rows))
        return np.ascontiguousarray(self._as_float32(rows))

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
        if rows.dtype.kind == "f" and self.kind == "image" and 0 < rows.max() <= 1 < self.high:
            raise InputError(
                f"got {rows.dtype} rows with values up to {rows.max():g}, wanted {self} with values as in training, "
                f"up to {self.high:g}; the bundle scales inside its graph: leave out the division by 255"
            )
        with np.errstate(invalid="ignore"):
            converted = rows.astype(np.uint8)
            # The comparison is also false for NaN, infinity, fractions, negatives and overflow.
            same = converted == rows
        if not same.all():
            row = int(np.argwhere(~same)[0][0])
            raise InputError(
                f"got {rows.dtype} rows that are not whole numbers from 0 to 255 (first in row {row}), wanted {self}; "
                "the bundle scales inside its graph, so pass the values as they were in training"
            )
        return converted

    def _as_float32(self, rows: NDArray[Any]) -> NDArray[Any]:
        if rows.dtype == np.uint8 and self.low >= 0 and self.high <= 1 < rows.max():
            raise InputError(
                f"got uint8 rows, wanted {self} with values as in training, from {self.low:g} to {self.high:g}; "
                "divide by 255 if that is what was done there"
            )
        with np.errstate(over="ignore"):
            converted = rows.astype(np.float32, copy=False)
        # One reduction finds out: a sum is finite only if no term is NaN or infinite (and rarely overflows by itself).
        with np.errstate(over="ignore", invalid="ignore"):
            suspicious = not np.isfinite(converted.sum(dtype=np.float64))
        if suspicious and not (finite := np.isfinite(converted)).all():
            bad = np.argwhere(~finite)
            raise InputError(
                f"got {len(bad)} NaN or infinite values (first in row {bad[0][0]}), wanted finite float32; "
                "impute or drop these rows first, for instance with sklearn.impute.SimpleImputer"
            )
        self._refuse_unscaled_images(converted)
        return converted

    def _refuse_unscaled_images(self, rows: NDArray[np.float32]) -> None:
        """Catch pixels up to 255 on their way into a bundle of pixels up to 1, which would embed without a word."""
        if self.kind == "image" and 0 <= self.low <= self.high <= 1 and (highest := rows.max()) > _FAR_BEYOND_ONE:
            raise InputError(
                f"got values up to {highest:g}, wanted {self} with values as in training, from {self.low:g} to "
                f"{self.high:g}; divide by 255 if that is what was done there"
            )
