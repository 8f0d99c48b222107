"""Labels in files that people fill in, CSV or Parquet: read as one, joined with rows by their ids, and written."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaefeat.errors import InputError
from vaefeat.labels import UNLABELLED
from vaefeat.parquet import SUFFIXES as PARQUET_SUFFIXES
from vaefeat.parquet import open_parquet, open_parts

__all__ = ["ID", "LABEL", "GivenLabels", "Label", "read_labels", "some_of", "written_labels"]

#: Columns of a file; others are left alone.
ID, LABEL = "id", "label"
Label = int | str
#: Between columns: spreadsheets write semicolons where a comma stands in numbers.
_SEPARATORS = (",", ";", "\t")
#: How many a message names.
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class GivenLabels:
    """What files of labels say.

    Attributes
    ----------
    source : str
        The files, for people.
    labels : dict of str to int or str
        By the row's id. All are whole numbers, or all are texts.
    passed_over : tuple of str
        Ids of rows whose label was left empty.
    """

    source: str
    labels: dict[str, Label]
    passed_over: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[Label, ...]:
        """Sorted."""
        return tuple(sorted(set(self.labels.values())))

    @property
    def counts(self) -> dict[Label, int]:
        """Labels of each class, the rarest first: names that are spelt wrongly are there."""
        return dict(sorted(Counter(self.labels.values()).items(), key=lambda item: (item[1], item[0])))

    def join(self, ids: Sequence[str], *, source: str) -> NDArray[Any]:
        """Give the label of each row.

        Parameters
        ----------
        ids : sequence of str
            Of all rows, no two the same.
        source : str
            Where they are from, for people.

        Returns
        -------
        ndarray of shape (n,)
            int64, or texts as objects; -1 for a row without a label.

        Raises
        ------
        InputError
            Labels for rows that are not there: how many, and the first of them.
        """
        wholes = all(isinstance(label, int) for label in self.labels.values())
        joined: NDArray[Any] = np.full(len(ids), UNLABELLED, dtype=np.int64 if wholes else object)
        for position, label in zip(self._places(self.labels, ids, source), self.labels.values(), strict=True):
            joined[position] = label
        return joined

    def places_passed_over(self, ids: Sequence[str], *, source: str) -> list[int]:
        """Give the positions of rows whose label was left empty; as :meth:`join`."""
        return self._places(self.passed_over, ids, source)

    def _places(self, names: Iterable[str], ids: Sequence[str], source: str) -> list[int]:
        places = dict.fromkeys(names, -1)
        n_left = len(places)
        for position, name in enumerate(ids):
            if name in places:
                places[name] = position
                n_left -= 1
        if n_left:
            unknown = [name for name, place in places.items() if place < 0]
            raise InputError(
                f"got labels in {self.source} for {len(unknown):,} of {len(places):,} ids that are not in {source}: "
                f"{some_of(unknown)}; wanted ids such as {ids[0]!r}. Give the data that these labels are of, or, of "
                "Parquet, --id-column (of a stage, finetune.id_column)"
            )
        return list(places.values())


def read_labels(paths: Sequence[Path], *, id_column: str = ID, label_column: str = LABEL) -> GivenLabels:
    """Read files of labels as one.

    Parameters
    ----------
    paths : sequence of Path
        CSV as :func:`_read_csv` takes it, or Parquet. A row may be in several of them; a label counts more than an
        empty one.
    id_column, label_column : str
        Empty labels, nulls and -1 are none. Texts that are all whole numbers are taken for numbers.

    Raises
    ------
    InputError
        A file that cannot be read, lacks a column, or has an id twice or a row without one; a row with two labels;
        labels that are neither whole numbers nor texts.
    """
    labels: dict[str, Label] = {}
    passed_over: dict[str, None] = {}
    for path in paths:
        cells = _cells(path, id_column, label_column)
        _refuse_doubtful_ids(cells, path, id_column)
        given = [cell for cell in cells if not _is_missing(cell.label)]
        passed_over |= dict.fromkeys(cell.name for cell in cells if _is_missing(cell.label))
        for cell, label in zip(given, _of_one_kind([cell.label for cell in given], path), strict=True):
            if str(before := labels.setdefault(cell.name, label)) != str(label):
                raise InputError(
                    f"got the labels {before!r} and {label!r} for row {cell.name!r} ({cell.where} of {path}), wanted "
                    "one; delete the wrong one"
                )
    if any(isinstance(label, str) for label in labels.values()):
        labels = {name: str(label) for name, label in labels.items()}  # whole numbers in one file, names in another
    return GivenLabels(
        source=", ".join(map(str, paths)),
        labels=labels,
        passed_over=tuple(name for name in passed_over if name not in labels),
    )


def written_labels(ids: Sequence[str]) -> bytes:
    """Give the content of a file to fill in, one line for each row, without labels."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([ID, LABEL])
    writer.writerows([name, ""] for name in ids)
    return file.getvalue().encode()


