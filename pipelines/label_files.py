"""Labels in a CSV file that people fill in: read back, joined with rows, and written."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from vaefeat.errors import InputError

__all__ = ["ID", "LABEL", "GivenLabels", "positions_of", "read_csv", "read_labels", "written_labels"]

#: Columns of the file; others are left alone.
ID, LABEL = "id", "label"
#: Between columns: spreadsheets write semicolons where a comma stands in numbers.
_SEPARATORS = (",", ";", "\t")
_NAMED = 3


class GivenLabels(NamedTuple):
    """What a file of labels says.

    Attributes
    ----------
    labels : dict of str to str
        By the row's id.
    passed_over : tuple of str
        Ids of rows whose label was left empty.
    """

    labels: dict[str, str]
    passed_over: tuple[str, ...]


def read_labels(paths: Sequence[Path]) -> GivenLabels:
    """Read files of labels as one.

    Parameters
    ----------
    paths : sequence of Path
        As :func:`read_csv` takes them, with the columns ``id`` and ``label``. A row may be in several of them; a label
        counts more than an empty one.

    Raises
    ------
    InputError
        A file that cannot be read, without these columns, or with a row without an id; a row with two labels.
    """
    labels: dict[str, str] = {}
    passed_over: dict[str, None] = {}
    for path in paths:
        for line, name, label in _lines(path):
            if not label:
                passed_over[name] = None
            elif labels.setdefault(name, label) != label:
                raise InputError(
                    f"got the labels {labels[name]!r} and {label!r} for row {name!r} (line {line} of {path}), wanted "
                    "one; delete the wrong line"
                )
    return GivenLabels(labels, tuple(name for name in passed_over if name not in labels))


def read_csv(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
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


def written_labels(ids: Sequence[str]) -> bytes:
    """Give the content of a file to fill in, one line for each row, without labels."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([ID, LABEL])
    writer.writerows([name, ""] for name in ids)
    return file.getvalue().encode()


def positions_of(names: Sequence[str], ids: Sequence[str], *, source: str) -> list[int]:
    """Join ids of labelled rows with those of all rows.

    Raises
    ------
    InputError
        Labels for rows that are not there.
    """
    places = {name: position for position, name in enumerate(ids)}
    unknown = [name for name in names if name not in places]
    if unknown:
        raise InputError(
            f"got labels for {len(unknown)} of {len(names)} rows that are not in {source}: "
            f"{', '.join(map(repr, unknown[:_NAMED]))}{', ...' if len(unknown) > _NAMED else ''}; wanted ids such as "
            f"{ids[0]!r}; give the data that these labels are of"
        )
    return [places[name] for name in names]


def _lines(path: Path) -> list[tuple[int, str, str]]:
    """Give (line, id, label) of each row of a file."""
    found, rows = read_csv(path)
    if missing := [name for name in (ID, LABEL) if name not in found]:
        raise InputError(
            f"got {path} with the columns {', '.join(found) or 'none'}, wanted {ID} and {LABEL}; {missing[0]} is "
            "missing"
        )
    if nameless := [line for line, row in rows if not row[ID]]:
        raise InputError(f"got line {nameless[0]} of {path} without an id, wanted one in each line; delete the line")
    return [(line, row[ID], row[LABEL]) for line, row in rows]
