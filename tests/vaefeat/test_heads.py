"""Heads for few labels: what each computes, against another route, and what they must refuse."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.datasets import load_digits, make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from vaefeat import FewLabelHead, VAEFeatures, few_label_head
from vaefeat.errors import ConfigError, InputError
from vaefeat.heads import HEADS

KINDS = [kind for kind in HEADS if kind != "auto"]


def few(y: NDArray[Any], per_class: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Keep so many labels of each class."""
    random = np.random.default_rng(seed)
    kept = np.full(len(y), -1)
    for label in np.unique(y):
        chosen = random.choice(np.flatnonzero(y == label), per_class, replace=False)
        kept[chosen] = label
    return kept


@pytest.fixture(scope="module")
def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    X, y = load_digits(return_X_y=True)
    return X.astype(np.float32), y


def expected_failures(estimator: object) -> dict[str, str]:
    return {
        "check_classifiers_classes": "it has a class -1, which is scikit-learn's own mark of an unlabelled row",
    }


@parametrize_with_checks(  # type: ignore[untyped-decorator]  # sklearn has no types
    [FewLabelHead(kind, random_state=0) for kind in HEADS], expected_failed_checks=expected_failures, xfail_strict=True
)
@pytest.mark.filterwarnings("ignore:A column-vector y was passed:UserWarning")
def test_head_passes_the_estimator_check(estimator: FewLabelHead, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_class", [1, 10])
def test_head_of_few_labels_tells_digits_apart(
    digits: tuple[NDArray[Any], NDArray[Any]], kind: str, per_class: int
) -> None:
    X, y = digits
    head = FewLabelHead(kind, random_state=0).fit(X, few(y, per_class))
    # One pixel image a class; a guess is right in 10 % of cases.
    assert head.score(X, y) > {1: 0.5, 10: 0.85}[per_class]
    probability = head.predict_proba(X)
    assert probability.shape == (len(X), 10)
    np.testing.assert_allclose(probability.sum(axis=1), 1, atol=1e-6)
    assert (head.predict(X) == head.classes_[probability.argmax(axis=1)]).all()


def test_spread_head_learns_from_rows_without_a_label(digits: tuple[NDArray[Any], NDArray[Any]]) -> None:
    X, y = digits
    gains = []
    for seed in range(3):
        labels = few(y, 3, seed=seed)
        known = labels >= 0
        with_others = FewLabelHead("spread", random_state=0).fit(X[::2], np.where(known, labels, -1)[::2])
        alone = FewLabelHead("logistic", random_state=0).fit(X[::2][known[::2]], labels[::2][known[::2]])
        gains.append(with_others.score(X[1::2], y[1::2]) - alone.score(X[1::2], y[1::2]))
    assert np.mean(gains) > 0.02


def test_prototype_head_gives_the_softmax_of_cosines() -> None:
    random = np.random.default_rng(0)
    X, y = random.normal(size=(60, 5)), np.repeat([0, 1, 2], 20)
    head = FewLabelHead("prototype").fit(X, y)
    centred = X - X.mean(axis=0)
    directions = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    means = np.stack([directions[y == label].mean(axis=0) for label in range(3)])
    wanted = np.exp(10 * cosine_similarity(centred, means))
    np.testing.assert_allclose(head.predict_proba(X), wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-6)


def test_logistic_head_of_one_label_a_class_is_that_of_c_1_on_one_scale() -> None:
    X, y = np.random.default_rng(0).normal(3, 7, size=(40, 4)), np.arange(40) % 4
    labels = np.where(np.arange(40) < 4, y, -1)
    scaled = (X - X.mean(axis=0)) / np.sqrt(X.var(axis=0).mean())
    wanted = LogisticRegression(C=1.0).fit(scaled[:4], y[:4]).predict_proba(scaled)
    np.testing.assert_allclose(FewLabelHead("logistic").fit(X, labels).predict_proba(X), wanted, atol=1e-4)


def test_logistic_head_chooses_a_small_c_for_noise_and_a_large_one_for_order() -> None:
    random = np.random.default_rng(0)
    X = random.normal(size=(200, 10))
    noise = FewLabelHead("logistic", random_state=0).fit(X, random.integers(0, 2, 200))
    order = FewLabelHead("logistic", random_state=0).fit(X, (X[:, 0] > 0).astype(int))
    assert noise.head_[-1].C < 0.1 < 1 <= order.head_[-1].C


def test_mixture_head_weighs_components_as_bayes_does() -> None:
    # Two Gaussians whose densities are known: the posterior of the class follows from them and the shares.
    random = np.random.default_rng(0)
    y = (random.random(4000) < 0.25).astype(int)
    X = random.normal(size=(4000, 1)) + 3 * y[:, None]
    labels = few(y, 50)
    head = FewLabelHead("mixture", class_shares=[0.75, 0.25], random_state=0).fit(X, labels)
    odds = 0.75 * np.exp(-(X[:, 0] ** 2) / 2), 0.25 * np.exp(-((X[:, 0] - 3) ** 2) / 2)
    wanted = odds[1] / (odds[0] + odds[1])
    assert np.abs(head.predict_proba(X)[:, 1] - wanted).mean() < 0.05


def test_spread_head_believes_the_shares_that_it_is_told() -> None:
    # Overlapping blobs of 9 to 1, labelled evenly: under equal shares the rare class takes rows that are not its own.
    random = np.random.default_rng(0)
    y = (random.random(2000) < 0.1).astype(int)
    X = random.normal(size=(2000, 8)) + 1.0 * y[:, None]
    labels = few(y, 10)
    told = FewLabelHead("spread", class_shares=[0.9, 0.1]).fit(X, labels)
    even = FewLabelHead("spread").fit(X, labels)
    np.testing.assert_array_equal(even.class_shares_, [0.5, 0.5])
    np.testing.assert_allclose(told.class_shares_, [0.9, 0.1])
    assert told.score(X, y) > even.score(X, y) + 0.05


@pytest.mark.parametrize(
    ("n_labelled", "n_others", "max_rows", "kind"),
    [(20, 100, 200, "spread"), (20, 0, 200, "logistic"), (101, 100, 200, "logistic"), (100, 100, 200, "spread")],
)
def test_auto_head_spreads_where_there_are_rows_to_learn_from(
    n_labelled: int, n_others: int, max_rows: int, kind: str
) -> None:
    X, y = make_blobs(n_labelled + n_others, centers=2, random_state=0)
    head = few_label_head(max_rows=max_rows, random_state=0).fit(X, np.where(np.arange(len(y)) < n_labelled, y, -1))
    assert head.kind_ == kind


@pytest.mark.parametrize("kind", KINDS)
def test_head_of_strings_gives_them_back(kind: str) -> None:
    X, y = make_blobs(120, centers=3, cluster_std=0.5, random_state=0)
    names = np.array(["cat", "dog", "emu"])
    labels = np.where(few(y, 5) >= 0, names[y].astype(object), -1)
    head = FewLabelHead(kind, random_state=0).fit(X, labels)
    assert head.classes_.tolist() == ["cat", "dog", "emu"]
    assert (head.predict(X) == names[y]).mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_head_that_is_cloned_and_pickled_gives_the_same(kind: str) -> None:
    X, y = make_blobs(200, centers=3, random_state=0)
    head = FewLabelHead(kind, max_rows=60, random_state=3).fit(X, few(y, 10))
    wanted = head.predict_proba(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(head)).predict_proba(X), wanted)
    np.testing.assert_array_equal(clone(head).fit(X, few(y, 10)).predict_proba(X), wanted)


