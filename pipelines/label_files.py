"""Labels in a CSV file that people fill in: read back, joined with rows, and written."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vaefeat.errors import InputError

__all__ = ["ID", "LABEL", "GivenLabels", "read_labels", "written_labels"]

#: Columns of the file; others are left alone.
ID, LABEL = "id", "label"
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
        CSV in UTF-8 with the columns ``id`` and ``label``. A row may be in several of them; a label counts more than
        an empty one.

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
    try:
        # Spreadsheets begin UTF-8 with a mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            found = reader.fieldnames or []
            if missing := [name for name in (ID, LABEL) if name not in found]:
                raise InputError(
                    f"got {path} with the columns {', '.join(found) or 'none'}, wanted {ID} and {LABEL}, separated by "
                    f"commas; {missing[0]} is missing"
                )
            lines = [(reader.line_num, (row[ID] or "").strip(), (row[LABEL] or "").strip()) for row in reader]
    except OSError as error:
        raise InputError(f"could not read the labels {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"got {path}, which is no CSV file in UTF-8 ({error}); save it as CSV UTF-8") from error
    if nameless := [line for line, name, _ in lines if not name]:
        raise InputError(f"got line {nameless[0]} of {path} without an id, wanted one in each line; delete the line")
    return lines
