r"""How far the rows that are served have moved from those the encoder was trained on.

With the features :math:`x_{ij}` of row :math:`i` (0 is the latest) and latent :math:`j`, and the training rows' mean
:math:`\mu_j` and variance :math:`\sigma_j^2` from the bundle, each row weighs a little less than the one after it:

.. math::

    w_i = (1 - 1/W)^i, \quad
    m_j = \frac{\sum_i w_i x_{ij}}{\sum_i w_i}, \quad
    n = \frac{(\sum_i w_i)^2}{\sum_i w_i^2}, \quad
    v_j = \frac{n}{n - 1} \left( \frac{\sum_i w_i x_{ij}^2}{\sum_i w_i} - m_j^2 \right)

- mean shift: :math:`\sqrt{\operatorname{mean}_j ((m_j - \mu_j) / \sigma_j)^2}`, near 0 without drift;
- largest shift: :math:`\max_j |m_j - \mu_j| / \sigma_j`;
- variance ratio: :math:`\exp \operatorname{mean}_j \ln (v_j / \sigma_j^2)`, near 1 without drift.

:math:`n` is the number of rows that would weigh the same if all weighed alike; chance alone makes a mean shift of about
:math:`1 / \sqrt n`. A collapsed latent, of which only rounding is left, would drown the others: those with less than a
ten-thousandth of the largest reference variance are left out. A feature further than a thousand deviations from the
reference mean counts as one that far away.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Drift", "DriftReading"]

_COLLAPSED = 1e-4
#: A row counts for no more than this, so that a single one cannot drown all others for good.
_MOST_DEVIATIONS = 1000.0
#: Rows that are copied aside before they are summed up: one sum for many small batches.
_BUFFER_ROWS = 256


@dataclass(frozen=True)
class DriftReading:
    """What the gauges show; the module has the formulas.

    Parameters
    ----------
    mean_shift, largest_shift : float
        In standard deviations of the reference.
    variance_ratio : float
    rows : float
        Rows of equal weight behind the figures.
    """

    mean_shift: float
    largest_shift: float
    variance_ratio: float
    rows: float


class Drift:
    """Running mean and variance of served features against a reference; several threads may feed it.

    Parameters
    ----------
    mean, variance : array_like of shape (d,)
        Of the posterior mean over the training rows.
    window_rows : int
        :math:`W`, after which a row's weight has fallen to about a third.
    """

    def __init__(self, *, mean: ArrayLike, variance: ArrayLike, window_rows: int = 10_000) -> None:
        self._mean = np.asarray(mean, dtype=np.float32)
        variance = np.asarray(variance, dtype=np.float64)
        self._kept = variance > _COLLAPSED * variance.max(initial=0.0)
        self._variance = variance[self._kept]
        self._most = (_MOST_DEVIATIONS * np.sqrt(variance)).astype(np.float32)
        self._lock = threading.Lock()
        self._buffer = np.empty((_BUFFER_ROWS, len(self._mean)), dtype=np.float32)
        self._filled = 0
        self._fade = 1.0 - 1.0 / window_rows
        self._weights = (self._fade ** np.arange(_BUFFER_ROWS)[::-1]).astype(np.float32)
        # Sums over all rows so far: of weights, squared weights, weighted and squared features less the reference mean.
        self._weight, self._weight2 = 0.0, 0.0
        self._sum = np.zeros(len(self._mean))
        self._sum2 = np.zeros(len(self._mean))

    def update(self, features: NDArray[np.float32]) -> None:
        """Take in what was served: one copy of the rows, and a sum over every 256 of them.

        Parameters
        ----------
        features : ndarray of shape (n, d), float32
            The posterior mean of real rows, finite: no padding, no warm-up, no image that could not be decoded.
        """
        with self._lock:
            start = 0
            while start < len(features):
                some = features[start : start + _BUFFER_ROWS - self._filled]
                self._buffer[self._filled : self._filled + len(some)] = some
                self._filled += len(some)
                start += len(some)
                if self._filled == _BUFFER_ROWS:
                    self._fold()

    def read(self) -> DriftReading | None:
        """Compare; None while fewer than two rows have come, or where the reference does not vary."""
        with self._lock:
            self._fold()
            weight, rows = self._weight, self._weight**2 / self._weight2 if self._weight2 else 0.0
            total, total2 = self._sum[self._kept], self._sum2[self._kept]
        # Just above 1: two rows count as a little less than two.
        if rows < 1.5 or not len(self._variance):
            return None
        moved = total / weight
        variance = np.maximum(total2 / weight - moved**2, 0.0) * rows / (rows - 1.0)
        shift = moved / np.sqrt(self._variance)
        with np.errstate(divide="ignore"):
            ratio = np.exp(np.mean(np.log(variance / self._variance)))
        return DriftReading(
            mean_shift=float(np.sqrt(np.mean(shift**2))),
            largest_shift=float(np.abs(shift).max()),
            variance_ratio=float(ratio),
            rows=rows,
        )

    def _fold(self) -> None:
        """Add the buffer to the sums, whose older rows fade by as many steps."""
        filled, self._filled = self._filled, 0
        if not filled:
            return
        # Less the reference mean, so that float32 does not lose the variance of latents far from zero.
        centred = np.clip(self._buffer[:filled] - self._mean, -self._most, self._most)
        weights = self._weights[-filled:]
        fade = self._fade**filled
        self._weight = self._weight * fade + float(weights.sum())
        self._weight2 = self._weight2 * fade**2 + float((weights**2).sum())
        self._sum = self._sum * fade + weights @ centred
        self._sum2 = self._sum2 * fade + weights @ np.square(centred)
