"""Where rows come from: arrays, NumPy files, MNIST's IDX files, folders of images, Parquet.

:func:`load_rows` looks at a source, hands it to the room that knows the format (``arrays``, ``idx``, ``images``,
``parquet``), and checks what comes back in one place. Nothing here scales, shuffles or splits.
"""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vaefeat.arrays import as_labels, as_rows, read_npy, read_npz
from vaefeat.errors import InputError, MissingSplitError
from vaefeat.idx import find_idx, is_idx, read_idx, read_idx_shape
from vaefeat.images import SUFFIXES as IMAGE_SUFFIXES
from vaefeat.images import OnError, class_folders, decode_images, find_images
from vaefeat.parquet import DEFAULT_IMAGE_COLUMN, DEFAULT_LABEL_COLUMN, find_parquet, read_parquet
from vaefeat.parquet import SUFFIXES as PARQUET_SUFFIXES
from vaefeat.table_columns import column_names
from vaefeat.table_files import SUFFIXES as TABLE_SUFFIXES
from vaefeat.table_files import read_frame
from vaefeat.table_fitting import fit_table, is_table
from vaefeat.table_schema import HandleUnknown, TableSchema

__all__ = [
    "Request",
    "Rows",
    "Split",
    "as_names",
    "as_positive",
    "as_size",
    "batches",
    "fingerprint",
    "load_rows",
    "one_of",
    "split_folder",
]

Split = Literal["train", "test"]

