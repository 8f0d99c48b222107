"""How sure a classifier of few labels may be: one temperature, from labels that copies of it did not see.

N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.base import clone

from vaefeat.settings import check_int
from vaefeat.targets import Targets
from vaefeat.temperature import LEAST_PROBABILITY

__all__ = ["cross_validated_temperature", "folds", "shrunken_temperature"]

#: Of the temperature's logarithm before anything is known. Few rows that were mostly right say little of it, and leave
#: it near 1; a classifier that was wrong and sure of it says much.
_PRIOR_STD = 0.5
_HIGHEST = 20.0


def cross_validated_temperature(
    classifier: Any, rows: NDArray[Any], classes: NDArray[Any], targets: Targets, *, n_folds: int
) -> float:
    """Fit a copy for each fold of the labelled rows, which it does not get, and find the temperature of its answers.

    Not even as rows without a label: of those, what learns from them makes itself sure, right or wrong.

    Parameters
    ----------
    classifier : PartlyLabelledClassifier
        Copies of it are fitted without ``calibration`` and callbacks, from the start.
    rows : ndarray of shape (n, ...)
    classes : ndarray of shape (K,)
    targets : Targets
    n_folds : int

    Returns
    -------
    float

    Raises
    ------
    ConfigError
        Fewer than two folds.
    """
    check_int("calibration", n_folds, at_least=2)
    probabilities, hidden = [], []
    for places in folds(targets, n_folds=n_folds):
        y, counts = np.full(len(rows), None, dtype=object), targets.counts.copy()
        y[targets.labelled] = classes[targets.codes[targets.labelled]]
        counts[places] = 0
        part = clone(classifier).set_params(calibration=None, warm_start=False).set_callbacks()
        part.fit(rows, y, sample_weight=counts)
        probabilities.append(part.predict_proba(rows[places]))
        hidden.append(places)
    if not hidden:
        return 1.0
    asked = np.concatenate(hidden)
    return shrunken_temperature(np.concatenate(probabilities), targets.codes[asked], targets.counts[asked])


def folds(targets: Targets, *, n_folds: int) -> Iterator[NDArray[np.int64]]:
    """Give the places of the labelled rows of each fold: as many of each class in all, but for one.

    The only label of a class is in no fold, for a classifier needs it; folds that nothing is left for are left out.
    """
    codes, numbers, begin = targets.codes[targets.labelled], np.full(len(targets.labelled), -1), 0
    for code in np.unique(codes):
        # In the order that the values of the rows decide, which is no order of theirs.
        of_class = np.flatnonzero(codes == code)
        if len(of_class) > 1:
            numbers[of_class] = (begin + np.arange(len(of_class))) % n_folds
            begin += len(of_class)
    for number in range(n_folds):
        if (numbers == number).any():
            yield targets.labelled[numbers == number]


def shrunken_temperature(
    probabilities_NK: NDArray[np.floating[Any]], codes_N: NDArray[np.int64], counts_N: NDArray[np.float64]
) -> float:
    """Find the most probable temperature of at least 1, its logarithm being half-normal before: few rows leave it at 1.

    Never below: copies that learned from less are less sure than the classifier itself.

    Parameters
    ----------
    probabilities_NK : ndarray of shape (n, n_classes)
        Of rows that the classifier has not learned from.
    codes_N : ndarray of shape (n,), int64
        Columns of their true classes.
    counts_N : ndarray of shape (n,)
        How many rows each stands for.

    Returns
    -------
    float
        From 1 to 20.
    """
    logits_NK = np.log(np.maximum(np.asarray(probabilities_NK, np.float64), LEAST_PROBABILITY))
    chosen = np.arange(len(codes_N)), codes_N

    def surprise(log_temperature: float) -> float:
        log_p_N = log_softmax(logits_NK / np.exp(log_temperature), axis=1)[chosen]
        return float(0.5 * (log_temperature / _PRIOR_STD) ** 2 - (counts_N * log_p_N).sum())

    found = minimize_scalar(surprise, bounds=(0.0, np.log(_HIGHEST)), method="bounded")
    return float(np.exp(found.x)) if found.fun < surprise(0.0) else 1.0
