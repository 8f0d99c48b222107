"""Splits keep test rows apart, and labels with their rows."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipelines.config import DataConfig
from pipelines.datasets import load_dataset
from vaefeat.errors import InputError


def test_digits_are_split_by_seed_and_stratified() -> None:
    data = load_dataset(DataConfig(), seed=0)
    assert len(data.train) + len(data.test) == 1797
    assert len(data.pretraining) == len(data.train)
    digits = load_digits()
    rows = digits.images.astype(np.uint8)
    every = {row.tobytes(): label for row, label in zip(rows, digits.target, strict=True)}
    assert all(every[row.tobytes()] == label for row, label in zip(data.test, data.test_labels, strict=True))
    assert np.bincount(data.test_labels).min() >= 45
    again = load_dataset(DataConfig(), seed=0)
    np.testing.assert_array_equal(data.test, again.test)
    assert not np.array_equal(data.test, load_dataset(DataConfig(), seed=1).test)


def test_pretraining_on_all_rows_includes_the_test_rows() -> None:
    assert len(load_dataset(DataConfig(pretrain_on="all"), seed=0).pretraining) == 1797


def test_mnist_keeps_its_own_split(data_dir: Path) -> None:
    data = load_dataset(DataConfig(path=str(data_dir / "MNIST")), seed=0)
    assert (len(data.train), len(data.test), len(data.pretraining)) == (60_000, 10_000, 60_000)
    raw = gzip.decompress((data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    np.testing.assert_array_equal(data.test_labels, np.frombuffer(raw, np.uint8, offset=8))


def test_single_file_is_split(tmp_path: Path) -> None:
    X, y = load_digits(return_X_y=True)
    np.savez(tmp_path / "digits.npz", X=X, y=y)
    data = load_dataset(DataConfig(path=str(tmp_path / "digits.npz"), test_share=0.5), seed=0)
    assert len(data.test) == pytest.approx(len(X) / 2, abs=1)
    assert data.names == tuple("0123456789")


def test_rows_without_labels_are_refused_with_what_to_do(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.eye(10))
    with pytest.raises(InputError, match="vaefeat pretrain"):
        load_dataset(DataConfig(path=str(tmp_path / "rows.npy")), seed=0)


def test_damaged_test_split_is_an_error_and_not_a_new_split(data_dir: Path, tmp_path: Path) -> None:
    source = data_dir / "MNIST" / "raw"
    for file in source.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:-1000] if file.name.startswith("t10k-images") else content)
    with pytest.raises(InputError, match="t10k-images"):
        load_dataset(DataConfig(path=str(tmp_path)), seed=0)


def test_test_rows_of_a_class_that_training_rows_lack_are_named(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = np.random.default_rng(0).normal(size=(6, 2))
    for split, labels in (("train", "aabbab"), ("test", "abxaby")):
        columns = {"p": values[:, 0], "q": values[:, 1], "label": list(labels)}
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    with pytest.raises(InputError, match=r"test rows of the classes \['x', 'y'\] in .*wanted classes that"):
        load_dataset(DataConfig(path=str(tmp_path)), seed=0)