def test_head_behind_served_features_is_the_last_step_of_a_pipeline(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], digits: tuple[NDArray[Any], NDArray[Any]]
) -> None:
    labels = few(digits[1], 10)
    pipe = make_pipeline(VAEFeatures(digits_bundle, output="hidden", device="cpu"), few_label_head(random_state=0))
    pipe.fit(digits_rows, labels)
    assert pipe.predict_proba(digits_rows).shape == (1797, 10)
    assert pipe[-1].kind_ == "spread"
    assert pipe.score(digits_rows, digits[1]) > 0.85


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(20, -1), "no label"),
        (np.where(np.arange(20) < 3, 1, -1), "one class only"),
        (None, "requires y"),
        (np.arange(19) % 2, "inconsistent"),
    ],
)
def test_head_without_labels_of_two_classes_says_so(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        few_label_head().fit(np.random.default_rng(0).normal(size=(20, 3)), labels)


def test_head_of_an_unknown_kind_is_refused_before_any_rows() -> None:
    with pytest.raises(ConfigError, match="did you mean 'prototype'"):
        few_label_head("protoype")
    with pytest.raises(ConfigError, match="max_rows"):
        few_label_head(max_rows=0)


@pytest.mark.parametrize("shares", [[0.5, 0.5, 0.5], [1.0, -1.0], [1.0, np.nan]])
def test_head_with_impossible_shares_says_so(shares: list[float]) -> None:
    X, y = make_blobs(20, centers=2, random_state=0)
    with pytest.raises(InputError, match="class_shares"):
        few_label_head(class_shares=shares).fit(X, y)


@pytest.mark.parametrize("kind", ["spread", "mixture"])
def test_head_looks_at_no_more_rows_than_allowed(kind: str) -> None:
    # Of 100,000 rows a graph or a mixture of all would take minutes.
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 100_000)
    X = (random.normal(size=(100_000, 16)) + 2 * np.eye(16)[y]).astype(np.float32)
    began = time.process_time()
    head = FewLabelHead(kind, max_rows=2000, random_state=0).fit(X, few(y, 5))
    assert time.process_time() - began < 20
    assert head.score(X[:2000], y[:2000]) > 0.7


def test_head_keeps_every_labelled_row_in_its_sample() -> None:
    X, y = make_blobs(5000, centers=4, cluster_std=0.5, random_state=0)
    # One labelled row each: without any of them a class would be missing.
    head = FewLabelHead("spread", max_rows=100, random_state=0).fit(X, few(y, 1))
    assert head.head_[-1].classes_.tolist() == [0, 1, 2, 3]


def test_heads_need_no_torch() -> None:
    code = (
        "import sys, numpy, vaefeat\n"
        "vaefeat.few_label_head().fit(numpy.eye(4), [0, 1, -1, -1])\n"
        "print({'torch', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_auto_takes_a_line_where_labels_flow_astray() -> None:
    """One direction of thirty tells the classes: neighbours know nothing of it."""
    X = np.random.default_rng(0).normal(size=(2000, 30)).astype(np.float32)
    y = (X[:, 0] > 0).astype(np.int64)
    head = few_label_head(random_state=0).fit(X, few(y, 40))
    assert head.kind_ == "logistic"
    assert head.score(X, y) > few_label_head("spread", random_state=0).fit(X, few(y, 40)).score(X, y)


def test_auto_spreads_where_there_are_too_few_labels_to_compare() -> None:
    X = np.random.default_rng(0).normal(size=(500, 30)).astype(np.float32)
    assert few_label_head(random_state=0).fit(X, few((X[:, 0] > 0).astype(np.int64), 2)).kind_ == "spread"


def test_rows_without_a_label_are_not_scored(digits: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    X, y = digits
    partial = few(y, 20)
    head = few_label_head("logistic").fit(X, partial)
    assert head.score(X, partial) == (head.predict(X) == y)[partial >= 0].mean()
