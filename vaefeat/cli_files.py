"""What every verb of the command line reads and writes in the same way."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from vaefeat.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vaefeat.input_spec import InputSpec
    from vaefeat.table_schema import TableSchema

__all__ = [
    "BUNDLE",
    "DATA",
    "IMAGE_SIZE",
    "SEED",
    "SPLIT",
    "frame_for",
    "parts",
    "require_suffix",
    "rows_for",
    "write_array",
    "write_file",
    "write_rows",
]

#: Help for arguments that several verbs take.
DATA = "A .npy or .npz file, Parquet, CSV, a folder of images, or of MNIST's IDX files."
BUNDLE = "Folder of a bundle."
SPLIT = "Which, where the data have splits."
IMAGE_SIZE = "Resize images to this height and width."
SEED = "The same seed gives the same result."

_ROWS_A_CALL = 4096


def parts(rows: NDArray[Any], description: str) -> Iterator[NDArray[Any]]:
    """Cut rows into parts, with a bar on a terminal."""
    from rich.progress import track

    console = Console(stderr=True)
    starts = range(0, len(rows), _ROWS_A_CALL)
    for start in track(starts, description, console=console, transient=True, disable=not console.is_terminal):
        yield rows[start : start + _ROWS_A_CALL]


def rows_for(
    spec: InputSpec,
    data: Path,
    *,
    split: Literal["train", "test"],
    image_size: int | None,
    max_rows: int | None = None,
    holes: bool = False,
) -> NDArray[Any]:
    """Read rows for a model: of a table's, the columns that it knows, encoded as it does.

    `holes` lets any column of a table have missing values.
    """
    from vaefeat.arrays import read_npy
    from vaefeat.data import load_rows
    from vaefeat.parquet import SUFFIXES as PARQUET_SUFFIXES
    from vaefeat.table_columns import compare_names

    if spec.table is None:
        # By their names, in whatever order the file has them.
        columns = spec.names if data.suffix.lower() in PARQUET_SUFFIXES else None
        loaded = load_rows(data, split=split, image_size=image_size, max_rows=max_rows, columns=columns)
        if spec.names is not None and loaded.columns is not None:
            compare_names(loaded.columns, spec.names)
        return loaded.array
    if data.suffix.lower() == ".npy" and data.is_file():
        return spec.prepare(read_npy(data)[:max_rows], holes=holes)
    return spec.prepare(frame_for(spec.table, data, max_rows=max_rows), holes=holes)


def frame_for(table: TableSchema, data: Path, *, max_rows: int | None = None) -> Any:
    """Read the columns that a model knows from a file of a table, as a table of pyarrow."""
    from vaefeat.table_files import SUFFIXES, read_frame

    if not data.exists():
        raise InputError(f"got {data}, which does not exist; wanted a file of {table}")
    if data.suffix.lower() not in SUFFIXES or not data.is_file():
        raise InputError(f"got {data}, wanted a file of {table}: {', '.join(SUFFIXES)} or .npy")
    names = [column.name for column in table.columns] if table.named else None
    return read_frame(data, columns=names, max_rows=max_rows, wanted="the bundle was trained with")[0]


def write_rows(
    path: Path, rows: NDArray[Any], spec: InputSpec, *, given: Any = None, holes: NDArray[Any] | None = None
) -> None:
    """Write rows as an array file, or those of a table as CSV or Parquet, with the names of categories.

    Outside of `holes`, the values of a table that was `given` (:func:`frame_for`) stay as they were read.
    """
    from vaefeat.table_files import completed, write_frame

    if path.suffix == ".npy":
        write_array(path, rows)
    elif spec.table is None:
        raise InputError(f"got the output file {path} for {spec}, which are no table; give a name that ends in .npy")
    else:
        frame = spec.table.frame(rows, library="pyarrow")
        write_file(path, write_frame(path, frame if given is None or holes is None else completed(given, frame, holes)))


def require_suffix(out: Path, *suffixes: str) -> None:
    """Refuse another kind of file before anything takes long."""
    if out.suffix not in suffixes:
        raise InputError(f"got the output file {out}, wanted a name that ends in {' or '.join(suffixes)}")


def write_array(path: Path, array: object) -> None:
    """Write an array file that appears whole or not at all."""
    import numpy as np

    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=False)
    write_file(path, file.getvalue())


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; one that was there is replaced."""
    from vaefeat.atomic import replace_file

    try:
        replace_file(path, content)
    except OSError as error:
        raise InputError(f"could not write {path}: {error.strerror or error}; choose another place") from error
