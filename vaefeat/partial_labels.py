"""Labels of which some are missing: what stands for a missing one, and classes as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from vaefeat.errors import InputError

__all__ = ["UNLABELLED", "encode_labels"]

#: The code of a row without a label.
UNLABELLED = -1
#: What NumPy makes of -1, None and NaN beside strings.
_LOST = ("-1", "None", "nan")


def encode_labels(y: ArrayLike | None, *, estimator: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Tell classes from missing labels.

    Parameters
    ----------
    y : array-like of shape (n,)
        Numbers, of which -1 and NaN are missing labels; or strings, beside which -1, None and NaN are. Strings with
        missing labels come in a list or an array of objects: an array of strings would hold the text ``"-1"``.
    estimator : str
        Its name, for error messages.

    Returns
    -------
    classes : ndarray of shape (n_classes,)
        Sorted.
    codes : ndarray of shape (n,), int64
        Index into `classes`, or -1.

    Raises
    ------
    InputError
        No labels, labels of fewer than two classes, or text where a missing label must have been.
    ValueError
        Labels that are no classes, from scikit-learn.
    """
    if y is None:
        raise InputError(
            f"{estimator} requires y to be passed, but the target y is None; give labels, and -1 for rows without one"
        )
    if isinstance(y, list | tuple) and any(isinstance(label, str) for label in y):
        y = np.array(y, dtype=object)
    labels = column_or_1d(y, warn=True)
    if labels.dtype.kind in "US" and (lost := sorted({*map(str, labels.tolist())} & {*_LOST})):
        raise InputError(
            f"got labels of dtype {labels.dtype} with the text {lost[0]!r}, wanted a number, None or NaN for a row "
            "without a label; make the array with dtype=object"
        )
    known = np.array([not _is_missing(label) for label in labels.tolist()], dtype=bool)
    if not known.any():
        raise InputError(
            f"got no label among {len(labels)} rows, wanted some of at least 2 classes; for rows without any label, "
            "take VAETransformer"
        )
    # Objects that are all of one kind become an array of that kind.
    given = np.array(labels[known].tolist()) if labels.dtype.kind == "O" else labels[known]
    if given.dtype.kind == "f" and not np.isfinite(given).all():
        raise InputError("Input y contains infinity, wanted classes, and NaN or -1 for a row without a label")
    classes, found = np.unique(given, return_inverse=True)
    # Each class twice: of labels that are mostly different scikit-learn warns, and few labels a class are the point.
    check_classification_targets(np.repeat(classes, 2))
    if len(classes) < 2:
        raise InputError(
            f"got labels of one class only ({classes.tolist()[0]!r}) among {len(labels)} rows, wanted at least 2; "
            "-1 is no class but a missing label: rename the class that it stands for"
        )
    codes = np.full(len(labels), UNLABELLED, dtype=np.int64)
    codes[known] = found
    return classes, codes


def _is_missing(label: object) -> bool:
    if label is None or label is np.ma.masked:
        return True
    # NaN, and pandas' NA where it stands for one.
    if isinstance(label, float) and label != label:
        return True
    return isinstance(label, int | float) and not isinstance(label, bool) and label == UNLABELLED
