"""The job: labels and rows in, the best classifier of several out, as a bundle that is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from pipelines.finetuning.comparison import Comparison, Terms, choose, compare, counted
from pipelines.finetuning.contenders import Ground
from pipelines.finetuning.labels import read_both
from pipelines.finetuning.results import save, show
from pipelines.finetuning.rows import NamedRows, embed_rows, read_features, read_rows
from vaefeat.bundle import MANIFEST_FILE, load_bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError

__all__ = ["FinetuneOptions", "finetune"]


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Terms):
    """What is asked for, besides the terms.

    Parameters
    ----------
    bundle, data, out : Path
    labels : sequence of Path
        Files of the labels there are.
    features : Path, optional
        Of all rows, as ``python -m pipelines embed`` writes them; encoded here when None.
    test_labels : Path, optional
        Labels of other rows of the data, which the shipped classifier is asked for at the end.
    id_column, label_column : str
        Of the files of labels.
    data_id_column : str, optional
        Of the data, where they are Parquet or a table.
    split : {"train", "test"}
    image_size : int, optional
    """

    bundle: Path
    data: Path
    labels: Sequence[Path]
    out: Path
    features: Path | None = None
    test_labels: Path | None = None
    id_column: str = "id"
    label_column: str = "label"
    data_id_column: str | None = None
    split: Literal["train", "test"] = "train"
    image_size: int | None = None


def finetune(options: FinetuneOptions, *, console: Console) -> Comparison:
    """Compare classifiers on the labels there are, and ship the best.

    Parameters
    ----------
    options : FinetuneOptions
    console : Console
        Where the table goes; progress goes to standard error.

    Returns
    -------
    Comparison
        Its bundle is the one in the folder.

    Raises
    ------
    InputError
        Labels, ids, rows or features that cannot be used or do not fit together; a folder that cannot be written.
    BundleError, ExportError, TrainingError
        Whatever a stage raises.
    """
    _refuse_used(options.out)
    given, test = read_both(
        options.labels, options.test_labels, id_column=options.id_column, label_column=options.label_column
    )
    bundle = load_bundle(options.bundle)
    encoder = OnnxEncoder(bundle)
    choice = choose(options, given, bundle)
    console.print(counted(given), highlight=False, markup=False)
    rows = read_rows(
        bundle.manifest.input,
        options.data,
        split=options.split,
        image_size=options.image_size,
        id_column=options.data_id_column,
    )
    labels = given.join(rows.ids, source=rows.source)
    test_labels = None if test is None else test.join(rows.ids, source=rows.source)
    ground = Ground(
        bundle=bundle,
        rows=rows.array,
        features=_features(options, encoder, rows),
        max_steps=options.max_steps,
    )
    found = compare(ground, labels, test_labels=test_labels, terms=options, choice=choice)
    show(found, console=console)
    saved = save(found, options.out, config={name: _plain(value) for name, value in vars(options).items()})
    console.print(f"{saved.best.contender.title}: python -m serving {options.out}", highlight=False, soft_wrap=True)
    return saved


def _refuse_used(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"got {out}, which is a file; wanted the name of a folder for the classifier")
    if (out / MANIFEST_FILE).exists():
        raise InputError(f"got {out}, which holds a bundle already; choose another --out, or remove the folder")


def _features(options: FinetuneOptions, encoder: OnnxEncoder, rows: NamedRows) -> NDArray[np.float32]:
    if options.features is None:
        return embed_rows(encoder, rows.array)
    return read_features(options.features, encoder, rows)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
