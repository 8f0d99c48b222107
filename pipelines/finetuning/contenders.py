"""What is tried: classifiers behind the features, from cheap to dear, and the fine-tuned encoder."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

from vaefeat.bundle import Bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.features import VAEFeatures
from vaefeat.finetune import FineTuneClassifier
from vaefeat.heads import few_label_head
from vaefeat.labels import UNLABELLED

__all__ = ["CONTENDERS", "FINETUNE", "Contender", "Ground", "Trained", "labelled", "train"]

FINETUNE = "finetune"
_FOLDS = _NEIGHBOURS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Ground:
    """What all of them learn from, but for the labels.

    Attributes
    ----------
    bundle : Bundle
    rows : ndarray of shape (n, ...)
    features : ndarray of shape (n, d), float32
        The bundle's posterior means of the rows.
    max_steps : int
        Of fine-tuning.
    """

    bundle: Bundle
    rows: NDArray[Any]
    features: NDArray[np.float32]
    max_steps: int


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way from features, or rows, and labels to a classifier.

    Attributes
    ----------
    name, title : str
    labels_a_class : int
        Labels of each class that it needs.
    make : callable or None
        From the fewest labels of a class and a seed to a classifier that is not fitted; None for the fine-tuned
        encoder.
    unlabelled : bool
        Whether it learns from rows without a label, too.
    """

    name: str
    title: str
    labels_a_class: int = 1
    make: Callable[[int, int], Any] | None
    unlabelled: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A fitted one.

    Attributes
    ----------
    classifier : Pipeline or FineTuneClassifier
        From rows to labels.
    head : estimator or None
        From features to labels; None for the fine-tuned encoder.
    seconds : float
        That training took, features not counted.
    """

    classifier: Any
    head: Any
    seconds: float

    def predict_proba(self, ground: Ground, positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Give the probabilities of some rows, (m, n_classes); features that are there are not computed again."""
        if self.head is None:
            return np.asarray(self.classifier.predict_proba(ground.rows[positions]), np.float64)
        return np.asarray(self.head.predict_proba(ground.features[positions]), np.float64)


def _svc(fewest: int, seed: int) -> Any:
    # Of an SVC's scores alone nobody can say how probable a class is.
    tempering = CalibratedClassifierCV(SVC(), method="temperature", ensemble=False, cv=min(_FOLDS, fewest))
    return make_pipeline(StandardScaler(), tempering)


#: From cheap to dear: of equal ones the first is taken.
CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(
            name="logistic",
            title="logistic regression",
            make=lambda fewest, seed: few_label_head("logistic", random_state=seed),
        ),
        Contender(
            name="knn",
            title="nearest neighbours",
            make=lambda fewest, seed: KNeighborsClassifier(min(_NEIGHBOURS, fewest)),
        ),
        Contender(name="svc", title="support vectors", labels_a_class=2, make=_svc),
        Contender(
            name="few_label_head",
            title="few_label_head()",
            make=lambda fewest, seed: few_label_head(random_state=seed),
            unlabelled=True,
        ),
        Contender(name=FINETUNE, title="fine-tuned encoder", make=None, unlabelled=True),
    )
}


def labelled(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Give the positions of rows with a label, where `labels` (n,) are those of :meth:`GivenLabels.join`'s."""
    return np.flatnonzero(np.array([label != UNLABELLED for label in labels.tolist()], dtype=bool))


def train(contender: Contender, ground: Ground, labels: NDArray[Any], *, seed: int) -> Trained:
    """Fit one of them.

    Parameters
    ----------
    contender : Contender
    ground : Ground
    labels : ndarray of shape (n,)
        -1 where there is none.
    seed : int

    Raises
    ------
    VaefeatError
        Whatever fine-tuning raises.
    """
    started = time.perf_counter()
    if contender.make is None:
        classifier = FineTuneClassifier(ground.bundle, max_steps=ground.max_steps, random_state=seed)
        classifier.fit(ground.rows, labels)
        return Trained(classifier=classifier, head=None, seconds=time.perf_counter() - started)
    places = labelled(labels)
    given = _plain(labels[places])
    head = contender.make(int(np.unique(given, return_counts=True)[1].min()), seed)
    # Two threads would wait for each other longer than they work on so few rows.
    with warnings.catch_warnings(), threadpool_limits(1):
        # A thousand steps are enough for the labels; nobody reads the coefficients.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if contender.unlabelled:
            head.fit(ground.features, labels)
        else:
            head.fit(ground.features[places], given)
    seconds = time.perf_counter() - started
    return Trained(classifier=_behind_features(ground, head), head=head, seconds=seconds)


def _plain(labels: NDArray[Any]) -> NDArray[Any]:
    """Give texts that shared an array with -1 the type of texts."""
    return np.array(labels.tolist())


def _behind_features(ground: Ground, head: Any) -> Pipeline:
    features = VAEFeatures(OnnxEncoder(ground.bundle, device="cpu"))
    return Pipeline([("features", features.fit(ground.rows[:1])), ("head", head)])
