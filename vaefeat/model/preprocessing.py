"""Scaling of rows, fitted once and kept inside the model, so that it travels in the exported graph."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch import Tensor, nn

from vaefeat.data import batches

__all__ = ["Preprocessing", "Scaling"]

#: ``unit`` maps the training rows into [0, 1], ``standard`` to mean 0 and variance 1.
Scaling = Literal["unit", "standard"]
#: Values read at a time, as float64: 32 MiB.
_VALUES_AT_A_TIME = 2**22


class Preprocessing(nn.Module):
    """x = (rows - shift) * scale, and back.

    Parameters
    ----------
    shift, scale : Tensor
        float32, broadcastable to the shape of a row. Zero shift and unit scale when built for loading weights.
    low, high : float
        x saturates at these: a Bernoulli likelihood has no meaning beyond 0 and 1, and would call what lies there ever
        more likely.
    """

    shift: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, shift: Tensor, scale: Tensor, *, low: float = -math.inf, high: float = math.inf) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    @classmethod
    def identity(cls, shape: tuple[int, ...]) -> Self:
        """Build one that changes nothing, of the sizes that :meth:`fit` gives for rows of `shape`."""
        sizes = (shape[0], 1, 1) if len(shape) == 3 else shape
        return cls(torch.zeros(sizes), torch.ones(sizes))

    @classmethod
    def fit(cls, rows: NDArray[Any], scaling: Scaling) -> Self:
        """Fit the scaling to training rows.

        Tables are scaled by column. Images are scaled as a whole under ``unit``, which keeps the ratios of their
        colours (a black of 0 stays 0, the brightest value becomes 1), and by channel under ``standard``. What is
        constant is shifted to zero and not scaled.

        Parameters
        ----------
        rows : ndarray of shape (n, F) or (n, C, H, W)
            uint8 or float32, read in chunks, so a memory map is not pulled in whole.
        scaling : {"unit", "standard"}
        """
        n_scales = rows.shape[1]
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
        return ((rows.to(self.shift.dtype) - self.shift) * self.scale).clamp(self.low, self.high)

    def inverse(self, x: Tensor) -> Tensor:
        """Undo :meth:`forward`, but for the saturation, in float32."""
        return x / self.scale + self.shift


def _fit(scaler: Any, rows: NDArray[Any]) -> Any:
    for chunk in batches(rows, max(1, _VALUES_AT_A_TIME // math.prod(rows.shape[1:]))):
        # One "feature" a scale: channels of an image, columns of a table.
        columns = np.moveaxis(chunk, 1, -1).reshape(-1, rows.shape[1]) if rows.ndim == 4 else chunk
        scaler.partial_fit(columns.astype(np.float64))
    return scaler
