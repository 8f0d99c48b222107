"""What the stages of a job share: configuration, folder, and rows, read once and when they are needed."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.config import RunConfig
from pipelines.datasets import Dataset, Parts, is_labelled, load_dataset, load_named_rows, load_parts, open_rows
from pipelines.finetuning.rows import NamedRows
from pipelines.probes import draw_labels
from vaefeat.blocks import Blocks
from vaefeat.data import Rows
from vaefeat.table_schema import TableSchema

__all__ = ["Job"]

_CHUNK_BYTES = 64 * 2**20


class Job:
    """One configuration at work.

    Parameters
    ----------
    config : RunConfig

    Attributes
    ----------
    folder : Path
        Of the job: bundle, records, figures.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.out)

    @cached_property
    def is_labelled(self) -> bool:
        """Whether the rows come with labels, so that features can be judged by them; one row is read."""
        return is_labelled(self.config.data)

    @cached_property
    def parts(self) -> Parts:
        """Training and test rows, whether they have labels or not."""
        return self.dataset if self.is_labelled else load_parts(self.config.data)

    @cached_property
    def dataset(self) -> Dataset:
        """Training and test rows with their labels."""
        return load_dataset(self.config.data, seed=self.config.probe.seed)

    @cached_property
    def rows(self) -> Rows | Blocks:
        """What the encoder is trained on; labels are not needed."""
        # Whoever has the parts, which contain these, does not read them twice.
        if {"dataset", "parts"} & self.__dict__.keys() and self.config.workers.rows != "stream":
            return self.parts.pretraining
        return open_rows(self.config)

    @cached_property
    def named_rows(self) -> NamedRows:
        """The rows that files of labels speak of, with their ids."""
        # Without labels and a split, all rows are in one place already.
        rows = None if self.is_labelled or self.parts.has_test else self.parts.pretraining
        return load_named_rows(self.config.data, id_column=self.config.finetune.id_column or None, rows=rows)

    @cached_property
    def draws(self) -> list[NDArray[np.int64]]:
        """Indices of the labelled training rows, a draw each; an impossible number of labels is found out here."""
        probe = self.config.probe
        seeds = range(probe.seed, probe.seed + probe.n_draws)
        return [draw_labels(self.dataset.train_labels, n_labels=probe.n_labels, seed=seed) for seed in seeds]

    def digest_of_rows(self, which: Literal["pretraining", "parts", "labelled", "named"]) -> str:
        """Give a digest of rows: of every value, or the fingerprint of rows that are read while training."""
        if which == "pretraining":
            return self._digest_of_pretraining
        if which == "named":
            return self._digest_of_named
        # Of rows with labels the digest is one: a stage that passes them on in a file depends on them, too.
        return self._digest_of_labelled if which == "labelled" or self.is_labelled else self._digest_of_parts

    @cached_property
    def _digest_of_pretraining(self) -> str:
        if isinstance(self.rows, Blocks):
            return self.rows.fingerprint()
        return _digest(self.rows.array, table=self.rows.table)

    @cached_property
    def _digest_of_labelled(self) -> str:
        data = self.dataset
        names = np.array(data.names)
        return _digest(
            data.train, data.test, names[data.train_labels], names[data.test_labels], table=data.pretraining.table
        )

    @cached_property
    def _digest_of_parts(self) -> str:
        return _digest(self.parts.train, self.parts.test, table=self.parts.pretraining.table)

    @cached_property
    def _digest_of_named(self) -> str:
        rows = self.named_rows
        # What a table's codes stand for is in the bundle, which is read with them.
        return _digest(rows.array, np.array(rows.ids), table=None)


def _digest(*arrays: NDArray[Any], table: TableSchema | None) -> str:
    digest = hashlib.sha256()
    if table is not None:
        digest.update(json.dumps(table.to_dict(), sort_keys=True).encode())  # what the codes in the rows stand for
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype.str}".encode())
        step = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
        for start in range(0, len(array), step):
            digest.update(array[start : start + step].tobytes())
    return f"sha256:{digest.hexdigest()}"
