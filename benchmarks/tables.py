"""What features of a table with categories and gaps are worth behind a linear classifier with few labels.

``python -m benchmarks.tables`` prints a table, and one JSON line last; ``docs/tables.md`` quotes it. The data are those
that come with scikit-learn: a third of the columns is binned into named categories, a sixth is made yes or no, and a
tenth of all values is knocked out. Three fifths of the rows are learned from, with a label for a few; a fifth judges
while settings are chosen, and the last fifth is read with ``--test`` alone.

What it is compared with sees the same rows: one-hot, imputation and standardisation are fitted to all of them, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from benchmarks.surroundings import surroundings
from pipelines.probes import draw_labels
from vaefeat import VAETransformer
from vaefeat.cli import run_command_line

__all__ = ["DATA", "Split", "as_mixed", "main", "open_split"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_LEVELS = ("lowest", "low", "high", "highest")
_KNOCKED_OUT = 0.1
DATA: Mapping[str, Callable[..., Any]] = {
    "wine": load_wine,
    "breast_cancer": load_breast_cancer,
    "digits": load_digits,
    "diabetes": load_diabetes,
    "iris": load_iris,
}


@dataclass(frozen=True)
class Split:
    """A data set, cut in two: rows to learn from, of which few labels are seen, and rows that judge."""

    train: pd.DataFrame
    train_labels: NDArray[np.int64]
    judges: pd.DataFrame
    judges_labels: NDArray[np.int64]


def as_mixed(frame: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Make categories of every third column, yes or no of every sixth, and gaps in all of them."""
    random = np.random.default_rng(seed)
    mixed = frame.copy()
    for number, column in enumerate(frame):
        values = frame[column]
        if number % 3 == 0:
            mixed[column] = pd.cut(values.rank(pct=True), 4, labels=list(_LEVELS)).astype(object)
        elif number % 6 == 1:
            mixed[column] = (values > values.median()).astype(object)
        mixed.loc[random.random(len(frame)) < _KNOCKED_OUT, column] = None
    return mixed


def open_split(name: str, *, test: bool) -> Split:
    """Cut a data set; rows are the same whoever judges."""
    loaded = DATA[name](as_frame=True)
    frame = loaded.data.loc[:, loaded.data.nunique() > 1]
    # A progression is no class: above or below the middle is.
    y = loaded.target > loaded.target.median() if name == "diabetes" else loaded.target
    labels = y.to_numpy().astype(np.int64)
    mixed = as_mixed(frame)
    learned, others = train_test_split(np.arange(len(frame)), test_size=0.4, stratify=labels, random_state=0)
    validation, tested = train_test_split(others, test_size=0.5, stratify=labels[others], random_state=0)
    judges = tested if test else validation
    return Split(mixed.iloc[learned], labels[learned], mixed.iloc[judges], labels[judges])


def one_hot() -> Any:
    """Give scikit-learn's own way with such a table."""
    names = make_column_selector(dtype_include=object)
    numbers = make_column_selector(dtype_exclude=object)
    # None is one category more.
    words = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return make_column_transformer(
        (words, names), (SimpleImputer(add_indicator=True), numbers), verbose_feature_names_out=False
    )


def features() -> dict[str, Any]:
    """Give what is compared, by name."""
    return {
        "one-hot, imputed": one_hot(),
        "vaefeat, features": VAETransformer(random_state=0, device="cpu"),
        "vaefeat, textbook": VAETransformer(preset="textbook", random_state=0, device="cpu"),
    }


def errors_of(split: Split, *, n_labels: int, draws: int, transformer: Any) -> dict[str, list[float]]:
    """Give the errors of both heads in percent on the judges, one for each draw of labels."""
    train = np.asarray(transformer.transform(split.train), dtype=np.float64)
    judges = np.asarray(transformer.transform(split.judges), dtype=np.float64)
    scaler = StandardScaler().fit(train)
    ways = {
        "standardised": (scaler.transform(train), scaler.transform(judges), 0.1),
        "as it is": (train, judges, 1.0),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(draws):
        chosen = draw_labels(split.train_labels, n_labels=n_labels, seed=seed)
        for name, (known, unknown, strength) in ways.items():
            head = LogisticRegression(C=strength, max_iter=5000).fit(known[chosen], split.train_labels[chosen])
            found[name].append(100 * (1 - head.score(unknown, split.judges_labels)))
    return found


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="A data set; may be repeated.")] = None,
    per_class: Annotated[int, typer.Option(min=1, help="Labels of each class.")] = 5,
    draws: Annotated[int, typer.Option(min=2, help="Of the labelled rows.")] = 20,
    test: Annotated[bool, typer.Option("--test", help="Judge by test rows, once.")] = False,
) -> None:
    """Measure the error of a linear classifier behind each kind of features."""
    measured: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for name in only or DATA:
        split = open_split(name, test=test)
        n_labels = per_class * len(np.unique(split.train_labels))
        for kind, transformer in features().items():
            fitted = transformer.fit(split.train)
            found = errors_of(split, n_labels=n_labels, draws=draws, transformer=fitted)
            measured.setdefault(kind, {})[name] = {
                head: {
                    "error": round(float(np.mean(e)), 2),
                    "standard_error": round(float(np.std(e, ddof=1)) / draws**0.5, 2),
                }
                for head, e in found.items()
            }
            print(name, kind, measured[kind][name], file=sys.stderr, flush=True)
    Console(width=120).print(_table(measured))
    print(json.dumps({**surroundings(), "test": test, "per_class": per_class, "draws": draws, "measured": measured}))


def _table(measured: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> Table:
    table = Table(title="error in % behind a StandardScaler (C = 0.1) / without one (C = 1)", title_justify="left")
    table.add_column("features")
    for name in next(iter(measured.values())):
        table.add_column(name, justify="right")
    for kind, row in measured.items():
        table.add_row(kind, *(" / ".join(f"{head['error']:.1f}" for head in cell.values()) for cell in row.values()))
    return table


if __name__ == "__main__":
    run_command_line(app)
