"""Suggested rows are different, stand for all clusters, leave alone what is labelled, and are worth their labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from vaefeat.errors import ConfigError, InputError
from vaefeat.suggestions import suggest_rows


def directions(counts: list[int], *, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scatter so many rows around each of some axes, of many lengths."""
    random = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(len(counts)), counts)
    rows = np.eye(len(counts))[cluster] + 0.03 * random.normal(size=(len(cluster), len(counts)))
    return (rows * random.uniform(0.5, 3, size=(len(rows), 1))).astype(np.float32), cluster


def test_suggestions_without_labels_are_the_centre_of_each_cluster_the_largest_first() -> None:
    rows, cluster = directions([40, 200, 80, 10])
    chosen = suggest_rows(rows, budget=4)
    assert cluster[chosen].tolist() == [1, 2, 0, 3]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for row in chosen:
        members = unit[cluster == cluster[row]]
        distance = ((members - members.mean(axis=0)) ** 2).sum(axis=1)
        assert ((unit[row] - members.mean(axis=0)) ** 2).sum() == pytest.approx(distance.min())


def test_suggestions_with_labels_turn_to_clusters_without_one() -> None:
    rows, cluster = directions([100, 90, 80, 70, 60, 50])
    labels = np.full(len(rows), None, dtype=object)
    for known in (0, 1, 3):
        labels[np.flatnonzero(cluster == known)[:1]] = f"class {known}"
    chosen = suggest_rows(rows, budget=3, labels=labels)
    assert set(cluster[chosen]) == {2, 4, 5}


def test_suggestions_begin_where_the_classifier_is_unsure() -> None:
    # Clusters 0 and 1 are labelled; 2 lies in between, and 3, which is larger, right beside 0.
    random = np.random.default_rng(0)
    angles = np.concatenate([np.full(n, a) for n, a in ((60, 0.0), (60, 1.5), (40, 0.75), (60, 0.22))])
    cluster = np.repeat([0, 1, 2, 3], [60, 60, 40, 60])
    angles += 0.01 * random.normal(size=len(angles))
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labels = np.full(len(rows), -1)
    labels[[0, 60]] = 0, 1
    assert cluster[suggest_rows(rows, budget=2, labels=labels)].tolist() == [2, 3]
    labels[60] = 0  # of one class there is nothing to be unsure of
    assert cluster[suggest_rows(rows, budget=2, labels=labels)].tolist() == [3, 2]


def test_suggestions_are_the_same_for_the_same_seed() -> None:
    rows = load_digits().data
    np.testing.assert_array_equal(suggest_rows(rows, budget=30, seed=4), suggest_rows(rows, budget=30, seed=4))
    assert set(suggest_rows(rows, budget=30, seed=4)) != set(suggest_rows(rows, budget=30, seed=5))


def test_suggestions_hold_no_row_twice_and_none_that_equals_a_labelled_one() -> None:
    different = np.random.default_rng(0).normal(size=(12, 5))
    rows = np.repeat(different, 4, axis=0)
    labels = np.full(48, -1)
    labels[[1, 6]] = 0, 1
    chosen = suggest_rows(rows, budget=10, labels=labels)
    assert sorted(chosen // 4) == list(range(2, 12))
    with pytest.raises(InputError, match="got a budget of 11 and 48 rows, of which 10 differ and have no label"):
        suggest_rows(rows, budget=11, labels=labels)


def test_suggestions_of_rows_that_differ_in_length_alone_fill_the_budget() -> None:
    rows = np.concatenate([np.outer(np.arange(1, 9), [1.0, 0.0]), np.outer(np.arange(1, 9), [0.0, 1.0])])
    chosen = suggest_rows(rows, budget=6)
    assert len(set(chosen)) == 6
    assert {0, 1} == set(chosen[:2] // 8)
    assert len(suggest_rows(np.zeros((1, 3)), budget=1)) == 1


def test_impossible_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="budget=0"):
        suggest_rows(np.eye(3), budget=0)


def test_suggested_labels_are_worth_more_than_random_ones() -> None:
    X, y = load_digits(return_X_y=True)
    X = X - X[:1200].mean(axis=0)

    def error(chosen: NDArray[Any]) -> float:
        return float(np.mean(LogisticRegression(max_iter=1000).fit(X[chosen], y[chosen]).predict(X[1200:]) != y[1200:]))

    suggested = [error(suggest_rows(X[:1200], budget=30, seed=seed)) for seed in range(5)]
    random = [error(np.random.default_rng(seed).choice(1200, 30, replace=False)) for seed in range(5)]
    assert np.mean(suggested) < 0.8 * np.mean(random)
