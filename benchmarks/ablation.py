"""What each part of the features preset is worth, on rows that are not the test rows.

``python -m benchmarks.ablation --data PATH`` trains the preset, and the preset without one part or with another value
of it, on a part of MNIST, the digits and two generated tables, and prints the error of logistic regression on the mean
with 10 labels a class. ``docs/features.md`` quotes it. ``--results FILE`` keeps the figures of every training as soon
as it is done, and what is in the file is not trained again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.few_labels_tasks import Task, open_task
from benchmarks.surroundings import surroundings
from pipelines.probes import probe
from vaefeat import OnnxEncoder, pretrain
from vaefeat.atomic import replace_file
from vaefeat.cli import run_command_line
from vaefeat.presets import choose_settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

#: Changes of the model and of training, by kind of rows where they differ.
PARTS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "the preset": ({}, {}),
    "no contrast (plain bound, same network)": ({}, {"objective": "elbo"}),
    "a tenth of the contrast": ({}, {"contrastive_weight": 0.1}),
    "no neighbours": ({}, {"neighbours": 0}),
    "neighbours, 50": ({}, {"neighbours": 50}),
    "no style latents": ({"style_dim": 0}, {}),
    "full KL on content": ({}, {"content_kl_weight": 1.0}),
    "temperature 0.2": ({}, {"contrastive_temperature": 0.2}),
    "temperature 1": ({}, {"contrastive_temperature": 1.0}),
    "only affine": ({}, {"augmentations": ("affine",)}),
    "and changes of light": ({}, {"augmentations": ("affine", "erasing", "brightness")}),
    "half the augmentation": ({}, {"augmentation_strength": 0.5}),
}
#: MNIST's rows, and steps of all: enough to tell parts from one another, not to be good.
_MNIST_ROWS = 20_000
_STEPS = {"mnist": 800, "digits": 1000, "table": 1650, "traits": 1650}
_LABELS_A_CLASS, _DRAWS = 10, 10


@app.command()
def main(
    data: Annotated[Path | None, typer.Option(help="Folder with MNIST/; without it MNIST is left out.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A data set; may be repeated. All when not given.")] = None,
    results: Annotated[Path | None, typer.Option(help="A JSON file that takes the figures in.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads.")] = 1,
) -> None:
    """Train every variant on every data set, and print a table and one line of JSON."""
    found: dict[str, Any] = json.loads(results.read_text()) if results is not None and results.is_file() else {}
    for name in only or (["mnist"] if data is not None else []) + ["digits", "table", "traits"]:
        task = open_task(name, data, validation=True)
        for part in PARTS:
            if not _differs(task, part) or part in found.get(name, {}):
                continue
            found.setdefault(name, {})[part] = {**_measured(task, part, threads=threads), **surroundings()}
            print(f"{name}, {part}: {found[name][part]['errors']}", file=sys.stderr, flush=True)
            if results is not None:
                replace_file(results, (json.dumps(found, indent=1) + "\n").encode())
    Console(width=110).print(_table(found))
    print(json.dumps(found))


def _settings(task: Task, part: str, *, threads: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the changes over the preset that make a variant."""
    rows = task.train[:_MNIST_ROWS]
    model, train = (dict(changes) for changes in PARTS[part])
    _, preset = choose_settings(rows, n_rows=len(rows))
    if "contrastive_weight" in train:
        train["contrastive_weight"] *= preset.contrastive_weight
    steps_per_epoch = -(-round(len(rows) * (1 - preset.heldout)) // preset.batch_size)
    train |= {"max_epochs": round(_STEPS[task.name] / steps_per_epoch), "threads": threads, "seed": 0}
    return model, train


def _differs(task: Task, part: str) -> bool:
    """Whether a variant is another training for this kind of rows, and one that is possible."""
    model, train = _settings(task, part)
    if "augmentations" in train and task.train.ndim == 2:
        return False
    rows = task.train[:_MNIST_ROWS]
    plain_model, plain_train = _settings(task, "the preset")
    same = choose_settings(rows, n_rows=len(rows), model=model, train=train) == choose_settings(
        rows, n_rows=len(rows), model=plain_model, train=plain_train
    )
    return part == "the preset" or not same


def _measured(task: Task, part: str, *, threads: int) -> dict[str, Any]:
    rows, labels = task.train[:_MNIST_ROWS], task.train_labels[:_MNIST_ROWS]
    model, train = _settings(task, part, threads=threads)
    began = time.perf_counter()
    bundle = pretrain(np.array(rows), model=model, train=train, progress=False)
    seconds = time.perf_counter() - began
    encoder = OnnxEncoder(bundle, device="cpu", threads=threads)
    judges, truth = task.judges()
    features = {"mean": (encoder.embed(np.array(rows)), encoder.embed(np.array(judges)))}
    shortened = Task(task.name, task.split, rows, labels, task.judges)
    draws = [shortened.draw(_LABELS_A_CLASS * task.n_classes, seed) for seed in range(_DRAWS)]
    probes = probe(features, labels, truth, draws=draws)
    return {"errors": {each.head: round(each.mean, 2) for each in probes}, "seconds": round(seconds, 1)}


def _table(found: Mapping[str, Any]) -> Table:
    table = Table(
        title="error in percent with 10 labels a class, standardised / as they are", title_justify="left", box=None
    )
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for part in PARTS:
        cells = [found[name].get(part, {}).get("errors") for name in found]
        table.add_row(
            part, *("" if cell is None else " / ".join(f"{error:.1f}" for error in cell.values()) for cell in cells)
        )
    return table


if __name__ == "__main__":
    run_command_line(app)
