"""What features are worth: a linear classifier on few labels, over several draws of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from vaefeat.errors import InputError

__all__ = ["HEADS", "Probe", "draw_labels", "predict", "probe"]

#: Classifiers that people put behind features. The first is the one that the data's baselines were measured with.
HEADS: Mapping[str, Callable[[], Pipeline]] = {
    "standardised": lambda: make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)),
    "as they are": lambda: make_pipeline(LogisticRegression(C=1.0, max_iter=1000)),
}


@dataclass(frozen=True)
class Probe:
    """Test errors in percent of one kind of features behind one head, one per draw.

    Attributes
    ----------
    features, head : str
    errors : tuple of float
    """

    features: str
    head: str
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean test error over the draws, in percent."""
        return float(np.mean(self.errors))

    @property
    def spread(self) -> float:
        """Standard deviation of the test error over the draws, in percentage points."""
        return float(np.std(self.errors, ddof=1)) if len(self.errors) > 1 else 0.0


def draw_labels(labels: NDArray[np.int64], *, n_labels: int, seed: int) -> NDArray[np.int64]:
    """Choose rows to label, as many of each class, at random.

    Parameters
    ----------
    labels : ndarray of shape (n,)
    n_labels : int
        In all; where the classes do not divide it, the first classes get one more.
    seed : int

    Returns
    -------
    ndarray of shape (n_labels,), int64
        Indices of the chosen rows.

    Raises
    ------
    InputError
        Fewer labels than classes, or a class with too few rows.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if n_labels < len(classes):
        raise InputError(
            f"got n_labels={n_labels} for {len(classes)} classes, wanted at least one label a class; ask for more, or, "
            "where these are no classes, set data.labelled=false"
        )
    wanted = [n_labels // len(classes) + (place < n_labels % len(classes)) for place in range(len(classes))]
    if (counts < wanted).any():
        raise InputError(f"got n_labels={n_labels}, but a class has only {counts.min()} training rows; ask for fewer")
    random = np.random.default_rng(seed)
    chosen = [
        random.choice(np.flatnonzero(labels == c), size=size, replace=False)
        for c, size in zip(classes, wanted, strict=True)
    ]
    return np.concatenate(chosen)


def probe(
    features: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    train_labels: NDArray[np.int64],
    test_labels: NDArray[np.int64],
    *,
    draws: Sequence[NDArray[np.int64]],
    on_fit: Callable[[], None] = lambda: None,
) -> list[Probe]:
    """Measure the test error of every kind of features behind every head, on the same draws of labels.

    Parameters
    ----------
    features : mapping of str to (train, test)
        Each of shape (n, d).
    train_labels, test_labels : ndarray of shape (n,)
    draws : sequence of ndarray
        Indices of the labelled training rows, as :func:`draw_labels` gives them.
    on_fit : callable
        Called after each classifier.

    Returns
    -------
    list of Probe
    """
    probes = []
    for name, (train, test) in features.items():
        for head in HEADS:
            errors = []
            for chosen in draws:
                classifier = _fitted(head, train[chosen], train_labels[chosen])
                errors.append(100 * (1 - classifier.score(test, test_labels)))
                on_fit()
            probes.append(Probe(name, head, tuple(errors)))
    return probes


def predict(
    train: NDArray[np.float32],
    test: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    *,
    head: str,
    draws: Sequence[NDArray[np.int64]],
    n_classes: int,
) -> NDArray[np.float64]:
    """Give the probabilities that one head gives the test rows, for each draw of labels.

    Parameters
    ----------
    train, test : ndarray of shape (n, d)
        Features.
    train_labels : ndarray of shape (n,)
    head : str
        A name in :data:`HEADS`.
    draws : sequence of ndarray
        Indices of the labelled training rows.
    n_classes : int

    Returns
    -------
    ndarray of shape (n_draws, n_test, n_classes)
        Zero for a class of which the training rows have none.
    """
    probabilities = np.zeros((len(draws), len(test), n_classes))
    for index, chosen in enumerate(draws):
        classifier = _fitted(head, train[chosen], train_labels[chosen])
        probabilities[index][:, classifier.classes_] = classifier.predict_proba(test)
    return probabilities


def _fitted(head: str, features: NDArray[np.float32], labels: NDArray[np.int64]) -> Pipeline:
    # Two threads would wait for each other longer than they work on so few rows.
    with warnings.catch_warnings(), threadpool_limits(1):
        # A thousand steps are enough for the error; nobody reads the coefficients.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return HEADS[head]().fit(features, labels)
