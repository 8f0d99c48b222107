"""What a run of :mod:`benchmarks.jobs` says: ratios, a table, and the plan for a billion images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.table import Table

__all__ = ["billion", "ratios", "shown"]

#: As many images as the plan is for, on machines of so many processors, within so many hours.
_BILLION, _CPUS, _HOURS = 10**9, 32, 24.0


def ratios(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Give how many times as fast the job is as the loop: medians over rounds.

    Parameters
    ----------
    found : mapping
        What each round gave, with ``rows_per_s``: ``job_rows``, ``loop_rows``, ``loop_memory``, ``job_images``,
        ``loop_images``.

    Returns
    -------
    dict
        ``embed_vs_loop``, against a loop that reads the same files; ``embed_vs_memory``, against one that reads
        nothing; and ``jpeg_vs_pillow``. The loop's best batch size counts in each round.
    """
    rate = {name: median(one["rows_per_s"] for one in rounds) for name, rounds in found.items()}
    return {
        "embed_vs_loop": round(rate["job_rows"] / rate["loop_rows"], 3),
        "embed_vs_memory": round(rate["job_rows"] / rate["loop_memory"], 3),
        "jpeg_vs_pillow": round(rate["job_images"] / rate["loop_images"], 3),
    }


def billion(*, images_per_s: float, cpus: int, read_bytes: float, written_bytes: float) -> dict[str, Any]:
    """Plan a billion images like those that were measured, from a rate that grows with processors.

    Parameters
    ----------
    images_per_s : float
        Of all processors together.
    cpus : int
        That this rate is of.
    read_bytes, written_bytes : float
        Of an image, in the input and in the output.

    Returns
    -------
    dict
        ``processor_hours``; ``machines`` of 32 processors that need ``hours``, at most a day; ``input_tb`` and
        ``output_tb``; what the machines read together, ``read_mb_per_s``.
    """
    processor_hours = _BILLION * cpus / images_per_s / 3600
    machines = max(1, math.ceil(processor_hours / (_CPUS * _HOURS)))
    hours = processor_hours / (machines * _CPUS)
    return {
        "images": _BILLION,
        "processor_hours": round(processor_hours, 1),
        "machines": machines,
        "processors_each": _CPUS,
        "hours": round(hours, 2),
        "input_tb": round(_BILLION * read_bytes / 1e12, 3),
        "output_tb": round(_BILLION * written_bytes / 1e12, 3),
        "read_mb_per_s": round(_BILLION * read_bytes / 1e6 / (hours * 3600), 1),
    }


def shown(results: Mapping[str, Any]) -> Table:
    """Make the table for people."""
    table = Table("what", "rows/s", "seconds until encoders are there", "peak memory, MB")
    for name, rounds in results["found"].items():
        for one in rounds:
            start = one.get("start_s")
            peak = one.get("peak_mb")
            table.add_row(
                name,
                f"{one['rows_per_s']:,.0f}",
                "" if start is None else f"{start:.1f}",
                "" if peak is None else f"{peak:,.0f}",
            )
    return table
