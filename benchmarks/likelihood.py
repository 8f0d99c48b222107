"""Test log-likelihoods on MNIST with dynamic binarization, beside published ones.

``python -m benchmarks.likelihood --data PATH`` trains every row and evaluates it; ``--only`` chooses rows, ``--resume``
continues what was stopped. The last line of the output is JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.likelihood_rows import ROWS, Row
from benchmarks.likelihood_runs import Trained, evaluate_row, shortened, train_row
from benchmarks.surroundings import surroundings
from vaefeat.atomic import replace_file
from vaefeat.cli import run_command_line
from vaefeat.data import load_rows
from vaefeat.errors import ConfigError
from vaefeat.latent_plots import learning_curves
from vaefeat.plots import png
from vaefeat.settings import unknown_name

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_HEADLINES = ("vae_1l", "iwae50_1l", "best")
_FIGURE = "likelihood-curve.png"


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with MNIST's IDX files.")],
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and figures.")] = Path("runs/likelihood"),
    only: Annotated[list[str] | None, typer.Option(help="A row; may be repeated. All of them when not given.")] = None,
    epochs: Annotated[list[str] | None, typer.Option(help="ROW=N: other than its own; may be repeated.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop each row's training after these, and evaluate what is there.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads.")] = None,
    samples: Annotated[int | None, typer.Option(help="Importance samples, other than the row's own.")] = None,
    test_rows: Annotated[int, typer.Option(help="Of the 10,000, from the first.")] = 10_000,
    max_rows: Annotated[int | None, typer.Option(help="Training images, for a quick try.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is in the folder.")] = False,
    results: Annotated[Path | None, typer.Option(help="A JSON file that takes the figures in.")] = None,
) -> None:
    """Train, evaluate, print a table and one line of JSON."""
    rows = _chosen(only or list(ROWS), epochs or [], threads)
    images = np.array(load_rows(data, max_rows=max_rows).array)
    # The folder holds figures of these images alone.
    figures: dict[str, dict[str, Any]] = {}
    for row in rows:
        print(f"{row.name}: {row.title}, {row.train.max_epochs} epochs", flush=True)
        trained = train_row(row, images, out, resume=resume, minutes=minutes)
        figures[row.name] = _described(row, trained, images, threads=row.train.threads)
        if row.n_samples is not None:
            unseen = np.array(load_rows(data, split="test", max_rows=test_rows).array)
            n_samples = samples or row.n_samples
            figures[row.name] |= {"n_samples": n_samples, "n_test_rows": len(unseen)}
            figures[row.name] |= evaluate_row(row, trained, unseen, out, n_samples=n_samples)
    report = _report(figures)
    curves = {
        f"{row.model.latent_dim} latents": figures[row.name]["curve"] for row in rows if "curve" in figures[row.name]
    }
    if curves:
        figure = learning_curves(curves)
        replace_file(out / _FIGURE, png(figure))
        print(f"wrote {out / _FIGURE}")
    _print_table(rows, figures)
    if results is not None:
        replace_file(results, (json.dumps(_merged(results, report), indent=1) + "\n").encode())
    print(json.dumps(report))


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


def _described(row: Row, trained: Trained, images: Any, *, threads: int | None) -> dict[str, Any]:
    last = trained.history[-1]
    described = {
        "title": row.title,
        "finished": trained.finished,
        "epochs": len(trained.history),
        "epochs_planned": row.train.max_epochs,
        "training_seconds": round(trained.seconds),
        "rows_per_s": round(float(np.median([record["rows_per_s"] for record in trained.history]))),
        "threads": threads,
        "heldout_elbo": last["heldout_elbo"],
        "active_units": last["active_units"],
        "begins_with": row.after,
        "model": row.model.to_dict(),
        "train": row.train.to_dict(),
        **surroundings(),
        "commit_of_training": trained.commit,
    }
    if row.name.startswith("curve_"):
        n_train = len(images) - max(1, round(row.train.heldout * len(images)))
        described["curve"] = [
            [record["epoch"] * n_train, round(record["heldout_elbo"], 2)] for record in trained.history
        ]
    return described


def _report(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    evaluated = {name: row for name, row in figures.items() if "nll" in row}
    return {
        "nll": {name: round(row["nll"], 3) for name, row in evaluated.items() if name in _HEADLINES},
        "standard_error": {
            name: {
                "monte_carlo": round(row["monte_carlo_error"], 4),
                "choice_of_test_rows": round(row["sampling_error"], 3),
            }
            for name, row in evaluated.items()
            if name in _HEADLINES
        },
        "published": {name: vars(ROWS[name].published) for name in figures if ROWS[name].published is not None},
        "rows": figures,
    }


def _merged(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Lay new figures over those of a file; rows that were not run now stay as they are."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    return {key: {**before.get(key, {}), **part} for key, part in report.items()}


def _print_table(rows: list[Row], figures: dict[str, dict[str, Any]]) -> None:
    table = Table(
        title="Negative log-likelihood of MNIST's test images, dynamically binarized, in nats",
        caption="in brackets: of held-out training images",
    )
    for column in ("row", "NLL", "error", "published", "-ELBO", "epochs", "minutes"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        found = figures[row.name]
        measured = "nll" in found
        table.add_row(
            row.name,
            f"{found['nll']:.2f}" if measured else "",
            f"{found['monte_carlo_error']:.3f}" if measured else "",
            f"{row.published.nll:.2f}" if row.published else "",
            f"{-found['elbo']:.2f}" if measured else f"({-found['heldout_elbo']:.2f})",
            f"{found['epochs']}" + ("" if found["finished"] else f" of {found['epochs_planned']}"),
            f"{found['training_seconds'] / 60:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    run_command_line(app)
