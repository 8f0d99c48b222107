"""What rows without a label are worth to each way of learning from them, and what it costs.

``python -m benchmarks.semi_supervised BUNDLE`` prints a table, and one JSON line last; ``docs/semi_supervised.md``
quotes it. Rows are encoded once, and all ways but fine-tuning learn from the same features. Labels are drawn among the
training rows, as many of each class; test rows judge, and nothing is chosen by them.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier
from threadpoolctl import threadpool_limits

from benchmarks.surroundings import surroundings
from pipelines.config import DataConfig
from pipelines.datasets import load_dataset
from pipelines.probes import draw_labels
from vaefeat import FewLabelHead, FineTuneClassifier, OnnxEncoder, load_bundle
from vaefeat.cli import run_command_line

__all__ = ["FINE_TUNED", "LABELLED_ONLY", "WAYS", "app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

LABELLED_ONLY, FINE_TUNED = "LogisticRegression, labelled rows only", "FineTuneClassifier"
_LINE = partial(LogisticRegression, max_iter=1000)
#: Behind the features; settings are those of the guide.
WAYS: Mapping[str, Callable[[], Any]] = {
    LABELLED_ONLY: lambda: make_pipeline(StandardScaler(), _LINE(C=0.1)),
    "SelfTrainingClassifier": lambda: make_pipeline(StandardScaler(), SelfTrainingClassifier(_LINE(), threshold=0.9)),
    "LabelSpreading": lambda: make_pipeline(
        StandardScaler(), Normalizer(), LabelSpreading(kernel="knn", n_neighbors=10, alpha=0.99, max_iter=500)
    ),
    "few_label_head()": lambda: FewLabelHead(random_state=0),
}


class _Rows(NamedTuple):
    """One part of the data."""

    rows: NDArray[Any]
    features: NDArray[np.float32]
    labels: NDArray[np.int64]


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(help="Whose posterior means are the features.")],
    data: Annotated[str, typer.Option(help="Rows with labels, as `vaefeat pretrain` reads them.")] = "digits",
    rows: Annotated[int, typer.Option(min=2, help="At most so many of the first training rows.")] = 10_000,
    labels: Annotated[list[int] | None, typer.Option(help="Of each class; may be repeated. 1, 5, 10.")] = None,
    draws: Annotated[int, typer.Option(min=2, help="Of the labelled rows.")] = 10,
    fine_tuned: Annotated[int, typer.Option(min=0, help="Draws of them that the encoder is fine-tuned on.")] = 2,
    max_steps: Annotated[int, typer.Option(min=1, help="Of fine-tuning.")] = 3000,
) -> None:
    """Measure the error and the seconds of each way for every number of labels."""
    loaded = load_dataset(DataConfig(path=data), seed=0)
    encoder = OnnxEncoder(bundle)
    began = time.perf_counter()
    train = _Rows(loaded.train[:rows], encoder.embed(loaded.train[:rows]), loaded.train_labels[:rows])
    encoding = time.perf_counter() - began
    test = _Rows(loaded.test, encoder.embed(loaded.test), loaded.test_labels)
    measured: dict[str, dict[str, Any]] = {}
    for per_class in labels or (1, 5, 10):
        total = per_class * len(loaded.names)
        chosen = [draw_labels(train.labels, n_labels=total, seed=seed) for seed in range(draws)]
        for name, make in WAYS.items():
            measured.setdefault(name, {})[str(per_class)] = _measure(make, train, test, chosen, on_rows=False)
            print(f"{per_class} a class, {name}", file=sys.stderr, flush=True)
        if fine_tuned:
            make_tuned = partial(FineTuneClassifier, load_bundle(bundle), max_steps=max_steps, random_state=0)
            found = _measure(make_tuned, train, test, chosen[:fine_tuned], on_rows=True)
            measured.setdefault(FINE_TUNED, {})[str(per_class)] = found
    Console(width=120).print(_table(measured, n_rows=len(train.labels), encoding=encoding))
    print(
        json.dumps(
            {
                **surroundings(),
                "bundle": encoder.digest,
                "data": data,
                "rows": len(train.labels),
                "test_rows": len(test.labels),
                "encoding_seconds": round(encoding, 2),
                "ways": measured,
            }
        )
    )


def _measure(
    make: Callable[[], Any], train: _Rows, test: _Rows, draws: Sequence[NDArray[np.int64]], *, on_rows: bool
) -> dict[str, Any]:
    errors, seconds = [], 0.0
    for chosen in draws:
        known = np.full(len(train.labels), -1)
        known[chosen] = train.labels[chosen]
        classifier = make()
        labelled_only = make is WAYS[LABELLED_ONLY]
        X = train.rows if on_rows else train.features
        began = time.perf_counter()
        with warnings.catch_warnings(), threadpool_limits(1):
            # LabelSpreading still moves a little after 500 steps; its answers hardly do.
            warnings.simplefilter("ignore", ConvergenceWarning)
            # Where its graph has parts without a label, it divides nothing by nothing and says the first class.
            warnings.filterwarnings("ignore", "invalid value encountered in divide", RuntimeWarning)
            classifier.fit(X[chosen] if labelled_only else X, known[chosen] if labelled_only else known)
        seconds += time.perf_counter() - began
        errors.append(100 * float(np.mean(classifier.predict(test.rows if on_rows else test.features) != test.labels)))
    return {
        "error": round(float(np.mean(errors)), 2),
        "spread": round(float(np.std(errors, ddof=1)), 2) if len(errors) > 1 else None,
        "draws": len(errors),
        "seconds": round(seconds / len(draws), 2),
    }


def _table(measured: Mapping[str, Mapping[str, Any]], *, n_rows: int, encoding: float) -> Table:
    table = Table(
        title=f"test error in percent ± standard deviation over draws, seconds of a fit; encoding {n_rows:,} rows "
        f"once: {encoding:.1f} s",
        title_justify="left",
    )
    table.add_column("behind the features")
    for per_class in next(iter(measured.values())):
        table.add_column(f"{per_class} a class", justify="right")
    for name, cells in measured.items():
        table.add_row(name, *(_cell(cell) for cell in cells.values()))
    return table


def _cell(cell: Mapping[str, Any]) -> str:
    spread = "" if cell["spread"] is None else f" ± {cell['spread']:.1f}"
    return f"{cell['error']:.1f}{spread}, {cell['seconds']:.1f} s"


if __name__ == "__main__":
    run_command_line(app)
