"""The folder that a job writes: one Parquet file for each part, and notes that are written before all and after all."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.embedding.encoding import METADATA_KEY, Encoded
from pipelines.embedding.storage import Found, Place
from vaefeat.errors import InputError, JobError

__all__ = ["JOB_FILE", "LOG_FILE", "MANIFEST_FILE", "QUARANTINE", "Output", "Receipt", "part_name"]

# Readers of Parquet folders, pyarrow's and Spark's among them, pass over names that begin with an underscore.
JOB_FILE = "_job.json"
MANIFEST_FILE = "_manifest.json"
QUARANTINE = "_quarantine"
LOG_FILE = "_ray.log"
_FORMAT = 1
_PART = re.compile(r"part-(\d{8})\.parquet")
_THREADS = 16


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a part."""

    index: int
    n_rows: int
    n_quarantined: int
    n_bytes: int


def part_name(index: int) -> str:
    """Name the file of a part; names sort as parts do."""
    return f"part-{index:08}.parquet"


class Output:
    """The folder.

    Parameters
    ----------
    place : Place
    job : dict
        What decides about the content of the files, as plain values: another job's files are not ours.
    """

    def __init__(self, place: Place, job: dict[str, Any]) -> None:
        self.place = place
        canonical = json.dumps({"format": _FORMAT, **job}, sort_keys=True, separators=(",", ":"))
        # As it will be read again: JSON knows no tuples.
        self.job: dict[str, Any] = json.loads(canonical)
        self.digest = f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"
        self._began = time.time()

    @property
    def metadata(self) -> dict[str, str]:
        """What every file says of itself."""
        return {name: str(self.job[name]) for name in ("bundle", "name", "output")} | {"job": self.digest}

    @property
    def begun(self) -> bool:
        """Whether an earlier launch has opened the folder."""
        return self.place.child(JOB_FILE).is_file

    def begin(self, n_parts: int) -> list[Receipt]:
        """Open the folder, new or as an earlier launch of the same job left it.

        Parameters
        ----------
        n_parts : int

        Returns
        -------
        list of Receipt
            Parts that are done.

        Raises
        ------
        InputError
            The folder holds something else, or cannot be written.
        """
        if self.place.is_file:
            raise InputError(f"got {self.place}, which is a file; wanted the name of a folder for the output")
        found = {file.name: file for file in self.place.find()}
        if JOB_FILE in found:
            self._refuse_other_job()
            return self._done(found, n_parts)
        if found:
            raise InputError(
                f"got {self.place} with {next(iter(found))} and {len(found) - 1} more that this job has not written; "
                "choose another name, or remove the folder"
            )
        self.place.write(JOB_FILE, _as_json(self.job))
        return []

    def _refuse_other_job(self) -> None:
        with self.place.reading(JOB_FILE):
            try:
                before = json.loads(self.place.read(JOB_FILE))
            except ValueError as error:
                raise InputError(f"got {self.place}/{JOB_FILE}, which is no JSON; remove the folder") from error
        other = [key for key in self.job if before.get(key) != self.job[key]]
        if other:
            # What people gave comes before what follows from it.
            key = next((name for name in ("bundle", "input") if name in other), other[0])
            if key == "part_rows" and before.get(key):
                raise InputError(
                    f"got {self.place}, begun with --part-rows {before[key]}; repeat that, choose another name for the "
                    "output, or remove the folder"
                )
            raise InputError(
                f"got {self.place}, begun with another {key} ({_shortly(before.get(key))}, now "
                f"{_shortly(self.job[key])}); choose another name for the output, or remove the folder"
            )

    def _done(self, found: dict[str, Found], n_parts: int) -> list[Receipt]:
        files = {int(match[1]): file for name, file in found.items() if (match := _PART.fullmatch(name)) is not None}
        with ThreadPoolExecutor(_THREADS) as pool:
            rows = dict(zip(files, pool.map(self._rows_of_ours, files.values()), strict=True))
        done = []
        for index in range(n_parts):
            aside = f"{QUARANTINE}/{part_name(index)}"
            n_rows = rows.get(index)
            if n_rows is not None:
                n_bad = self._rows(aside) if aside in found else 0
                done.append(Receipt(index, n_rows, n_bad, files[index].size))
            elif aside in found:
                self.place.remove(aside)  # of a part that was not finished, and may turn out otherwise
        if MANIFEST_FILE in found and len(done) < n_parts:
            self.place.remove(MANIFEST_FILE)
        return done

    def _rows_of_ours(self, file: Found) -> int | None:
        """Count the rows of a part's file; None where it is damaged, or of another job."""
        try:
            with self.place.open(file.name) as opened:
                footer = pq.read_metadata(opened)
        except (pa.ArrowException, OSError):
            return None
        ours = (footer.metadata or {}).get(f"{METADATA_KEY}job".encode()) == self.digest.encode()
        return int(footer.num_rows) if ours else None

    def _rows(self, name: str) -> int:
        with self.place.reading(name), self.place.open(name) as opened:
            return int(pq.read_metadata(opened).num_rows)

    def write(self, index: int, encoded: Encoded) -> Receipt:
        """Write a part: the quarantine first, so that a part's file says that all of it is there.

        Raises
        ------
        InputError
            The disk is full, or the place cannot be written.
        """
        if encoded.quarantine is not None:
            self.place.write(f"{QUARANTINE}/{part_name(index)}", encoded.quarantine)
        self.place.write(part_name(index), encoded.content)
        return Receipt(index, encoded.n_rows, encoded.n_quarantined, len(encoded.content))

    def commonest_reason(self, index: int) -> str:
        """Say why most of the rows are in a part's quarantine."""
        name = f"{QUARANTINE}/{part_name(index)}"
        with self.place.reading(name), self.place.open(name) as opened:
            reasons = pq.read_table(opened, columns=["reason"]).column("reason").to_pylist()
        return str(Counter(reasons).most_common(1)[0][0])

    def finish(self, receipts: Iterable[Receipt], *, n_parts: int, n_rows: int) -> dict[str, Any]:
        """Write the manifest, which says that the output is whole, after looking that it is.

        Returns
        -------
        dict
            The manifest.

        Raises
        ------
        JobError
            A part is missing or is not what was written, or rows are.
        """
        by_index = {receipt.index: receipt for receipt in receipts}
        sizes = {file.name: file.size for file in self.place.find()}
        for index in range(n_parts):
            receipt = by_index.get(index)
            if receipt is None or sizes.get(part_name(index)) != receipt.n_bytes:
                raise JobError(f"got {self.place} without a whole {part_name(index)}; the same command writes it again")
        ordered = [by_index[index] for index in range(n_parts)]
        n_embedded, n_bad = sum(one.n_rows for one in ordered), sum(one.n_quarantined for one in ordered)
        if n_embedded + n_bad != n_rows:
            raise JobError(f"got {n_embedded} rows and {n_bad} in quarantine, wanted {n_rows} in all; start again")
        manifest = {
            **self.job,
            "job": self.digest,
            "rows_embedded": n_embedded,
            "rows_quarantined": n_bad,
            "files": [
                {
                    "name": part_name(one.index),
                    "rows": one.n_rows,
                    "quarantined": one.n_quarantined,
                    "bytes": one.n_bytes,
                }
                for one in ordered
            ],
            "versions": {"python": platform.python_version(), "pyarrow": pa.__version__}
            | {name: version(name) for name in ("ray", "vaefeat")},
        }
        self._remove_litter()
        self.place.write(MANIFEST_FILE, _as_json(manifest))
        return manifest

    def _remove_litter(self) -> None:
        """Remove what writers that were killed left half written, but nothing of anybody who is still at work."""
        if self.place.local is None:
            return
        for folder in (self.place.local, self.place.local / QUARANTINE):
            for path in folder.glob(".*.tmp"):
                _remove_older(path, self._began)


def _remove_older(path: Path, than: float) -> None:
    if path.stat().st_mtime < than:
        path.unlink(missing_ok=True)


def _as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def _shortly(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
