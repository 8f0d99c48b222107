"""Labels to learn from and to test on: read, and refused where neither can be done."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines.label_files import GivenLabels, Label, read_labels, some_of
from vaefeat.errors import InputError

__all__ = ["read_both", "refuse_mixing", "require_two_each"]

_MOST_NAMED = 6


def read_both(
    labels: Sequence[Path], test_labels: Path | None, *, id_column: str, label_column: str
) -> tuple[GivenLabels, GivenLabels | None]:
    """Read the labels there are, and those of other rows to test on.

    Raises
    ------
    InputError
        Files that cannot be read, or labels that cannot be learned from or not be tested on.
    """
    given = read_labels(labels, id_column=id_column, label_column=label_column)
    require_two_each(given, column=label_column)
    if test_labels is None:
        return given, None
    test = read_labels([test_labels], id_column=id_column, label_column=label_column)
    refuse_mixing(given, test)
    return given, test


def require_two_each(given: GivenLabels, *, column: str) -> None:
    """Refuse labels that cannot be judged by: one of a class cannot be learned from and hidden at once.

    Parameters
    ----------
    given : GivenLabels
    column : str
        Of the labels, for people.

    Raises
    ------
    InputError
        No label, one class only, or a class with one label.
    """
    counts: dict[Label, list[str]] = {}
    for name, label in given.labels.items():
        counts.setdefault(label, []).append(name)
    if not counts:
        raise InputError(
            f"got {given.source} with {len(given.passed_over)} rows and no label in column {column!r}; fill some in"
        )
    if len(counts) < 2:
        raise InputError(f"got labels of one class only in {given.source} ({given.classes[0]!r}), wanted at least 2")
    if single := [label for label in given.classes if len(counts[label]) == 1]:
        others = ", ".join(repr(label) for label in single[1:_MOST_NAMED]) + ", ..." * (len(single) > _MOST_NAMED)
        raise InputError(
            f"got one row of the class {single[0]!r} in {given.source} (id {counts[single[0]][0]!r}"
            f"{f', and one each of {others}' if others else ''}), wanted at least 2 of "
            "each: some are learned from while others are asked for; "
            f"{_near(single[0], given.classes)}label another, or take the class out"
        )


def refuse_mixing(given: GivenLabels, test: GivenLabels) -> None:
    """Refuse test labels that were learned from, or of classes that were not; or none.

    Raises
    ------
    InputError
    """
    if not test.labels:
        raise InputError(f"got {test.source} without a label to test on; fill some in, or leave it out")
    if unknown := [label for label in test.classes if label not in given.classes]:
        rows = [name for name, label in test.labels.items() if label in unknown]
        raise InputError(
            f"got {len(unknown)} classes in {test.source} that are not in {given.source}: {some_of(unknown)} (id "
            f"{rows[0]!r} and {len(rows) - 1} more), wanted classes that were learned: "
            f"{', '.join(map(repr, given.classes[:10]))}; {_near(unknown[0], given.classes)}mend the labels, or put "
            f"some of that class into {given.source}"
        )
    if shared := [name for name in test.labels if name in given.labels]:
        raise InputError(
            f"got {len(shared)} ids in {test.source} that are in {given.source}, too: {some_of(shared)}; rows to test "
            "on must not be learned from, take them out of one of the files"
        )


def _near(label: Label, classes: Iterable[Label]) -> str:
    """Ask whether another class was meant."""
    if not isinstance(label, str):
        return ""
    others = {str(name).casefold(): name for name in classes if name != label}
    near = difflib.get_close_matches(label.casefold(), others, n=1)
    return f"did you mean {others[near[0]]!r}? If not, " if near else ""
