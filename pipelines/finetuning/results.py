"""What a comparison came to: a table on the terminal and in Markdown, a picture, and all of it as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from pipelines.finetuning.judging import CONFIDENCE, Interval, Judged
from vaefeat import plots
from vaefeat.drawing import BLUE, GREY, draw_title

__all__ = ["Tested", "as_markdown", "as_table", "as_values", "draw_comparison"]

_COLUMNS = ("classifier", "error, %", "95 % interval", "log-loss", "calibrated", "T", "confidence", "seconds")
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


class Tested(NamedTuple):
    """What the shipped file says of test rows."""

    n_rows: int
    error: float
    """In percent."""

    interval: Interval
    log_loss: float
    confidence: float


def as_table(judged: Sequence[Judged], best: Judged, *, title: str) -> Table:
    """Give what fits a terminal; the best in bold."""
    table = Table(title=title, title_justify="left", caption=" ".join(_notes(judged)), caption_justify="left")
    table.add_column("classifier", no_wrap=True)
    for column in ("error, %", "95 % interval", "log-loss", "seconds"):
        table.add_column(column, justify="right")
    for one in judged:
        name, error, interval, _, calibrated, _, _, seconds = _cells(one)
        table.add_row(name, error, interval, calibrated, seconds, style="bold" if one is best else None)
    return table


def as_markdown(judged: Sequence[Judged], best: Judged, *, title: str) -> str:
    """Give all columns as a page."""
    lines = [f"# {title}", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for one in judged:
        cells = [f"**{cell}**" if one is best else cell for cell in _cells(one)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _LEGEND, *_notes(judged), ""])


def as_values(judged: Sequence[Judged], left_out: dict[str, str], tested: Tested | None) -> dict[str, Any]:
    """Give plain values for ``results.json``."""
    return {
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
            for one in judged
        ],
        "left_out": left_out,
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
    }


def draw_comparison(judged: Sequence[Judged], best: Judged, *, title: str) -> bytes:
    """Draw errors, their intervals and the single draws, as a PNG."""
    drawn, axes = plots.figure(width=7.0, height=1.1 + 0.5 * len(judged))
    places = np.arange(len(judged))[::-1]
    for one, place in zip(judged, places, strict=True):
        colour = BLUE if one is best else GREY
        axes.plot(one.interval[:2], [place, place], color=colour, linewidth=3, solid_capstyle="round", zorder=1)
        axes.scatter(one.errors, np.full(len(one.errors), place - 0.22), s=9, color=colour, alpha=0.6, linewidths=0)
        axes.scatter([one.error], [place], s=60, color=colour, edgecolors="white", zorder=2)
        axes.annotate(
            f"{one.error:.1f}",
            (one.error, place),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            weight="bold" if one is best else "normal",
        )
    axes.set_yticks(places, [one.contender.title for one in judged])
    axes.set(xlabel="error on hidden labels (%); below each, its draws", ylim=(-0.6, len(judged) - 0.4))
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(axis="x", color="#e5e9ee")
    axes.set_axisbelow(True)
    draw_title(axes, title)
    return plots.png(drawn)


def _notes(judged: Sequence[Judged]) -> list[str]:
    kinds = {one.interval.kind for one in judged}
    return [note for kind, note in _NOTES.items() if kind in kinds]


def _cells(one: Judged) -> list[str]:
    return [
        one.contender.title,
        f"{one.error:.1f}",
        f"{one.interval.low:.1f} to {one.interval.high:.1f}{_MARKS[one.interval.kind]}",
        f"{one.log_loss:.3f}",
        f"{one.calibrated_log_loss:.3f}",
        f"{one.temperature:.2f}",
        f"{one.confidence:.1f}",
        f"{one.seconds:.1f}",
    ]
