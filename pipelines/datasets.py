"""The rows of a run: training and test rows, with labels to judge by where there are some, and what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pipelines.config import DataConfig, RunConfig
from pipelines.finetuning.rows import NamedRows, read_ids
from vaefeat.blocks import Blocks, open_blocks
from vaefeat.data import Rows, Split, load_rows
from vaefeat.errors import ConfigError, InputError, MissingSplitError
from vaefeat.parquet import DEFAULT_LABEL_COLUMN
from vaefeat.table_files import SUFFIXES as TABLE_SUFFIXES
from vaefeat.table_files import read_frame
from vaefeat.table_schema import TableSchema

__all__ = [
    "Dataset",
    "Parts",
    "is_labelled",
    "load_dataset",
    "load_named_rows",
    "load_parts",
    "load_validation",
    "open_rows",
]

#: Training rows that are held back for validation, at most, and of all of them.
_N_VALIDATION, _VALIDATION_SHARE = 10_000, 1 / 6


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Rows (n, ...), training and test.

    Attributes
    ----------
    pretraining : Rows
        What the encoder is trained on: no label is looked at there.
    train, test : ndarray of shape (n, ...)
        There are no test rows where data have neither labels nor a split of their own.
    """

    pretraining: Rows
    train: NDArray[Any]
    test: NDArray[Any]

    @property
    def has_test(self) -> bool:
        """Whether there are test rows."""
        return len(self.test) > 0

    @property
    def shown(self) -> NDArray[Any]:
        """What is shown to people and looked at twice: test rows, or training rows where there are none."""
        return self.test if self.has_test else self.train


@dataclass(frozen=True, kw_only=True)
class Dataset(Parts):
    """Rows and their labels (n,), training and test.

    Attributes
    ----------
    train_labels, test_labels : ndarray of shape (n,)
        Class indices.
    names : tuple of str
        Of the classes.
    """

    train_labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]
    names: tuple[str, ...]


def is_labelled(config: DataConfig) -> bool:
    """Tell whether the training rows come with labels.

    One row is read, or the whole file of a table.

    Raises
    ------
    InputError
        Nothing readable.
    """
    if not config.labelled:
        return False
    path = Path(config.path)
    is_table = config.table or bool(config.categorical) or path.suffix.lower() == ".csv"
    if is_table and path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        # One row of a table is none: a column may have no value in it.
        return read_frame(path)[1] is not None
    return _load(config, max_rows=1).labels is not None


def load_parts(config: DataConfig) -> Parts:
    """Read the rows of a run without their labels, split only where the data are.

    Raises
    ------
    InputError
        Nothing readable, or test rows of another shape than training rows.
    """
    train = _load(config)
    if not _has_test_rows(config):
        return Parts(pretraining=train, train=train.array, test=train.array[:0])
    test = _load(config, split="test")
    pretraining = _together(train, test) if config.pretrain_on == "all" else train
    return Parts(pretraining=pretraining, train=train.array, test=test.array)


def load_dataset(config: DataConfig, *, seed: int) -> Dataset:
    """Read the rows of a run.

    Parameters
    ----------
    config : DataConfig
    seed : int
        Of the split, where the data come without one.

    Raises
    ------
    InputError
        Nothing readable, or no labels to judge by.
    """
    train = _load(config)
    _require_labels(train)
    try:
        test = _load(config, split="test")
    except MissingSplitError:
        return _split(train.array, train.labels, train.names, config, seed, train.source, table=train.table)
    _require_labels(test)
    labels, names = _indices(np.concatenate([train.labels, test.labels]), train.names)
    _refuse_one_class(labels, names, train.source)
    if len(unseen := np.setdiff1d(labels[len(train) :], labels[: len(train)])):
        raise InputError(
            f"got test rows of the classes {[names[index] for index in unseen][:10]} in {test.source}, wanted classes "
            f"that the training rows in {train.source} have; leave these rows out, or add some of them there"
        )
    return Dataset(
        pretraining=_together(train, test)
        if config.pretrain_on == "all"
        else Rows(array=train.array, source=train.source),
        train=train.array,
        train_labels=labels[: len(train)],
        test=test.array,
        test_labels=labels[len(train) :],
        names=names,
    )


def open_rows(config: RunConfig) -> Rows | Blocks:
    """Read or open what the configuration trains on: the training rows, or all; labels are not needed.

    Rows with labels but without a split of their own are split as the main job splits them, so that an encoder never
    sees the rows which that job tests on.

    Raises
    ------
    ConfigError
        Rows are to be read while training, and the configuration wants other rows than a source's training rows.
    InputError
        They cannot be read.
    """
    data = config.data
    streamed = config.workers.rows == "stream"
    if data.path == "digits" and streamed:
        raise ConfigError("got workers.rows='stream' for the embedded digits, wanted 'load' or 'share'")
    has_test_rows = _has_test_rows(data)
    if streamed:
        if has_test_rows and data.pretrain_on == "all":
            raise ConfigError(
                "got workers.rows='stream' with data.pretrain_on='all', wanted 'train': training and test rows are two "
                "sources, and one can be streamed"
            )
        return open_blocks(data.path, image_size=data.size, label_column=_label_column(data))
    train = _load(data)
    if not has_test_rows:
        whole = data.pretrain_on == "all" or train.labels is None
        return train if whole else load_dataset(data, seed=config.probe.seed).pretraining
    if data.pretrain_on == "train":
        return train
    return _together(train, _load(data, split="test"))


