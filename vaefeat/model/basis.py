"""Coordinates for features in which all of them vary alike.

L latents.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["equal_variance_basis"]

#: Shares of the mean variance that are small enough to leave.
_CLOSE = 1e-9


def equal_variance_basis(covariance_LL: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find orthogonal axes (L, L), one a row, along all of which the variance is the same.

    What a latent says of a row is in how much it varies, and whoever standardises features takes that away: a latent
    that hardly varies becomes as loud as one that tells the classes apart. Along these axes there is nothing to take
    away. Distances and angles are those of the latents, and a standard normal prior stays one.

    There are such axes for any covariance (Schur 1923, Horn 1954: the diagonal may be anything that its eigenvalues
    majorise). Beginning with random ones, L - 1 rotations of two axes set one variance to the mean each (Chan and Li
    1983, doi:10.1137/0604056).
    """
    n_latents = len(covariance_LL)
    axes_LL = np.linalg.qr(np.random.default_rng(0).normal(size=(n_latents, n_latents)))[0]
    turned_LL = axes_LL @ covariance_LL @ axes_LL.T
    mean = np.trace(covariance_LL) / n_latents
    for _ in range(n_latents - 1):
        variances = np.diag(turned_LL)
        high, low = int(np.argmax(variances)), int(np.argmin(variances))
        above, below, shared = variances[high] - mean, variances[low] - mean, turned_LL[high, low]
        if above <= _CLOSE * mean:
            break
        # above cos^2 + 2 shared cos sin + below sin^2 = 0, for the tangent: below is negative, so that there is one.
        tangent = (-shared - np.sqrt(shared**2 - above * below)) / below
        cosine = 1 / np.hypot(1.0, tangent)
        turn = np.array([[cosine, tangent * cosine], [-tangent * cosine, cosine]])
        pair = [high, low]
        axes_LL[pair] = turn @ axes_LL[pair]
        turned_LL[pair] = turn @ turned_LL[pair]
        turned_LL[:, pair] = turned_LL[:, pair] @ turn.T
    return axes_LL
