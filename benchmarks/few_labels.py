"""Error with few labels: frozen features behind cheap heads, fine-tuning, and what they have to beat.

``python -m benchmarks.few_labels --data PATH`` measures every row on MNIST, CIFAR-10, scikit-learn's digits and a
generated table, and says which claims hold. ``--only mnist/raw`` (repeated, or ``mnist/*``) measures one row,
``--results FILE`` lays it over what the file has, ``--list`` says what there is. A row that was stopped goes on when it
is called again. ``--validation`` judges on training rows that are held back, and reads no test row. The last line is
JSON.
"""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.few_labels_features import Plan
from benchmarks.few_labels_report import checks, figure, headlines, merge, tables
from benchmarks.few_labels_rows import ROWS, run_row
from benchmarks.few_labels_tasks import BUDGETS, TASKS, open_task
from vaefeat.atomic import replace_file
from vaefeat.cli import run_command_line
from vaefeat.errors import InputError
from vaefeat.plots import png
from vaefeat.settings import unknown_name

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

NAMES = [f"{task}/{row}" for task in TASKS for row in ROWS if not ROWS[row].only or task in ROWS[row].only]
#: Within some 40 seconds.
_QUICK = ("digits/raw", "digits/pca", "digits/random", "digits/ours", "digits/supervised", "table/raw")
_QUICK_DRAWS = 2
_FIGURE = "few-labels.png"


@app.command()
def main(
    data: Annotated[Path | None, typer.Option(help="Folder with MNIST/ and CIFAR10/.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A row, or rows such as digits/*; may be repeated.")] = None,
    results: Annotated[Path | None, typer.Option(help="A JSON file that takes the figures in.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of encoders and unfinished rows.")] = Path("runs/few-labels"),
    validation: Annotated[bool, typer.Option("--validation", help="Judge on held-back training rows.")] = False,
    draws: Annotated[int | None, typer.Option(min=1, help="Of labels; 10, or 3 of rows that train, when None.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few rows, tiny networks: figures mean nothing.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Where the figure goes; into --work when None.")] = None,
    list_rows: Annotated[bool, typer.Option("--list", help="Say what there is, and stop.")] = False,
) -> None:
    """Measure rows, print tables, which claims hold, and one line of JSON."""
    if list_rows:
        Console(width=110).print(_listed())
        return
    if quick and results is not None:
        raise InputError("got --quick with --results, whose figures mean nothing; leave one of them out")
    chosen = _chosen(only or (list(_QUICK) if quick else NAMES))
    # So that what is tried out costs no look at test rows.
    split = "validation" if validation or quick else "test"
    plan = Plan(work, threads, quick)
    found: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for name in chosen:
        task_name, _, row = name.partition("/")
        print(f"{name}: {ROWS[row].title}", file=sys.stderr, flush=True)
        task = open_task(task_name, data, validation=split == "validation")
        found[name] = run_row(row, task, plan, draws=draws or (_QUICK_DRAWS if quick else None))
        n_listed = max(found[name]["draws"], max(map(len, listed.get(task_name, {}).values()), default=0))
        listed[task_name] = task.listed(n_listed)
        if results is not None:
            # After each row: the next one may take hours.
            known = merge(results, found, listed, split=split)["rows"]
    rows = known or found
    if (made := figure(rows)) is not None:
        path = picture or work / _FIGURE
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, png(made))
        print(f"wrote {path}", file=sys.stderr)
    console = Console(width=150)
    for table in tables(rows):
        console.print(table)
    judged = checks(rows)
    for check in judged:
        if check.holds is not None:
            console.print(f"{'holds' if check.holds else 'FAILS'}: {check.claim} ({check.because})", highlight=False)
    verdict = {word: sum(check.holds is value for check in judged) for word, value in _VERDICTS.items()}
    console.print(f"claims: {verdict['hold']} hold, {verdict['fail']} fail, {verdict['open']} not measured")
    print(json.dumps({"split": split, **headlines(rows), "claims": verdict, "rows": found, "draws": listed}))


_VERDICTS: dict[str, bool | None] = {"hold": True, "fail": False, "open": None}


def _chosen(patterns: list[str]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in NAMES):
            raise unknown_name("row", pattern, NAMES)
    return [name for name in NAMES if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _listed() -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("row", "what", "draws"):
        table.add_column(column, justify="right" if column == "draws" else "left")
    for name in NAMES:
        row = ROWS[name.partition("/")[2]]
        table.add_row(name, row.title, str(row.draws))
    table.caption = "labels: " + "; ".join(f"{task} {', '.join(map(str, sizes))}" for task, sizes in BUDGETS.items())
    return table


if __name__ == "__main__":
    run_command_line(app)