def load_named_rows(config: DataConfig, *, id_column: str | None, rows: Rows | None = None) -> NamedRows:
    """Read the rows that files of labels speak of: all, or the training rows of data that come with a split.

    Whatever labels come with the data are not looked at.

    Parameters
    ----------
    config : DataConfig
    id_column : str, optional
        Of Parquet. Where None, the path of an image below the data's, or the row's number from 0 on.
    rows : Rows, optional
        These rows, where they have been read before.

    Raises
    ------
    InputError
        Rows that cannot be read; no such column, or one that the encoder is trained on; ids that are missing or come
        twice.
    """
    rows = _load(config) if rows is None else rows
    features = rows.columns or () if rows.table is None else [column.name for column in rows.table.columns]
    if id_column in features:
        raise InputError(
            f"got finetune.id_column={id_column!r} of {rows.source}, which the encoder is trained on like any other "
            "column; write these ids as texts into Parquet of numbers, lists or images, or leave the setting out: ids "
            "are the rows' numbers then"
        )
    ids = read_ids(Path(config.path), split="train", id_column=id_column, n_rows=len(rows))
    return NamedRows(array=rows.array, ids=ids, source=rows.source)


def _load(config: DataConfig, *, split: Split = "train", max_rows: int | None = None) -> Rows:
    if config.path == "digits":
        rows = _digits(split)
    else:
        rows = load_rows(
            config.path,
            split=split,
            image_size=config.size,
            label_column=_label_column(config),
            max_rows=max_rows,
            table=config.table or None,
            categorical=list(config.categorical) or None,
        )
    return rows if config.labelled else replace(rows, labels=None, names=None)


def _digits(split: Split) -> Rows:
    if split == "test":
        raise MissingSplitError("got split='test' for the embedded digits, which have no splits")
    digits = load_digits()
    # The values are whole numbers from 0 to 16.
    return Rows(array=digits.images.astype(np.uint8)[:, None], labels=digits.target, source="digits")


def _label_column(config: DataConfig) -> str | None:
    return DEFAULT_LABEL_COLUMN if config.labelled else None


def _together(train: Rows, test: Rows) -> Rows:
    if train.row_shape != test.row_shape:
        raise InputError(
            f"got rows of shape {train.row_shape} in {train.source} and {test.row_shape} in {test.source}, wanted one "
            "shape to pretrain on all of them"
        )
    return Rows(array=np.concatenate([train.array, test.array]), source=train.source)


def _has_test_rows(config: DataConfig) -> bool:
    """Whether the data come with a split; tables, which are one file, never do."""
    try:
        _load(config, split="test", max_rows=1)
    except MissingSplitError:
        return False
    return True


def load_validation(config: DataConfig, *, seed: int) -> Dataset:
    """Read training rows alone, a part of them in the place of the test rows: to choose settings by.

    What is trained on there is what a run's configuration says, of the training rows: all of them, or those that are
    not held back.

    Parameters
    ----------
    config : DataConfig
    seed : int
        Of the run, whose test rows are left out, and of the part that is held back.

    Raises
    ------
    InputError
        Nothing readable, or no labels to judge by.
    """
    if _has_test_rows(config):
        given = _load(config)
        _require_labels(given)
        rows, labels, names, table = given.array, given.labels, given.names, None
    else:
        # The run splits its rows itself.
        data = load_dataset(config, seed=seed)
        rows, labels, names, table = data.train, data.train_labels, data.names, data.pretraining.table
    share = min(_N_VALIDATION, int(_VALIDATION_SHARE * len(rows))) / len(rows)
    return _split(rows, labels, names, replace(config, test_share=share), seed, config.path, table=table)


def _split(
    rows: NDArray[Any],
    raw_labels: Any,
    names: tuple[str, ...] | None,
    config: DataConfig,
    seed: int,
    source: str,
    *,
    table: TableSchema | None = None,
) -> Dataset:
    labels, found = _indices(raw_labels, names)
    _refuse_one_class(labels, found, source)
    if (counts := np.bincount(labels)).min() < 2:
        rare = int(counts.argmin())
        row = int(np.flatnonzero(labels == rare)[0])
        raise InputError(
            f"got one row of the class {found[rare]!r} in {source} (row {row}), wanted at least 2 of "
            "each, one to learn from and one to test on; leave it out, or add another, or, where these are no classes, "
            "set data.labelled=false"
        )
    try:
        train, test = train_test_split(
            np.arange(len(rows)), test_size=config.test_share, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise InputError(
            f"could not put aside {config.test_share:.0%} of {len(rows)} rows of {source} as test rows: {error}"
        ) from None
    train, test = np.sort(train), np.sort(test)
    return Dataset(
        pretraining=Rows(array=rows if config.pretrain_on == "all" else rows[train], source=source, table=table),
        train=rows[train],
        train_labels=labels[train],
        test=rows[test],
        test_labels=labels[test],
        names=found,
    )


def _indices(labels: NDArray[Any], names: tuple[str, ...] | None) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    classes, indices = np.unique(labels, return_inverse=True)
    if names is not None and np.issubdtype(classes.dtype, np.integer):
        return indices.astype(np.int64), tuple(names[int(c)] for c in classes)
    return indices.astype(np.int64), tuple(str(c) for c in classes)


def _refuse_one_class(labels: NDArray[np.int64], names: Sequence[str], source: str) -> None:
    if len(np.unique(labels)) < 2:
        raise InputError(
            f"got labels of one class only in {source} ({names[int(labels[0])]!r}), wanted at least 2 to judge by; "
            "where that is no class, set data.labelled=false, and the rows are rows without labels"
        )


def _require_labels(rows: Rows) -> None:
    if rows.labels is None:
        raise InputError(
            f"got rows without labels from {rows.source}, wanted labels to judge the features by: sub-folders named "
            "after classes, or a column 'label'. Where no row has any, or data.labelled=false, python -m pipelines run "
            "leaves judging out"
        )
