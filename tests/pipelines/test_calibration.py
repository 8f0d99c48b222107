"""Mistakes by class and calibration, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.calibration import class_errors, measure_calibration
from pipelines.evaluate import nearest
from pipelines.probes import HEADS, predict


def rows_of_probabilities(
    seed: int, *, n: int = 400, n_classes: int = 4
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.full(n_classes, 0.5), size=(3, n))
    return probabilities, random.integers(0, n_classes, n)


def test_calibration_error_is_that_of_a_loop_over_decisions() -> None:
    probabilities, labels = rows_of_probabilities(0)
    found = measure_calibration(probabilities, labels, n_bins=7)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for classifier in probabilities:
        for row, label in zip(classifier, labels, strict=True):
            place = next(k for k in range(7) if row.max() <= (k + 1) / 7)
            bins.setdefault(place, []).append((row.max(), bool(np.argmax(row) == label)))
    gaps = [abs(sum(c for c, _ in members) - sum(r for _, r in members)) for members in bins.values()]
    assert found.error == pytest.approx(sum(gaps) / probabilities[..., 0].size)
    assert found.counts == tuple(len(bins[place]) for place in sorted(bins))


def test_labels_drawn_from_the_probabilities_are_calibrated_and_certain_mistakes_are_not() -> None:
    random = np.random.default_rng(1)
    probabilities = random.dirichlet(np.ones(3), size=20_000)
    labels = (probabilities.cumsum(axis=1) < random.random(20_000)[:, None]).sum(axis=1)
    assert measure_calibration(probabilities[None], labels).error < 0.015
    certain = np.eye(3)[np.zeros(10, dtype=int)][None]
    wrong = measure_calibration(certain, np.ones(10, dtype=np.int64))
    assert (wrong.error, wrong.confidence, wrong.accuracy, wrong.counts) == (1.0, (1.0,), (0.0,), (10,))


def test_class_errors_count_decisions_of_all_classifiers() -> None:
    decisions = np.array([[0, 0, 1, 2, 2, 0], [0, 1, 1, 0, 0, 0]])
    labels = np.array([0, 0, 1, 2, 2, 2])
    names = ("a", "b", "c", "never")
    a, b, c = class_errors(np.eye(4)[decisions], labels, names=names)
    assert (a.name, a.n_rows, a.error, a.taken_for, a.taken_for_share) == ("a", 2, 25.0, "b", 25.0)
    assert (b.error, b.taken_for) == (0.0, None)
    assert c.error == pytest.approx(400 / 6)
    assert c.taken_for == "a"


def test_nearest_rows_are_by_angle_and_a_dead_latent_does_not_count() -> None:
    random = np.random.default_rng(2)
    train, queries = ((random.normal(size=(n, 3)) * [1, 100, 1e-7]).astype(np.float32) for n in (50, 4))
    found = nearest(train, queries, count=5)
    middle, scale = train[:, :2].mean(axis=0), train[:, :2].std(axis=0)
    ours, theirs = (train[:, :2] - middle) / scale, (queries[:, :2] - middle) / scale
    angles = (theirs @ ours.T) / np.linalg.norm(theirs, axis=1)[:, None] / np.linalg.norm(ours, axis=1)
    np.testing.assert_array_equal(found, np.argsort(-angles, axis=1)[:, :5])
    assert nearest(train[:3], queries, count=5).shape == (4, 3)


def test_predictions_are_those_of_a_head_fitted_by_hand_and_zero_for_an_unseen_class() -> None:
    random = np.random.default_rng(3)
    labels = np.repeat([0, 2], 20)
    train = (random.normal(size=(40, 2)) + labels[:, None]).astype(np.float32)
    chosen = np.array([0, 1, 2, 20, 21, 22])
    head = next(iter(HEADS))
    found = predict(train, train, labels, head=head, draws=[chosen], n_classes=3)
    by_hand = HEADS[head]().fit(train[chosen], labels[chosen]).predict_proba(train)
    np.testing.assert_allclose(found[0][:, [0, 2]], by_hand)
    assert not found[0][:, 1].any()
