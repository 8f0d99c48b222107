"""Which fitted steps of a scikit-learn pipeline can be written as ONNX: taken apart, and refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

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
    if type(step) is KNeighborsClassifier and (step.weights != "uniform" or step.effective_metric_ != "euclidean"):
        raise InputError(
            f"got KNeighborsClassifier with weights={step.weights!r} and the metric {step.effective_metric_!r}, wanted "
            "weights='uniform' and Euclidean distances; others are not translated exactly"
        )
    if type(step) is HistGradientBoostingClassifier and step.is_categorical_ is not None:
        raise InputError(
            "got HistGradientBoostingClassifier with categorical features, wanted numbers only, as features of an "
            "encoder are; leave out categorical_features="
        )
    if type(step) is CalibratedClassifierCV:
        for part in step.calibrated_classifiers_:
            fitted_steps([("estimator", part.estimator)], calibrated=True)
