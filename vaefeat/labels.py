"""Labels of which most are missing: what marks them, and what the others are."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chisquare
from sklearn.metrics import accuracy_score
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, column_or_1d

from vaefeat.errors import InputError

__all__ = [
    "UNLABELLED",
    "class_names",
    "class_shares",
    "encode_labels",
    "given_shares",
    "labelled_accuracy",
    "labelled_rows",
]

#: scikit-learn's mark for a row without a label.
UNLABELLED = -1
#: What NumPy makes of -1, None and NaN beside strings.
_LOST = {"-1", "None", "nan"}
#: How improbable the labelled rows' shares must be under equal ones before they are believed.
_SURPRISE = 0.01


def encode_labels(
    y: ArrayLike | None, *, estimator: str, unlabelled: int | None = UNLABELLED
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Tell classes and unlabelled rows apart.

    Parameters
    ----------
    y : array-like of shape (n,)
        Labels. -1, None and NaN mark rows without one. Strings go with them in a list or an array of dtype object:
        ``np.array(["cat", -1, "dog"])`` would turn -1 into a text.
    estimator : str
        Its name, for error messages.
    unlabelled : int or None
        The number that marks rows without a label. None where every number is a class, -1 too.

    Returns
    -------
    classes : ndarray of shape (K,)
        Sorted.
    codes : ndarray of shape (n,), int64
        Index of each row's class, -1 where it has none.

    Raises
    ------
    InputError
        No labels, or only one class, or labels that cannot be told apart.
    """
    if y is None:
        raise InputError(
            f"{estimator} requires y to be passed, but the target y is None; give labels, and -1 for rows without one"
        )
    if isinstance(y, list | tuple) and any(isinstance(label, str) for label in y):
        y = np.array(y, dtype=object)
    values = column_or_1d(y, warn=True)
    if lost := sorted({label for label in values.tolist() if isinstance(label, str)} & _LOST):
        raise InputError(
            f"got the text {lost[0]!r} among labels, wanted the number -1, None or NaN for unlabelled rows; NumPy "
            "turns it into text beside strings: give np.array(labels, dtype=object), and another name to a class of "
            "that name"
        )
    known = ~_unlabelled(values, unlabelled)
    if not known.any():
        raise InputError(
            f"got no label among {len(values)} rows, wanted some of at least 2 classes; for rows without any label, "
            "take VAETransformer"
        )
    given = _natural(values[known])
    if given.dtype.kind == "f" and not np.isfinite(given).all():
        raise InputError("got infinite labels, wanted classes; NaN, None or -1 mark a row without one")
    try:
        classes, codes = np.unique(given, return_inverse=True)
    except TypeError as error:
        raise InputError(f"got labels of several types, wanted one: make all of them texts ({error})") from error
    with warnings.catch_warnings():
        # One label a class is what this is for, and no sign of a regression.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        check_classification_targets(given)
    if len(classes) < 2:
        raise InputError(
            f"got labels of one class only ({classes.tolist()[0]!r}) among {len(values)} rows, wanted at least 2; "
            "-1 is no class but a missing label: rename the class that it stands for, or give unlabelled=None to a "
            "classifier that has this setting"
        )
    encoded = np.full(len(values), UNLABELLED, dtype=np.int64)
    encoded[known] = codes
    return classes, encoded


def labelled_accuracy(
    predicted: NDArray[Any],
    y: ArrayLike,
    sample_weight: ArrayLike | None = None,
    *,
    unlabelled: int | None = UNLABELLED,
) -> float:
    """Give the share of labelled rows whose class was predicted; rows marked as unlabelled say nothing.

    Raises
    ------
    InputError
        No row has a label.
    """
    if isinstance(y, list | tuple) and any(isinstance(label, str) for label in y):
        y = np.array(y, dtype=object)
    values = column_or_1d(y)
    check_consistent_length(predicted, values)
    known = ~_unlabelled(values, unlabelled)
    if not known.any():
        raise InputError(f"got no label among {len(values)} rows to score, wanted at least one")
    weights = None if sample_weight is None else np.asarray(sample_weight)[known]
    return float(accuracy_score(_natural(values[known]), predicted[known], sample_weight=weights))


def labelled_rows(y: ArrayLike) -> NDArray[np.bool_]:
    """Tell which rows (n,) have a label: all but those with -1, None or NaN."""
    return ~_unlabelled(column_or_1d(np.asarray(y, dtype=object)), UNLABELLED)


def class_names(classes: NDArray[Any]) -> tuple[str | int | float | bool, ...]:
    """Give classes as plain values that JSON can hold.

    Raises
    ------
    InputError
        Others than texts, numbers and truth values.
    """
    plain = tuple(value.item() if isinstance(value, np.generic) else value for value in classes.tolist())
    if odd := [value for value in plain if not isinstance(value, str | int | float | bool)]:
        raise InputError(f"got the class {odd[0]!r}, wanted texts or numbers, which a bundle can name; convert them")
    return plain


def class_shares(counts_K: ArrayLike) -> NDArray[np.float64]:
    """Guess the share of each class (K,) among all rows from how many of the labelled ones are of it.

    Equal shares, unless the counts would be improbable under them (a chi-squared test at 1 %): a few labels drawn by
    hand are as many of each class, or as good as.
    """
    counts = np.asarray(counts_K, dtype=np.float64)
    if chisquare(counts).pvalue >= _SURPRISE:
        return np.full(len(counts), 1 / len(counts))
    # One more of each: a class that is rare is not one that is impossible.
    return np.asarray((counts + 1) / (counts.sum() + len(counts)))


def given_shares(shares: ArrayLike, n_classes: int) -> NDArray[np.float64]:
    """Check the shares of the classes (K,) that a caller gives, and make them sum to one.

    Raises
    ------
    InputError
        Not one positive number for each class.
    """
    numbers = np.asarray(shares)
    # Comparing first: NaN is in no relation, and what is no number is not compared.
    positive = numbers.dtype.kind in "iuf" and bool(((numbers > 0) & (numbers < np.inf)).all())
    if numbers.shape != (n_classes,) or not positive:
        raise InputError(f"got class_shares={shares!r}, wanted {n_classes} positive numbers, one for each class")
    return np.asarray(numbers / numbers.sum())


def _natural(values: NDArray[Any]) -> NDArray[Any]:
    """Give numbers that only shared an array with None the type of numbers."""
    plain = np.array(values.tolist())
    return plain if values.dtype == object and plain.dtype.kind in "biuf" else values


def _unlabelled(values: NDArray[Any], mark: int | None) -> NDArray[np.bool_]:
    if values.dtype == object:
        return np.array([_is_missing(value, mark) for value in values], dtype=bool)
    if values.dtype.kind == "f":
        return np.asarray(np.isnan(values) | _marked(values, mark))
    if values.dtype.kind == "i":
        return _marked(values, mark)
    return np.zeros(len(values), dtype=bool)


def _marked(values: NDArray[Any], mark: int | None) -> NDArray[np.bool_]:
    return np.zeros(len(values), dtype=bool) if mark is None else np.asarray(values == mark)


def _is_missing(value: object, mark: int | None) -> bool:
    # pandas' mark compares as neither equal nor different.
    if value is None or type(value).__name__ == "NAType":
        return True
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and (value == mark or math.isnan(value))  # type: ignore[arg-type]  # it is a number
