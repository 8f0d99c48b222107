"""What each head makes of a bundle's features with few labels.

``python -m benchmarks.heads BUNDLE --data PATH`` prints a table, and one JSON line last; ``docs/heads.md`` quotes it.
The last rows of the training set judge, 10,000 or a sixth; the first ones are what labels are drawn among, and what
heads that learn from rows without a label get. No test row is read.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.semi_supervised import LabelSpreading

from benchmarks.surroundings import surroundings
from pipelines.probes import draw_labels
from vaefeat import FewLabelHead, OnnxEncoder
from vaefeat.cli import run_command_line
from vaefeat.data import load_rows
from vaefeat.errors import InputError

__all__ = ["HEADS", "app", "errors_of"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

#: Ours, and scikit-learn's own label spreading over as many neighbours and with the same alpha as ours.
HEADS: Mapping[str, Callable[[], Any]] = {
    **{kind: partial(FewLabelHead, kind, random_state=0) for kind in ("prototype", "logistic", "mixture", "spread")},
    "LabelSpreading": lambda: make_pipeline(
        StandardScaler(),
        Normalizer(),
        LabelSpreading(kernel="knn", n_neighbors=10, alpha=0.99, max_iter=500),
    ),
}
_N_VALIDATION = 10_000


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(help="Whose posterior means are the features.")],
    data: Annotated[Path, typer.Option(help="Rows with labels, as `vaefeat pretrain` reads them.")],
    rows: Annotated[int, typer.Option(min=2, help="At most so many of the first rows.")] = 10_000,
    labels: Annotated[list[int] | None, typer.Option(help="Of each class; may be repeated. 1, 10, 100.")] = None,
    draws: Annotated[int, typer.Option(min=2, help="Of the labelled rows, each as many of every class.")] = 10,
) -> None:
    """Measure the error of every head for every number of labels."""
    loaded = load_rows(data)
    if loaded.labels is None:
        raise InputError(f"got rows without labels in {data}, wanted some to draw and to judge with")
    n_judges = min(_N_VALIDATION, len(loaded) // 6)
    n_rows = min(rows, len(loaded) - n_judges)
    encoder = OnnxEncoder(bundle)
    y = np.asarray(loaded.labels, dtype=np.int64)
    train, judges = encoder.embed(loaded.array[:n_rows]), encoder.embed(loaded.array[-n_judges:])
    measured: dict[str, dict[str, Any]] = {}
    for per_class in labels or (1, 10, 100):
        chosen = [draw_labels(y[:n_rows], n_labels=per_class * len(np.unique(y)), seed=seed) for seed in range(draws)]
        for name in HEADS:
            errors, seconds = errors_of(name, train, y[:n_rows], judges, y[-n_judges:], chosen)
            measured.setdefault(name, {})[str(per_class)] = {
                "error": round(float(np.mean(errors)), 2),
                "spread": round(float(np.std(errors, ddof=1)), 2),
                "seconds": round(seconds, 2),
            }
            print(f"{per_class} a class, {name}: {np.mean(errors):.1f} %", file=sys.stderr, flush=True)
    Console(width=110).print(_table(measured))
    report = {**surroundings(), "bundle": encoder.digest, "rows": n_rows, "draws": draws, "heads": measured}
    print(json.dumps(report))


def errors_of(
    name: str,
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    judges: NDArray[np.float32],
    judges_labels: NDArray[np.int64],
    draws: list[NDArray[np.int64]],
) -> tuple[list[float], float]:
    """Fit one head to each draw; give its errors in percent on the judges, and the seconds of an average fit."""
    errors = []
    seconds = 0.0
    for chosen in draws:
        partial = np.full(len(train), -1)
        partial[chosen] = train_labels[chosen]
        began = time.perf_counter()
        with warnings.catch_warnings():
            # scikit-learn's spreading still moves a little after 500 steps; its answers hardly do.
            warnings.simplefilter("ignore", ConvergenceWarning)
            head = HEADS[name]().fit(train, partial)
        seconds += time.perf_counter() - began
        errors.append(100 * (1 - head.score(judges, judges_labels)))
    return errors, seconds / len(draws)


def _table(measured: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="error in percent ± standard deviation over draws, seconds of a fit", title_justify="left")
    table.add_column("head")
    for per_class in next(iter(measured.values())):
        table.add_column(f"{per_class} a class", justify="right")
    for name, row in measured.items():
        table.add_row(name, *(f"{c['error']:.1f} ± {c['spread']:.1f}, {c['seconds']:.1f} s" for c in row.values()))
    return table


if __name__ == "__main__":
    run_command_line(app)
