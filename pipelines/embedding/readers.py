"""The rows of a part, some at a time, with their ids and what is carried along."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.embedding.arrays import ArrayHeader, read_array
from pipelines.embedding.csv_files import cell_type, read_texts, typed
from pipelines.embedding.parts import Part
from pipelines.embedding.sources import Source
from pipelines.embedding.storage import Place
from vaefeat.errors import InputError
from vaefeat.input_spec import InputSpec

__all__ = ["Batch", "ahead", "read_part", "rows_of_batch"]

#: Small enough to stay in a processor's cache on their way through the encoder.
_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 4096
#: Of a table: among more, a row that is refused takes long to find.
_TABLE_ROWS = 1024
_IMAGES = 256
_BUFFER_BYTES = 1 << 20
#: What is gone or forbidden is a matter of one image; any other failure of a file system is one of the job.
_OF_ONE_FILE = (FileNotFoundError, PermissionError, IsADirectoryError)
_T = TypeVar("_T")
_NULL = "no row: the cell is null"


class Batch(NamedTuple):
    """Consecutive rows."""

    offset: int
    """Of the first one, in the part."""

    content: Any
    """Numbers, an array of shape (n, ...) as they were read; encoded images, a list of bytes or None; or a table of
    pyarrow."""

    bad: dict[int, str]
    """Position in the batch and reason, of rows that are already known to be unreadable."""

    columns: Any
    """A record batch: ``id`` and what is carried along."""


def read_part(source: Source, headers: Mapping[str, ArrayHeader], part: Part, spec: InputSpec) -> Iterator[Batch]:
    """Read a part in order.

    Parameters
    ----------
    source : Source
    headers : mapping of str to ArrayHeader
        Of array files, as the plan has them.
    part : Part
    spec : InputSpec
        The rows that the encoder takes.

    Yields
    ------
    Batch

    Raises
    ------
    InputError
        A file cannot be read, or is shorter than it was.
    """
    if source.kind == "images":
        return _read_images(source.place, part)
    rows = rows_of_batch(source, spec)
    if source.kind == "parquet":
        return _read_parquet(source, part, rows, spec)
    if source.kind == "csv":
        return _read_csv(source, part, rows, spec)
    return _read_arrays(source, headers, part, rows)


def rows_of_batch(source: Source, spec: InputSpec) -> int:
    """Give the number of rows in a batch, at most."""
    if source.encoded:
        return _IMAGES
    return max(1, min(_MAX_BATCH_ROWS if spec.table is None else _TABLE_ROWS, _BATCH_BYTES // spec.row_bytes))


def ahead(items: Iterable[_T], depth: int = 3) -> Iterator[_T]:
    """Take items in a thread while somebody works on those before; whoever stops half way has to close it.

    Parameters
    ----------
    items : iterable
    depth : int
        Items that may wait.
    """
    waiting: queue.Queue[tuple[_T] | BaseException | None] = queue.Queue(depth)
    left = threading.Event()

    def put(item: tuple[_T] | BaseException | None) -> bool:
        while not left.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not put((item,)):
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        left.set()


def _read_images(place: Place, part: Part) -> Iterator[Batch]:
    for start in range(0, part.n_rows, _IMAGES):
        names = part.names[start : start + _IMAGES]
        content: list[bytes | None] = []
        bad: dict[int, str] = {}
        for position, name in enumerate(names):
            with place.reading(name):
                try:
                    content.append(place.read(name))
                except _OF_ONE_FILE as error:
                    content.append(None)
                    bad[position] = f"could not be opened: {error.strerror or type(error).__name__}"
        columns = pa.record_batch([pa.array(names, pa.string())], ["id"])
        yield Batch(start, content, bad, columns)


def _read_arrays(source: Source, headers: Mapping[str, ArrayHeader], part: Part, rows: int) -> Iterator[Batch]:
    (name,) = part.names
    offset = 0
    for array in read_array(
        source.place,
        name,
        headers[name],
        start=part.offset,
        stop=part.offset + part.n_rows,
        batch_rows=rows,
    ):
        yield Batch(offset, array, {}, _numbered(part.first + offset, len(array)))
        offset += len(array)


def _numbered(first: int, n_rows: int) -> Any:
    return pa.record_batch([pa.array(np.arange(first, first + n_rows))], ["id"])


def _read_parquet(source: Source, part: Part, rows: int, spec: InputSpec) -> Iterator[Batch]:
    assert source.columns is not None
    (name,) = part.names
    columns, position, given = source.columns, 0, 0
    with (
        source.place.reading(name),
        source.place.open(name) as opened,
        pq.ParquetFile(opened, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file,
    ):
        for table in file.iter_batches(
            batch_size=rows, row_groups=list(part.groups), columns=columns.all, use_threads=False
        ):
            first = max(part.skip - position, 0)
            n_rows = min(table.num_rows - first, part.n_rows - given)
            position += table.num_rows
            if n_rows <= 0:
                continue
            batch = _batch(table.slice(first, n_rows), source, part, given, spec)
            given += n_rows
            yield batch
            if given == part.n_rows:
                return
    raise InputError(
        f"got {given} rows of a part of {source.place}/{name} that announces {part.n_rows}; fetch or write it again"
    )


def _read_csv(source: Source, part: Part, rows: int, spec: InputSpec) -> Iterator[Batch]:
    assert source.columns is not None
    (name,) = part.names
    offset, stop = 0, part.offset + part.n_rows
    texts = read_texts(source.place, name, source.columns.all, start=part.offset, stop=stop, batch_rows=rows)
    for batch in texts:
        yield _batch(batch, source, part, offset, spec)
        offset += batch.num_rows


def _batch(table: Any, source: Source, part: Part, offset: int, spec: InputSpec) -> Batch:
    assert source.columns is not None
    columns, where = source.columns, f"{source.place}/{part.names[0]}"
    table.validate(full=True)
    if columns.id is None:
        ids = _numbered(part.first + offset, table.num_rows).column(0)
    else:
        ids = table.column(columns.id)
        if ids.null_count:
            row = part.offset + offset + int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
            raise InputError(f"got no id in row {row} of {where}, column {columns.id!r}; every row needs one")
    carried = pa.record_batch([ids, *(table.column(name) for name in columns.keep)], schema=source.schema)
    content, bad = _content(table, source, spec)
    return Batch(offset, content, bad, carried)


def _content(table: Any, source: Source, spec: InputSpec) -> tuple[Any, dict[int, str]]:
    """Give the rows, and positions and reasons of those that cannot be read."""
    assert source.columns is not None
    columns, unread = source.columns, dict[int, str]()
    if source.kind == "csv":
        known = (None,) * len(columns.rows) if spec.table is None else spec.table.columns
        types = {name: cell_type(column) for name, column in zip(columns.rows, known, strict=True)}
        table, unread = typed(table, types)
    cells = [table.column(name) for name in columns.rows]
    match columns.form:
        case "encoded":
            return _encoded(cells[0]), {}
        case "raw":
            return _raw(cells[0], spec)
        case "tensor":
            return _tensor(cells[0], spec.n_features)
        case "table":
            return pa.table(cells, names=list(columns.rows)), unread
        case "numbers":
            array, bad = _numbers(cells, columns.rows)
            return array, bad | unread


def _encoded(column: Any) -> list[bytes | None]:
    cells = column.field("bytes") if pa.types.is_struct(column.type) else column
    found: list[bytes | None] = cells.to_pylist()
    return found


def _raw(column: Any, spec: InputSpec) -> tuple[NDArray[Any], dict[int, str]]:
    """Give rows of bytes as they lie in memory, in the dtype of the encoder and little-endian."""
    _, content = column.buffers()
    begin, dtype = column.offset * spec.row_bytes, np.dtype(spec.dtype).newbyteorder("<")
    values = np.frombuffer(content, dtype, count=len(column) * spec.n_features, offset=begin)
    return values.reshape(len(column), -1), dict.fromkeys(_missing(column), _NULL)


def _tensor(column: Any, width: int) -> tuple[NDArray[Any], dict[int, str]]:
    """Give lists of numbers as one array, without a copy where none is missing and all are of one length."""
    storage = column.storage if isinstance(column, pa.ExtensionArray) else column
    bad = dict.fromkeys(_missing(storage), _NULL)
    values = storage.flatten()
    if not bad and not values.null_count and len(values) == len(storage) * width and _even(storage):
        return values.to_numpy(zero_copy_only=False).reshape(len(storage), -1), bad
    # A row at a time, for what is wrong in few of them.
    rows = storage.to_pylist()
    array = np.zeros((len(rows), width), values.type.to_pandas_dtype())
    for position, row in enumerate(rows):
        if row is None:
            continue
        if len(row) != width or None in row:
            bad[position] = "a number is null" if None in row else f"{len(row)} numbers, wanted {width}"
        else:
            array[position] = row
    return array, bad


def _even(storage: Any) -> bool:
    """Whether all lists are of one length."""
    if pa.types.is_fixed_size_list(storage.type):
        return True
    lengths = storage.value_lengths().to_numpy(zero_copy_only=False)
    return bool(len(lengths) and (lengths == lengths[0]).all())


def _numbers(columns: list[Any], names: tuple[str, ...]) -> tuple[NDArray[Any], dict[int, str]]:
    bad: dict[int, str] = {}
    arrays = []
    for name, column in zip(names, columns, strict=True):
        for position in _missing(column):
            bad.setdefault(position, f"column {name!r} is null")
        arrays.append((column.fill_null(0) if column.null_count else column).to_numpy(zero_copy_only=False))
    return np.stack(arrays, axis=1), bad


def _missing(column: Any) -> list[int]:
    if not column.null_count:
        return []
    found: list[int] = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist()
    return found
