"""Labels spread over a graph, against the closed form, and on rows that lie in clusters."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits, make_blobs, make_moons
from sklearn.neighbors import kneighbors_graph
from sklearn.preprocessing import StandardScaler, normalize

from vaefeat.propagation import spread_labels


def test_spread_labels_are_those_of_the_closed_form() -> None:
    X, y = load_digits(return_X_y=True)
    X, y = X[:400].astype(np.float64) + 0.01, y[:400]
    labels = np.full(400, -1)
    labels[:40] = y[:40]
    unit = normalize(StandardScaler().fit_transform(X.astype(np.float32)))
    graph = kneighbors_graph(unit, 10).toarray()
    graph = np.maximum(graph, graph.T)
    degree = graph.sum(axis=1)
    S = graph / np.sqrt(np.outer(degree, degree))
    given = np.eye(10)[y[:40]]
    flow = np.linalg.solve(np.eye(400) - 0.99 * S, np.vstack([given, np.zeros((360, 10))]))
    wanted = (flow / flow.sum(axis=0)).argmax(axis=1)
    wanted[:40] = y[:40]
    got = spread_labels(X, labels, np.full(10, 0.1))
    assert (got == wanted).mean() > 0.99


def test_spread_labels_of_two_moons_follow_the_moons() -> None:
    X, y = make_moons(400, noise=0.05, random_state=0)
    # A cosine, which the graph is made of, tells directions apart, so the moons are lifted onto a sphere.
    lifted = np.concatenate([np.cos(3 * X), np.sin(3 * X)], axis=1)
    labels = np.full(400, -1)
    for label in (0, 1):
        labels[np.flatnonzero(y == label)[:2]] = label
    assert (spread_labels(lifted, labels, np.array([0.5, 0.5])) == y).mean() > 0.9


def test_spread_labels_keep_labelled_rows_even_among_others() -> None:
    X, y = make_blobs(200, centers=2, random_state=0)
    labels = np.full(200, -1)
    labels[:10] = y[:10]
    labels[0] = 1 - labels[0]
    assert spread_labels(X, labels, np.array([0.5, 0.5]))[0] == labels[0]


def test_spread_labels_leave_an_island_without_a_label_unlabelled() -> None:
    rng = np.random.default_rng(0)
    near, far = rng.normal([1, 0], 0.01, (40, 2)), rng.normal([-1, 0], 0.01, (40, 2))
    labels = np.full(80, -1)
    labels[:2] = [0, 1]
    spread = spread_labels(np.concatenate([near, far]), labels, np.array([0.5, 0.5]))
    assert (spread[40:] == -1).all()
    assert (spread[:40] >= 0).all()


def test_spread_labels_do_not_depend_on_what_the_features_are_measured_in() -> None:
    X, y = load_digits(return_X_y=True)
    X, labels = X[:300] + 0.01, np.where(np.arange(300) < 30, y[:300], -1)
    shares = np.full(10, 0.1)
    scale = np.random.default_rng(0).uniform(0.1, 10, X.shape[1])
    same = spread_labels(X, labels, shares) == spread_labels(X * scale, labels, shares)
    assert same.mean() > 0.99


def test_spread_labels_of_rows_that_tell_little_come_in_the_shares_that_are_given() -> None:
    rows = np.random.default_rng(0).normal(size=(600, 6))
    labels = np.where(np.arange(600) < 20, np.arange(600) % 2, -1)
    few, many = ((spread_labels(rows, labels, np.array([1 - s, s])) == 1).mean() for s in (0.2, 0.8))
    assert few < 0.35 < 0.65 < many
