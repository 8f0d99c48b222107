"""How well one view of a row tells which other view is of the same row, or of one like it.

B rows, L values of each view, M views in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Memory", "info_nce", "neighbour_info_nce"]


class Memory(nn.Module):
    """The directions of the views that came last, a ring of them.

    Parameters
    ----------
    size : int
        M.
    width : int
        L.
    """

    views: Tensor
    n_seen: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("views", torch.zeros(size, width))
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def remember(self, views_BL: Tensor) -> None:
        """Put views in the places of the oldest ones."""
        latest = views_BL[: len(self.views)]
        places = (self.n_seen + torch.arange(len(latest), device=latest.device)) % len(self.views)
        self.views.index_copy_(0, places, functional.normalize(latest, dim=1))
        self.n_seen += len(latest)

    @torch.no_grad()
    def neighbours(self, views_BL: Tensor, n_nearest: int) -> Tensor:
        """Give for each view one of the nearest in memory, by the cosine, each as likely: unit vectors (B, L)."""
        similarity_BM = functional.normalize(views_BL, dim=1) @ self.views.T
        # A place that is still empty is near to nothing.
        empty_M = torch.arange(len(self.views), device=views_BL.device) >= self.n_seen
        similarity_BM = similarity_BM.masked_fill(empty_M, float("-inf"))
        nearest_BK = similarity_BM.topk(min(n_nearest, len(self.views)), dim=1, sorted=False).indices
        drawn_B1 = torch.randint(nearest_BK.shape[1], (len(views_BL), 1), device=views_BL.device)
        return self.views[nearest_BK.gather(1, drawn_B1).squeeze(1)]


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


def neighbour_info_nce(
    first_BL: Tensor, second_BL: Tensor, memory: Memory, *, n_nearest: int, temperature: float
) -> Tensor:
    """Give each row's cross-entropy of finding its other view from a neighbour of the one, in nats: (B,).

    As :func:`info_nce`, but what looks for a view among the B of its kind is not the row's other view itself: it is one
    of that view's nearest in memory, most often a view of another row. So rows that are alike come together, and with
    them the classes, of which no label told.

    References
    ----------
    Dwibedi et al. 2021, With a Little Help from My Friends (NNCLR), arXiv:2104.14548, equation 3, with one of several
    neighbours in place of the nearest.
    """
    found = torch.arange(len(first_BL), device=first_BL.device)
    costs = []
    for one_BL, other_BL in ((first_BL, second_BL), (second_BL, first_BL)):
        looking_BL = memory.neighbours(one_BL.detach(), n_nearest)
        similarity_BB = looking_BL @ functional.normalize(other_BL, dim=1).T / temperature
        costs.append(functional.cross_entropy(similarity_BB, found, reduction="none"))
    return (costs[0] + costs[1]) / 2
