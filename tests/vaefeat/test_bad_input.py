"""What the estimators say to rows and labels that they cannot use: what scikit-learn says, or more."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import load_digits

from vaefeat import FineTuneClassifier, VAEClassifier, VAEFeatures, VAETransformer

Y: NDArray[np.int64] = load_digits().target[:100]
NAMES = [f"pixel{i}" for i in range(64)]
KINDS = ["features", "transformer", "fine-tuning", "generative"]
CLASSIFIERS = KINDS[2:]


@pytest.fixture(scope="module")
def frame(digits_rows: NDArray[np.uint8]) -> pd.DataFrame:
    return pd.DataFrame(digits_rows[:100].reshape(100, -1), columns=NAMES)


@pytest.fixture(scope="module")
def estimators(digits_bundle: Path) -> dict[str, Any]:
    return {
        "features": VAEFeatures(digits_bundle),
        "transformer": VAETransformer(2, hidden_dims=(8,), max_epochs=1, random_state=0),
        "fine-tuning": FineTuneClassifier(digits_bundle, max_steps=1, random_state=0),
        "generative": VAEClassifier(n_components=2, hidden_dims=(8,), max_epochs=1, random_state=0),
    }


@pytest.fixture(scope="module")
def fitted(estimators: dict[str, Any], frame: pd.DataFrame) -> dict[str, Any]:
    return {kind: clone(estimator).fit(frame, Y) for kind, estimator in estimators.items()}


def object_column(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(pixel3=["red"] * len(frame))


def with_value(frame: pd.DataFrame, value: float) -> pd.DataFrame:
    changed = frame.astype(np.float64)
    changed.iloc[3, 5] = value
    return changed


#: What is done to the rows, the error, and what it says.
ROWS: dict[str, tuple[Any, type[Exception], str]] = {
    "sparse": (lambda X: csr_array(X.to_numpy()), TypeError, "Sparse data was passed.*dense data is required"),
    "texts": (object_column, ValueError, "could not convert string to float: 'red'"),
    "complex": (lambda X: X.to_numpy() + 1j, ValueError, "Complex data not supported"),
    "missing": (lambda X: with_value(X, np.nan), ValueError, "Input X contains NaN"),
    "infinite": (lambda X: with_value(X, np.inf), ValueError, "Input X contains infinity"),
    "one row": (lambda X: X.to_numpy()[0], ValueError, "Expected 2D array, got 1D array instead"),
    "three axes": (lambda X: X.to_numpy().reshape(100, 8, 8), ValueError, "Found array with dim 3"),
    "no row": (lambda X: X[:0], ValueError, r"Found array with 0 sample\(s\)"),
    "masked": (lambda X: np.ma.masked_equal(X.to_numpy(), 0), ValueError, r"masked values.*fill"),
}
#: The same for rows that fit would take, and that are not those of fit.
OTHER_ROWS: dict[str, tuple[Any, type[Exception], str]] = {
    "narrow": (lambda X: X.to_numpy()[:, 1:], ValueError, "X has 63 features, but .* is expecting 64 features"),
    "another order": (lambda X: X[NAMES[::-1]], ValueError, "feature names should match.*same order"),
    "other names": (
        lambda X: X.rename(columns={"pixel5": "fifth"}),
        ValueError,
        r"feature names should match.*\n.*unseen at fit time:\n- fifth\n.*seen at fit time, yet now missing:\n- pixel5",
    ),
    "a column less": (lambda X: X[NAMES[1:]], ValueError, "feature names should match|X has 63 features"),
}
LABELS: dict[str, tuple[Any, str]] = {
    "none": (None, "requires y to be passed, but the target y is None"),
    "all -1": (np.full(100, -1), "got no label among 100 rows, wanted some of at least 2 classes"),
    "all NaN": (np.full(100, np.nan), "got no label among 100 rows"),
    "one class": (np.where(Y == 3, 3, -1), r"got labels of one class only \(3\) among 100 rows, wanted at least 2"),
    "1 and -1": (np.where(Y == 3, 1, -1), "got labels of one class only.*-1 is no class.*unlabelled=None"),
    "infinite": (np.where(Y == 3, np.inf, Y), "got infinite labels"),
    "measured": (Y + 0.5, "Unknown label type: continuous"),
    "several outputs": (np.stack([Y, Y], axis=1), "y should be a 1d array"),
    "too few": (Y[:-1], "inconsistent numbers of samples"),
    "texts of -1": (np.where(Y == 3, "three", "-1"), "got the text '-1' among labels"),
    "two types": (np.where(Y == 3, "three", np.array(3, dtype=object)), "got labels of several types"),
}


@pytest.mark.filterwarnings("ignore:X does not have valid feature names:UserWarning")
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_no_rows_are_refused_by_fit_and_after_it(
    estimators: dict[str, Any], fitted: dict[str, Any], frame: pd.DataFrame, kind: str, case: str
) -> None:
    change, error, message = ROWS[case]
    # To the one that is fitted to tables, these are a category and a missing value (tests/vaefeat/test_tables.py).
    taken = kind == "transformer" and case in {"texts", "missing"}
    with contextlib.nullcontext() if taken else pytest.raises(error, match=message):
        clone(estimators[kind]).fit(change(frame), Y if case not in {"no row", "one row"} else Y[:0])
    ask = fitted[kind].transform if hasattr(fitted[kind], "transform") else fitted[kind].predict
    with pytest.raises(error, match=f"{message}|feature names should match"):
        ask(change(frame))


# Arrays come to an estimator that knows names; the width is what is wrong with them.
@pytest.mark.filterwarnings("ignore:X does not have valid feature names:UserWarning")
@pytest.mark.parametrize("case", OTHER_ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_unlike_those_of_fit_are_refused_with_scikit_learns_words(
    fitted: dict[str, Any], frame: pd.DataFrame, kind: str, case: str
) -> None:
    change, error, message = OTHER_ROWS[case]
    for name in ("transform", "predict", "predict_proba", "decision_function", "score_samples"):
        if hasattr(fitted[kind], name):
            with pytest.raises(error, match=f"(?s){message}"):
                getattr(fitted[kind], name)(change(frame))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int8, object])
@pytest.mark.filterwarnings("ignore:X does not have valid feature names:UserWarning")
def test_rows_of_another_dtype_and_the_same_values_give_the_same(
    fitted: dict[str, Any], frame: pd.DataFrame, kind: str, dtype: Any
) -> None:
    ask = fitted[kind].transform if hasattr(fitted[kind], "transform") else fitted[kind].predict_proba
    np.testing.assert_array_equal(ask(frame.astype(dtype)), ask(frame))
    np.testing.assert_array_equal(ask(frame.to_numpy().astype(dtype)), ask(frame))


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_labels_that_teach_nothing_are_refused(
    estimators: dict[str, Any], frame: pd.DataFrame, kind: str, case: str
) -> None:
    y, message = LABELS[case]
    with pytest.raises(ValueError, match=message):
        clone(estimators[kind]).fit(frame, y)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_as_many_classes_as_rows_are_no_fault(estimators: dict[str, Any], frame: pd.DataFrame, kind: str) -> None:
    fitted = clone(estimators[kind]).fit(frame, np.arange(100))
    assert fitted.predict_proba(frame).shape == (100, 100)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_labels_that_fit_never_saw_are_errors_in_score_and_nothing_worse(
    fitted: dict[str, Any], frame: pd.DataFrame, kind: str
) -> None:
    assert fitted[kind].score(frame, np.full(100, 77)) == 0
    with pytest.raises(ValueError, match="got no label among 100 rows to score"):
        fitted[kind].score(frame, np.full(100, -1))


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize(
    ("settings", "weights", "message"),
    [
        ({}, np.zeros(100), "at least one non-zero"),
        ({}, np.full(100, -1.0), "Negative values in data passed to `sample_weight`"),
        ({}, np.ones(99), r"sample_weight.shape == \(99,\), expected \(100,\)"),
        ({}, (Y == 3).astype(float), r"sample_weight above 0 for labels of 1 class only \(\[3\]\)"),
        ({"class_weight": {0: 0.0}}, (Y == 0) + 1e-3 * (Y == 0), "of 1 class only"),
        ({"class_weight": dict.fromkeys(range(10), 0.0)}, None, "leaves every label a weight of zero"),
        ({"class_weight": {0: 1.0, 99: 1.0}}, None, r"The classes, \[1, .*\], are not in class_weight"),
        ({"class_weight": "even"}, None, "got class_weight='even', wanted None, 'balanced' or a mapping"),
        ({"unlabelled": "none"}, None, "got unlabelled='none', wanted a whole number, or None"),
    ],
)
def test_weights_that_say_nothing_are_refused(
    estimators: dict[str, Any], frame: pd.DataFrame, kind: str, settings: dict[str, Any], weights: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        clone(estimators[kind]).set_params(**settings).fit(frame, Y, sample_weight=weights)
