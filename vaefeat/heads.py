"""Cheap classifiers on features that an encoder has made: what to put behind them for few labels.

Everything here is scikit-learn's, put together for a handful of labels and many rows without; ``docs/heads.md`` says
which when. None of it trains the encoder: :class:`vaefeat.FineTuneClassifier` does.

N rows, F features, K classes, M components of a mixture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances_argmin
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from vaefeat.labels import UNLABELLED, class_shares, encode_labels, given_shares, labelled_accuracy
from vaefeat.propagation import spread_labels
from vaefeat.settings import check_choice, check_int

if TYPE_CHECKING:
    from numpy.random import RandomState

__all__ = ["HEADS", "FewLabelHead", "few_label_head"]

#: What there is to choose from.
HEADS = ("auto", "prototype", "logistic", "spread", "mixture")

#: C of a logistic regression on features of unit variance: from the labels alone where they are too few to choose one,
#: and from guesses, which are many.
_C, _C_OF_GUESSES = 1.0, 0.1
#: What a label given counts, a guessed one counting 1: where many are given, guesses must not outvote them.
_WEIGHT_OF_GIVEN = 10.0
#: Where every class has as many labels as this, C is chosen among these by log-loss.
_LABELS_TO_CHOOSE_C = 10
_CS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_FOLDS = 5
#: Where every class has as many labels as this, spreading has to be no worse than a line, on so many rows.
_LABELS_TO_COMPARE, _COMPARING_ROWS = 3, 5000
#: Labelled rows that choose C; it hardly depends on more.
_CHOOSING_ROWS = 2000
_MAX_ITER = 1000
#: By which cosines are divided to become log-probabilities.
_TEMPERATURE = 0.1
_COMPONENTS_PER_CLASS, _ROWS_PER_COMPONENT = 10, 20
_MIXTURE_FEATURES = 20
#: What the labelled row nearest to a component's mean counts, in labelled rows inside it.
_WEIGHT_OF_NEAREST = 0.1


def few_label_head(
    kind: str = "auto",
    *,
    class_shares: ArrayLike | None = None,
    max_rows: int = 20_000,
    random_state: int | RandomState | None = None,
) -> FewLabelHead:
    """Give a classifier to put behind :class:`vaefeat.VAEFeatures` when labels are few.

    Parameters
    ----------
    kind : {"auto", "prototype", "logistic", "spread", "mixture"}
    class_shares : array-like of shape (n_classes,), optional
    max_rows : int
    random_state : int, RandomState or None
        See :class:`FewLabelHead`.

    Returns
    -------
    FewLabelHead
        Not fitted, its settings judged here and not only in ``fit``.

    Raises
    ------
    ConfigError
        An unknown kind (the nearest is named), or an impossible number of rows.

    Examples
    --------
    >>> from sklearn.pipeline import make_pipeline
    >>> from vaefeat import VAEFeatures, few_label_head
    >>> pipe = make_pipeline(VAEFeatures("runs/digits"), few_label_head())
    >>> pipe.fit(X, y).predict(X_new)  # y is -1 where there is no label  # doctest: +SKIP
    """
    head = FewLabelHead(kind, class_shares=class_shares, max_rows=max_rows, random_state=random_state)
    head.check_settings()
    return head


class FewLabelHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classify features from few labels, with the help of rows that have none.

    In `y`, -1, None and NaN stand for a missing label, beside strings in a list or an array of objects. Features are
    centred and divided by one number, the root of their mean variance over all rows of `X`: features of one encoder
    share their unit, and those that vary little say little.

    Parameters
    ----------
    kind : {"auto", "prototype", "logistic", "spread", "mixture"}
        - ``prototype``: the mean direction of each class; probabilities are the softmax of the cosines to them.
        - ``logistic``: logistic regression. With at least 10 labels of each class, C is chosen by cross-validation;
          with fewer it is 1.
        - ``spread``: labels flow over a graph of nearest neighbours to the rows without one, and a logistic regression
          learns what arrived, a label given counting ten times one that arrived. It answers for any row, and keeps
          no others (Zhou et al. 2004; see :func:`vaefeat.propagation.spread_labels`).
        - ``mixture``: a Gaussian mixture of all rows in 20 principal components; each of its components is named by the
          labelled rows in it, and one without any by the labelled row nearest to its mean.
        - ``auto``: ``spread`` where there are rows without a label and no more than half of `max_rows` have one (all of
          these are in the graph, and the others must find room), else ``logistic``. With at least 3 labels of each
          class it is also ``logistic`` where that tells more of the labels that were hidden from both, in up to five
          folds: labels flow astray where classes overlap.
    class_shares : array-like of shape (n_classes,), optional
        Share of each class, in sorted order, among all rows; ``spread`` and ``mixture`` use it. When None, classes are
        taken to be **equally frequent**, unless the labelled rows' shares are too unlike for chance (a chi-squared test
        at 1 %); then these are believed. ``prototype`` takes classes as equally frequent, ``logistic`` as frequent as
        among the labelled rows.
    max_rows : int
        Rows, at most, that ``spread`` and ``mixture`` look at: all those with a label, and a random sample of the
        others. Memory grows with this number, and the time of ``spread`` with its square (20,000 rows of 128 features:
        some six seconds of one processor).
    random_state : int, RandomState or None
        Of that sample, the folds, and the mixture's start.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    kind_ : str
        What ``auto`` chose.
    head_ : Pipeline
        The fitted parts.
    class_shares_ : ndarray of shape (n_classes,)
        What was assumed.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Where `X` had column names.

    References
    ----------
    Zhou et al. 2004, Learning with Local and Global Consistency. Zhu, Ghahramani and Lafferty 2003 (class mass
    normalisation). Snell et al. 2017, Prototypical Networks, arXiv:1703.05175.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from vaefeat import FewLabelHead
    >>> X, y = load_digits(return_X_y=True)
    >>> few = np.where(np.arange(len(y)) < 50, y, -1)
    >>> head = FewLabelHead(random_state=0).fit(X, few)
    >>> head.kind_, head.score(X, y) > 0.85
    ('spread', True)
    """

    def __init__(
        self,
        kind: str = "auto",
        *,
        class_shares: ArrayLike | None = None,
        max_rows: int = 20_000,
        random_state: int | RandomState | None = None,
    ) -> None:
        self.kind = kind
        self.class_shares = class_shares
        self.max_rows = max_rows
        self.random_state = random_state

    def check_settings(self) -> None:
        """Refuse what no rows could make possible.

        Raises
        ------
        ConfigError
        """
        check_choice("kind", self.kind, HEADS)
        check_int("max_rows", self.max_rows, at_least=2)

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit to features and the labels there are.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
        y : array-like of shape (n,)
            -1 where there is no label.

        Raises
        ------
        InputError
            No labels, or those of one class only; class shares that are not positive, or not one for each class.
        ConfigError
            An unknown kind, or an impossible number of rows.
        """
        self.check_settings()
        classes, codes = encode_labels(y, estimator=type(self).__name__)
        rows = validate_data(self, X, dtype=[np.float64, np.float32])
        check_consistent_length(rows, codes)
        self.class_shares_ = self._shares(codes, len(classes))
        random = check_random_state(self.random_state)
        scaler = _one_scale(rows)
        self.kind_ = self._chosen(rows, codes, scaler, random) if self.kind == "auto" else self.kind
        seen = np.flatnonzero(codes >= 0) if self.kind_ in _LABELLED_ONLY else self._sample(codes, random)
        parts = _PARTS[self.kind_](scaler.transform(rows[seen]), codes[seen], self.class_shares_, random)
        self.head_ = make_pipeline(scaler, parts)
        self.classes_ = classes
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Give the probability of each class.

        Parameters
        ----------
        X : array-like of shape (n, n_features)

        Returns
        -------
        ndarray of shape (n, n_classes)
            In the order of ``classes_``.
        """
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        found: NDArray[np.float64] = self.head_.predict_proba(rows)
        return found

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Give the most probable class of each row, an ndarray of shape (n,)."""
        probability = self.predict_proba(X)
        return np.asarray(self.classes_[probability.argmax(axis=1)])

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Give the accuracy on the rows that have a label: in a search, folds hold rows without one, too."""
        return labelled_accuracy(self.predict(X), y, sample_weight)

    def _shares(self, codes: NDArray[np.int64], n_classes: int) -> NDArray[np.float64]:
        if self.class_shares is None:
            return class_shares(np.bincount(codes[codes >= 0], minlength=n_classes))
        return given_shares(self.class_shares, n_classes)

    def _chosen(self, rows: NDArray[Any], codes: NDArray[np.int64], scaler: StandardScaler, random: RandomState) -> str:
        labelled = codes[codes >= 0]
        if len(labelled) == len(codes) or len(labelled) > self.max_rows / 2:
            return "logistic"
        if (fewest := np.bincount(labelled).min()) < _LABELS_TO_COMPARE:
            return "spread"
        seen = self._sample(codes, random, max_rows=max(2 * len(labelled), min(_COMPARING_ROWS, self.max_rows)))
        features, known = scaler.transform(rows[seen]), codes[seen]
        folds = StratifiedKFold(min(_FOLDS, fewest), shuffle=True, random_state=random.randint(2**31 - 1))
        places, lead = np.flatnonzero(known >= 0), 0.0
        for shown, hidden in folds.split(places, known[places]):
            partial, asked = known.copy(), places[hidden]
            partial[asked] = UNLABELLED
            line = LogisticRegression(C=_C, max_iter=_MAX_ITER).fit(features[places[shown]], known[places[shown]])
            spread = spread_labels(features, partial, self.class_shares_)[asked]
            lead += (spread == known[asked]).sum() - (line.predict(features[asked]) == known[asked]).sum()
        return "spread" if lead >= 0 else "logistic"

    def _sample(
        self, codes: NDArray[np.int64], random: RandomState, *, max_rows: int | None = None
    ) -> NDArray[np.int64]:
        labelled, others = np.flatnonzero(codes >= 0), np.flatnonzero(codes < 0)
        n_others = max(0, (max_rows or self.max_rows) - len(labelled))
        if len(others) > n_others:
            others = random.choice(others, n_others, replace=False)
        # In the order of the rows, so that it is the same sample whichever was drawn first.
        return np.sort(np.concatenate([labelled, others]))


