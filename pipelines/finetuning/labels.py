"""Labels in a CSV or Parquet file, joined with rows by their ids."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.label_files import read_csv
from vaefeat.errors import InputError
from vaefeat.labels import UNLABELLED
from vaefeat.parquet import SUFFIXES as PARQUET_SUFFIXES
from vaefeat.parquet import open_parquet, open_parts

__all__ = ["LabelFile", "read_labels"]

Label = int | str
#: How many a message names.
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class LabelFile:
    """What a file says.

    Attributes
    ----------
    path : Path
    labels : dict of str to int or str
        By the row's id; rows without a label are left out. All are whole numbers, or all are texts.
    """

    path: Path
    labels: dict[str, Label]

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
        wholes = isinstance(self.classes[0], int)
        joined: NDArray[Any] = np.full(len(ids), UNLABELLED, dtype=np.int64 if wholes else object)
        left = dict(self.labels)
        for position, name in enumerate(ids):
            if name in left:
                joined[position] = left.pop(name)
        if left:
            raise InputError(
                f"got labels in {self.path} for {len(left):,} of {len(self.labels):,} ids that are not in {source}: "
                f"{_some(left)}; wanted ids such as {ids[0]!r}. Give the data that these labels are of, or, of "
                "Parquet, --id-column"
            )
        return joined

    def require_two_each(self) -> None:
        """Refuse labels that cannot be judged by: one of a class cannot be learned from and hidden at once.

        Raises
        ------
        InputError
            One class only, or a class with one label.
        """
        counts: dict[Label, list[str]] = {}
        for name, label in self.labels.items():
            counts.setdefault(label, []).append(name)
        if len(counts) < 2:
            raise InputError(f"got labels of one class only in {self.path} ({self.classes[0]!r}), wanted at least 2")
        if single := [label for label in self.classes if len(counts[label]) == 1]:
            raise InputError(
                f"got one row of the class {single[0]!r} in {self.path} (id {counts[single[0]][0]!r}"
                f"{f', and {len(single) - 1} more such classes' if len(single) > 1 else ''}), wanted at least 2 of "
                "each: some are learned from while others are asked for; "
                f"{_near(single[0], self.classes)}label another, or take the class out"
            )

    def refuse_mixing(self, test: LabelFile) -> None:
        """Refuse test labels that were learned from, or of classes that were not.

        Raises
        ------
        InputError
        """
        if unknown := [label for label in test.classes if label not in self.classes]:
            rows = [name for name, label in test.labels.items() if label in unknown]
            raise InputError(
                f"got {len(unknown)} classes in {test.path} that are not in {self.path}: {_some(unknown)} (id "
                f"{rows[0]!r} and {len(rows) - 1} more), wanted classes that were learned: "
                f"{', '.join(map(repr, self.classes[:10]))}; {_near(unknown[0], self.classes)}mend the labels, or "
                f"put some of that class into {self.path}"
            )
        if shared := [name for name in test.labels if name in self.labels]:
            raise InputError(
                f"got {len(shared)} ids in {test.path} that are in {self.path}, too: {_some(shared)}; rows to test on "
                "must not be learned from, take them out of one of the files"
            )


def read_labels(path: Path, *, id_column: str = "id", label_column: str = "label") -> LabelFile:
    """Read a file of labels.

    Parameters
    ----------
    path : Path
        ``.csv`` as :func:`pipelines.label_files.read_csv` takes it, or Parquet.
    id_column, label_column : str
        Empty labels, nulls and -1 are none. Texts that are all whole numbers are taken for numbers.

    Raises
    ------
    InputError
        The file cannot be read, lacks a column, has an id twice or none, or labels that are neither whole numbers nor
        texts; or nothing is labelled.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", *PARQUET_SUFFIXES):
        raise InputError(f"got the labels {path}, wanted a .csv or .parquet file")
    if not path.is_file():
        raise InputError(f"got the labels {path}, which does not exist")
    read = _read_csv if suffix == ".csv" else _read_parquet
    labels: dict[str, Any] = {}
    seen: set[str] = set()
    for row, (given, label) in enumerate(read(path, id_column, label_column)):
        name = "" if given is None else str(given).strip()
        if not name:
            raise InputError(f"got row {row} of {path} without an id, wanted one in column {id_column!r}")
        if name in seen:
            raise InputError(f"got the id {name!r} twice in {path} (again in row {row}), wanted it once; delete one")
        seen.add(name)
        if not _is_missing(label):
            labels[name] = label
    if not labels:
        raise InputError(f"got {path} with {len(seen)} rows and no label in column {label_column!r}; fill some in")
    return LabelFile(path=path, labels=dict(zip(labels, _of_one_kind(list(labels.values()), path), strict=True)))


def _read_csv(path: Path, id_column: str, label_column: str) -> list[tuple[Any, Any]]:
    names, rows = read_csv(path)
    _require_columns(path, names, id_column, label_column)
    return [(row[id_column], row[label_column]) for _, row in rows]


def _read_parquet(path: Path, id_column: str, label_column: str) -> list[tuple[Any, Any]]:
    _require_columns(path, open_parts([path]).schemas[0].names, id_column, label_column)
    with open_parquet(path) as file:
        table = file.read(columns=[id_column, label_column])
    return list(zip(table.column(id_column).to_pylist(), table.column(label_column).to_pylist(), strict=True))


def _require_columns(path: Path, names: Sequence[str], id_column: str, label_column: str) -> None:
    for column, option in ((id_column, "--id"), (label_column, "--label")):
        if column not in names:
            raise InputError(
                f"got no column {column!r} in {path}; there are: {', '.join(names) or 'none'}. Name another with "
                f"{option}"
            )


def _near(label: Label, classes: Iterable[Label]) -> str:
    """Ask whether another class was meant."""
    if not isinstance(label, str):
        return ""
    others = {str(name).casefold(): name for name in classes if name != label}
    near = difflib.get_close_matches(label.casefold(), others, n=1)
    return f"did you mean {others[near[0]]!r}? If not, " if near else ""


def _is_missing(label: object) -> bool:
    return label in (None, "", UNLABELLED, str(UNLABELLED)) or (isinstance(label, float) and label != label)


def _of_one_kind(labels: list[Any], path: Path) -> list[Label]:
    if all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels):
        if broken := [label for label in labels if label != int(label)]:
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


def _some(names: Iterable[object]) -> str:
    listed = list(names)
    return f"{', '.join(map(repr, listed[:_NAMED]))}{', ...' if len(listed) > _NAMED else ''}"
