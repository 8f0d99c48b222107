"""Labels of a few rows spread over a graph of neighbours: what the pretrained features alone say of the others.

N rows, F features, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.neighbors import kneighbors_graph
from sklearn.preprocessing import StandardScaler, normalize

__all__ = ["spread_labels"]

_NEIGHBOURS = 10
#: How much of a row's label comes from its neighbours at each step: the nearer to 1, the further labels travel.
_ALPHA = 0.99
_MAX_STEPS = 500
_TOLERANCE = 1e-4


def spread_labels(
    features_NF: NDArray[np.floating[Any]], labels: NDArray[np.int64], shares_K: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Guess the class of unlabelled rows from that of labelled ones near them.

    Standardised features are joined by the cosine to their nearest neighbours, and labels flow along the edges:
    F <- alpha S F + (1 - alpha) Y with S the graph's symmetrically normalised weights (Zhou et al. 2004, Learning with
    Local and Global Consistency, section 2). Each class is then scaled to its share (Zhu et al. 2003, class mass
    normalisation), since a class of scattered rows would otherwise lose to one of crowded ones. scikit-learn's
    LabelSpreading does neither this nor join rows in both directions, and errs more (``docs/heads.md``).

    Parameters
    ----------
    features_NF : ndarray of shape (N, F)
    labels : ndarray of shape (N,), int64
        0 to K - 1, or -1.
    shares_K : ndarray of shape (K,)
        Of the classes among these rows.

    Returns
    -------
    ndarray of shape (N,), int64
        Labelled rows keep theirs. -1 where no label arrives, in a part of the graph without one.
    """
    weights = _normalised_graph(features_NF)
    given_NK = np.zeros((len(labels), len(shares_K)))
    known = np.flatnonzero(labels >= 0)
    given_NK[known, labels[known]] = 1
    flow_NK = given_NK
    for _ in range(_MAX_STEPS):
        before_NK, flow_NK = flow_NK, _ALPHA * (weights @ flow_NK) + (1 - _ALPHA) * given_NK
        if np.abs(flow_NK - before_NK).sum() <= _TOLERANCE * flow_NK.sum():
            break
    scaled_NK = flow_NK * (shares_K / flow_NK.sum(axis=0))
    spread = np.where(scaled_NK.max(axis=1) > 0, scaled_NK.argmax(axis=1), -1)
    spread[known] = labels[known]
    return spread


def _normalised_graph(features_NF: NDArray[np.floating[Any]]) -> Any:
    """Give S = D^-1/2 W D^-1/2, with W 1 between a row and each of its nearest neighbours, in both directions."""
    unit_NF = normalize(StandardScaler().fit_transform(features_NF.astype(np.float32)))
    graph = kneighbors_graph(unit_NF, min(_NEIGHBOURS, len(unit_NF) - 1))
    joined = graph.maximum(graph.T)
    scale = sparse.diags(1 / np.sqrt(np.asarray(joined.sum(axis=1)).ravel()))
    return (scale @ joined @ scale).tocsr()
