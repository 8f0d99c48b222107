"""Parquet files as rows: numeric columns, or a column of encoded images. Needs pyarrow (the extra ``parquet``)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import InputError, MissingExtraError, MissingSplitError
from vaefeat.images import OnError, decode_images
from vaefeat.parquet_lists import is_list, list_values

__all__ = [
    "ParquetRows",
    "Parts",
    "encoded_cells",
    "fill_numbers",
    "find_parquet",
    "has_images",
    "numeric_columns",
    "numeric_dtype",
    "open_parquet",
    "open_parts",
    "read_parquet",
    "row_width",
]

SUFFIXES = (".parquet", ".pq")
DEFAULT_IMAGE_COLUMN = "image"
DEFAULT_LABEL_COLUMN = "label"

# Rows that are read at a time: encoded images are large, and a row group may hold any number of them.
IMAGE_BATCH = 128
_NUMERIC_BATCH = 65_536
_BUFFER_BYTES = 1 << 20


class ParquetRows(NamedTuple):
    """What :func:`read_parquet` returns."""

    array: NDArray[Any]
    """Of shape (n, features), float32 or uint8; or (n, C, H, W), uint8."""

    labels: NDArray[Any] | None
    """Of shape (n,): integers, booleans or strings."""

    columns: tuple[str, ...] | None
    """Names of the features; None for images and lists."""

    skipped: tuple[str, ...]
    """Names of the unreadable images."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Files that are read as one, in order.

    Attributes
    ----------
    files : tuple of Path
    schemas : tuple of pyarrow.Schema
        One for each file, of the same names.
    count : int
        Rows of all of them.
    """

    files: tuple[Path, ...]
    schemas: tuple[Any, ...]
    count: int

    def types(self, column: str) -> list[Any]:
        """Types of a column, file by file."""
        return [schema.field(column).type for schema in self.schemas]

    def require(self, column: str) -> None:
        """Refuse a column that is not there, naming the nearest."""
        names = self.schemas[0].names
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
            raise InputError(f"got no column {column!r} in {self.files[0]}; {hint}")


def find_parquet(folder: Path, split: str) -> tuple[list[Path], bool]:
    """List the Parquet files of one split.

    Parameters
    ----------
    folder : Path
    split : {"train", "test"}

    Returns
    -------
    files : list of Path
        Those named after the split (``train.parquet``, ``train-00000-of-00002.parquet``), or, where no file is named
        after a split, all of them. Sorted by name; empty where the folder holds no Parquet file.
    has_splits : bool
        Whether files are named after splits.

    Raises
    ------
    InputError
        Files are named after the other split only.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] not in "._")
    by_split = {
        name: [path for path in files if path.stem == name or path.stem.startswith(f"{name}-")]
        for name in ("train", "test")
    }
    has_splits = any(by_split.values())
    if has_splits and not by_split[split]:
        raise MissingSplitError(
            f"got {folder} with {', '.join(path.name for path in files)}, wanted {split}.parquet, too"
        )
    return (by_split[split] if has_splits else files), has_splits


def read_parquet(
    files: Sequence[Path],
    *,
    columns: Sequence[str] | None = None,
    label_column: str | None = DEFAULT_LABEL_COLUMN,
    image_column: str = DEFAULT_IMAGE_COLUMN,
    image_size: tuple[int, int] | None = None,
    on_error: OnError = "raise",
    max_rows: int | None = None,
) -> ParquetRows:
    """Read one Parquet file, or several of the same columns as one, a batch of rows at a time.

    Parameters
    ----------
    files : sequence of Path
        At least one.
    columns : sequence of str, optional
        Numeric columns to read, or one column of lists of numbers, each of which is a row. By default the image column
        where there is one, else the only column of lists, else every numeric or boolean column but the label; others
        are left out.
    label_column : str or None, default="label"
        Integers, booleans or strings; read where it is there. None reads no labels; a column of the default name is
        still no feature then, unless it is in `columns`.
    image_column : str, default="image"
        Encoded images: ``binary``, or ``struct<bytes: binary, path: string>`` as dataset hubs write it.
    image_size, on_error
        As in :func:`vaefeat.images.decode_images`.
    max_rows : int, optional
        Read only the first `max_rows` rows.

    Returns
    -------
    ParquetRows
        float32, or uint8 where every column is uint8.

    Raises
    ------
    InputError
        A damaged file, a missing column, a column of another type, or a null.
    MissingExtraError
        pyarrow is not installed.
    """
    parts = open_parts(files, max_rows)
    labels = _Labels(parts, label_column)
    if columns is None and has_images(parts, image_column):
        items = _encoded_images(parts, image_column, labels)
        images = decode_images(items, count=parts.count, image_size=image_size, on_error=on_error)
        every = labels.joined()
        return ParquetRows(images.array, None if every is None else every[images.kept], None, images.skipped)
    if image_size is not None:
        raise InputError(
            f"got image_size for numeric columns of {files[0]}; it applies to encoded images, leave it out"
        )
    names = numeric_columns(parts, columns, label_column)
    rows = _read_numbers(parts, names, labels)
    return ParquetRows(rows, labels.joined(), names if len(names) == rows.shape[1] else None, ())