def some_of(names: Iterable[object]) -> str:
    """List the first of them, for an error."""
    listed = list(names)
    return f"{', '.join(map(repr, listed[:_NAMED]))}{', ...' if len(listed) > _NAMED else ''}"


class _Cell(NamedTuple):
    where: str
    """For people: a line of CSV, counted from 1 with the header, or a row of Parquet, counted from 0."""

    name: str
    """The id."""

    label: Any


def _cells(path: Path, id_column: str, label_column: str) -> list[_Cell]:
    suffix = path.suffix.lower()
    if suffix not in (".csv", *PARQUET_SUFFIXES):
        raise InputError(f"got the labels {path}, wanted a .csv or .parquet file")
    if not path.is_file():
        raise InputError(f"got the labels {path}, which does not exist")
    return (_cells_of_csv if suffix == ".csv" else _cells_of_parquet)(path, id_column, label_column)


def _cells_of_csv(path: Path, id_column: str, label_column: str) -> list[_Cell]:
    names, rows = _read_csv(path)
    _require_columns(path, names, id_column, label_column)
    return [_Cell(f"line {line}", row[id_column], row[label_column]) for line, row in rows]


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a file as people and spreadsheets write it.

    Parameters
    ----------
    path : Path
        CSV in UTF-8, with or without a mark at its beginning, separated by commas, semicolons or tabs.

    Returns
    -------
    columns : list of str
    rows : list of (int, dict)
        The line in the file and its values by column, without spaces around them. Lines without any value are left
        out, and values that are missing at a line's end are empty.

    Raises
    ------
    InputError
        The file cannot be read, or a line has more values than there are columns.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            separator = max(_SEPARATORS, key=file.readline().count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            columns = [name.strip() for name in next(reader, [])]
            lines = [(reader.line_num, [value.strip() for value in values]) for values in reader]
    except OSError as error:
        raise InputError(f"could not read the labels {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"got {path}, which is no CSV file in UTF-8 ({error}); save it as CSV UTF-8") from error
    except csv.Error as error:
        raise InputError(
            f"got {path}, which is no CSV file up to its line {reader.line_num} ({error}); is there a quotation mark "
            "that is not closed?"
        ) from error
    rows = []
    for line, values in lines:
        if any(values[len(columns) :]):
            raise InputError(
                f"got {len(values)} values in line {line} of {path}, wanted {len(columns)}: {', '.join(columns)}; put "
                f"quotes around a value with {separator!r} in it"
            )
        if any(values):
            rows.append((line, dict(zip_longest(columns, values[: len(columns)], fillvalue=""))))
    return columns, rows


def _cells_of_parquet(path: Path, id_column: str, label_column: str) -> list[_Cell]:
    _require_columns(path, open_parts([path]).schemas[0].names, id_column, label_column)
    with open_parquet(path) as file:
        table = file.read(columns=[id_column, label_column])
    pairs = zip(table.column(id_column).to_pylist(), table.column(label_column).to_pylist(), strict=True)
    return [
        _Cell(f"row {row}", "" if name is None else str(name).strip(), label) for row, (name, label) in enumerate(pairs)
    ]


def _refuse_doubtful_ids(cells: Sequence[_Cell], path: Path, column: str) -> None:
    seen: dict[str, str] = {}
    for cell in cells:
        if not cell.name:
            raise InputError(f"got {cell.where} of {path} without an id, wanted one in column {column!r}")
        if cell.name in seen:
            raise InputError(
                f"got the id {cell.name!r} twice in {path} ({seen[cell.name]} and {cell.where}), wanted it once; "
                "delete one"
            )
        seen[cell.name] = cell.where


def _require_columns(path: Path, names: Sequence[str], id_column: str, label_column: str) -> None:
    if not any(names):
        raise InputError(
            f"got {path}, which is empty; wanted a table with the columns {id_column!r} and {label_column!r}"
        )
    for column, option in ((id_column, "--id"), (label_column, "--label")):
        if column not in names:
            raise InputError(
                f"got no column {column!r} in {path}; there are: {', '.join(names)}. Rename one of them, or "
                f"(of finetune) name it with {option}, or finetune.{option.removeprefix('--')} in a TOML file"
            )


def _is_missing(label: object) -> bool:
    return label in (None, "", UNLABELLED, str(UNLABELLED)) or (isinstance(label, float) and label != label)


def _of_one_kind(labels: list[Any], path: Path) -> list[Label]:
    if all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels):
        if broken := [label for label in labels if not float(label).is_integer()]:
            raise InputError(
                f"got the label {broken[0]!r} in {path}, wanted whole numbers or texts; are these classes?"
            )
        return [int(label) for label in labels]
    if odd := [label for label in labels if not isinstance(label, str)]:
        raise InputError(
            f"got the label {odd[0]!r} ({type(odd[0]).__name__}) in {path}, wanted all whole numbers or all texts"
        )
    return [int(label) for label in labels] if all(map(_is_whole, labels)) else labels


def _is_whole(text: str) -> bool:
    # What would not be written the same again, such as 007, is a name.
    return text.removeprefix("-").isdecimal() and str(int(text)) == text
