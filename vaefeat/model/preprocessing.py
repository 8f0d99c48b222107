"""Scaling of rows, fitted once and kept inside the model, so that it travels in the exported graph."""

from __future__ import annotations

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
_ROWS_AT_A_TIME = 8192


class Preprocessing(nn.Module):
    """x = (rows - shift) * scale, and back.

    Parameters
    ----------
    shift, scale : Tensor
        float32, broadcastable to the shape of a row. Zero shift and unit scale when built for loading weights.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

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
        return cls(*(torch.tensor(values, dtype=torch.float32).view(sizes) for values in (shift, scale)))

    def forward(self, rows: Tensor) -> Tensor:
        """Scale rows of shape (B, ...), uint8 or float32, to float32 of the same shape."""
        return (rows.to(self.shift.dtype) - self.shift) * self.scale

    def inverse(self, x: Tensor) -> Tensor:
        """Undo :meth:`forward`, in float32."""
        return x / self.scale + self.shift


def _fit(scaler: Any, rows: NDArray[Any]) -> Any:
    for chunk in batches(rows, _ROWS_AT_A_TIME):
        # One "feature" a scale: channels of an image, columns of a table.
        columns = np.moveaxis(chunk, 1, -1).reshape(-1, rows.shape[1]) if rows.ndim == 4 else chunk
        scaler.partial_fit(columns.astype(np.float64))
    return scaler
