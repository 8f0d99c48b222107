"""Which fitted steps of a scikit-learn pipeline can be written as ONNX: taken apart, and refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA, KernelPCA, TruncatedSVD
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_selection import SelectKBest, VarianceThreshold
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import (
    Binarizer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.semi_supervised import SelfTrainingClassifier
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from vaefeat.errors import InputError
from vaefeat.heads import FewLabelHead

__all__ = ["CLASSIFIERS", "TRANSFORMERS", "fitted_steps"]

#: What may stand between the features and the classifier.
TRANSFORMERS = (
    Binarizer,
    KernelPCA,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    PCA,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    SelectKBest,
    StandardScaler,
    TruncatedSVD,
    VarianceThreshold,
)
#: What may end a pipeline, besides what :func:`fitted_steps` takes apart.
CLASSIFIERS = (
    CalibratedClassifierCV,
    DecisionTreeClassifier,
    ExtraTreesClassifier,
    HistGradientBoostingClassifier,
    KNeighborsClassifier,
    LogisticRegression,
    RandomForestClassifier,
    SVC,
)
#: Kinds of :class:`vaefeat.FewLabelHead` that are a line in the end.
_LINES = ("logistic", "spread")


def fitted_steps(steps: Iterable[tuple[str, Any]], *, calibrated: bool = False) -> list[tuple[str, Any]]:
    """Take apart what only holds a fitted estimator, until nothing but what can be written is left.

    Parameters
    ----------
    steps : iterable of (str, estimator)
        Fitted; of a pipeline behind its features.
    calibrated : bool
        Whether these are what :class:`CalibratedClassifierCV` has calibrated, which needs no probabilities.

    Returns
    -------
    list of (str, estimator)
        Pipelines flattened, ``passthrough`` left out; of :class:`SelfTrainingClassifier`, :class:`FrozenEstimator`,
        searches and :class:`vaefeat.FewLabelHead` what they fitted.

    Raises
    ------
    InputError
        An estimator that is not among :data:`TRANSFORMERS` and :data:`CLASSIFIERS`, by name.
    """
    found = [(name, part) for name, step in steps for part in _opened(step)]
    for place, (name, step) in enumerate(found):
        last = place == len(found) - 1
        allowed = CLASSIFIERS if last else TRANSFORMERS
        if type(step) not in allowed:
            names = ", ".join(sorted(kind.__name__ for kind in allowed))
            wanted = "a classifier at the end" if last else "steps between features and classifier"
            raise InputError(
                f"got {_named(step)} as step {name!r}, wanted {wanted} that can be written as ONNX: {names}; put one "
                f"of these in its place, or serve the features alone and keep {type(step).__name__} in Python"
            )
        _refuse_settings(step, calibrated=calibrated)
    return found


def _opened(step: Any) -> list[Any]:
    if step is None or (isinstance(step, str) and step == "passthrough"):
        return []
    if type(step) is Pipeline:
        return [part for _, inner in step.steps for part in _opened(inner)]
    if type(step) is FrozenEstimator:
        return _opened(step.estimator)
    if type(step) is SelfTrainingClassifier:
        return _opened(step.estimator_)
    if type(step) in (GridSearchCV, RandomizedSearchCV) and hasattr(step, "best_estimator_"):
        return _opened(step.best_estimator_)
    if type(step) is FewLabelHead and step.kind_ in _LINES:
        *scaling, line = _opened(step.head_)
        named = copy.copy(line)
        named.classes_ = step.classes_[line.classes_]
        return [*scaling, named]
    return [step]


def _named(step: Any) -> str:
    return f"FewLabelHead({step.kind_!r})" if type(step) is FewLabelHead else type(step).__name__


def _refuse_settings(step: Any, *, calibrated: bool) -> None:
    """Refuse settings that are not translated exactly, or that leave nothing to translate."""
    if type(step) is SVC and not (calibrated or hasattr(step, "predict_proba")):
        raise InputError(
            "got an SVC without probabilities, wanted them; take CalibratedClassifierCV(SVC(), ensemble=False)"
        )
    if type(step) is SVC and step.break_ties and len(step.classes_) > 2 and not calibrated:
        raise InputError(
            "got an SVC with break_ties=True, wanted it without, or calibrated; ONNX's classifier decides by votes"
        )
    if type(step) is KNeighborsClassifier:
        _refuse_neighbours(step)
    if type(step) is HistGradientBoostingClassifier and step.is_categorical_ is not None:
        raise InputError(
            "got HistGradientBoostingClassifier with categorical features, wanted numbers only, as features of an "
            "encoder are; leave out categorical_features="
        )
    if type(step) is CalibratedClassifierCV:
        for part in step.calibrated_classifiers_:
            fitted_steps([("estimator", part.estimator)], calibrated=True)


def _refuse_neighbours(step: KNeighborsClassifier) -> None:
    """Refuse what is not written exactly, and fitted rows of which scikit-learn counts either, by their order."""
    if step.weights not in ("uniform", "distance") or step.effective_metric_ != "euclidean":
        raise InputError(
            f"got KNeighborsClassifier with weights={step.weights!r} and the metric {step.effective_metric_!r}, wanted "
            "weights='uniform' or 'distance' and Euclidean distances; others are not translated exactly"
        )
    rows = np.asarray(step._fit_X)
    _, place = np.unique(rows, axis=0, return_inverse=True)
    pairs = np.unique(np.stack([place.ravel(), step._y]), axis=1)
    if n_mixed := pairs.shape[1] - len(np.unique(pairs[0])):
        raise InputError(
            f"got KNeighborsClassifier with {n_mixed} fitted rows whose features are those of a row of another class: "
            "they are equally far from every row, and which are counted is left to chance; leave such rows out"
        )
    if (rows == np.rint(rows)).all():
        raise InputError(
            "got KNeighborsClassifier fitted to whole numbers, wanted features without steps: many rows are equally "
            "far, and which are counted is left to chance; leave out Binarizer, or take another classifier"
        )
