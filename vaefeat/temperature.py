"""Probabilities as confident as they are right: one temperature for all classes.

References
----------
Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599. Platt 1999, Probabilistic Outputs for
Support Vector Machines, section 2.2 (targets of few rows).

N rows, K classes.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.validation import check_is_fitted

from vaefeat.errors import InputError
from vaefeat.settings import check_number

__all__ = ["LEAST_PROBABILITY", "TemperedClassifier", "find_temperature", "log_loss", "tempered"]

#: What smaller probabilities are taken for: neighbours and trees say 0, of which there is no logarithm.
LEAST_PROBABILITY = 1e-9
_LOWEST, _HIGHEST = 0.1, 20.0


class TemperedClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier whose log-probabilities are divided by a temperature; its labels stay what they were.

    :func:`find_temperature` finds one on rows that the classifier has not learned from. :func:`vaefeat.export_pipeline`
    writes it into the graph.

    Parameters
    ----------
    estimator : classifier
        With ``predict_proba``. Wrap a fitted one in :class:`sklearn.frozen.FrozenEstimator` to keep it as it is.
    temperature : float
        Above 1, probabilities become more even; below, more extreme.

    Attributes
    ----------
    estimator_ : classifier
        Fitted.
    classes_ : ndarray of shape (n_classes,)
    """

    def __init__(self, estimator: Any, *, temperature: float = 1.0) -> None:
        self.estimator = estimator
        self.temperature = temperature

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the classifier.

        Raises
        ------
        ConfigError
            A temperature that is not above 0.
        """
        check_number("temperature", self.temperature, above=0)
        self.estimator_ = clone(self.estimator).fit(X, y)
        self.classes_: NDArray[Any] = self.estimator_.classes_
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Give the probability of each class, (n, n_classes), in the order of ``classes_``."""
        check_is_fitted(self)
        return tempered(self.estimator_.predict_proba(X), self.temperature)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Give the label of each row, (n,): the classifier's own."""
        check_is_fitted(self)
        return np.asarray(self.estimator_.predict(X))


def tempered(probabilities_NK: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Divide log-probabilities by a temperature.

    Parameters
    ----------
    probabilities_NK : array-like of shape (n, n_classes)
        Below :data:`LEAST_PROBABILITY` they are taken for that.
    temperature : float

    Returns
    -------
    ndarray of shape (n, n_classes), float64
    """
    logits_NK = np.log(np.maximum(np.asarray(probabilities_NK, np.float64), LEAST_PROBABILITY))
    return np.asarray(softmax(logits_NK / temperature, axis=1))


def log_loss(probabilities_NK: ArrayLike, codes_N: NDArray[np.int64]) -> float:
    """Give the mean of -log p of the true classes, in nats; `codes_N` are their columns."""
    chosen_N = np.asarray(probabilities_NK, np.float64)[np.arange(len(codes_N)), codes_N]
    return float(-np.log(np.maximum(chosen_N, LEAST_PROBABILITY)).mean())


def find_temperature(probabilities_NK: ArrayLike, codes_N: NDArray[np.int64], *, n_rows: int | None = None) -> float:
    """Find the temperature of the least log-loss.

    Of few rows, all of which may have been right, none is believed to be certain: as in Platt's targets, one of n + 2
    counts as a mistake, spread over the other classes.

    Parameters
    ----------
    probabilities_NK : array-like of shape (n, n_classes)
        Of rows that the classifier has not learned from.
    codes_N : ndarray of shape (n,), int64
        Columns of their true classes.
    n_rows : int, optional
        Different rows among them, where some were asked for several times.

    Returns
    -------
    float
        Between 0.1 and 20.

    Raises
    ------
    InputError
        No rows.
    """
    if len(codes_N) == 0:
        raise InputError("got no rows to find a temperature on, wanted some that the classifier has not learned from")
    probabilities_NK = np.asarray(probabilities_NK, np.float64)
    mistaken = 1 / ((n_rows or len(codes_N)) + 2)
    targets_NK = np.full(probabilities_NK.shape, mistaken / (probabilities_NK.shape[1] - 1))
    targets_NK[np.arange(len(codes_N)), codes_N] = 1 - mistaken
    logits_NK = np.log(np.maximum(probabilities_NK, LEAST_PROBABILITY))
    found = minimize_scalar(
        lambda log_temperature: -(targets_NK * log_softmax(logits_NK / np.exp(log_temperature), axis=1)).sum(),
        bounds=(np.log(_LOWEST), np.log(_HIGHEST)),
        method="bounded",
    )
    return float(np.exp(found.x))
