"""The data sets of :mod:`benchmarks.few_labels`: rows to learn from, which of them have a label, and rows that judge.

Rows that judge never enter pretraining, spreading or a choice. They are the test rows, or, for validation, the last of
the training rows, which are then taken out of these; for validation no test row is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from pipelines.probes import draw_labels
from vaefeat.data import Rows, load_rows
from vaefeat.errors import InputError
from vaefeat.settings import unknown_name

__all__ = ["ALL", "BUDGETS", "TASKS", "Task", "make_table", "make_traits", "open_task"]

#: In the place of a number of labels: every training row's.
ALL = "all"
#: Labels in all that methods are given; those that a data set has not enough rows for are left out.
BUDGETS: Mapping[str, tuple[int, ...]] = {
    "mnist": (10, 20, 100, 1000),
    "cifar10": (10, 100, 250, 1000, 4000),
    "digits": (10, 100, 1000),
    "table": (4, 40, 400),
    "traits": (2, 20, 200),
}
_FOLDERS = {"mnist": "MNIST", "cifar10": "CIFAR10"}
_N_VALIDATION = 10_000
_N_TEST_DIGITS = 500
_N_TABLE, _N_TEST_TABLE = 12_000, 3000
_N_TRAITS, _N_TEST_TRAITS = 20_000, 6000
#: Draws of up to so many labels are listed row by row, larger ones by their hash.
_LISTED_LABELS = 100


@dataclass(frozen=True)
class Task:
    """A data set, cut in two.

    Attributes
    ----------
    name : str
    split : {"test", "validation"}
        What the judges are.
    train : ndarray of shape (n, F) or (n, C, H, W)
    train_labels : ndarray of shape (n,), int64
        0 to K - 1.
    judges : callable
        Reads the rows that judge and their labels; each row of the benchmark asks once.
    """

    name: str
    split: str
    train: NDArray[Any]
    train_labels: NDArray[np.int64]
    judges: Callable[[], tuple[NDArray[Any], NDArray[np.int64]]]

    @property
    def n_classes(self) -> int:
        """Classes among the training rows."""
        return int(self.train_labels.max()) + 1

    def budgets(self) -> tuple[int, ...]:
        """Give the numbers of labels that there are enough rows for."""
        rarest = np.bincount(self.train_labels).min()
        return tuple(budget for budget in BUDGETS[self.name] if -(-budget // self.n_classes) <= rarest)

    def draw(self, budget: int | str, seed: int) -> NDArray[np.int64]:
        """Choose the rows that have a label in one draw: as many of each class."""
        if budget == ALL:
            return np.arange(len(self.train))
        return draw_labels(self.train_labels, n_labels=int(budget), seed=seed)

    def partial(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the labels of the chosen rows, and -1 for all others."""
        labels = np.full(len(self.train), -1)
        labels[chosen] = self.train_labels[chosen]
        return labels

    def listed(self, n_draws: int) -> dict[str, Any]:
        """Give the labelled rows of every draw, as numbers of training rows, or a hash of these where they are many."""
        found: dict[str, Any] = {}
        for budget in self.budgets():
            draws = [self.draw(budget, seed) for seed in range(n_draws)]
            if budget <= _LISTED_LABELS:
                found[str(budget)] = {str(seed): chosen.tolist() for seed, chosen in enumerate(draws)}
            else:
                hashes = [hashlib.sha256(chosen.tobytes()).hexdigest()[:16] for chosen in draws]
                found[str(budget)] = {str(seed): f"sha256:{hashed}" for seed, hashed in enumerate(hashes)}
        return found


