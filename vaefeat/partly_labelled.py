"""What the classifiers have in common: labels of which some are missing, weights, answers, and the score of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.callback import CallbackSupportMixin

from vaefeat.calibration import cross_validated_temperature
from vaefeat.errors import InputError
from vaefeat.labels import labelled_accuracy
from vaefeat.settings import plain_value
from vaefeat.targets import Targets

__all__ = ["PartlyLabelledClassifier"]

#: Probabilities below it are taken for it: the logarithm of none is no number to sort by.
_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


class PartlyLabelledClassifier(CallbackSupportMixin, ClassifierMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """A classifier that is fitted to rows of which some have no label."""

    classes_: NDArray[Any]
    class_weight: Mapping[Any, float] | str | None
    unlabelled: int | None
    calibration: int | None
    temperature_: float

    @abstractmethod
    def predict_proba(self, X: ArrayLike) -> NDArray[np.floating[Any]]:
        """Give the probability of each class."""

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Give the most probable class of each row, an ndarray of shape (n,)."""
        probability = self.predict_proba(X)
        return np.asarray(self.classes_[probability.argmax(axis=1)])

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Give the logarithm of each class's probability, of two classes that of their ratio.

        Returns
        -------
        ndarray of shape (n, n_classes), or (n,) for two classes, float64
            In nats. For two classes it is above 0 where the second of ``classes_`` is the more probable.
        """
        logarithms = np.log(np.maximum(self.predict_proba(X), _SMALLEST, dtype=np.float64))
        return np.asarray(logarithms[:, 1] - logarithms[:, 0] if len(self.classes_) == 2 else logarithms)

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Give the accuracy on the rows that have a label: in a search, folds hold rows without one, too."""
        return labelled_accuracy(self.predict(X), y, sample_weight, unlabelled=self._mark())

    def _targets(
        self, rows: NDArray[Any], y: ArrayLike | None, sample_weight: ArrayLike | None
    ) -> tuple[NDArray[Any], Targets]:
        return Targets.collect(
            rows,
            y,
            sample_weight=sample_weight,
            class_weight=self.class_weight,
            unlabelled=self._mark(),
            estimator=type(self).__name__,
        )

    def _temperature(self, rows: NDArray[Any], classes: NDArray[Any], targets: Targets) -> float:
        if self.calibration is None:
            return 1.0
        return cross_validated_temperature(self, rows, classes, targets, n_folds=plain_value(self.calibration))

    def _mark(self) -> int | None:
        mark = plain_value(self.unlabelled)
        if mark is not None and (not isinstance(mark, int) or isinstance(mark, bool)):
            raise InputError(f"got unlabelled={mark!r}, wanted a whole number, or None where every number is a class")
        return mark
