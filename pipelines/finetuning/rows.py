"""Rows with an id each, and their features: encoded here, or read from what ``python -m pipelines embed`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vaefeat.cli_files import parts, rows_for
from vaefeat.data import load_rows, split_folder
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError
from vaefeat.images import find_images
from vaefeat.input_spec import InputSpec
from vaefeat.parquet import DEFAULT_IMAGE_COLUMN, find_parquet, has_images, numeric_columns, open_parquet, open_parts
from vaefeat.parquet import SUFFIXES as PARQUET_SUFFIXES
from vaefeat.table_files import read_frame

__all__ = ["NamedRows", "embed_rows", "read_features", "read_ids", "read_rows"]

#: What the embedding job says of its output, in the schema of each file and in a file that it writes last.
_BUNDLE_KEY, _OUTPUT_KEY, _MANIFEST = b"vaefeat.bundle", b"vaefeat.output", "_manifest.json"
#: Rows whose features are computed again, and by how much they may differ, in standard deviations of a feature:
#: processors round differently.
_COMPARED, _TOLERANCE = 64, 1e-2


@dataclass(frozen=True, kw_only=True, eq=False)
class NamedRows:
    """Rows as the bundle takes them.

    Attributes
    ----------
    array : ndarray of shape (n, ...)
    ids : sequence of str
        No two the same.
    source : str
        For people.
    """

    array: NDArray[Any]
    ids: Sequence[str]
    source: str


def read_rows(
    spec: InputSpec, data: Path, *, split: Literal["train", "test"], image_size: int | None, id_column: str | None
) -> NamedRows:
    """Read the rows of a data set.

    Parameters
    ----------
    spec : InputSpec
        What the bundle takes.
    data : Path
        As :func:`vaefeat.data.load_rows` takes it.
    split : {"train", "test"}
    image_size : int, optional
    id_column : str, optional
        Of Parquet, and of CSV. Where None, the path of an image below `data`, or the row's number from 0 on.

    Raises
    ------
    InputError
        Rows that cannot be read or that the bundle does not take; ids that are missing or come twice.
    """
    if spec.table is not None:
        array = rows_for(spec, data, split=split, image_size=image_size)
    else:
        columns = None if id_column is None else _features_beside(data, split, id_column)
        rows = load_rows(data, split=split, image_size=image_size, columns=columns, label_column=None)
        try:
            array = spec.prepare(rows.array)
        except InputError as error:
            raise InputError(f"the bundle does not take the rows of {data}: {error}") from error
    ids = read_ids(data, split=split, id_column=id_column, n_rows=len(array))
    return NamedRows(array=array, ids=ids, source=str(data))


def read_ids(data: Path, *, split: Literal["train", "test"], id_column: str | None, n_rows: int) -> list[str]:
    """Give the id of each row of a data set.

    Parameters
    ----------
    data : Path
    split : {"train", "test"}
    id_column : str, optional
        As in :func:`read_rows`.
    n_rows : int
        As many as were read.

    Raises
    ------
    InputError
        Data without such a column; ids that are missing or come twice.
    """
    files = _parquet_files(data, split)
    if id_column is not None:
        if files:
            return _parquet_ids(files, id_column)
        if data.suffix.lower() == ".csv":
            return _csv_ids(data, id_column)
        raise _no_columns(data, id_column)
    if data.is_dir() and not files:
        images = find_images(split_folder(data, split))
        if len(images) == n_rows:
            return [file.relative_to(data).as_posix() for file in images]
    return list(map(str, range(n_rows)))


def embed_rows(encoder: OnnxEncoder, rows: NDArray[Any]) -> NDArray[np.float32]:
    """Give the posterior means of rows (n, d), with a bar."""
    return np.concatenate([encoder.embed(part) for part in parts(rows, "embed")])


def read_features(path: Path, encoder: OnnxEncoder, rows: NamedRows) -> NDArray[np.float32]:
    """Read features that were computed before, in the order of the rows.

    Parameters
    ----------
    path : Path
        A file or a folder of Parquet with the columns ``id`` and ``embedding``.
    encoder : OnnxEncoder
        Which made them: some are computed again and compared.
    rows : NamedRows

    Returns
    -------
    ndarray of shape (n, d), float32

    Raises
    ------
    InputError
        Features of another bundle or of other rows, an unfinished job's, or not of all rows.
    """
    found = _embeddings(path, encoder)
    missing = [name for name in rows.ids if name not in found]
    if missing:
        raise InputError(
            f"got {path} without {len(missing):,} of the {len(rows.ids):,} rows of {rows.source}, the first "
            f"{missing[0]!r}; its ids are such as {next(iter(found), None)!r}. Embed the same data, with the same "
            "--id-column and --split, or leave out --features"
        )
    features = np.stack([found[name] for name in rows.ids]).astype(np.float32)
    spread = np.linspace(0, len(features) - 1, min(_COMPARED, len(features))).round().astype(int)
    again = encoder.embed(rows.array[spread])
    apart = np.abs(again - features[spread]).max(axis=1)
    if (apart > _TOLERANCE * max(float(features.std()), 1e-6)).any():
        row = spread[int(apart.argmax())]
        raise InputError(
            f"got other features in {path} for row {rows.ids[row]!r} than bundle {encoder.name!r} gives for it in "
            f"{rows.source} (they differ by {apart.max():.2g}); wanted features of these rows: are ids of another "
            "order or split? Embed again, or leave out --features"
        )
    return features


def _embeddings(path: Path, encoder: OnnxEncoder) -> dict[str, NDArray[np.float32]]:
    if path.is_dir() and not (path / _MANIFEST).is_file():
        raise InputError(
            f"got {path} without {_MANIFEST}, which is written last: embedding has not finished; run it on"
        )
    files = find_parquet(path, "train")[0] if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise InputError(f"got {path} without Parquet files, wanted what python -m pipelines embed wrote")
    schemas = open_parts(files)
    for name in ("id", "embedding"):
        schemas.require(name)
    wanted = {_BUNDLE_KEY: encoder.digest, _OUTPUT_KEY: "mean"}
    found: dict[str, NDArray[np.float32]] = {}
    for file, schema in zip(files, schemas.schemas, strict=True):
        notes = schema.metadata or {}
        for key, value in wanted.items():
            if (got := notes.get(key, value.encode()).decode()) != value:
                raise InputError(f"got {file} of {key.decode()} {got}, wanted {value}; embed with this bundle's mean")
        with open_parquet(file) as opened:
            table = opened.read(columns=["id", "embedding"]).combine_chunks()
        ids = list(map(str, table.column("id").to_pylist()))
        values = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if len(values) != len(ids) * encoder.outputs["mean"]:
            raise InputError(f"got {file} with embeddings of another width than {encoder.outputs['mean']}")
        found.update(zip(ids, values.reshape(len(ids), -1), strict=True))
    return found


def _features_beside(data: Path, split: Literal["train", "test"], id_column: str) -> tuple[str, ...] | None:
    """Name the columns of numbers but for the ids; None where rows are images."""
    files = _parquet_files(data, split)
    if not files:
        raise _no_columns(data, id_column)
    opened = open_parts(files)
    opened.require(id_column)
    if has_images(opened, DEFAULT_IMAGE_COLUMN):
        return None
    return tuple(name for name in numeric_columns(opened, None, None) if name != id_column)


def _parquet_files(data: Path, split: Literal["train", "test"]) -> Sequence[Path]:
    if data.is_dir():
        return find_parquet(split_folder(data, split), split)[0]
    return [data] if data.suffix.lower() in PARQUET_SUFFIXES else []


def _no_columns(data: Path, id_column: str) -> InputError:
    return InputError(
        f"got --id-column (of a stage, finetune.id_column) {id_column!r} for {data}, wanted Parquet, or CSV of a "
        "table; leave it out"
    )


def _parquet_ids(files: Sequence[Path], column: str) -> list[str]:
    open_parts(files).require(column)
    ids: list[Any] = []
    for path in files:
        with open_parquet(path) as file:
            ids += file.read(columns=[column]).column(column).to_pylist()
    return _distinct(ids, column, source=", ".join(map(str, files)))


def _csv_ids(data: Path, column: str) -> list[str]:
    frame, _ = read_frame(data, columns=[column], label_column=None, texts=[column])
    return _distinct(frame.column(column).to_pylist(), column, source=str(data))


def _distinct(ids: Sequence[Any], column: str, *, source: str) -> list[str]:
    seen: dict[str, int] = {}
    for row, value in enumerate(ids):
        name = "" if value is None else str(value).strip()
        if not name or name in seen:
            how = f"twice (rows {seen[name]} and {row})" if name else f"as a missing value (row {row})"
            raise InputError(f"got the id {value!r} {how} in column {column!r} of {source}, wanted one a row")
        seen[name] = row
    return list(seen)