FINGERPRINT_ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Rows:
    """Rows, and what came with them.

    Parameters
    ----------
    array : ndarray of shape (n, features) or (n, C, H, W)
        uint8 or float32. May be a view of the source, and a read-only memory map.
    labels : ndarray of shape (n,) or None
        int64 or strings; None where the source has none.
    names : tuple of str or None
        Class names in the order of integer labels, where the source has them.
    source : str
        What the rows were read from, for people: ``"array"`` or a path.
    skipped : tuple of str
        Unreadable inputs that were left out, with ``on_error="skip"``.
    table : TableSchema or None
        What the columns are, where they are not all numbers without a gap; the array then holds codes and NaN.
    columns : tuple of str or None
        Names of the features, of a data frame or Parquet whose columns are all numbers.
    """

    array: NDArray[Any]
    labels: NDArray[Any] | None = None
    names: tuple[str, ...] | None = None
    source: str = "array"
    skipped: tuple[str, ...] = ()
    table: TableSchema | None = None
    columns: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.array)

    def __repr__(self) -> str:
        what = "" if self.table is None else f", {self.table}"
        labels = "no labels" if self.labels is None else "labels"
        return f"Rows({self.array.dtype} of shape {self.array.shape}{what}, {labels}, source={self.source!r})"

    @property
    def kind(self) -> Literal["image", "vector"]:
        """``"image"`` for rows of shape (C, H, W), ``"vector"`` for rows of shape (features,)."""
        return "image" if self.array.ndim == 4 else "vector"

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row, without the axis of rows."""
        return self.array.shape[1:]

    def fingerprint(self) -> str:
        """Return :func:`fingerprint` of the array."""
        return fingerprint(self.array)


class Request(NamedTuple):
    """The arguments of :func:`load_rows`, checked."""

    split: Split
    image_size: tuple[int, int] | None
    columns: tuple[str, ...] | None
    label_column: str | None
    image_column: str
    on_error: OnError
    max_rows: int | None

    def refuse(self, source: str, *, image_size: bool = False, columns: bool = False, split: bool = False) -> None:
        """Refuse arguments that do not apply to `source`, rather than ignore what somebody asked for."""
        if image_size and self.image_size is not None:
            raise InputError(f"got image_size for {source}; it applies to encoded images only, leave it out")
        if columns and self.columns is not None:
            raise InputError(f"got columns for {source}; they apply to Parquet only, leave them out")
        if split and self.split != "train":
            raise MissingSplitError(
                f"got split={self.split!r} for {source}, which has no splits; leave it out to read all rows, "
                "or pass the path of the test rows"
            )


class _Found(NamedTuple):
    """What a reader hands back, not yet checked."""

    array: Any
    source: str
    labels: NDArray[Any] | None = None
    names: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()


def load_rows(
    source: ArrayLike | str | os.PathLike[str],
    *,
    split: Split = "train",
    image_size: int | Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    label_column: str | None = DEFAULT_LABEL_COLUMN,
    image_column: str = DEFAULT_IMAGE_COLUMN,
    on_error: OnError = "raise",
    max_rows: int | None = None,
    table: bool | None = None,
    categorical: Sequence[str | int] | None = None,
    handle_unknown: HandleUnknown = "error",
) -> Rows:
    """Read rows from an array, a data frame, a file or a folder.

    Parameters
    ----------
    source : array-like, str or path-like
        - an array of shape (n, features), (n, H, W) or (n, C, H, W), see :func:`vaefeat.arrays.as_rows`;
        - ``.npy`` (stays memory-mapped if it is uint8 or float32) or ``.npz``, see :func:`vaefeat.arrays.read_npz`;
        - an IDX file, or a folder with MNIST's four, gzipped or not, also in ``raw/`` or ``MNIST/raw/`` below it;
        - a Parquet file, or a folder of them, see :func:`vaefeat.parquet.read_parquet`;
        - a data frame of pandas or polars;
        - a CSV file, which is read as a table (needs pyarrow);
        - a folder of PNG, JPEG or WebP images, see :mod:`vaefeat.image_decoding` for what is done to them. If every
          image lies in a sub-folder, these are the classes.

        A folder is searched in this order, IDX first.
    split : {"train", "test"}, default="train"
        Chooses the IDX files, Parquet files or sub-folder of that name. Sources without splits are read whole as
        "train" and refused as "test".
    image_size : int or (int, int), optional
        Height and width to which encoded images are resized; one number for a square.
    columns, label_column, image_column
        Columns of a Parquet file. ``label_column=None`` reads no labels.
    on_error : {"raise", "skip"}, default="raise"
        Whether an unreadable image is an error, or left out and named in :attr:`Rows.skipped`.
    max_rows : int, optional
        Take only the first `max_rows` rows (or images, before unreadable ones are skipped).
    table : bool, optional
        Whether columns may be text, booleans or categories, and values missing; :attr:`Rows.table` then says what they
        are. When None, data frames and arrays with such values are tables, and of files those of CSV: True takes the
        text columns of Parquet for categories, which are left out otherwise.
    categorical : sequence of str or int, optional
        Columns of a table that are categories although they hold numbers.
    handle_unknown : {"error", "ignore"}, default="error"
        What an encoder of this table does with a category that is not in it: refuse it, or take it for missing.

    Returns
    -------
    Rows

    Raises
    ------
    InputError
        The source does not exist, holds nothing readable, is damaged, or holds something else than finite real rows
        of one shape; or an argument does not apply to it.
    MissingExtraError
        Parquet without pyarrow.
    """
    request = Request(
        split=one_of("split", split, get_args(Split)),
        image_size=as_size(image_size),
        columns=as_names(columns),
        label_column=label_column,
        image_column=image_column,
        on_error=one_of("on_error", on_error, get_args(OnError)),
        max_rows=None if max_rows is None else as_positive("max_rows", max_rows),
    )
    one_of("handle_unknown", handle_unknown, get_args(HandleUnknown))
    if (frame := _table(source, request, table, categorical)) is not None:
        schema, encoded = fit_table(frame.array, categorical=categorical, handle_unknown=handle_unknown)
        labels = None if frame.labels is None else as_labels(frame.labels, what=frame.source, count=len(encoded))
        return Rows(array=encoded, labels=labels, source=frame.source, table=schema)
    found = _find(source, request)
    array = as_rows(found.array, what=found.source, max_rows=request.max_rows, columns=found.columns)
    labels = None if found.labels is None else as_labels(found.labels, what=found.source, count=len(found.array))
    return Rows(
        array=array,
        labels=None if labels is None else labels[: len(array)],
        names=found.names,
        source=found.source,
        skipped=found.skipped,
        columns=found.columns,
    )


def fingerprint(array: NDArray[Any]) -> str:
    """Tell arrays apart by a digest that is cheap even for a memory map.

    Parameters
    ----------
    array : ndarray of shape (n, ...)
        Numbers.

    Returns
    -------
    str
        ``"sha256:"`` and 64 hexadecimal digits, over the shape, the dtype and at most 4,096 evenly spaced rows (the
        first and the last among them). Changes in other rows go unnoticed. The same on every machine.
    """
    digest = hashlib.sha256(f"{array.shape} {array.dtype.name}".encode())
    little_endian = array.dtype.newbyteorder("<")
    # Row by row, because 4,096 large images at once may not fit into memory.
    count = min(len(array), FINGERPRINT_ROWS)
    for position in range(count):
        row = position * (len(array) - 1) // max(count - 1, 1)
        digest.update(array[row].astype(little_endian).tobytes())
    return f"sha256:{digest.hexdigest()}"


def batches(array: NDArray[Any], batch_size: int) -> Iterator[NDArray[Any]]:
    """Cut an array into views of `batch_size` rows, in order; the last one may be shorter.

    Raises
    ------
    InputError
        `batch_size` is not a positive integer.
    """
    size = as_positive("batch_size", batch_size)
    return (array[start : start + size] for start in range(0, len(array), size))


def as_positive(name: str, value: int) -> int:
    """Give a positive integer, or refuse it by its name."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f"got {name}={value!r}, wanted a positive integer")
    return number


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """Give a value that is allowed, or refuse it by its name."""
    if value not in allowed:
        raise InputError(f"got {name}={value!r}, wanted {' or '.join(map(repr, allowed))}")
    return value


