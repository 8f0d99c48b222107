"""Which rows to label next: those that stand for many others, and of these those that the labels so far leave open.

N rows, F features, B the budget.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.preprocessing import normalize
from sklearn.utils import check_array, check_consistent_length

from vaefeat.errors import InputError
from vaefeat.heads import FewLabelHead
from vaefeat.labels import UNLABELLED, labelled_rows
from vaefeat.settings import check_int

__all__ = ["suggest_rows"]

#: Clusters settle long before; what moves after that is no other choice of rows.
_MAX_ITER = 50
#: Rows beside the labelled ones that the head spreads labels over: it only ranks clusters.
_HEAD_ROWS = 5000


def suggest_rows(
    features: ArrayLike, *, budget: int, labels: ArrayLike | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """Choose rows whose labels say most about the others.

    Rows are clustered by the direction of their features, as many clusters as rows with a label and rows that are
    wanted (k-means), and each cluster is spoken for by its row nearest to the centre. Clusters that hold a labelled row
    need no other. With labels of at least two classes, clusters are ordered by how much they hold that
    :class:`vaefeat.heads.FewLabelHead` is unsure of (the sum over rows of one minus the margin between its two most
    probable classes), without them by their size: the first rows of the answer stand for the most.

    Parameters
    ----------
    features : array-like of shape (N, F)
        Posterior means, for instance. Memory is that of some copies of them; give a random sample of very many rows.
    budget : int
        Rows to choose.
    labels : array-like of shape (N,), optional
        Those there are; -1, None and NaN stand for a missing one.
    seed : int
        The same seed gives the same rows.

    Returns
    -------
    ndarray of shape (budget,), int64
        Positions of rows without a label, no two of them with equal features, and none equal to a labelled row.

    Raises
    ------
    InputError
        Fewer different rows without a label than the budget.
    ConfigError
        A budget that is no positive number.

    References
    ----------
    Hacohen et al. 2022, Active Learning on a Budget (TypiClust), arXiv:2202.02794, after which clusters without a label
    are asked for; Zhdanov 2019, Diverse mini-batch Active Learning, arXiv:1901.05954.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from vaefeat.suggestions import suggest_rows
    >>> X, y = load_digits(return_X_y=True)
    >>> chosen = suggest_rows(X, budget=20)
    >>> len(np.unique(y[chosen]))
    10
    """
    check_int("budget", budget, at_least=1)
    rows_NF = check_array(features, dtype=[np.float32, np.float64])
    y = np.full(len(rows_NF), UNLABELLED, dtype=object) if labels is None else np.asarray(labels, dtype=object)
    check_consistent_length(rows_NF, y)
    known = labelled_rows(y)
    free, labelled = _different(rows_NF, known), np.flatnonzero(known)
    if len(free) < budget:
        raise InputError(
            f"got a budget of {budget} and {len(rows_NF)} rows, of which {len(free)} differ and have no label, wanted "
            f"at least as many; ask for {len(free)} or fewer"
        )
    pool = np.concatenate([free, labelled])
    weight_N = _doubt(rows_NF[pool], y[pool], seed) if len(set(y[known])) > 1 else np.ones(len(pool))
    unit_NF = normalize(rows_NF[pool])
    clusters = _clusters(unit_NF, budget + len(labelled), seed)
    chosen = _central(unit_NF, clusters, weight_N, n_free=len(free))[:budget]
    return pool[_filled_up(unit_NF, chosen, n_free=len(free), budget=budget)]


def _different(rows_NF: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Give the first of all equal rows, where none of them has a label."""
    _, first, group = np.unique(rows_NF, axis=0, return_index=True, return_inverse=True)
    taken = np.zeros(len(first), dtype=bool)
    taken[group.ravel()[known]] = True
    return np.sort(first[~taken]).astype(np.int64)


def _clusters(unit_NF: NDArray[Any], n_clusters: int, seed: int) -> KMeans:
    found = KMeans(min(n_clusters, len(unit_NF)), n_init=1, max_iter=_MAX_ITER, random_state=seed)
    with warnings.catch_warnings():
        # Labelled rows may be equal to each other, and directions of different rows, too: fewer clusters then do.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return found.fit(unit_NF)


def _doubt(rows_NF: NDArray[Any], labels: NDArray[Any], seed: int) -> NDArray[np.float64]:
    """Give one minus the margin between the two most probable classes of each row, between 0 and 1."""
    head = FewLabelHead(max_rows=int(labelled_rows(labels).sum()) + _HEAD_ROWS, random_state=seed)
    probability = np.sort(head.fit(rows_NF, labels).predict_proba(rows_NF), axis=1)
    return np.asarray(1 - (probability[:, -1] - probability[:, -2]))


def _central(
    unit_NF: NDArray[Any], clusters: KMeans, weight_N: NDArray[np.float64], *, n_free: int
) -> NDArray[np.int64]:
    """Let each cluster without a label be spoken for by its most central row, the heaviest clusters first."""
    cluster_N = clusters.labels_
    mass_C = np.bincount(cluster_N, weights=weight_N, minlength=clusters.n_clusters)
    mass_C[cluster_N[n_free:]] = -1
    distance_N = ((unit_NF - clusters.cluster_centers_[cluster_N]) ** 2).sum(axis=1)
    # By cluster, then by distance, then by position: the first of each cluster is its most central row.
    order = np.lexsort((distance_N[:n_free], cluster_N[:n_free]))
    present, first = np.unique(cluster_N[order], return_index=True)
    mass = mass_C[present]
    ranked = np.argsort(-mass, kind="stable")
    return np.asarray(order[first[ranked[mass[ranked] >= 0]]])


def _filled_up(unit_NF: NDArray[Any], chosen: NDArray[np.int64], *, n_free: int, budget: int) -> NDArray[np.int64]:
    """Add the rows farthest from all others: there are fewer clusters where rows differ in length alone."""
    while len(chosen) < budget:
        taken = np.concatenate([chosen, np.arange(n_free, len(unit_NF))])
        distance_N = (
            pairwise_distances_argmin_min(unit_NF[:n_free], unit_NF[taken])[1] if len(taken) else np.ones(n_free)
        )
        distance_N[chosen] = -1
        chosen = np.append(chosen, distance_N.argmax())
    return chosen
