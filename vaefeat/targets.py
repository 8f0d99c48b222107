"""What a classifier is told to learn: which rows have a label, which class it is, and how much it counts.

n rows, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.validation import _check_sample_weight, check_consistent_length

from vaefeat.errors import InputError
from vaefeat.labels import encode_labels

__all__ = ["Targets"]


@dataclass(frozen=True)
class Targets:
    """Labels as a training loop wants them.

    Attributes
    ----------
    codes : ndarray of shape (n,), int64
        The class of each row, from 0; -1 where it has none.
    labelled : ndarray of int64
        Places of the rows to learn a label from, in the order that they are drawn in.
    unlabelled : ndarray of int64
        Places of the rows without a label.
    counts : ndarray of shape (n,), float64
        How many labelled rows each stands for.
    weights : ndarray of shape (n,), float32
        Of each label in the loss, 1 on average over `labelled`.
    """

    codes: NDArray[np.int64]
    labelled: NDArray[np.int64]
    unlabelled: NDArray[np.int64]
    counts: NDArray[np.float64]
    weights: NDArray[np.float32]

    @classmethod
    def of(cls, codes: NDArray[np.int64]) -> Targets:
        """Take every row as it comes, and every label for as much as any other."""
        labelled, unlabelled = np.flatnonzero(codes >= 0), np.flatnonzero(codes < 0)
        return cls(codes, labelled, unlabelled, np.ones(len(codes)), np.ones(len(codes), dtype=np.float32))

    @classmethod
    def collect(
        cls,
        rows: NDArray[Any],
        y: ArrayLike | None,
        *,
        sample_weight: ArrayLike | None,
        class_weight: Mapping[Any, float] | str | None,
        unlabelled: int | None,
        estimator: str,
    ) -> tuple[NDArray[Any], Targets]:
        """Check what an estimator is given beside its rows.

        Equal rows with equal labels become one that counts for all of them, and labelled rows are put in an order that
        their values decide. So a weight of 3 and three copies are the same to the last bit, as are a weight of 0 and no
        row, and the order of the labelled rows changes nothing.

        Parameters
        ----------
        rows : ndarray of shape (n, ...)
        y : array-like of shape (n,)
        sample_weight : array-like of shape (n,), optional
            Rows without a label are there, or left out where it is 0; what else it is does not matter.
        class_weight : mapping of labels to weights, "balanced" or None
        unlabelled : int or None
            See :func:`vaefeat.labels.encode_labels`.
        estimator : str
            Its name, for messages.

        Returns
        -------
        classes : ndarray of shape (K,)
            Sorted.
        targets : Targets

        Raises
        ------
        ValueError
            Labels of fewer than two classes, negative weights or none above 0, other lengths, a class without weight.
        """
        classes, codes = encode_labels(y, estimator=estimator, unlabelled=unlabelled)
        check_consistent_length(rows, codes)
        counts = _check_sample_weight(sample_weight, rows, dtype=np.float64, ensure_non_negative=True)
        left = np.unique(codes[(codes >= 0) & (counts > 0)])
        if len(left) < 2:
            raise InputError(
                f"got sample_weight above 0 for labels of {len(left)} class only ({classes[left].tolist()}), wanted at "
                "least 2 classes; give the others some weight"
            )
        # Classes whose every label weighs nothing move out, and the codes of those that stay close the gaps.
        moved = np.full(len(classes) + 1, -1)
        moved[left] = np.arange(len(left))
        codes = np.where(counts > 0, moved[codes], -1)
        classes = classes[left]
        labelled, counts = _merged(rows, codes, counts, np.flatnonzero(codes >= 0))
        weights = counts.copy()
        if class_weight is not None:
            shares = {"sample_weight": counts[labelled]} if class_weight == "balanced" else {}
            per_class = compute_class_weight(
                _plain(class_weight), classes=classes, y=classes[codes[labelled]], **shares
            )
            weights[labelled] *= per_class[codes[labelled]]
        if not (mean := weights[labelled].mean()) > 0:
            raise InputError("got class_weight that leaves every label a weight of zero, wanted some above it")
        without = np.flatnonzero((codes < 0) & (counts > 0))
        return classes, cls(codes, labelled, without, counts, (weights / mean).astype(np.float32))

    def rows_to_use(self, rows: NDArray[Any]) -> tuple[NDArray[Any], Targets]:
        """Copy the rows that there is something to learn from, (m, ...), with targets whose places are theirs."""
        used, n_labelled = np.concatenate([self.labelled, self.unlabelled]), len(self.labelled)
        labelled, unlabelled = np.arange(n_labelled), np.arange(n_labelled, len(used))
        return rows[used], Targets(self.codes[used], labelled, unlabelled, self.counts[used], self.weights[used])

    def class_counts(self) -> NDArray[np.float64]:
        """Count the labels of each class (K,), each as often as it counts."""
        counts_K = np.zeros(self.codes[self.labelled].max() + 1)
        np.add.at(counts_K, self.codes[self.labelled], self.counts[self.labelled])
        return counts_K


def _merged(
    rows: NDArray[Any], codes: NDArray[np.int64], counts: NDArray[np.float64], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Give a place for each distinct pair of row and label, sorted by a digest of it, and what all equal ones count."""
    found: dict[bytes, int] = {}
    counts = counts.copy()
    for place in places.tolist():
        content = blake2b(np.ascontiguousarray(rows[place]).tobytes(), digest_size=16, salt=_salt(codes[place]))
        if (first := found.setdefault(content.digest(), place)) != place:
            counts[first] += counts[place]
            counts[place] = 0
    return np.array([found[digest] for digest in sorted(found)], dtype=np.int64), counts


def _salt(code: np.int64) -> bytes:
    return int(code).to_bytes(8, "little")


def _plain(class_weight: Mapping[Any, float] | str) -> Mapping[Any, float] | str:
    """Refuse what is neither, with the values that scikit-learn allows."""
    if isinstance(class_weight, Mapping):
        return dict(class_weight)
    if class_weight != "balanced":
        raise InputError(
            f"got class_weight={class_weight!r}, wanted None, 'balanced' or a mapping of labels to weights"
        )
    return class_weight
