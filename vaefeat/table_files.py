"""Files of tables, CSV and Parquet, as tables of pyarrow (the extra ``parquet``)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import ConfigError, InputError, requiring
from vaefeat.parquet import DEFAULT_LABEL_COLUMN
from vaefeat.settings import unknown_name

__all__ = ["NULL_VALUES", "SUFFIXES", "completed", "read_frame", "write_frame"]

SUFFIXES = (".csv", ".parquet", ".pq")
#: Of CSV: in columns of text as of numbers, as pandas has it; pyarrow cannot tell them apart before it knows the types.
NULL_VALUES = ("", "NA", "NaN", "nan", "null")


def read_frame(
    path: Path,
    *,
    columns: Sequence[str] | None = None,
    label_column: str | None = DEFAULT_LABEL_COLUMN,
    max_rows: int | None = None,
    wanted: str = "was asked for",
    texts: Sequence[str] = (),
) -> tuple[Any, NDArray[Any] | None]:
    """Read a file whole.

    Parameters
    ----------
    path : Path
        Ends in one of :data:`SUFFIXES`. Empty fields of CSV are missing values, and so are ``NA``, ``NaN``, ``nan`` and
        ``null``, in columns of text, too; types are read off the values.
    columns : sequence of str, optional
        Which to read, in this order; all but the label when None.
    label_column : str or None
        Read as labels where it is there; None reads no labels, and a column of the default name is still left out.
    max_rows : int, optional
    wanted : str
        Of a column that is missing: why it has to be there, for the error.
    texts : sequence of str
        Columns of CSV that stay text whatever they hold: 007 is another id than 7.

    Returns
    -------
    frame : pyarrow.Table
    labels : ndarray of shape (n,) or None

    Raises
    ------
    InputError
        The file is not there, is damaged, or has no such column.
    MissingExtraError
        pyarrow is not installed.
    """
    with requiring("parquet", what=f"Reading {path.suffix}"):
        import pyarrow as pa
        from pyarrow import csv, parquet
    try:
        if path.suffix.lower() == ".csv":
            types = dict.fromkeys(texts, pa.string())
            options = csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=NULL_VALUES)
            whole = csv.read_csv(path, convert_options=options)
        else:
            whole = parquet.read_table(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"got {path}, which cannot be read as a table ({error}); write it again") from error
    whole = whole.slice(0, max_rows)
    labels = None
    if label_column is not None and label_column in whole.column_names:
        labels = _labels(whole.column(label_column), f"column {label_column!r} of {path}")
    elif label_column not in (None, DEFAULT_LABEL_COLUMN):
        raise unknown_name(f"the label column in {path}", label_column, whole.column_names)
    left_out = {label_column, DEFAULT_LABEL_COLUMN if label_column is None else label_column}
    names = columns if columns is not None else [name for name in whole.column_names if name not in left_out]
    for name in names:
        if name not in whole.column_names:
            near = difflib.get_close_matches(name, whole.column_names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"{path} has no column {name!r}, which {wanted}; {hint}it has {', '.join(whole.column_names)}"
            )
    return whole.select(list(names)), labels


def write_frame(path: Path, frame: Any) -> bytes:
    """Give the bytes of a file of `path`'s kind that holds a data frame of pyarrow, as :func:`read_frame` reads it."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    sink = pa.BufferOutputStream()
    if path.suffix.lower() == ".csv":
        style = "needed" if _wants_quotes(frame) else "none"
        csv.write_csv(frame, sink, csv.WriteOptions(quoting_style=style, quoting_header=style))
    else:
        parquet.write_table(frame, sink)
    return bytes(sink.getvalue())


def _wants_quotes(frame: Any) -> bool:
    """Whether any text could be read in another way without them: pyarrow quotes all of them, or none."""
    import pyarrow as pa
    from pyarrow import compute

    texts = [pa.array(frame.column_names)]
    for column in frame.columns:
        labels = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):
            texts.append(labels)
    found = (compute.any(compute.match_substring_regex(text, '[",\r\n]|^$')).as_py() for text in texts)
    return any(bool(one) for one in found)


def completed(given: Any, filled: Any, holes: NDArray[np.bool_]) -> Any:
    """Lay filled values into the holes of a table, whose other values stay as they were read.

    Rows are float32, in which 14.23 is 14.229999542; nobody wants that back.

    Parameters
    ----------
    given, filled : pyarrow.Table
        The same columns in the same order.
    holes : ndarray of bool of shape (n, columns)

    Returns
    -------
    pyarrow.Table
        With the names of `given`.
    """
    import pyarrow as pa
    from pyarrow import compute

    columns = []
    for observed, made, hole in zip(given.columns, filled.columns, holes.T, strict=True):
        if not hole.any():
            columns.append(observed)
            continue
        if pa.types.is_float64(made.type):
            # The shortest decimals that read back as the same float32.
            made = made.cast(pa.float32()).cast(pa.string()).cast(pa.float64())
        if pa.types.is_dictionary(observed.type):
            observed = observed.cast(observed.type.value_type)
        here = pa.array(hole)
        # What stands in a hole need not be of the other type.
        kept = compute.if_else(here, pa.scalar(None, observed.type), observed)
        columns.append(compute.if_else(here, made, kept.cast(made.type)))
    return pa.table(columns, names=given.column_names)


def _labels(column: Any, where: str) -> NDArray[Any]:
    values = column.to_pylist()
    if missing := [row for row, value in enumerate(values) if value is None]:
        raise InputError(
            f"got no label in row {missing[0]} of {where} ({len(missing)} are missing), wanted one for each row; fill "
            "them with -1 (unlabelled), or read no labels: label_column=None, of a job data.labelled=false"
        )
    return np.array(values)
