"""What marks a row without a label, and what is a class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from vaefeat.errors import InputError
from vaefeat.labels import class_names, class_shares, encode_labels


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (np.array([3, -1, 5, 3]), [3, 5]),
        (np.array([3.0, np.nan, 5.0, 3.0]), [3, 5]),
        (np.array([3.0, -1.0, 5.0, 3.0]), [3, 5]),
        (np.array(["a", -1, "b", "a"], dtype=object), ["a", "b"]),
        (np.array(["a", None, "b", "a"], dtype=object), ["a", "b"]),
        (np.array(["a", np.nan, "b", "a"], dtype=object), ["a", "b"]),
        (["a", None, "b", "a"], ["a", "b"]),
        ([3, None, 5, 3], [3, 5]),
        (pd.Series(["a", None, "b", "a"]), ["a", "b"]),
        (pd.Series(["a", pd.NA, "b", "a"], dtype="string"), ["a", "b"]),
        (pd.Series([3, None, 5, 3], dtype="Int64"), [3, 5]),
        (pd.Series(["a", None, "b", "a"], dtype="category"), ["a", "b"]),
    ],
)
def test_labels_with_any_mark_of_a_missing_one_are_told_apart(y: Any, classes: list[object]) -> None:
    found, codes = encode_labels(y, estimator="Classifier")
    assert found.tolist() == classes
    assert codes.tolist() == [0, -1, 1, 0]


def test_labels_that_are_all_there_have_no_unlabelled_row() -> None:
    classes, codes = encode_labels(np.array(["two", "one", "two"]), estimator="Classifier")
    assert classes.tolist() == ["one", "two"]
    assert codes.tolist() == [1, 0, 1]


@pytest.mark.parametrize("mark", [-1, None, np.nan])
def test_labels_all_missing_are_refused(mark: object) -> None:
    with pytest.raises(InputError, match="got no label among 3 rows"):
        encode_labels(np.array([mark] * 3, dtype=object), estimator="Classifier")


def test_labels_of_one_class_are_refused() -> None:
    with pytest.raises(InputError, match=r"labels of one class only \(7\) among 3 rows"):
        encode_labels(np.array([7, -1, 7]), estimator="Classifier")


def test_labels_in_which_numpy_turned_the_mark_into_text_are_refused() -> None:
    with pytest.raises(InputError, match="dtype=object"):
        encode_labels(np.array(["cat", -1, "dog"]), estimator="Classifier")


def test_labels_in_which_the_mark_is_a_text_among_objects_are_refused() -> None:
    """As columns of a table that was read as text have them: they would be a class of their own."""
    for y in (np.array(["cat", "-1", "dog"], dtype=object), pd.Series(["cat", "nan", "dog"]), ["cat", "None", "dog"]):
        with pytest.raises(InputError, match=r"got the text '.*' among labels, wanted the number -1"):
            encode_labels(y, estimator="Classifier")


def test_labels_of_two_types_are_refused() -> None:
    with pytest.raises(InputError, match="got labels of several types, wanted one"):
        encode_labels(np.array(["cat", 3, None], dtype=object), estimator="Classifier")


def test_labels_that_are_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="continuous"):
        encode_labels(np.array([0.5, 1.25, -1]), estimator="Classifier")


def test_class_names_are_plain_values() -> None:
    names = class_names(np.array([np.int64(3), np.int64(5)]))
    assert names == (3, 5)
    assert [type(name) for name in names] == [int, int]
    assert class_names(np.array(["a", "b"])) == ("a", "b")
    assert class_names(np.array([False, True])) == (False, True)


def test_class_names_that_json_does_not_hold_are_refused() -> None:
    with pytest.raises(InputError, match="wanted texts or numbers"):
        class_names(np.array([np.datetime64("2020-01-01"), np.datetime64("2020-01-02")]))


def test_class_shares_of_labels_drawn_evenly_or_nearly_so_are_equal() -> None:
    evenly = np.repeat(np.arange(10), 10)
    by_chance = np.random.default_rng(0).integers(0, 10, 100)
    for codes in (evenly, by_chance, np.arange(1000)):
        shares = class_shares(np.bincount(codes))
        np.testing.assert_allclose(shares, 1 / len(shares))


def test_class_shares_of_labels_that_chance_does_not_explain_are_theirs() -> None:
    codes = np.concatenate([np.zeros(95, dtype=np.int64), np.ones(5, dtype=np.int64), np.full(900, -1)])
    np.testing.assert_allclose(class_shares(np.bincount(codes[codes >= 0])), [96 / 102, 6 / 102])