def open_parts(files: Sequence[Path], max_rows: int | None = None) -> Parts:
    """Read every file's schema, so that a wrong file is found before the first row is read."""
    schemas = []
    count = 0
    for path in files:
        with open_parquet(path) as file:
            schemas.append(file.schema_arrow)
            count += file.metadata.num_rows
            names, wanted = schemas[-1].names, schemas[0].names
        if set(names) != set(wanted):
            raise InputError(
                f"got {path} with the columns {', '.join(names)}, wanted those of {files[0]}: "
                f"{', '.join(wanted)}; read files of different columns one by one"
            )
    if count < 1:
        raise InputError(f"got {count} rows in {files[0].parent if len(files) > 1 else files[0]}, wanted at least one")
    return Parts(files=tuple(files), schemas=tuple(schemas), count=count if max_rows is None else min(count, max_rows))


@contextmanager
def open_parquet(path: Path, metadata: Any = None) -> Iterator[Any]:
    """Give a ``pyarrow.parquet.ParquetFile``; what goes wrong inside names the file.

    Parameters
    ----------
    path : Path
    metadata : pyarrow.parquet.FileMetaData, optional
        The file's own, where it was read before.
    """
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError("Reading Parquet", extra="parquet") from error
    try:
        # pyarrow would by default fetch the wanted columns of the whole file before it hands out the first batch.
        with ParquetFile(path, metadata=metadata, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"got {path}, which is no readable Parquet file ({error}); fetch or write it again") from error


def _batches(parts: Parts, columns: Sequence[str], batch_size: int) -> Iterator[tuple[Path, int, Any]]:
    """Yield (file, row in the file, record batch) until the wanted number of rows is reached."""
    left = parts.count
    for path in parts.files:
        with open_parquet(path) as file:
            row = 0
            for batch in file.iter_batches(batch_size=min(batch_size, left), columns=list(columns)):
                batch.validate(full=True)  # finds text that is no UTF-8, on which to_pylist would stumble
                yield path, row, batch.slice(0, left)
                row += batch.num_rows
                left -= min(left, batch.num_rows)
                if left == 0:
                    return
    raise InputError(
        f"got {parts.count - left} rows in {parts.files[0].parent}, wanted the {parts.count} that the files announce; "
        "fetch or write them again"
    )


