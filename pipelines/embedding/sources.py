"""What a path holds, and which of its columns are rows, ids, or only carried along."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.embedding.csv_files import count_rows, read_names
from pipelines.embedding.storage import Found, Place
from vaefeat.errors import InputError, MissingSplitError
from vaefeat.idx import is_idx
from vaefeat.images import SUFFIXES as IMAGE_SUFFIXES
from vaefeat.input_spec import InputSpec
from vaefeat.parquet import DEFAULT_IMAGE_COLUMN, DEFAULT_LABEL_COLUMN
from vaefeat.parquet import SUFFIXES as PARQUET_SUFFIXES
from vaefeat.settings import unknown_name
from vaefeat.table_columns import compare_names
from vaefeat.table_schema import TableSchema

__all__ = ["Columns", "Request", "Source", "open_source"]

Kind = Literal["parquet", "npy", "idx", "images", "csv"]
Form = Literal["encoded", "raw", "tensor", "numbers", "table"]

#: Footers that are fetched at a time.
_THREADS = 16
#: Names that the output has for itself.
RESERVED = ("id", "embedding")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked to read.

    Parameters
    ----------
    split : {"train", "test"}, optional
        Only the files of that name; all when None.
    columns : tuple of str
        Of Parquet: one column of encoded images, of lists of numbers, or of rows as bytes (``fixed_size_binary`` in the
        encoder's dtype; by far the fastest to read), or several columns of numbers. Of CSV several of numbers, and for
        an encoder of a table its columns. Found out when empty.
    id_column : str, optional
    keep : tuple of str
        Columns that are carried along.
    """

    split: str | None = None
    columns: tuple[str, ...] = ()
    id_column: str | None = None
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of Parquet and CSV files are what."""

    rows: tuple[str, ...]
    form: Form
    id: str | None
    keep: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """What has to be read."""
        return list(dict.fromkeys([*self.rows, *([self.id] if self.id else []), *self.keep]))


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of one kind, in the order of their rows.

    Attributes
    ----------
    place : Place
        The folder that they are below.
    kind : {"parquet", "npy", "idx", "images", "csv"}
    files : tuple of Found
    columns : Columns or None
        Of Parquet and CSV.
    schema : pyarrow.Schema
        Of the ids and of what is carried along, in the output.
    groups : tuple of tuple of int
        Rows of the row groups of each Parquet file; of each CSV file, its rows.
    """

    place: Place
    kind: Kind
    files: tuple[Found, ...]
    columns: Columns | None = None
    schema: Any = field(default_factory=lambda: pa.schema([("id", pa.int64())]))
    groups: tuple[tuple[int, ...], ...] = ()

    @property
    def encoded(self) -> bool:
        """Whether rows are encoded images."""
        return self.kind == "images" or (self.columns is not None and self.columns.form == "encoded")

    def fingerprint(self) -> str:
        """Tell by names, sizes and times whether the files are still the same."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.size}\0{file.changed_ns}\n".encode())
        return f"sha256:{digest.hexdigest()}"


def open_source(place: Place, spec: InputSpec, request: Request) -> Source:
    """Look at a path: names, and of Parquet the footers; no rows. Those of CSV are counted.

    Parameters
    ----------
    place : Place
        A file or a folder: Parquet, ``.npy``, IDX, CSV (all files of one kind, in the order of their names), or images.
    spec : InputSpec
        The rows that the encoder takes.
    request : Request

    Returns
    -------
    Source

    Raises
    ------
    InputError
        There is nothing to read, a column is missing or of another type, or it does not fit the encoder.
    """
    if not place.is_file and not place.is_folder:
        raise InputError(f"got {place}, which does not exist; wanted a file or a folder")
    root = place if place.is_folder else _parent(place)
    kind, files = _classify(place, request.split)
    if kind == "parquet":
        return _open_parquet(root, files, spec, request)
    if kind == "csv":
        return _open_csv(root, files, spec, request)
    named = [("columns", request.columns), ("id-column", request.id_column), ("keep", request.keep)]
    if wrong := [name for name, value in named if value]:
        raise InputError(
            f"got --{wrong[0]} for {place}, which has no columns; they are for Parquet and CSV, leave it out"
        )
    if kind == "images" and spec.kind != "image":
        raise InputError(f"got images in {place} for an encoder of {spec}; wanted a bundle trained on images")
    id_type = pa.string() if kind == "images" else pa.int64()
    return Source(place=root, kind=kind, files=files, schema=pa.schema([("id", id_type)]))


def _parent(place: Place) -> Place:
    bare, mark, options = place.address.partition("?")
    return Place(bare.rstrip("/").rpartition("/")[0] + mark + options)


def _classify(place: Place, split: str | None) -> tuple[Kind, tuple[Found, ...]]:
    """Take the files of the first kind that there are any of, as in :func:`vaefeat.data.load_rows`."""
    found = place.find()
    kinds: tuple[Kind, ...] = ("idx", "parquet", "npy", "images", "csv")  # beside others, CSV are labels
    for kind in kinds:
        files = [file for file in found if _is(kind, file.name, place)]
        if files and kind == "images":
            files = [file for file in place.find_images() if _is(kind, file.name, place)]
        if files:
            return kind, tuple(_of_split(files, split, place))
    raise InputError(
        f"got {place} without anything to read; wanted .parquet, .npy, .csv or IDX files, or images "
        f"({', '.join(IMAGE_SUFFIXES)})"
    )


def _is(kind: str, name: str, place: Place) -> bool:
    path = PurePosixPath(name)
    if any(part.startswith("_") for part in path.parts[:-1]) or path.name.startswith("_"):
        return False  # the notes of this job and of others, such as Spark's
    suffix = path.suffix.lower()
    if kind == "idx":
        # Labels are IDX files, too, with one axis.
        by_name = "idx3-ubyte" in path.name or suffix == ".idx"
        return by_name or (place.is_file and place.local is not None and suffix == "" and is_idx(place.local))
    return suffix in {"parquet": PARQUET_SUFFIXES, "npy": (".npy",), "images": IMAGE_SUFFIXES, "csv": (".csv",)}[kind]


def _of_split(files: Sequence[Found], split: str | None, place: Place) -> list[Found]:
    if split is None:
        return list(files)
    begins = {"train": ("train",), "test": ("test", "t10k")}[split]
    chosen = [file for file in files if file.name.split("/")[0] in begins or _first_word(file.name) in begins]
    if not chosen:
        raise MissingSplitError(
            f"got {place} with {files[0].name} and {len(files) - 1} more, wanted files that begin with {begins[0]}; "
            "leave out --split to read all"
        )
    return chosen


def _first_word(name: str) -> str:
    return PurePosixPath(name).name.partition(".")[0].partition("-")[0]


def _open_parquet(root: Place, files: tuple[Found, ...], spec: InputSpec, request: Request) -> Source:
    def footer(file: Found) -> Any:
        with root.reading(file.name), root.open(file.name) as opened:
            return pq.read_metadata(opened)

    with ThreadPoolExecutor(_THREADS) as pool:
        footers = list(pool.map(footer, files))
    schemas = [one.schema.to_arrow_schema() for one in footers]
    columns = _choose(schemas[0], spec, request, f"{root}/{files[0].name}")
    for file, schema in zip(files, schemas, strict=True):
        for name in columns.all:
            _require(schema, name, f"{root}/{file.name}")
            if schema.field(name).type != schemas[0].field(name).type:
                raise InputError(
                    f"got column {name!r} of type {schema.field(name).type} in {root}/{file.name}, wanted "
                    f"{schemas[0].field(name).type} as in {files[0].name}; convert one of them"
                )
    id_type = pa.int64() if columns.id is None else schemas[0].field(columns.id).type
    kept = [pa.field(name, schemas[0].field(name).type) for name in columns.keep]
    return Source(
        place=root,
        kind="parquet",
        files=files,
        columns=columns,
        schema=pa.schema([pa.field("id", id_type), *kept]),
        groups=tuple(tuple(one.row_group(i).num_rows for i in range(one.num_row_groups)) for one in footers),
    )


def _open_csv(root: Place, files: tuple[Found, ...], spec: InputSpec, request: Request) -> Source:
    carried = [*([request.id_column] if request.id_column else []), *request.keep]
    headers = [read_names(root, file.name) for file in files]
    schema = pa.schema([(name, pa.string() if name in carried else pa.float64()) for name in headers[0]])
    columns = _choose(schema, spec, request, f"{root}/{files[0].name}")
    for file, names in zip(files, headers, strict=True):
        for name in columns.all:
            _require(pa.schema([(one, pa.string()) for one in names]), name, f"{root}/{file.name}")
    with ThreadPoolExecutor(_THREADS) as pool:
        counts = list(pool.map(lambda file: count_rows(root, file.name, columns.rows[0]), files))
    id_type = pa.int64() if columns.id is None else pa.string()
    return Source(
        place=root,
        kind="csv",
        files=files,
        columns=columns,
        schema=pa.schema([("id", id_type), *((name, pa.string()) for name in columns.keep)]),
        groups=tuple((count,) for count in counts),
    )


def _choose(schema: Any, spec: InputSpec, request: Request, where: str) -> Columns:
    if clash := sorted(set(request.keep) & set(RESERVED)):
        raise InputError(f"got --keep {clash[0]}, a name that the output has for itself; rename the column first")
    for name in (*request.columns, *([request.id_column] if request.id_column else []), *request.keep):
        _require(schema, name, where)
    if request.id_column:
        _refuse_id_type(schema.field(request.id_column), where)
    if spec.table is not None:
        names = _of_table(schema, spec.table, request, where)
        return Columns(rows=names, form="table", id=request.id_column, keep=request.keep)
    names = request.columns or _guess(schema, spec, request)
    if not names:
        raise InputError(
            f"got the columns {', '.join(schema.names)} in {where}, wanted encoded images in {DEFAULT_IMAGE_COLUMN!r}, "
            f"a column of lists of {spec.n_features} numbers, or {spec.n_features} columns of numbers; name them with "
            "--column"
        )
    form = _form(schema, names, where)
    if form == "encoded" and spec.kind != "image":
        raise InputError(f"got encoded images in column {names[0]!r} of {where} for an encoder of {spec}")
    if form == "raw" and not _is_raw(schema.field(names[0]).type, spec):
        raise InputError(
            f"got rows of {schema.field(names[0]).type.byte_width} bytes in column {names[0]!r} of {where}, wanted "
            f"{spec.row_bytes} for {spec}; take a bundle that was trained on such rows"
        )
    width = spec.n_features if form in ("encoded", "raw") else _width(schema, names, form)
    if width not in (None, spec.n_features):
        raise InputError(
            f"got {width} numbers a row in {where} ({_shortly(names)}), wanted {spec.n_features} for {spec}; take a "
            "bundle that was trained on such rows, or name other columns with --column"
        )
    return Columns(rows=tuple(names), form=form, id=request.id_column, keep=request.keep)


def _of_table(schema: Any, table: TableSchema, request: Request, where: str) -> tuple[str, ...]:
    """Give the columns that the encoder was trained with, by their names where these are a data frame's."""
    if table.named and not request.columns:
        names = tuple(column.name for column in table.columns)
        for name in names:
            _require(schema, name, where)
        return names
    others = {DEFAULT_LABEL_COLUMN, "id", request.id_column, *request.keep}
    names = request.columns or tuple(name for name in schema.names if name not in others)
    if len(names) != len(table.columns):
        raise InputError(
            f"got {len(names)} columns in {where} ({_shortly(names)}), wanted {table}; name them with --column"
        )
    return names


