"""What a classifier gets wrong, class by class, and whether its probabilities mean what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Calibration", "ClassError", "class_errors", "measure_calibration"]


@dataclass(frozen=True)
class ClassError:
    """How one class fares.

    Attributes
    ----------
    name : str
    n_rows : int
        Test rows of the class.
    error : float
        Share of its decisions that are wrong, in percent.
    taken_for : str or None
        What it is most often taken for; None where nothing is wrong.
    taken_for_share : float
        Share of its decisions that are this mistake, in percent.
    """

    name: str
    n_rows: int
    error: float
    taken_for: str | None
    taken_for_share: float


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy, in bins of equal width.

    Attributes
    ----------
    error : float
        Expected calibration error: the mean over decisions of the gap between a bin's accuracy and its confidence (Guo
        et al. 2017, arXiv:1706.04599, equation 3), between 0 and 1.
    confidence, accuracy : tuple of float
        Means over each bin that is not empty.
    counts : tuple of int
        Decisions in each of these bins.
    n_bins : int
    """

    error: float
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    counts: tuple[int, ...]
    n_bins: int


def class_errors(probabilities: NDArray[Any], labels: NDArray[np.int64], *, names: tuple[str, ...]) -> list[ClassError]:
    """Count mistakes by class, over several classifiers of the same rows.

    Parameters
    ----------
    probabilities : ndarray of shape (n_classifiers, n, n_classes)
    labels : ndarray of shape (n,)
        Class indices.
    names : tuple of str
        Of the classes.

    Returns
    -------
    list of ClassError
        Of the classes that have rows, in the order of `names`.
    """
    decisions = probabilities.argmax(axis=2)
    found = []
    for index, name in enumerate(names):
        own = labels == index
        if not own.any():
            continue
        counts = np.bincount(decisions[:, own].ravel(), minlength=len(names)).astype(np.float64)
        counts *= 100 / counts.sum()
        error = 100 - counts[index]
        counts[index] = 0
        worst = int(counts.argmax())
        mistaken = counts[worst] > 0
        found.append(
            ClassError(name, int(own.sum()), float(error), names[worst] if mistaken else None, float(counts[worst]))
        )
    return found


def measure_calibration(probabilities: NDArray[Any], labels: NDArray[np.int64], *, n_bins: int = 10) -> Calibration:
    """Compare how sure classifiers are of their decisions with how often they are right.

    Parameters
    ----------
    probabilities : ndarray of shape (n_classifiers, n, n_classes)
    labels : ndarray of shape (n,)
        Class indices.
    n_bins : int
        Of confidence, from 0 to 1.
    """
    confidence = probabilities.max(axis=2).ravel()
    right = (probabilities.argmax(axis=2) == labels).ravel()
    # A confidence on the border belongs to the bin below it, and 1 to the last.
    places = np.clip(np.ceil(confidence * n_bins).astype(np.int64) - 1, 0, n_bins - 1)
    counts = np.bincount(places, minlength=n_bins)
    filled = counts > 0
    means = np.bincount(places, weights=confidence, minlength=n_bins)[filled] / counts[filled]
    rights = np.bincount(places, weights=right, minlength=n_bins)[filled] / counts[filled]
    error = float(np.abs(means - rights) @ counts[filled] / counts.sum())
    return Calibration(error, tuple(means.tolist()), tuple(rights.tolist()), tuple(counts[filled].tolist()), n_bins)
