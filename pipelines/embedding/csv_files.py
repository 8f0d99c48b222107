"""CSV files wherever they lie: their header, how many rows they have, and ranges of these, as text and by type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from pipelines.embedding.storage import Place
from vaefeat.table_files import NULL_VALUES
from vaefeat.table_schema import Column

__all__ = ["cell_type", "count_rows", "read_names", "read_texts", "typed"]

_BLOCK_BYTES = 1 << 20


def read_names(place: Place, name: str) -> list[str]:
    """Read the header of a file below a folder."""
    with place.reading(name), place.open(name) as file, csv.open_csv(file) as reader:
        names: list[str] = reader.schema.names
    return names


def count_rows(place: Place, name: str, column: str) -> int:
    """Count the rows of a file, of which `column` is one; all of it is read."""
    with place.reading(name), place.open(name) as file, _opened(file, [column]) as reader:
        return sum(batch.num_rows for batch in reader)


def read_texts(
    place: Place, name: str, columns: Sequence[str], *, start: int, stop: int, batch_rows: int
) -> Iterator[Any]:
    """Read a range of rows, some at a time; what comes before them has to be read, too.

    Parameters
    ----------
    place : Place
    name : str
    columns : sequence of str
    start, stop : int
    batch_rows : int

    Yields
    ------
    pyarrow.RecordBatch
        Texts, and nulls where a value is missing.
    """
    position = 0
    with place.reading(name), place.open(name) as file, _opened(file, columns) as reader:
        for batch in reader:
            for first in range(max(start - position, 0), min(stop - position, batch.num_rows), batch_rows):
                yield batch.slice(first, min(batch_rows, stop - position - first))
            position += batch.num_rows
            if position >= stop:
                return
    raise EOFError(f"it ends after {position} rows, wanted {stop}")


def cell_type(column: Column | None) -> Any:
    """Give the type of Arrow that the cells of an encoder's column are; None stands for numbers, as in no table."""
    if column is None or column.kind == "number":
        return pa.float64()
    if column.kind == "boolean":
        return pa.bool_()
    if all(isinstance(label, str) for label in column.categories):
        return pa.string()
    return pa.bool_() if all(isinstance(label, bool) for label in column.categories) else pa.float64()


def typed(texts: Any, types: Mapping[str, Any]) -> tuple[Any, dict[int, str]]:
    """Turn texts into what the encoder takes.

    Parameters
    ----------
    texts : pyarrow.RecordBatch
    types : mapping of str to pyarrow.DataType
        By column, as :func:`cell_type` gives them.

    Returns
    -------
    cells : pyarrow.RecordBatch
        Null where a text could not be read as its type.
    bad : dict of int to str
        Positions of these rows, and why.
    """
    bad: dict[int, str] = {}
    columns = []
    for name, wanted in types.items():
        cells = texts.column(name)
        if not pa.types.is_string(wanted):
            # As in pyarrow's own reader, which takes spaces around numbers.
            given = pc.utf8_trim_whitespace(cells)
            cells = _converted(given, wanted)
            for position in np.flatnonzero(pc.and_(given.is_valid(), cells.is_null()).to_numpy(False)).tolist():
                what = "a number" if pa.types.is_floating(wanted) else "true or false"
                bad.setdefault(position, f"{given[position].as_py()!r} in column {name!r}, wanted {what}")
        columns.append(cells)
    return pa.record_batch(columns, list(types)), bad


def _converted(texts: Any, wanted: Any) -> Any:
    try:
        return pc.cast(texts, wanted)
    except pa.ArrowInvalid:
        return pa.array([_cell(text, wanted) for text in texts], wanted)


def _cell(text: Any, wanted: Any) -> Any:
    try:
        return pc.cast(text, wanted).as_py()
    except pa.ArrowInvalid:
        return None


def _opened(file: Any, columns: Sequence[str]) -> Any:
    # Types that are read off the values would be those of the first block, and differ from file to file.
    options = csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()),
        include_columns=list(columns),
        strings_can_be_null=True,
        null_values=NULL_VALUES,
    )
    return csv.open_csv(
        file,
        read_options=csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=options,
    )
