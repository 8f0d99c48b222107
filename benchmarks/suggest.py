"""What labels of suggested rows are worth, against as many of random rows.

``python -m benchmarks.suggest --data PATH --bundle mnist=FOLDER --bundle cifar10=FOLDER`` draws training rows
at random, lets :func:`vaefeat.suggestions.suggest_rows` and chance choose 50 and 100 of them, and measures what the
test rows say of classifiers on the bundle's frozen features with these labels. ``--validation`` judges on the last
10,000 training rows, and measures the other ways to choose that were thought of, too; no test row is read. The last
line is JSON; ``docs/jobs.md`` quotes the tables.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from benchmarks.few_labels_tasks import open_task
from benchmarks.surroundings import surroundings
from pipelines.probes import HEADS as LINEAR_HEADS
from vaefeat import FewLabelHead, OnnxEncoder
from vaefeat.cli import run_command_line
from vaefeat.errors import ConfigError
from vaefeat.suggestions import suggest_rows

__all__ = ["HEADS", "METHODS", "app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_FIRST, _BUDGET = 50, 100
_TYPICAL_NEIGHBOURS = 20
#: What is put behind the features; the last one also learns from the rows without a label.
HEADS: Mapping[str, Callable[[], Any]] = {**LINEAR_HEADS, "few_label_head": lambda: FewLabelHead(random_state=0)}


@dataclass(frozen=True)
class _Draw:
    """Features (N, F) of some random training rows, their labels (N,), and a seed."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    seed: int

    def partial(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the labels of the chosen rows, and -1 for all others."""
        labels = np.full(len(self.labels), -1)
        labels[chosen] = self.labels[chosen]
        return labels


def _random(draw: _Draw, budget: int) -> NDArray[np.int64]:
    return np.random.default_rng(draw.seed).choice(len(draw.features), budget, replace=False)


def _suggested(draw: _Draw, budget: int) -> NDArray[np.int64]:
    return suggest_rows(draw.features, budget=budget, seed=draw.seed)


def _in_two_rounds(draw: _Draw, budget: int) -> NDArray[np.int64]:
    first = _suggested(draw, budget // 2)
    labels = draw.partial(first)
    return np.concatenate([first, suggest_rows(draw.features, budget=budget // 2, labels=labels, seed=draw.seed)])


def _after_random(draw: _Draw, budget: int) -> NDArray[np.int64]:
    first = _random(draw, budget // 2)
    labels = draw.partial(first)
    return np.concatenate([first, suggest_rows(draw.features, budget=budget // 2, labels=labels, seed=draw.seed)])


def _typical(draw: _Draw, budget: int) -> NDArray[np.int64]:
    """TypiClust: of each cluster the row in the densest place, in place of the most central one."""
    unit = normalize(draw.features)
    cluster = KMeans(budget, n_init=1, max_iter=50, random_state=draw.seed).fit_predict(unit)
    chosen = []
    for rows in (np.flatnonzero(cluster == one) for one in range(budget)):
        n_neighbors = min(_TYPICAL_NEIGHBOURS + 1, len(rows))
        distances, _ = NearestNeighbors(n_neighbors=n_neighbors).fit(unit[rows]).kneighbors(unit[rows])
        chosen.append(rows[distances.sum(axis=1).argmin()])
    return np.array(chosen)


def _farthest_first(draw: _Draw, budget: int) -> NDArray[np.int64]:
    """Greedy k-centre: one after the other the row farthest from all that were chosen."""
    unit = normalize(draw.features)
    chosen = [int(_random(draw, 1)[0])]
    nearest = np.full(len(unit), np.inf)
    while len(chosen) < budget:
        nearest = np.minimum(nearest, ((unit - unit[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(nearest.argmax()))
    return np.array(chosen)


def _then_unsure(draw: _Draw, budget: int) -> NDArray[np.int64]:
    """Suggested rows first, then those with the least margin between the two most probable classes."""
    first = _suggested(draw, budget // 2)
    head = FewLabelHead(random_state=0).fit(draw.features, draw.partial(first))
    probability = np.sort(head.predict_proba(draw.features), axis=1)
    margin = probability[:, -1] - probability[:, -2]
    margin[first] = np.inf
    return np.concatenate([first, np.argsort(margin, kind="stable")[: budget // 2]])


#: Ways to choose, with the budgets that they are measured at. The first is what the others have to beat.
METHODS: Mapping[str, tuple[Callable[[_Draw, int], NDArray[np.int64]], tuple[int, ...]]] = {
    "random": (_random, (_FIRST, _BUDGET)),
    "suggested": (_suggested, (_FIRST, _BUDGET)),
    "suggested, 50 labelled, then 50 more": (_in_two_rounds, (_BUDGET,)),
    "50 random, then 50 suggested": (_after_random, (_BUDGET,)),
}
#: What else was thought of.
OTHERS: Mapping[str, tuple[Callable[[_Draw, int], NDArray[np.int64]], tuple[int, ...]]] = {
    "the densest row of each cluster (TypiClust)": (_typical, (_FIRST, _BUDGET)),
    "farthest first (k-centre)": (_farthest_first, (_FIRST, _BUDGET)),
    "suggested, then the least margin": (_then_unsure, (_BUDGET,)),
}


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with MNIST/ and CIFAR10/.")],
    bundle: Annotated[list[str], typer.Option(help="TASK=FOLDER, such as mnist=runs/mnist; may be repeated.")],
    draws: Annotated[int, typer.Option(min=2, help="Of the rows that are chosen among.")] = 20,
    rows: Annotated[int, typer.Option(min=200, help="In a draw.")] = 10_000,
    validation: Annotated[bool, typer.Option("--validation", help="Judge on held-back training rows.")] = False,
) -> None:
    """Measure the error with suggested and with random labels."""
    measured: dict[str, Any] = {}
    for text in bundle:
        task, equals, folder = text.partition("=")
        if not equals:
            raise ConfigError(f"got --bundle {text!r}, wanted TASK=FOLDER, such as mnist=runs/mnist")
        measured[task] = _measure(task, Path(folder), data, draws=draws, n_rows=rows, validation=validation)
        Console(width=150).print(_table(task, measured[task], draws))
    split = "validation" if validation else "test"
    print(json.dumps({**surroundings(), "split": split, "draws": draws, "rows": rows, "tasks": measured}))


def _measure(
    name: str, bundle: Path, data: Path, *, draws: int, n_rows: int, validation: bool
) -> dict[str, dict[str, Any]]:
    task = open_task(name, data, validation=validation)
    encoder = OnnxEncoder(bundle)
    train, (judging, judges_labels) = encoder.embed(task.train), task.judges()
    judges = encoder.embed(judging)
    methods = {**METHODS, **(OTHERS if validation else {})}
    errors: dict[str, dict[str, list[float]]] = {}
    for seed in range(draws):
        some = np.random.default_rng(seed).choice(len(train), min(n_rows, len(train)), replace=False)
        draw = _Draw(train[some], task.train_labels[some], seed)
        for method, (choose, budgets) in methods.items():
            for budget in budgets:
                found = _errors(draw, choose(draw, budget), judges, judges_labels)
                row = errors.setdefault(f"{method}, {budget}", {head: [] for head in HEADS})
                for head, error in found.items():
                    row[head].append(error)
        print(f"{name}: draw {seed + 1} of {draws}", file=sys.stderr, flush=True)
    return {
        key: {head: _figures(row[head], _of_chance(errors, key)[head]) for head in HEADS} for key, row in errors.items()
    }


def _of_chance(errors: Mapping[str, dict[str, list[float]]], key: str) -> dict[str, list[float]]:
    """Give the errors of random labels, as many as in this row."""
    return errors[f"random, {key.rpartition(', ')[2]}"]


def _errors(
    draw: _Draw, chosen: NDArray[np.int64], judges: NDArray[np.float32], judges_labels: NDArray[np.int64]
) -> dict[str, float]:
    found = {}
    for head, make in HEADS.items():
        with warnings.catch_warnings():
            # A thousand steps are enough for the error.
            warnings.simplefilter("ignore", ConvergenceWarning)
            if head in LINEAR_HEADS:
                fitted = make().fit(draw.features[chosen], draw.labels[chosen])
            else:
                fitted = make().fit(draw.features, draw.partial(chosen))
        found[head] = 100 * float(np.mean(fitted.predict(judges) != judges_labels))
    return found


def _figures(errors: list[float], of_chance: list[float]) -> dict[str, float]:
    """Summarise the errors of all draws; the differences are paired, since both choose among the same rows."""
    gain = np.array(of_chance) - np.array(errors)
    return {
        "error": round(float(np.mean(errors)), 2),
        "spread": round(float(np.std(errors, ddof=1)), 2),
        "gain": round(float(gain.mean()), 2),
        "gain_standard_error": round(float(gain.std(ddof=1) / len(gain) ** 0.5), 2),
        "draws_won": int((gain > 0).sum()),
    }


def _table(task: str, measured: Mapping[str, Mapping[str, Any]], draws: int) -> Table:
    table = Table(
        title=f"{task}: error in percent ± standard deviation over {draws} draws, draws that are better than random",
        title_justify="left",
    )
    table.add_column("rows chosen, labels")
    for head in HEADS:
        table.add_column(head, justify="right")
    for key, row in measured.items():
        cells = [f"{cell['error']:.2f} ± {cell['spread']:.2f}, {cell['draws_won']}" for cell in row.values()]
        table.add_row(key, *cells)
    return table


if __name__ == "__main__":
    run_command_line(app)
