"""The generative classifiers with few labels, on real images: the error, and a picture of analogies.

``python -m benchmarks.classifiers --data PATH`` prints a table, and one JSON line last; ``docs/classifiers.md`` quotes
it. The last 10,000 training images judge, and are not trained on; the test images stay untouched unless
``--split test`` asks for them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.surroundings import surroundings
from pipelines.probes import draw_labels
from vaefeat import VAEClassifier, plots
from vaefeat.atomic import replace_file
from vaefeat.cli import run_command_line
from vaefeat.data import Rows, load_rows
from vaefeat.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

N_VALIDATION = 10_000
#: Published test errors in percent with 100 labels: Kingma et al. 2014, table 1; Maaløe et al. 2016, table 1.
PUBLISHED = {"m2": 11.97, "m1m2": 3.33, "adgm": 0.96, "sdgm": 1.32}
_PICTURED = 10


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with MNIST's IDX files.")],
    model: Annotated[list[str] | None, typer.Option(help="Which model; repeat for several, all if not given.")] = None,
    epochs: Annotated[int, typer.Option(help="Of each model.")] = 20,
    rows: Annotated[int, typer.Option(help="Training images.")] = 50_000,
    labels: Annotated[int, typer.Option(help="Of all classes together, as many of each.")] = 100,
    components: Annotated[int, typer.Option(help="Latents of the style.")] = 16,
    hidden: Annotated[list[int] | None, typer.Option(help="Width of a hidden layer; repeat for several.")] = None,
    seed: Annotated[int, typer.Option(help="Of the labels drawn, and of training.")] = 0,
    consistency: Annotated[float, typer.Option(help="0 is the papers' objective alone.")] = 1.0,
    threads: Annotated[int, typer.Option(help="Processor threads within an operation.")] = 1,
    split: Annotated[str, typer.Option(help="Who judges: validation or test.")] = "validation",
    picture: Annotated[Path | None, typer.Option(help="Draw the last model's analogies of images that judge.")] = None,
) -> None:
    """Train each model on the same rows and labels, and measure its error on rows that nothing was fitted to."""
    train, judges = _split(data, rows, split)
    assert train.labels is not None
    assert judges.labels is not None
    partial = np.full(len(train), -1)
    chosen = draw_labels(train.labels, n_labels=labels, seed=seed)
    partial[chosen] = train.labels[chosen]
    measured: dict[str, dict[str, float]] = {}
    widths = tuple(hidden or (256,))
    for name in model or PUBLISHED:
        started = time.perf_counter()
        classifier = VAEClassifier(
            name,
            n_components=components,
            hidden_dims=widths,
            max_epochs=epochs,
            consistency=consistency,
            train_options={"threads": threads},
            random_state=seed,
            verbose=1,
        )
        classifier.fit(np.array(train.array), partial)
        seconds = time.perf_counter() - started
        error = 100 * (1 - classifier.score(np.array(judges.array), judges.labels))
        measured[name] = {"error": round(error, 2), "seconds": round(seconds, 1)}
        print(f"{name}: {error:.2f} % in {seconds:.0f} s", file=sys.stderr, flush=True)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        replace_file(picture, _analogies(classifier, judges))
    report: dict[str, Any] = {
        **surroundings(),
        "rows": len(train),
        "epochs": epochs,
        "labels": labels,
        "components": components,
        "hidden": widths,
        "seed": seed,
        "consistency": consistency,
        "threads": threads,
        "split": split,
        "models": measured,
    }
    Console(width=110).print(_table(report))
    print(json.dumps(report))


def _split(data: Path, n_rows: int, split: str) -> tuple[Rows, Rows]:
    train = load_rows(data)
    assert train.labels is not None
    if split not in ("validation", "test"):
        raise InputError(f"got split {split!r}, wanted 'validation' or 'test'")
    if n_rows > (most := len(train) - N_VALIDATION * (split == "validation")):
        raise InputError(f"got {n_rows} training rows, wanted at most {most}: the others judge, or do not exist")
    judges = load_rows(data, split="test") if split == "test" else _part(train, slice(-N_VALIDATION, None))
    return _part(train, slice(n_rows)), judges


def _part(rows: Rows, some: slice) -> Rows:
    assert rows.labels is not None
    return Rows(array=rows.array[some], labels=rows.labels[some], source=rows.source)


def _analogies(classifier: VAEClassifier, judges: Rows) -> bytes:
    assert judges.labels is not None
    shown = [int(np.flatnonzero(judges.labels == label)[0]) for label in classifier.classes_[:_PICTURED]]
    images: NDArray[Any] = np.array(judges.array[shown])
    made = classifier.analogies(images)
    figure = plots.analogies(
        images, made.reshape(*made.shape[:2], *images.shape[1:]), classifier.classes_.tolist(), low=0, high=255
    )
    return plots.png(figure)


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"{report['rows']:,} MNIST rows, {report['labels']} labels, {report['epochs']} epochs: error in "
        f"percent on {report['split']} rows",
        title_justify="left",
    )
    table.add_column("model")
    for column in ("error %", "published", "s"):
        table.add_column(column, justify="right")
    for name, row in report["models"].items():
        published = PUBLISHED.get(name)
        table.add_row(
            name, f"{row['error']:.2f}", "-" if published is None else f"{published:.2f}", f"{row['seconds']:.0f}"
        )
    return table


if __name__ == "__main__":
    run_command_line(app)
