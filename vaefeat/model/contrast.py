"""How well one view of a row tells which other view is of the same row.

B rows, L values of each view.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["info_nce"]


def info_nce(first_BL: Tensor, second_BL: Tensor, *, temperature: float) -> Tensor:
    """Give each row's cross-entropy of finding its other view among all views of the minibatch, in nats: (B,).

    Views are compared by the cosine of their angle, over `temperature`; each looks for its other among the 2B - 1 that
    are not itself, and both directions are averaged. 0 is the best; log(2B - 1) is chance. log(2B - 1) minus the mean
    is near a lower bound on the mutual information of the views: a bound it would be if the others were independent
    of each other, but two of them are of each row.

    References
    ----------
    van den Oord et al. 2018, arXiv:1807.03748, equation 4; in this form (NT-Xent) Chen et al. 2020, SimCLR,
    arXiv:2002.05709, equation 1.
    """
    n_rows = len(first_BL)
    views = functional.normalize(torch.cat([first_BL, second_BL]), dim=1)
    similarity = views @ views.T / temperature
    # Nothing is its own other view.
    itself = torch.eye(2 * n_rows, dtype=torch.bool, device=views.device)
    similarity = similarity.masked_fill(itself, float("-inf"))
    places = torch.arange(n_rows, device=views.device)
    others = torch.cat([places + n_rows, places])
    return functional.cross_entropy(similarity, others, reduction="none").view(2, n_rows).mean(dim=0)
