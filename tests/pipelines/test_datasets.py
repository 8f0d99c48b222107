"""Splits keep test rows apart, and labels with their rows."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits, load_wine

from pipelines.config import DataConfig, RunConfig
from pipelines.datasets import load_dataset, load_validation, open_rows
from pipelines.evaluate import baselines
from pipelines.job import Job
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
    with pytest.raises(InputError, match="python -m pipelines run leaves judging out"):
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


def wine_file(folder: Path, wine_table: pd.DataFrame, suffix: str) -> Path:
    path = folder / f"wine{suffix}"
    labelled = wine_table.assign(label=np.array(["red", "white", "rosé"])[load_wine().target])
    (labelled.to_csv if suffix == ".csv" else labelled.to_parquet)(path, index=False)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_table_is_split_in_one_form_that_its_schema_reads_back(
    suffix: str, wine_table: pd.DataFrame, tmp_path: Path
) -> None:
    config = DataConfig(path=str(wine_file(tmp_path, wine_table, suffix)), table=True, test_share=0.5)
    data = load_dataset(config, seed=0)
    table = data.pretraining.table
    assert table is not None
    assert data.names == ("red", "rosé", "white")
    again = pd.concat([table.frame(data.train), table.frame(data.test)])["hue"].value_counts()
    pd.testing.assert_series_equal(again.sort_index(), wine_table["hue"].value_counts().sort_index(), check_index=False)
    held = load_validation(config, seed=0)
    assert held.pretraining.table == table
    assert len(held.train) + len(held.test) == len(data.train)
    rows = open_rows(RunConfig(data=config))
    np.testing.assert_array_equal(rows.array, data.pretraining.array)  # type: ignore[union-attr]  # no blocks


def test_table_whose_categories_have_other_names_is_other_rows(wine_table: pd.DataFrame, tmp_path: Path) -> None:
    digests = []
    for table in (wine_table, wine_table.assign(hue=wine_table["hue"].replace({"a": "A", "b": "B", "c": "C"}))):
        path = wine_file(tmp_path, table, ".csv")
        job = Job(RunConfig(data=DataConfig(path=str(path))))
        digests += [job.digest_of_rows("pretraining"), job.digest_of_rows("labelled")]
        np.testing.assert_array_equal(job.dataset.train, load_dataset(DataConfig(path=str(path)), seed=0).train)
    assert len(set(digests)) == 4


def test_baselines_of_a_table_are_finite_and_know_its_gaps(wine_table: pd.DataFrame, tmp_path: Path) -> None:
    data = load_dataset(DataConfig(path=str(wine_file(tmp_path, wine_table, ".csv"))), seed=0)
    (name, (train, test)), (_, (reduced, _)) = baselines(data, seed=0).items()
    assert name == "one-hot, imputed"
    assert np.isfinite(train).all()
    assert np.isfinite(test).all()
    # Four categories and a gap, two, three and a gap; ten numbers, of which two have gaps.
    assert train.shape[1] == 5 + 2 + 4 + 10 + 2
    assert len(reduced) == len(train)


@pytest.mark.parametrize("given", ["hue", [1]])
def test_categorical_that_is_no_list_of_names_is_refused(given: object) -> None:
    with pytest.raises(InputError, match="wanted a list of columns"):
        DataConfig(categorical=given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 10, r"one class only in .*rows.csv \('a'\)"),
        (["a"] * 4 + ["b"] + ["a"] * 5, r"one row of the class 'b' in .*rows.csv \(row 4\)"),
        (["a"] * 3 + [None] + ["b"] * 6, r"no label in row 3 of column 'label' of .*rows.csv \(1 are missing\)"),
    ],
)
def test_labels_that_nothing_can_be_judged_by_name_file_and_row(
    labels: list[str | None], message: str, tmp_path: Path
) -> None:
    pd.DataFrame({"x": np.arange(10.0), "label": labels}).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(InputError, match=message):
        load_dataset(DataConfig(path=str(tmp_path / "rows.csv")), seed=0)
