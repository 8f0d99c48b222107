"""What a comparison came to: a table on the terminal and in Markdown, a picture, and all of it as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines.finetuning.comparison import Comparison
from pipelines.finetuning.judging import CONFIDENCE, Judged
from vaefeat import plots
from vaefeat.atomic import replace_file
from vaefeat.drawing import BLUE, GREY, draw_title
from vaefeat.errors import InputError

__all__ = ["PICTURE_FILE", "RESULTS_FILE", "TABLE_FILE", "save", "show"]

RESULTS_FILE, TABLE_FILE, PICTURE_FILE = "results.json", "comparison.md", "comparison.png"
_COLUMNS = ("classifier", "error, %", "95 % interval", "log-loss", "calibrated", "T", "confidence", "seconds")
#: Pixels in an inch of the picture, as of a report's charts.
_DPI = 144
#: Behind an interval that is not of draws.
_MARKS = {"corrected t": "", "Wilson": " *"}
_NOTES = {
    "corrected t": "Intervals are t intervals over draws that share labels (Nadeau and Bengio 2003).",
    "Wilson": "* All draws had the same error: Wilson's interval of their rows.",
}


_LEGEND = (
    "Error and confidence in percent, log-loss in nats, on labels that were hidden; calibrated by the temperature T; "
    "seconds of a fit."
)


def show(found: Comparison, *, console: Console) -> None:
    """Print the table, and what was left out."""
    console.print(_as_table(found))
    for name, reason in found.left_out.items():
        console.print(f"{name} was left out: {reason}", highlight=False, soft_wrap=True)
    if (tested := found.tested) is not None:
        console.print(
            f"on {tested.n_rows:,} test rows: error {tested.error:.1f} % ({tested.interval.low:.1f} to "
            f"{tested.interval.high:.1f}, {tested.interval.kind}), confidence {tested.confidence:.1f} %",
            highlight=False,
            soft_wrap=True,
        )


def save(found: Comparison, out: Path, *, config: Mapping[str, Any]) -> Comparison:
    """Write table, picture, figures, and at last the bundle of the best.

    Parameters
    ----------
    found : Comparison
    out : Path
        A folder; files of the same names are replaced.
    config : mapping
        What was asked for, as plain values.

    Returns
    -------
    Comparison
        With the bundle that is in the folder.

    Raises
    ------
    InputError, BundleError
        The folder cannot be written.
    """
    values = _as_values(found) | {"config": dict(config)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / PICTURE_FILE, _draw_comparison(found))
        replace_file(out / TABLE_FILE, _as_markdown(found).encode())
        replace_file(out / RESULTS_FILE, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise InputError(f"could not write {out}: {error.strerror or error}; choose another place") from error
    # Last: its manifest says that the folder is whole.
    return replace(found, bundle=found.bundle.save(out))


def _as_table(found: Comparison) -> Table:
    """Give what fits a terminal; the best in bold."""
    table = Table(
        title=found.title, title_justify="left", caption=" ".join(_notes(found.judged)), caption_justify="left"
    )
    table.add_column("classifier", no_wrap=True)
    for column in ("error, %", "95 % interval", "log-loss", "calibrated", "seconds"):
        table.add_column(column, justify="right")
    for one in found.judged:
        name, error, interval, raw, calibrated, _, _, seconds = _cells(one)
        table.add_row(name, error, interval, raw, calibrated, seconds, style="bold" if one is found.best else None)
    return table


def _as_markdown(found: Comparison) -> str:
    """Give all columns as a page."""
    lines = [f"# {found.title}", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for one in found.judged:
        cells = [f"**{cell}**" if one is found.best else cell for cell in _cells(one)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _LEGEND, *_notes(found.judged), ""])


def _as_values(found: Comparison) -> dict[str, Any]:
    """Give plain values for ``results.json``."""
    manifest, tested = found.bundle.manifest, found.tested
    assert manifest.pipeline is not None
    return {
        "shipped": found.best.contender.name,
        "digest": found.bundle.digest,
        "encoder": manifest.pipeline["encoder"],
        "temperature": found.best.temperature,
        "n_rows": found.n_rows,
        "n_labels": found.n_labels,
        "classes": list(manifest.classes),
        "n_hidden_a_draw": found.n_hidden,
        "confidence_of_intervals": CONFIDENCE,
        "classifiers": [
            {
                "name": one.contender.name,
                "title": one.contender.title,
                "error_percent": one.error,
                "interval_percent": [one.interval.low, one.interval.high],
                "interval": one.interval.kind,
                "errors_percent": list(one.errors),
                "log_loss_nats": one.log_loss,
                "calibrated_log_loss_nats": one.calibrated_log_loss,
                "confidence_percent": one.confidence,
                "temperature": one.temperature,
                "seconds_a_fit": one.seconds,
            }
            for one in found.judged
        ],
        "left_out": dict(found.left_out),
        "test": None
        if tested is None
        else {
            "n_rows": tested.n_rows,
            "error_percent": tested.error,
            "interval_percent": [tested.interval.low, tested.interval.high],
            "interval": tested.interval.kind,
            "log_loss_nats": tested.log_loss,
            "confidence_percent": tested.confidence,
        },
        "environment": {
            "date": datetime.now(UTC).date().isoformat(),
            "python": platform.python_version(),
            **manifest.versions,
        },
    }


def _draw_comparison(found: Comparison) -> bytes:
    """Draw errors, their intervals and the single draws, as a PNG."""
    judged = found.judged
    drawn, axes = plots.figure(width=7.0, height=1.1 + 0.5 * len(judged))
    places = np.arange(len(judged))[::-1]
    for one, place in zip(judged, places, strict=True):
        colour = BLUE if one is found.best else GREY
        axes.plot(one.interval[:2], [place, place], color=colour, linewidth=3, solid_capstyle="round", zorder=1)
        axes.scatter(one.errors, np.full(len(one.errors), place - 0.22), s=9, color=colour, alpha=0.6, linewidths=0)
        axes.scatter([one.error], [place], s=60, color=colour, edgecolors="white", zorder=2)
        axes.annotate(
            f"{one.error:.1f}",
            (one.error, place),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            weight="bold" if one is found.best else "normal",
        )
    axes.set_yticks(places, [one.contender.title for one in judged])
    axes.set(xlabel="error on hidden labels (%); below each, its draws", ylim=(-0.6, len(judged) - 0.4))
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(axis="x", color="#e5e9ee")
    axes.set_axisbelow(True)
    draw_title(axes, found.title)
    return plots.png(drawn, dpi=_DPI)


def _notes(judged: Sequence[Judged]) -> list[str]:
    kinds = {one.interval.kind for one in judged}
    notes = [note for kind, note in _NOTES.items() if kind in kinds]
    few = any(one.calibrated_log_loss is None for one in judged)
    return [*notes, "The draws hide too few labels to tell what a temperature is worth."] if few else notes


def _cells(one: Judged) -> list[str]:
    return [
        one.contender.title,
        f"{one.error:.1f}",
        f"{one.interval.low:.1f} to {one.interval.high:.1f}{_MARKS[one.interval.kind]}",
        f"{one.log_loss:.3f}",
        "-" if one.calibrated_log_loss is None else f"{one.calibrated_log_loss:.3f}",
        f"{one.temperature:.2f}",
        f"{one.confidence:.1f}",
        f"{one.seconds:.1f}",
    ]
