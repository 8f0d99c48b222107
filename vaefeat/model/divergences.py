"""Divergences between two sets of samples, which may stand in place of the KL term.

N samples, L latents, P projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["maximum_mean_discrepancy", "sliced_wasserstein"]

#: Widths of the kernel, in units of the distance that two draws from N(0, I) have.
_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def maximum_mean_discrepancy(z_NL: Tensor, prior_NL: Tensor) -> Tensor:
    """Estimate MMD^2 without bias, with inverse multiquadratic kernels: a scalar, 0 when the distributions agree.

    k(a, b) = C / (C + |a - b|^2) with C = 2 L s, averaged over scales s from 0.1 to 10 (Tolstikhin et al. 2018,
    arXiv:1711.01558, section 4 and algorithm 2). An estimate may be below 0. One sample has none, and counts 0.
    """
    n_samples, n_latents = z_NL.shape
    if n_samples < 2:
        return z_NL.new_zeros(())
    base = 2.0 * n_latents
    within = _kernel(z_NL, z_NL, base).fill_diagonal_(0) + _kernel(prior_NL, prior_NL, base).fill_diagonal_(0)
    across = _kernel(z_NL, prior_NL, base).mean()
    return within.sum() / (n_samples * (n_samples - 1)) - 2 * across


def sliced_wasserstein(z_NL: Tensor, prior_NL: Tensor, *, n_projections: int) -> Tensor:
    """Estimate the squared sliced Wasserstein-2 distance of two sets of equal size: a scalar of at least 0.

    Both sets are projected on random directions, sorted and compared (Kolouri et al. 2019, arXiv:1804.01947,
    equation 15; Bonneel et al. 2015).
    """
    directions_LP = torch.randn(z_NL.shape[1], n_projections, device=z_NL.device)
    directions_LP = directions_LP / directions_LP.norm(dim=0)
    ours, theirs = ((samples @ directions_LP).sort(dim=0).values for samples in (z_NL, prior_NL))
    distance: Tensor = (ours - theirs).pow(2).mean()
    return distance


def _kernel(a_NL: Tensor, b_ML: Tensor, base: float) -> Tensor:
    # By a product of matrices: N * M differences of L values each would not fit in memory.
    squared_norms = a_NL.pow(2).sum(dim=-1).unsqueeze(1) + b_ML.pow(2).sum(dim=-1)
    squared = (squared_norms - 2 * a_NL @ b_ML.T).clamp_min(0)
    kernels: Tensor = torch.stack([base * scale / (base * scale + squared) for scale in _SCALES]).mean(dim=0)
    return kernels
