"""Scaling of rows, fitted once and kept inside the model, so that it travels in the exported graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch import Tensor, nn

from vaefeat.data import batches

__all__ = ["Preprocessing", "Scaling"]

#: ``unit`` maps the training rows into [0, 1], ``standard`` to mean 0 and variance 1; ``none`` leaves ids as they are;
#: ``table`` is ``standard`` for the quantities among a table's columns and leaves the others as they are.
Scaling = Literal["unit", "standard", "none", "table"]
#: Values read at a time, as float64: 8 MiB, of which scikit-learn makes a few copies.
_VALUES_AT_A_TIME = 2**20


class Preprocessing(nn.Module):
    """x = (rows - shift) * scale, and back.

    Parameters
    ----------
    shift, scale : Tensor
        float32, broadcastable to the shape of a row. Zero shift and unit scale when built for loading weights.
    low, high : float
        x saturates at these: a Bernoulli likelihood has no meaning beyond 0 and 1, and would call what lies there ever
        more likely; an id beyond the vocabulary would be looked up where nothing is.
    whole : bool
        x is rounded: rows are ids.
    optional : bool
        x may be NaN, which is a missing value, and saturates nowhere: what NaN is cut to, processors do not agree on.
    """

    shift: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        shift: Tensor,
        scale: Tensor,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        whole: bool = False,
        optional: bool = False,
    ) -> None:
        super().__init__()
        self.whole, self.optional = whole, optional
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    @classmethod
    def identity(cls, shape: tuple[int, ...], scaling: Scaling = "standard") -> Self:
        """Build one to load :meth:`fit`'s state into, for rows of `shape`; until then it shifts and scales nothing."""
        sizes = (shape[0], 1, 1) if len(shape) == 3 else shape
        return cls(torch.zeros(sizes), torch.ones(sizes), whole=scaling == "none", optional=scaling == "table")

    @property
    def blank(self) -> float:
        """What stands at a place of x where nothing is known."""
        return math.nan if self.optional else 0.0

    @classmethod
    def fit(
        cls, rows: NDArray[Any], scaling: Scaling, *, levels: int | None = None, columns: Sequence[int] = ()
    ) -> Self:
        """Fit the scaling to training rows.

        Tables are scaled by column. Images are scaled as a whole under ``unit``, which keeps the ratios of their
        colours (a black of 0 stays 0, the brightest value becomes 1), and by channel under ``standard``. What is
        constant is shifted to zero and not scaled. Under ``none`` x is the nearest id.

        Parameters
        ----------
        rows : ndarray of shape (n, F) or (n, C, H, W)
            uint8 or float32, read in chunks, so a memory map is not pulled in whole.
        scaling : {"unit", "standard", "none", "table"}
        levels : int, optional
            Size of the vocabulary, at whose last id ``none`` saturates; the highest id among `rows` when None.
        columns : sequence of int
            Of a table: as in :class:`vaefeat.config.ModelConfig`. Missing values are left out.
        """
        n_scales = rows.shape[1]
        if scaling == "none":
            identity = cls.identity(rows.shape[1:], scaling)
            last = float(rows.max()) if levels is None else levels - 1.0
            return cls(identity.shift, identity.scale, low=0.0, high=last, whole=True)
        if scaling == "table":
            scalers = [_fit_quantity(rows[:, i]) if size == 0 else (0.0, 1.0) for i, size in enumerate(columns)]
            shifts, spreads = zip(*scalers, strict=True)
            return cls(torch.tensor(shifts), 1 / torch.tensor(spreads), optional=True)
        if scaling == "unit":
            scaler = _fit(MinMaxScaler(), rows)
            shift, high = scaler.data_min_, scaler.data_max_
            if rows.ndim == 4:
                shift, high = np.full(n_scales, min(shift.min(), 0.0)), np.full(n_scales, high.max())
            scale = 1 / np.where(high > shift, high - shift, 1)
        else:
            scaler = _fit(StandardScaler(), rows)
            shift, scale = scaler.mean_, 1 / scaler.scale_
        sizes = (n_scales, 1, 1) if rows.ndim == 4 else (n_scales,)
        low, high = (0.0, 1.0) if scaling == "unit" else (-math.inf, math.inf)
        shift_scale = (torch.tensor(values, dtype=torch.float32).view(sizes) for values in (shift, scale))
        return cls(*shift_scale, low=low, high=high)

    def forward(self, rows: Tensor) -> Tensor:
        """Scale rows of shape (B, ...), uint8 or float32, to float32 of the same shape."""
        x = (rows.to(self.shift.dtype) - self.shift) * self.scale
        if self.optional:
            return x
        x = x.clamp(self.low, self.high)
        return x.round() if self.whole else x

    def inverse(self, x: Tensor) -> Tensor:
        """Undo :meth:`forward`, but for the saturation, in float32."""
        return x / self.scale + self.shift


def _fit_quantity(column: NDArray[Any]) -> tuple[float, float]:
    """Give mean and standard deviation of the values that are there."""
    values = column[np.isfinite(column)].astype(np.float64)
    scaler = StandardScaler().fit(values[:, None])
    return float(scaler.mean_[0]), float(scaler.scale_[0])


def _fit(scaler: Any, rows: NDArray[Any]) -> Any:
    for chunk in batches(rows, max(1, _VALUES_AT_A_TIME // math.prod(rows.shape[1:]))):
        # One "feature" a scale: channels of an image, columns of a table.
        columns = np.moveaxis(chunk, 1, -1).reshape(-1, rows.shape[1]) if rows.ndim == 4 else chunk
        scaler.partial_fit(columns.astype(np.float64))
    return scaler
