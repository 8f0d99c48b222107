"""Test log-likelihoods on MNIST with dynamic binarization, beside published ones.

``python -m benchmarks.likelihood --data PATH`` trains every row and evaluates it; ``--only`` chooses rows, ``--resume``
continues what was stopped, ``--list`` says what there is and ``--smoke`` tries it in a minute. The last line of the
output is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.likelihood_report import described, listed, merge, report, results_table, write_curves
from benchmarks.likelihood_rows import ROWS, Row
from benchmarks.likelihood_runs import checkpoint_of, evaluate_row, read_row, shortened, train_row
from vaefeat.cli import run_command_line
from vaefeat.data import load_rows
from vaefeat.errors import ConfigError, InputError
from vaefeat.settings import unknown_name

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_FIGURE = "likelihood-curve.png"
_SMOKE = {"epochs": 1, "max_rows": 300, "test_rows": 20, "samples": 20}


@app.command()
def main(
    data: Annotated[Path | None, typer.Option(help="Folder with MNIST's IDX files.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and figures.")] = Path("runs/likelihood"),
    only: Annotated[list[str] | None, typer.Option(help="A row; may be repeated. All of them when not given.")] = None,
    epochs: Annotated[list[str] | None, typer.Option(help="ROW=N: other than its own; may be repeated.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop each row's training after these, and evaluate what is there.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads.")] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Importance samples, other than the row's own.")] = None,
    test_rows: Annotated[int, typer.Option(min=2, help="Of the 10,000, from the first.")] = 10_000,
    max_rows: Annotated[int | None, typer.Option(min=2, help="Training images, for a quick try.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is in the folder.")] = False,
    evaluate_anyway: Annotated[
        bool, typer.Option("--evaluate-anyway", help="Train no further; evaluate the best weights in the folder.")
    ] = False,
    results: Annotated[Path | None, typer.Option(help="A JSON file that takes the figures in.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="One epoch of a few images, in a folder of its own.")] = False,
    list_rows: Annotated[bool, typer.Option("--list", help="Say what there is, and stop.")] = False,
) -> None:
    """Train, evaluate, print a table and one line of JSON."""
    rows = _chosen(only or list(ROWS), epochs or [], threads)
    if list_rows:
        Console().print(listed(rows))
        return
    if data is None:
        raise InputError("got no --data, wanted the folder with MNIST's IDX files")
    if smoke:
        if results is not None:
            raise InputError("got --smoke with --results, whose figures mean nothing; leave one of them out")
        rows, out = [shortened(row, epochs=_SMOKE["epochs"]) for row in rows], out / "smoke"
        max_rows, test_rows, samples = _SMOKE["max_rows"], _SMOKE["test_rows"], _SMOKE["samples"]
    images = _images(data, "train", max_rows)
    if not (resume or evaluate_anyway or smoke):
        _refuse_to_overwrite(rows, out)
    figures: dict[str, dict[str, Any]] = {}
    known: dict[str, Any] = {}
    for row in rows:
        print(f"{row.name}: {row.title}, {row.train.max_epochs} epochs", file=sys.stderr, flush=True)
        trained = (
            read_row(row, images, out)
            if evaluate_anyway
            else train_row(row, images, out, resume=resume, minutes=minutes)
        )
        found = described(trained, len(images))
        if row.n_samples is not None:
            # The folder's weights are chosen by now: this is the only place that reads test images.
            unseen = _images(data, "test", test_rows)
            n_samples = samples or row.n_samples
            found |= {"n_samples": n_samples, "n_test_rows": len(unseen)}
            found |= evaluate_row(trained, unseen, out, n_samples=n_samples, threads=threads)
        figures[row.name] = found
        if results is not None:
            # After each row: the next one may take hours.
            known = merge(results, report(figures))["rows"]
    if write_curves(out / _FIGURE, known or figures):
        print(f"wrote {out / _FIGURE}", file=sys.stderr)
    Console().print(results_table(figures))
    print(json.dumps(report(figures)))


def _chosen(names: list[str], epochs: list[str], threads: int | None) -> list[Row]:
    lengths: dict[str, int] = {}
    for text in epochs:
        name, equals, number = text.partition("=")
        if not equals or not number.isdigit() or int(number) < 1:
            raise ConfigError(f"got --epochs {text!r}, wanted ROW=N, for instance --epochs best=5")
        lengths[name] = int(number)
    for name in [*names, *lengths]:
        if name not in ROWS:
            raise unknown_name("row", name, ROWS)
    # In the order of the table: a row may begin with the weights of one before it.
    return [shortened(row, epochs=lengths.get(row.name), threads=threads) for row in ROWS.values() if row.name in names]


def _images(data: Path, split: Any, max_rows: int | None) -> NDArray[np.uint8]:
    images = np.array(load_rows(data, split=split, max_rows=max_rows).array)
    if images.shape[1:] != (1, 28, 28) or images.dtype != np.uint8:
        raise InputError(
            f"got rows of shape {images.shape[1:]} and dtype {images.dtype} in {data}, wanted MNIST's images, of "
            "(1, 28, 28) and uint8: published figures are of these"
        )
    return images


def _refuse_to_overwrite(rows: list[Row], out: Path) -> None:
    for row in rows:
        if (path := checkpoint_of(row.name, out)).is_file():
            raise InputError(f"got {path}, which would be lost; continue it with --resume, or choose another --out")


if __name__ == "__main__":
    run_command_line(app)