class _Labels:
    """The label column, collected batch by batch beside the rows."""

    def __init__(self, parts: Parts, column: str | None) -> None:
        if column is not None and column != DEFAULT_LABEL_COLUMN:
            parts.require(column)
        self._column = column if column in parts.schemas[0].names else None
        self._pieces: list[NDArray[Any]] = []
        for arrow_type in parts.types(self._column) if self._column is not None else ():
            plain = _undictionaried(arrow_type)
            if not (_is_text(plain) or _is_integer(plain)):
                raise InputError(
                    f"got the label column {column!r} of type {arrow_type}, wanted integers or strings; "
                    "convert it, or read no labels with label_column=None"
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """What to read for it: one name or none."""
        return () if self._column is None else (self._column,)

    def add(self, path: Path, row: int, batch: Any) -> None:
        if self._column is None:
            return
        column = batch.column(self._column)
        hint = "fill them with -1 (unlabelled), or read no labels: label_column=None, of a job data.labelled=false"
        _refuse_nulls(column, self._column, path, row, hint)
        column = column.cast(_undictionaried(column.type))
        is_text = _is_text(column.type)
        self._pieces.append(np.array(column.to_pylist(), str) if is_text else column.to_numpy(zero_copy_only=False))

    def joined(self) -> NDArray[Any] | None:
        return None if self._column is None else np.concatenate(self._pieces)


def _undictionaried(arrow_type: Any) -> Any:
    """Return the type of the values where `arrow_type` is a dictionary, which is how pandas writes its categories."""
    from pyarrow import types

    return arrow_type.value_type if types.is_dictionary(arrow_type) else arrow_type


def _is_text(arrow_type: Any) -> bool:
    from pyarrow import types

    return any(check(arrow_type) for check in (types.is_string, types.is_large_string, types.is_string_view))


def _is_integer(arrow_type: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(arrow_type) or types.is_boolean(arrow_type))


def _is_encoded(arrow_type: Any) -> bool:
    from pyarrow import types

    if types.is_struct(arrow_type):
        index = arrow_type.get_field_index("bytes")
        return index >= 0 and _is_encoded(arrow_type.field(index).type)
    return any(check(arrow_type) for check in (types.is_binary, types.is_large_binary, types.is_binary_view))


def _refuse_nulls(column: Any, name: str, path: Path, row: int, hint: str) -> None:
    if column.null_count:
        first = row + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise InputError(f"got nulls in column {name!r} of {path} (first in row {first}), wanted values; {hint}")


def has_images(parts: Parts, column: str) -> bool:
    """Whether there is a column of encoded images; one that was asked for by its own name must be."""
    if column != DEFAULT_IMAGE_COLUMN:
        parts.require(column)
    elif column not in parts.schemas[0].names:
        return False
    encoded = all(map(_is_encoded, parts.types(column)))
    if not encoded and column != DEFAULT_IMAGE_COLUMN:
        raise InputError(
            f"got the image column {column!r} of type {parts.types(column)[0]}, wanted binary or "
            "struct<bytes: binary, path: string>; read numbers with columns=[...]"
        )
    return encoded


def _encoded_images(parts: Parts, column: str, labels: _Labels) -> Iterator[tuple[str, bytes | None]]:
    """Yield a name and the encoded bytes of each row, and collect its label."""
    for path, start, batch in _batches(parts, (column, *labels.columns), IMAGE_BATCH):
        labels.add(path, start, batch)
        yield from encoded_cells(batch.column(column), path, start)


def encoded_cells(column: Any, path: Path, start: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield a name for error messages and the encoded bytes of each row.

    `start` is the number of the first row in the file.
    """
    for row, cell in enumerate(column.to_pylist(), start):
        fields = cell if isinstance(cell, dict) else {"bytes": cell}
        original = f" ({fields['path']})" if fields.get("path") else ""
        yield f"{path} row {row}{original}", fields["bytes"]


def numeric_columns(parts: Parts, columns: Sequence[str] | None, label_column: str | None) -> tuple[str, ...]:
    """Name the columns that become features, see :func:`read_parquet`."""
    from pyarrow import types

    def is_numeric(name: str) -> bool:
        return all(_is_integer(arrow_type) or types.is_floating(arrow_type) for arrow_type in parts.types(name))

    if columns is not None and len(columns) == 1:
        parts.require(columns[0])
        if all(map(is_list, parts.types(columns[0]))):
            return tuple(columns)
    if columns is None:
        labels = {label_column, DEFAULT_LABEL_COLUMN if label_column is None else label_column}
        others = [name for name in parts.schemas[0].names if name not in labels]
        lists = [name for name in others if all(map(is_list, parts.types(name)))]
        # Beside whole rows, single numbers are ids and the like.
        names = tuple(lists) if len(lists) == 1 else tuple(filter(is_numeric, others))
    else:
        names = tuple(columns)
        for name in names:
            parts.require(name)
            if not is_numeric(name):
                raise InputError(
                    f"got column {name!r} of type {parts.types(name)[0]}, wanted numbers; convert it first"
                )
    if not names:
        raise InputError(
            f"got no numeric column, no single column of lists of numbers and no column {DEFAULT_IMAGE_COLUMN!r} of "
            f"encoded images in {parts.files[0]} (columns: {', '.join(parts.schemas[0].names)}); name the column of "
            "images with image_column="
        )
    return names


def _read_numbers(parts: Parts, names: tuple[str, ...], labels: _Labels) -> NDArray[Any]:
    rows = np.empty((parts.count, row_width(parts, names)), numeric_dtype(parts, names))
    start = 0
    for path, row, batch in _batches(parts, (*names, *labels.columns), _NUMERIC_BATCH):
        labels.add(path, row, batch)
        fill_numbers(rows[start : start + batch.num_rows], batch, names, path, row)
        start += batch.num_rows
    return rows


def row_width(parts: Parts, names: Sequence[str]) -> int:
    """Count the numbers of a row: the columns, or those of the first list."""
    if not is_list(parts.types(names[0])[0]):
        return len(names)
    for path, row, batch in _batches(parts, names, 1):
        _refuse_nulls(batch.column(0), names[0], path, row, "fill or drop them first")
        return max(1, len(batch.column(0).flatten()))
    raise AssertionError("open_parts refuses files without a row")


def numeric_dtype(parts: Parts, names: Sequence[str]) -> np.dtype[Any]:
    """Choose uint8 where every column, or list, is of it in every file, else float32."""
    from pyarrow import types

    every = [arrow_type for name in names for arrow_type in parts.types(name)]
    all_uint8 = all(types.is_uint8(one.value_type if is_list(one) else one) for one in every)
    return np.dtype(np.uint8 if all_uint8 else np.float32)


def fill_numbers(rows: NDArray[Any], batch: Any, names: Sequence[str], path: Path, start: int) -> None:
    """Write a record batch's columns into `rows` (n, features); `start` is the first row's number in the file."""
    for index, name in enumerate(names):
        column = batch.column(name)
        _refuse_nulls(column, name, path, start, "fill or drop them first")
        with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite or NaN, which is refused later
            if is_list(column.type):
                what = f"column {name!r} of {path}"
                rows[:] = list_values(column, width=rows.shape[1], what=what, start=start)
            else:
                rows[:, index] = column.to_numpy(zero_copy_only=False)
