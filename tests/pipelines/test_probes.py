"""Draws of labels are balanced and repeatable; probes measure what they say."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipelines.probes import HEADS, draw_labels, probe
from vaefeat.errors import InputError


def test_draw_is_balanced_without_repeats_and_repeatable() -> None:
    labels = load_digits().target
    chosen = draw_labels(labels, n_labels=50, seed=3)
    assert np.bincount(labels[chosen]).tolist() == [5] * 10
    assert len(set(chosen)) == 50
    np.testing.assert_array_equal(chosen, draw_labels(labels, n_labels=50, seed=3))
    assert set(chosen) != set(draw_labels(labels, n_labels=50, seed=4))


def test_labels_that_do_not_divide_go_to_the_first_classes() -> None:
    labels = np.repeat([0, 1, 2], 10)
    assert np.bincount(labels[draw_labels(labels, n_labels=7, seed=0)]).tolist() == [3, 2, 2]


@pytest.mark.parametrize(("n_labels", "message"), [(2, "at least one label a class"), (40, "only 10 training rows")])
def test_impossible_number_of_labels_is_refused(n_labels: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw_labels(np.repeat([0, 1, 2], 10), n_labels=n_labels, seed=0)


def test_probe_equals_a_classifier_fitted_by_hand() -> None:
    X, y = load_digits(return_X_y=True)
    X = X.astype(np.float32)
    train, test, y_train, y_test = X[:1200], X[1200:], y[:1200], y[1200:]
    fits: list[int] = []
    draws = [draw_labels(y_train, n_labels=50, seed=seed) for seed in (0, 1)]
    got = probe({"raw": (train, test)}, y_train, y_test, draws=draws, on_fit=lambda: fits.append(1))
    assert [p.head for p in got] == list(HEADS)
    assert len(fits) == len(HEADS) * 2
    chosen = draws[1]
    by_hand = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(
        train[chosen], y_train[chosen]
    )
    assert got[0].errors[1] == pytest.approx(100 * np.mean(by_hand.predict(test) != y_test))
    assert got[0].mean == pytest.approx(np.mean(got[0].errors))
    assert got[0].spread == pytest.approx(np.std(got[0].errors, ddof=1))