def _require(schema: Any, name: str, where: str) -> None:
    if name not in schema.names:
        raise unknown_name(f"in {where} no column", name, schema.names)


def _refuse_id_type(column: Any, where: str) -> None:
    if not (
        pa.types.is_integer(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    ):
        raise InputError(f"got ids of type {column.type} in column {column.name!r} of {where}, wanted integers or text")


def _guess(schema: Any, spec: InputSpec, request: Request) -> tuple[str, ...]:
    if spec.kind == "image" and DEFAULT_IMAGE_COLUMN in schema.names and _is_encoded(schema.field("image").type):
        return (DEFAULT_IMAGE_COLUMN,)
    lists = [one.name for one in schema if _list_width(one.type) in (spec.n_features, 0) or _is_raw(one.type, spec)]
    if len(lists) == 1:
        return (lists[0],)
    others = {DEFAULT_LABEL_COLUMN, "id", request.id_column, *request.keep}
    numbers = tuple(one.name for one in schema if one.name not in others and _is_number(one.type))
    if spec.names is None:
        return numbers
    if not set(spec.names) <= set(schema.names):
        compare_names(numbers, spec.names)
    return spec.names


def _form(schema: Any, names: Sequence[str], where: str) -> Form:
    types = [schema.field(name).type for name in names]
    if len(names) == 1 and _is_encoded(types[0]):
        return "encoded"
    if len(names) == 1 and pa.types.is_fixed_size_binary(types[0]):
        return "raw"
    if len(names) == 1 and _list_width(types[0]) is not None:
        return "tensor"
    for name, one in zip(names, types, strict=True):
        if not _is_number(one):
            raise InputError(
                f"got column {name!r} of type {one} in {where}, wanted numbers, or one column of encoded images or of "
                "lists of numbers"
            )
    return "numbers"


def _width(schema: Any, names: Sequence[str], form: Form) -> int | None:
    """Numbers in a row; None where only the rows tell."""
    return len(names) if form == "numbers" else (_list_width(schema.field(names[0]).type) or None)


def _list_width(arrow_type: Any) -> int | None:
    """Numbers in each list of a type, 0 where they may differ, None where it is no list of numbers."""
    if isinstance(arrow_type, pa.FixedShapeTensorType):
        arrow_type = arrow_type.storage_type
    if pa.types.is_fixed_size_list(arrow_type) and _is_number(arrow_type.value_type):
        return int(arrow_type.list_size)
    variable = pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type)
    return 0 if variable and _is_number(arrow_type.value_type) else None


def _is_raw(arrow_type: Any, spec: InputSpec) -> bool:
    return bool(pa.types.is_fixed_size_binary(arrow_type) and arrow_type.byte_width == spec.row_bytes)


def _is_number(arrow_type: Any) -> bool:
    return bool(pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type) or pa.types.is_boolean(arrow_type))


def _is_encoded(arrow_type: Any) -> bool:
    if pa.types.is_struct(arrow_type):
        index = arrow_type.get_field_index("bytes")
        return index >= 0 and _is_encoded(arrow_type.field(index).type)
    return bool(pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type))


def _shortly(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, ... {names[-1]}"