def as_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Give height and width of a size, which may be one number."""
    if image_size is None:
        return None
    sides = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(sides) != 2:
        raise InputError(f"got image_size={image_size!r}, wanted (height, width), or one number for a square")
    return as_positive("image_size", sides[0]), as_positive("image_size", sides[1])


def as_names(columns: Sequence[str] | None) -> tuple[str, ...] | None:
    """Give names of columns, and refuse a single text."""
    if isinstance(columns, str):
        raise InputError(f"got columns={columns!r}, wanted a list of names; pass columns=[{columns!r}]")
    return None if columns is None else tuple(columns)


def _find(source: Any, request: Request) -> _Found:
    if not isinstance(source, str | os.PathLike):
        request.refuse("an array", image_size=True, columns=True, split=True)
        # A DataFrame's column names make an error message easier to act on.
        return _Found(source, "array", columns=column_names(source))
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, request)
    if path.is_file():
        return _read_file(path, request)
    raise _missing(path)


def _missing(path: Path) -> InputError:
    return InputError(f"got {path}, which does not exist; wanted a folder or a file, see vaefeat.data.load_rows")


def _table(source: Any, request: Request, asked: bool | None, categorical: Sequence[str | int] | None) -> _Found | None:
    """Give a table that is not encoded yet, or None where the rows are plain numbers or images."""
    if not isinstance(source, str | os.PathLike):
        cut = source if request.max_rows is None else source[: request.max_rows]
        if asked is False or not (asked or is_table(cut, categorical=categorical)):
            return None
        request.refuse("a table", image_size=True, columns=True, split=True)
        return _Found(cut, "array")
    path = Path(source)
    if asked is None:
        asked = path.suffix.lower() == ".csv" or categorical is not None
    if not asked:
        return None
    if not path.exists():
        raise _missing(path)
    if path.suffix.lower() not in TABLE_SUFFIXES or not path.is_file():
        raise InputError(f"got {path} to read as a table, wanted a file that ends in {' or '.join(TABLE_SUFFIXES)}")
    request.refuse(str(path), image_size=True, split=True)
    frame, labels = read_frame(
        path, columns=request.columns, label_column=request.label_column, max_rows=request.max_rows
    )
    return _Found(frame, str(path), labels)


def _read_file(path: Path, request: Request) -> _Found:
    suffix = path.suffix.lower()
    request.refuse(str(path), split=True)
    if suffix in PARQUET_SUFFIXES:
        return _read_parquet(path, [path], request)
    request.refuse(str(path), image_size=True, columns=True)
    if suffix == ".npy":
        return _Found(read_npy(path), str(path))
    if suffix == ".npz":
        rows, labels = read_npz(path)
        return _Found(rows, str(path), labels)
    if is_idx(path):
        return _Found(read_idx(path, max_rows=request.max_rows), str(path))
    hint = "pass the folder that holds the images" if suffix in IMAGE_SUFFIXES else "convert it to one of these"
    raise InputError(f"got {path}, wanted a .npy, .npz, .parquet, .csv or IDX file, or a folder; {hint}")


def _read_folder(folder: Path, request: Request) -> _Found:
    """Try the formats in the order of :func:`load_rows`."""
    if idx := find_idx(folder, request.split):
        request.refuse(str(folder), image_size=True, columns=True)
        return _read_idx(*idx, request)
    inner = split_folder(folder, request.split)
    files, has_splits = find_parquet(inner, request.split)
    images = [] if files else find_images(inner)
    if not files and not images:
        raise InputError(
            f"got {inner} without anything to read; wanted train-images-idx3-ubyte[.gz] (also in raw/ or MNIST/raw/), "
            f"*.parquet, or images ({', '.join(IMAGE_SUFFIXES)}) at any depth"
        )
    request.refuse(str(folder), split=inner is folder and not has_splits)
    if files:
        return _read_parquet(inner, files, request)
    request.refuse(str(folder), columns=True)
    return _read_images(inner, images, request, train=None if inner is folder else folder / "train")


def split_folder(folder: Path, split: Split) -> Path:
    """Return the sub-folder of the split, or the folder itself where it has no such sub-folders."""
    present = [name for name in get_args(Split) if (folder / name).is_dir()]
    if present and split not in present:
        raise MissingSplitError(
            f"got {folder} with the sub-folder {present[0]}/ only, wanted {split}/ for split={split!r}"
        )
    return folder / split if present else folder


def _read_idx(images: Path, labels: Path | None, request: Request) -> _Found:
    rows = read_idx(images, max_rows=request.max_rows)
    if labels is None:
        return _Found(rows, str(images))
    # With max_rows both are cut to the same length, which would hide that one of them belongs to something else.
    n_images, n_labels = read_idx_shape(images)[0], read_idx_shape(labels)[0]
    if n_images != n_labels:
        raise InputError(f"got {n_labels} labels in {labels}, wanted one for each of the {n_images} images in {images}")
    return _Found(rows, str(images), read_idx(labels, max_rows=request.max_rows))


def _read_parquet(source: Path, files: Sequence[Path], request: Request) -> _Found:
    table = read_parquet(
        files,
        columns=request.columns,
        label_column=request.label_column,
        image_column=request.image_column,
        image_size=request.image_size,
        on_error=request.on_error,
        max_rows=request.max_rows,
    )
    return _Found(table.array, str(source), table.labels, columns=table.columns, skipped=table.skipped)


def _read_images(folder: Path, files: list[Path], request: Request, *, train: Path | None) -> _Found:
    in_classes = all(len(file.relative_to(folder).parts) > 1 for file in files)
    names = _class_names(folder, train) if in_classes else None
    files = files[: request.max_rows]
    images = decode_images(
        ((str(file), file) for file in files),
        count=len(files),
        image_size=request.image_size,
        on_error=request.on_error,
    )
    labels = None
    if names is not None:
        every = np.array([names.index(file.relative_to(folder).parts[0]) for file in files])
        labels = every[images.kept]
    return _Found(images.array, str(folder), labels, names, skipped=images.skipped)


def _class_names(folder: Path, train: Path | None) -> tuple[str, ...]:
    """Return the class folders; those of ``train/`` for ``test/``, too, so that a label means the same in both."""
    names = class_folders(folder)
    train_names = class_folders(train) if train is not None and train.is_dir() else ()
    if not train_names:
        return names
    if unknown := sorted(set(names) - set(train_names)):
        raise InputError(
            f"got {folder} with the classes {', '.join(unknown)}, wanted only those of {train}: "
            f"{', '.join(train_names)}; rename the folders, or pass {folder} itself to number its classes on their own"
        )
    return train_names
