"""One part, from its rows to the bytes of its output file; no Ray here."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.embedding.arrays import ArrayHeader
from pipelines.embedding.parts import Part
from pipelines.embedding.readers import Batch, ahead, read_part, rows_of_batch
from pipelines.embedding.sources import Source
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError
from vaefeat.image_decoding import decode_image
from vaefeat.input_spec import InputSpec

__all__ = ["METADATA_KEY", "Encoded", "PartEncoder", "output_schema"]

#: Of the schema's metadata that say whose features these are.
METADATA_KEY = "vaefeat."
_ROW_GROUP_ROWS = 16_384
_EMBEDDING = "embedding.list.element"


class Encoded(NamedTuple):
    """A part that is ready to be written."""

    content: memoryview
    """A Parquet file of the rows that could be read, in order."""

    quarantine: bytes | None
    """A Parquet file of the others, with reasons; None where there are none."""

    n_rows: int

    n_quarantined: int


class PartEncoder:
    """Embeds parts of a source.

    Parameters
    ----------
    encoder : OnnxEncoder
    source : Source
    headers : mapping of str to ArrayHeader
        Of array files.
    output : str
        Which of the encoder's outputs.
    metadata : dict of str to str
        For the schema of every file.
    threads : int
        That decode images.
    """

    def __init__(
        self,
        encoder: OnnxEncoder,
        *,
        source: Source,
        headers: Mapping[str, ArrayHeader],
        output: str,
        metadata: dict[str, str],
        threads: int = 1,
    ) -> None:
        self._encoder, self._source, self._headers, self._output = encoder, source, headers, output
        self._width = encoder.outputs[output]
        self._schema = output_schema(source, self._width, metadata)
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="vaefeat-decode")
        self._threads = threads
        self._features = np.empty((0, self._width), np.float32)

    def encode(self, parts: Iterable[Part]) -> Generator[Encoded]:
        """Read parts, embed them, and give what is to be written of each, in order.

        The next part is read while one is embedded.

        Raises
        ------
        InputError
            A file cannot be read; single rows that cannot are in the quarantine.
        DeviceError
            ONNX Runtime failed.
        """
        batches = ahead(self._batches(parts))
        for part, _ in batches:  # the first item of each says that it begins
            yield self._encoded(part, batches)

    def _batches(self, parts: Iterable[Part]) -> Iterator[tuple[Part, Batch | None]]:
        """Give the batches of parts, with None before those of each, and after."""
        for part in parts:
            yield part, None
            for batch in read_part(self._source, self._headers, part, self._encoder.input):
                yield part, batch
            yield part, None

    def _encoded(self, part: Part, batches: Iterator[tuple[Part, Batch | None]]) -> Encoded:
        tables: list[Any] = []
        quarantine = _Quarantine(self._source, part)
        free = self._room(part.n_rows)
        while (batch := next(batches)[1]) is not None:
            rows, kept, bad = self._rows(batch)
            features, free = free[: len(rows)], free[len(rows) :]
            self._embed(rows, into=features)
            if not (finite := np.isfinite(features).all(axis=1)).all():
                bad |= dict.fromkeys(kept[~finite].tolist(), "its features are not finite")
                features, kept = features[finite], kept[finite]
            tables.append(self._table(batch.columns, kept, features))
            quarantine.add(batch, bad)
        table = pa.Table.from_batches(tables, self._schema)
        return Encoded(self._written(table), quarantine.written(), table.num_rows, len(quarantine))

    def _room(self, n_rows: int) -> NDArray[np.float32]:
        """Give memory for the features of a part, the same for all: what is new to a process costs it a tenth more."""
        if len(self._features) < n_rows:
            self._features = np.empty((n_rows, self._width), np.float32)
        return self._features

    def _embed(self, rows: NDArray[Any], *, into: NDArray[np.float32]) -> None:
        size = self._encoder.batch_size
        for start in range(0, len(rows), size):
            (into[start : start + size],) = self._encoder.compute(rows[start : start + size], [self._output])

    def warm_up(self) -> None:
        """Take the memory, and compile the kernels, that the first batch would wait for."""
        spec = self._encoder.input
        n_rows = min(self._encoder.batch_size, rows_of_batch(self._source, spec))
        self._encoder.compute(np.zeros((n_rows, *spec.shape), spec.dtype), [self._output])

    def try_first(self, part: Part) -> None:
        """Refuse a source of which the first rows are none that the encoder takes, all for one reason.

        Raises
        ------
        InputError
        """
        batch = next(read_part(self._source, self._headers, part, self._encoder.input))
        rows, _, bad = self._rows(batch)
        if not len(rows):
            raise InputError(
                f"got none of the first {len(bad)} rows of {self._source.place}/{part.names[0]} that can be embedded; "
                f"the first: {bad[0]}"
            )

    def _rows(self, batch: Batch) -> tuple[NDArray[Any], NDArray[np.intp], dict[int, str]]:
        """Give rows as the encoder takes them, their positions in the batch, and why others are none."""
        spec = self._encoder.input
        if isinstance(batch.content, list):
            return self._decoded(batch.content, dict(batch.bad))
        if isinstance(batch.content, pa.Table):
            return _encoded_cells(spec, batch.content, dict(batch.bad))
        shape = (len(batch.content), *spec.shape)
        return _prepared(spec, batch.content.reshape(shape), dict(batch.bad))

    def _decoded(
        self, encoded: list[bytes | None], bad: dict[int, str]
    ) -> tuple[NDArray[Any], NDArray[np.intp], dict[int, str]]:
        """Decode as the service does, image by image: a row must not depend on its neighbours."""
        spec = self._encoder.input
        n_channels, height, width = spec.shape
        rows = np.empty((len(encoded), *spec.shape), spec.dtype)

        def decode(positions: range) -> dict[int, str]:
            found = {}
            for position in positions:
                content = encoded[position]
                try:
                    if content is None:
                        raise InputError("no image: the cell is null")
                    pixels = decode_image(content, name="an image", shape=(n_channels, height, width))
                except InputError as error:
                    found[position] = str(error)
                else:
                    rows[position] = spec.of_pixels(pixels)
            return found

        shares = [range(start, len(encoded), self._threads) for start in range(self._threads)]
        decoded = [decode(shares[0])] if self._threads == 1 else self._decoders.map(decode, shares)
        # What is known of a file says more than that there is nothing to decode.
        reasons = {position: reason for share in decoded for position, reason in share.items()} | bad
        kept = _others(len(encoded), reasons)
        return (rows[kept] if reasons else rows), kept, reasons

    def _table(self, columns: Any, kept: NDArray[np.intp], features: NDArray[np.float32]) -> Any:
        carried = columns if len(kept) == columns.num_rows else columns.take(pa.array(kept))
        values = pa.array(features.reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(values, type=self._schema.field("embedding").type)
        return pa.RecordBatch.from_arrays([*carried.columns, vectors], schema=self._schema)

    def _written(self, table: Any) -> memoryview:
        # Its memory goes back to pyarrow, and comes from there for the next part; new memory costs time.
        file = pa.BufferOutputStream()
        dictionaries = [name for name in table.column_names if name != "embedding"]
        with pq.ParquetWriter(
            file,
            table.schema,
            # Every reader knows it, and it takes two thirds of the time of zstd for files that are a twentieth larger.
            compression="snappy",
            use_dictionary=dictionaries,
            # Bytes of the same weight side by side are what little there is to compress in floats.
            column_encoding={_EMBEDDING: "BYTE_STREAM_SPLIT"},
            write_statistics=dictionaries,
        ) as writer:
            writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)
        return memoryview(file.getvalue())


def output_schema(source: Source, width: int, metadata: dict[str, str]) -> Any:
    """Describe the output files: ids, what is carried along, the embedding; and whose features they are."""
    vector = pa.list_(pa.field("element", pa.float32(), nullable=False), width)
    notes = {f"{METADATA_KEY}{name}": value for name, value in metadata.items()}
    return pa.schema([*source.schema, pa.field("embedding", vector, nullable=False)], metadata=notes)


def _prepared(
    spec: InputSpec, rows: NDArray[Any], bad: dict[int, str]
) -> tuple[NDArray[Any], NDArray[np.intp], dict[int, str]]:
    """Check all rows at once, and one by one only those of a batch in which some are refused."""
    if not bad:
        try:
            return spec.prepare(rows), np.arange(len(rows)), bad
        except InputError:
            pass
    if spec.table is None and rows.dtype.kind == "f":
        finite = np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)
        bad = dict.fromkeys(np.flatnonzero(~finite).tolist(), "NaN or infinite values") | bad
    kept = _others(len(rows), bad)
    try:
        # The others together, as they would have been without these: what is a picture's scale shows in many.
        return (spec.prepare(rows[kept]) if len(kept) else rows[kept]), kept, bad
    except InputError:
        pass
    for position in kept.tolist():
        try:
            spec.prepare(rows[position : position + 1])
        except InputError as error:
            bad[position] = str(error)
    kept = _others(len(rows), bad)
    return (spec.prepare(rows[kept]) if len(kept) else rows[kept]), kept, bad


def _encoded_cells(
    spec: InputSpec, cells: Any, bad: dict[int, str]
) -> tuple[NDArray[Any], NDArray[np.intp], dict[int, str]]:
    """Turn a table into rows; where some are refused, look for them by halves: a call costs as much as many rows."""
    waiting = [_others(len(cells), bad)]
    rows: list[NDArray[Any]] = []
    while waiting:
        positions = waiting.pop()
        if not len(positions):
            continue
        try:
            rows.append(spec.prepare(cells.take(pa.array(positions))))
        except InputError as error:
            if len(positions) > 1:
                middle = len(positions) // 2
                waiting += [positions[middle:], positions[:middle]]
            else:
                bad[int(positions[0])] = str(error).replace(" (row 0)", "")  # its number is told beside
    kept = _others(len(cells), bad)
    return (np.concatenate(rows) if rows else np.empty((0, *spec.shape), spec.dtype)), kept, bad


def _others(n_rows: int, bad: dict[int, str]) -> NDArray[np.intp]:
    kept = np.ones(n_rows, bool)
    kept[list(bad)] = False
    return np.flatnonzero(kept)


class _Quarantine:
    """Rows that cannot be embedded: their ids, where they are, and why."""

    def __init__(self, source: Source, part: Part) -> None:
        self._part, self._images = part, source.kind == "images"
        self._schema = pa.schema(
            [source.schema.field("id"), ("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())]
        )
        self._tables: list[Any] = []

    def __len__(self) -> int:
        return sum(table.num_rows for table in self._tables)

    def add(self, batch: Batch, bad: dict[int, str]) -> None:
        """Take note of a batch's."""
        if not bad:
            return
        positions = sorted(bad)
        files, rows = zip(*(self._where(batch.offset + position) for position in positions), strict=True)
        reasons = [bad[position] for position in positions]
        ids = batch.columns.column("id").take(pa.array(positions))
        self._tables.append(pa.record_batch([ids, list(files), list(rows), reasons], schema=self._schema))

    def _where(self, offset: int) -> tuple[str, int | None]:
        if self._images:
            return self._part.names[offset], None
        return self._part.names[0], self._part.offset + offset

    def written(self) -> bytes | None:
        """Give the file, if there is something in it."""
        if not self._tables:
            return None
        file = io.BytesIO()
        pq.write_table(pa.Table.from_batches(self._tables, self._schema), file)
        return file.getvalue()