def open_task(name: str, data: Path | None, *, validation: bool) -> Task:
    """Open a data set.

    Parameters
    ----------
    name : {"mnist", "cifar10", "digits", "table", "traits"}
    data : Path or None
        Folder with MNIST's IDX files in ``MNIST/`` and CIFAR-10 in ``CIFAR10/``; the others need none.
    validation : bool
        Take the judges from the training rows: the last 10,000, or a sixth where that is fewer.

    Raises
    ------
    InputError
        Data that are not there, or an unknown name.
    """
    if name not in TASKS:
        raise unknown_name("data set", name, TASKS)
    parts = TASKS[name](data)
    train = next(parts)
    rows, labels = train.array, np.asarray(train.labels, dtype=np.int64)
    if validation:
        n_judges = min(_N_VALIDATION, len(rows) // 6)
        judging = rows[-n_judges:], labels[-n_judges:]
        return Task(name, "validation", rows[:-n_judges], labels[:-n_judges], lambda: judging)

    def test_rows() -> tuple[NDArray[Any], NDArray[np.int64]]:
        test = next(parts)
        return test.array, np.asarray(test.labels, dtype=np.int64)

    return Task(name, "test", rows, labels, test_rows)


def make_table(n: int, *, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Generate a mixed table whose classes are unions of clusters.

    Twelve clusters lie in six dimensions; class k is the clusters k, k + 4 and k + 8. Columns are: seven numbers and
    three heavy-tailed ones (exponentials of such numbers), non-linear in the six and with noise of their own, and six
    categorical columns of 2 to 8 values, one-hot. The clusters and the maps are the same for every `seed`.

    Returns
    -------
    rows : ndarray of shape (n, 38), float32
    labels : ndarray of shape (n,), int64
        0 to 3, equally frequent.
    """
    n_classes, clusters, dims, numbers, categories = 4, 12, 6, 10, (3, 4, 5, 8, 2, 6)
    fixed = np.random.default_rng(123)
    centres = 1.6 * fixed.normal(size=(clusters, dims))
    inner, outer = fixed.normal(size=(dims, 16)), fixed.normal(size=(16, numbers))
    choices = [fixed.normal(size=(dims, n_values)) for n_values in categories]
    random = np.random.default_rng(seed)
    cluster = random.integers(clusters, size=n)
    hidden = centres[cluster] + 0.7 * random.normal(size=(n, dims))
    values = np.tanh(hidden @ inner / 2) @ outer + random.normal(size=(n, numbers))
    values[:, :3] = np.exp(values[:, :3] / 2)
    # The largest of noisy scores: a category with the probabilities of a softmax (Gumbel).
    columns = [
        np.eye(weights.shape[1])[(hidden @ weights + random.gumbel(size=(n, weights.shape[1]))).argmax(axis=1)]
        for weights in choices
    ]
    return np.hstack([values, *columns]).astype(np.float32), (cluster % n_classes).astype(np.int64)


def make_traits(n: int, *, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Generate a mixed table without clusters, in the manner of a census.

    People have five traits, two of them related. Columns are: an age, years of schooling, gains and losses that most do
    not have, hours of work, a weight that says nothing, and six categorical columns of 2 to 14 values, one-hot. The
    class is whether a noisy sum of four traits is over a threshold. The maps are the same for every `seed`.

    Returns
    -------
    rows : ndarray of shape (n, 48), float32
    labels : ndarray of shape (n,), int64
        0 or 1, about a fifth of them 1.
    """
    n_traits, categories = 5, (8, 7, 14, 6, 5, 2)
    fixed, random = np.random.default_rng(7), np.random.default_rng(seed)
    maps = [(0.9 * fixed.normal(size=(n_traits, k)), 0.8 * fixed.normal(size=k)) for k in categories]
    traits = random.normal(size=(n, n_traits))
    traits[:, 1] = 0.5 * traits[:, 0] + 0.86 * traits[:, 1]
    noise = random.normal(size=(n, 7))
    gains = random.random(n) < 1 / (1 + np.exp(2.6 - 0.8 * traits[:, 2] - 0.5 * traits[:, 1]))
    numbers = [
        38 + 13 * traits[:, 0] + 4 * noise[:, 0],
        np.clip(np.round(10 + 2.4 * traits[:, 1] + 0.8 * noise[:, 1]), 1, 16),
        np.where(gains, np.exp(8 + noise[:, 2]), 0),
        np.where(random.random(n) < 0.05, np.exp(7.4 + 0.3 * noise[:, 3]), 0),
        40 + 8 * traits[:, 3] + 5 * noise[:, 4],
        np.exp(12 + 0.5 * noise[:, 5]),
    ]
    columns = [
        np.eye(len(bias))[(traits @ weights + bias + random.gumbel(size=(n, len(bias)))).argmax(axis=1)]
        for weights, bias in maps
    ]
    score = traits[:, :4] @ [0.9, 1.2, 0.8, 0.5] + 0.7 * gains + 0.8 * noise[:, 6]
    return np.hstack([np.stack(numbers, axis=1), *columns]).astype(np.float32), (score > 1.6).astype(np.int64)


def _read(name: str, data: Path | None) -> Iterator[Rows]:
    if data is None:
        raise InputError(f"got no --data, wanted the folder that has {name} in {_FOLDERS[name]}/")
    yield load_rows(data / _FOLDERS[name], split="train")
    yield load_rows(data / _FOLDERS[name], split="test")


def _mnist(data: Path | None) -> Iterator[Rows]:
    return _read("mnist", data)


def _cifar10(data: Path | None) -> Iterator[Rows]:
    return _read("cifar10", data)


def _digits(data: Path | None) -> Iterator[Rows]:
    digits = load_digits()
    # Neighbouring rows are of one writer.
    mixed = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images.astype(np.uint8)[mixed, None], digits.target[mixed]
    yield Rows(array=images[:-_N_TEST_DIGITS], labels=labels[:-_N_TEST_DIGITS], source="digits")
    yield Rows(array=images[-_N_TEST_DIGITS:], labels=labels[-_N_TEST_DIGITS:], source="digits")


def _table(data: Path | None) -> Iterator[Rows]:
    rows, labels = make_table(_N_TABLE, seed=0)
    yield Rows(array=rows[:-_N_TEST_TABLE], labels=labels[:-_N_TEST_TABLE], source="table")
    yield Rows(array=rows[-_N_TEST_TABLE:], labels=labels[-_N_TEST_TABLE:], source="table")


def _traits(data: Path | None) -> Iterator[Rows]:
    rows, labels = make_traits(_N_TRAITS, seed=0)
    yield Rows(array=rows[:-_N_TEST_TRAITS], labels=labels[:-_N_TEST_TRAITS], source="traits")
    yield Rows(array=rows[-_N_TEST_TRAITS:], labels=labels[-_N_TEST_TRAITS:], source="traits")


#: Each gives its training rows and then, to who asks on, its test rows.
TASKS: Mapping[str, Callable[[Path | None], Iterator[Rows]]] = {
    "mnist": _mnist,
    "cifar10": _cifar10,
    "digits": _digits,
    "table": _table,
    "traits": _traits,
}