class _Prototypes(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Mean directions of classes; log-probabilities are cosines to them over a temperature."""

    def fit(self, X_NF: NDArray[Any], y_N: NDArray[np.int64]) -> Self:
        self.classes_ = np.unique(y_N)
        unit_NF = normalize(X_NF)
        self.prototypes_KF_ = normalize(np.stack([unit_NF[y_N == code].mean(axis=0) for code in self.classes_]))
        return self

    def predict_proba(self, X_NF: NDArray[Any]) -> NDArray[np.float64]:
        cosines_NK = normalize(X_NF) @ self.prototypes_KF_.T
        return np.asarray(softmax(cosines_NK.astype(np.float64) / _TEMPERATURE, axis=1))


class _NamedMixture(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A Gaussian mixture whose components stand for classes: p(y|x) = sum over m of p(m|x) p(y|m)."""

    def __init__(self, shares: NDArray[np.float64], random_state: int) -> None:
        self.shares = shares
        self.random_state = random_state

    def fit(self, X_NF: NDArray[Any], y_N: NDArray[np.int64]) -> Self:
        self.classes_ = np.arange(len(self.shares))
        # Of single precision, responsibilities would not sum to one.
        X_NF = X_NF.astype(np.float64)
        n_components = min(_COMPONENTS_PER_CLASS * len(self.shares), 1 + len(X_NF) // _ROWS_PER_COMPONENT)
        self.mixture_ = GaussianMixture(
            n_components,
            covariance_type="diag",
            reg_covar=1e-3,  # of features of unit variance; rows that repeat would have none
            init_params="k-means++",
            random_state=self.random_state,
        )
        with warnings.catch_warnings():
            # A mixture that still moves a little names rows as well.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.mixture_.fit(X_NF)
        self.names_MK_ = self._names(X_NF[y_N >= 0], y_N[y_N >= 0])
        return self

    def _names(self, X_NF: NDArray[Any], y_N: NDArray[np.int64]) -> NDArray[np.float64]:
        one_hot_NK = np.eye(len(self.shares))[y_N]
        # Labels may have been drawn as many of each class; rows are as the shares say.
        weight_K = self.shares * len(y_N) / one_hot_NK.sum(axis=0)
        named_MK = self.mixture_.predict_proba(X_NF).T @ (one_hot_NK * weight_K)
        nearest_M = pairwise_distances_argmin(self.mixture_.means_, X_NF)
        named_MK += _WEIGHT_OF_NEAREST * one_hot_NK[nearest_M]
        return np.asarray(named_MK / named_MK.sum(axis=1, keepdims=True))

    def predict_proba(self, X_NF: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(self.mixture_.predict_proba(X_NF.astype(np.float64)) @ self.names_MK_)


def _one_scale(rows_NF: NDArray[Any]) -> StandardScaler:
    """Centre features, and divide all by one number: standardised ones would count alike, however little they say."""
    scaler = StandardScaler().fit(rows_NF)
    scaler.scale_ = np.full_like(scaler.scale_, np.sqrt(scaler.var_.mean()) or 1.0)
    return scaler


def _prototype(X_NF: NDArray[Any], y_N: NDArray[np.int64], shares_K: NDArray[Any], random: RandomState) -> Any:
    return _Prototypes().fit(X_NF, y_N)


def _logistic(X_NF: NDArray[Any], y_N: NDArray[np.int64], shares_K: NDArray[Any], random: RandomState) -> Any:
    if np.bincount(y_N).min() < _LABELS_TO_CHOOSE_C:
        return LogisticRegression(C=_C, max_iter=_MAX_ITER).fit(X_NF, y_N)
    n_per_class = max(_LABELS_TO_CHOOSE_C, _CHOOSING_ROWS // len(shares_K))
    mixed = random.permutation(len(y_N))
    some = np.concatenate([mixed[y_N[mixed] == code][:n_per_class] for code in range(len(shares_K))])
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=random.randint(2**31 - 1))
    choice = GridSearchCV(
        LogisticRegression(max_iter=_MAX_ITER), {"C": _CS}, scoring="neg_log_loss", cv=folds, refit=False
    )
    choice.fit(X_NF[some], y_N[some])
    return LogisticRegression(**choice.best_params_, max_iter=_MAX_ITER).fit(X_NF, y_N)


def _spread(X_NF: NDArray[Any], y_N: NDArray[np.int64], shares_K: NDArray[Any], random: RandomState) -> Any:
    spread_N = spread_labels(X_NF, y_N, shares_K)
    weights_N = np.where(y_N >= 0, _WEIGHT_OF_GIVEN, 1.0)
    reached = spread_N >= 0
    head = LogisticRegression(C=_C_OF_GUESSES, max_iter=_MAX_ITER)
    return head.fit(X_NF[reached], spread_N[reached], sample_weight=weights_N[reached])


def _mixture(X_NF: NDArray[Any], y_N: NDArray[np.int64], shares_K: NDArray[Any], random: RandomState) -> Any:
    seed = random.randint(2**31 - 1)
    reduced = PCA(min(_MIXTURE_FEATURES, *X_NF.shape), random_state=seed)
    return make_pipeline(reduced, _NamedMixture(shares_K, seed)).fit(X_NF, y_N)


_LABELLED_ONLY = ("prototype", "logistic")
_PARTS: Mapping[str, Callable[[NDArray[Any], NDArray[np.int64], NDArray[Any], RandomState], Any]] = {
    "prototype": _prototype,
    "logistic": _logistic,
    "spread": _spread,
    "mixture": _mixture,
}
