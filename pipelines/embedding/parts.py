"""The input cut into parts: what one encoder does in one go, and what a job that is started again does not do again.

Parts depend on the input and the width of a row's features alone, not on who embeds them, so that a job may go on with
another number of encoders, or on another machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.embedding.arrays import ArrayHeader, read_header
from pipelines.embedding.sources import Source
from vaefeat.errors import InputError
from vaefeat.input_spec import InputSpec

__all__ = ["Part", "Plan", "plan_parts", "shares"]

#: Rows of a part, and bytes of their features: what is lost when an encoder dies, and the size of an output file.
PART_ROWS = 65_536
PART_BYTES = 32 << 20
#: Packed files, CSV and row groups are read from their beginning, so cutting them very small costs more than it gives.
_MAX_CUTS = 16
_MAX_PACKED_BYTES = 4 << 30
#: Each share is so small a portion, by encoders, of what is left: many parts first, single ones at the end.
_SHARES_LEFT = 3
#: Parts of a share, what an encoder that is lost leaves to the others; more where shares would be so many, for each of
#: which Ray Data keeps books.
_MAX_SHARE, _MAX_SHARES = 16, 4096
#: Of images; every encoder is sent the next share's.
_MAX_NAMES = 65_536


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of one file, or consecutive images of a folder."""

    index: int
    """Place among all parts, and in the name of the output file."""

    first: int
    """Number of the first row, over all files."""

    n_rows: int

    names: tuple[str, ...]
    """The file, or of images all files."""

    offset: int
    """Number of the first row in its file."""

    groups: tuple[int, ...] = ()
    """Row groups of a Parquet file that the rows are in."""

    skip: int = 0
    """Rows of the first group that come before."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All parts of an input.

    Attributes
    ----------
    parts : tuple of Part
    headers : dict of str to ArrayHeader
        Of array files.
    """

    parts: tuple[Part, ...]
    headers: dict[str, ArrayHeader]

    @property
    def n_rows(self) -> int:
        """Rows of all parts."""
        return sum(part.n_rows for part in self.parts)


class _Range(NamedTuple):
    """A part that has no number yet."""

    n_rows: int
    names: tuple[str, ...]
    offset: int
    groups: tuple[int, ...] = ()
    skip: int = 0


def plan_parts(source: Source, spec: InputSpec, *, width: int, part_rows: int | None = None) -> Plan:
    """Cut an input into parts.

    Parameters
    ----------
    source : Source
    spec : InputSpec
    width : int
        Numbers in a row's features.
    part_rows : int, optional
        Rows of a part, at most; by default 65,536, and fewer where their features take more than 32 MiB.

    Returns
    -------
    Plan

    Raises
    ------
    InputError
        There are no rows, an array file cannot be read, or it does not fit the encoder.
    """
    rows = part_rows or max(1, min(PART_ROWS, PART_BYTES // (4 * width)))
    headers: dict[str, ArrayHeader] = {}
    if source.kind == "images":
        ranges = list(_of_images(source, rows))
    elif source.kind == "parquet":
        ranges = list(_of_parquet(source, rows))
    elif source.kind == "csv":
        ranges = list(_of_csv(source, rows))
    else:
        headers = {
            file.name: read_header(source.place, file.name, kind=source.kind, spec=spec) for file in source.files
        }
        ranges = [one for name, header in headers.items() for one in _of_array(source, name, header, rows)]
    parts, first = [], 0
    for index, one in enumerate(ranges):
        parts.append(Part(index, first, *one))
        first += one.n_rows
    if not first:
        more = f" and {len(source.files) - 1} more files" if len(source.files) > 1 else ""
        raise InputError(f"got 0 rows in {source.place}/{source.files[0].name}{more}, wanted at least one")
    return Plan(parts=tuple(parts), headers=headers)


def shares(parts: Sequence[Part], n_encoders: int) -> list[tuple[Part, ...]]:
    """Deal out parts to encoders that come for a share whenever they have none.

    Between two shares an encoder waits for some milliseconds, so they should be large; and all encoders should end at
    about the same time, so they become smaller towards the end (guided self-scheduling, Polychronopoulos and Kuck
    1987, "Guided self-scheduling: a practical scheduling scheme for parallel supercomputers").

    Parameters
    ----------
    parts : sequence of Part
    n_encoders : int

    Returns
    -------
    list of tuple of Part
        All parts, in order.
    """
    most = max(_MAX_SHARE, -(-len(parts) // _MAX_SHARES))
    found, start = [], 0
    while start < len(parts):
        size = min(most, -(-(len(parts) - start) // (_SHARES_LEFT * n_encoders)))
        size = min(size, max(1, _MAX_NAMES // len(parts[start].names)))
        found.append(tuple(parts[start : start + size]))
        start += size
    return found


def _of_images(source: Source, rows: int) -> Iterator[_Range]:
    names = [file.name for file in source.files]
    for start in range(0, len(names), rows):
        chosen = tuple(names[start : start + rows])
        yield _Range(len(chosen), chosen, 0)


def _of_array(source: Source, name: str, header: ArrayHeader, rows: int) -> Iterator[_Range]:
    n_rows = header.shape[0]
    if header.packed:
        if n_rows * header.row_bytes > _MAX_PACKED_BYTES:
            raise InputError(
                f"got {source.place}/{name}, which unpacks to {n_rows * header.row_bytes / 2**30:.0f} GiB and can only "
                "be read from its beginning; unpack it first with gunzip"
            )
        rows = max(rows, -(-n_rows // _MAX_CUTS))
    for start in range(0, n_rows, rows):
        yield _Range(min(rows, n_rows - start), (name,), start)


def _of_parquet(source: Source, rows: int) -> Iterator[_Range]:
    for file, sizes in zip(source.files, source.groups, strict=True):
        offset = 0
        waiting: list[int] = []
        n_waiting = 0
        for group, size in enumerate(sizes):
            if waiting and n_waiting + size > rows:
                yield _Range(n_waiting, (file.name,), offset - n_waiting, tuple(waiting))
                waiting, n_waiting = [], 0
            if size > rows:
                for start, n_rows in _cuts(size, rows):
                    yield _Range(n_rows, (file.name,), offset + start, (group,), start)
            elif size:
                waiting.append(group)
                n_waiting += size
            offset += size
        if waiting:
            yield _Range(n_waiting, (file.name,), offset - n_waiting, tuple(waiting))


def _of_csv(source: Source, rows: int) -> Iterator[_Range]:
    for file, (size,) in zip(source.files, source.groups, strict=True):
        for start, n_rows in _cuts(size, rows):
            yield _Range(n_rows, (file.name,), start)


def _cuts(size: int, rows: int) -> Iterator[tuple[int, int]]:
    rows = max(rows, -(-size // _MAX_CUTS))
    for start in range(0, size, rows):
        yield start, min(rows, size - start)
