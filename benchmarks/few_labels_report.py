"""What is said of the rows of :mod:`benchmarks.few_labels`: the results file, the checks, tables and the figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from rich.table import Table

from benchmarks.few_labels_rows import ROWS
from benchmarks.few_labels_tasks import ALL, TASKS
from vaefeat.atomic import replace_file
from vaefeat.drawing import BLUE, GREY, INK, ORANGE, draw_title, style
from vaefeat.errors import InputError

__all__ = ["Check", "checks", "figure", "headlines", "merge", "tables"]

#: By data set: what a headline is called, and its row, head and labels. frozen_best is the default head, whatever the
#: others give on the rows that judge.
_HEADLINES: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "mnist": {
        "fast_lr_100": ("ours_fast", "lr_scaled", "100"),
        "frozen_lr_100": ("ours", "lr_scaled", "100"),
        "frozen_lr_1000": ("ours", "lr_scaled", "1000"),
        "frozen_best_100": ("ours", "auto", "100"),
        "finetune_100": ("finetune", "finetune", "100"),
        "finetune_20": ("finetune", "finetune", "20"),
        "m2_100": ("m2", "m2", "100"),
        "m1m2_100": ("m1m2", "m1m2", "100"),
        "adgm_100": ("adgm", "adgm", "100"),
    },
    "cifar10": {
        "frozen_lr_all": ("ours", "lr_scaled", ALL),
        "finetune_4000": ("finetune", "finetune", "4000"),
        "finetune_250": ("finetune", "finetune", "250"),
    },
}
_BASELINES = ("raw", "pca", "textbook", "random")
#: Labels in all that are 10 and 100 a class.
_COMPARED = {
    "mnist": (100, 1000),
    "cifar10": (100, 1000),
    "digits": (100, 1000),
    "table": (40, 400),
    "traits": (20, 200),
}
#: The preset, quick and at length.
_EFFORTS = ("ours_fast", "ours")
_CURVES = (
    ("ours_fast", "lr_scaled"),
    ("ours_fast", "lr"),
    ("ours_fast", "auto"),
    ("ours", "lr_scaled"),
    ("ours", "lr"),
    ("ours", "auto"),
    ("finetune", "finetune"),
)
#: Lines of the figure: what is pretrained here in blue, with labels alone in orange, the rest in grey.
_DRAWN: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("finetune", "finetune"): {"color": BLUE, "ls": "-", "marker": "o"},
    ("ours_fast", "auto"): {"color": BLUE, "ls": "--", "marker": "s"},
    ("ours_fast", "lr_scaled"): {"color": BLUE, "ls": ":", "marker": "^"},
    ("supervised_augmented", "network"): {"color": ORANGE, "ls": "-", "marker": "o"},
    ("supervised", "network"): {"color": ORANGE, "ls": ":", "marker": "^"},
    ("textbook", "lr_scaled"): {"color": INK, "ls": "-", "marker": "s"},
    ("pythae", "lr_scaled"): {"color": INK, "ls": ":", "marker": "v"},
    ("random", "lr_scaled"): {"color": GREY, "ls": "-", "marker": "o"},
    ("pca", "lr_scaled"): {"color": GREY, "ls": "--", "marker": "s"},
    ("raw", "lr_scaled"): {"color": GREY, "ls": ":", "marker": "^"},
}
_OF_HEAD = {"auto": ", default head", "lr_scaled": ", logistic regression"}


@dataclass(frozen=True)
class Check:
    """A claim, whether the figures bear it out, and on what that rests; None where they are not all there."""

    claim: str
    holds: bool | None
    because: str


def checks(rows: Mapping[str, Any]) -> list[Check]:
    """Hold the claims against the rows.

    Parameters
    ----------
    rows : mapping
        By ``data set/row``, as :func:`benchmarks.few_labels_rows.run_row` gives them.
    """
    found = []
    for task, budgets in _COMPARED.items():
        for row in _EFFORTS:
            for head in ("lr_scaled", "lr"):
                found += [_beats(rows, task, row, head, str(budget)) for budget in budgets]
        found += [_never_turns_up(rows, task, row, head) for row, head in _CURVES]
    return found


def _beats(rows: Mapping[str, Any], task: str, effort: str, head: str, budget: str) -> Check:
    claim = f"{task}, {effort}, {budget} labels, {head}: the frozen mean beats {', '.join(_BASELINES)}"
    means = {row: _mean(rows, task, row, head, budget) for row in (effort, *_BASELINES)}
    said = ", ".join(f"{row} {'not measured' if mean is None else f'{mean:.2f}'}" for row, mean in means.items())
    ours, others = means[effort], [means[row] for row in _BASELINES]
    # One baseline that is better is enough to know.
    if ours is not None and any(other is not None and other <= ours for other in others):
        return Check(claim, False, said)
    if ours is None or None in others:
        return Check(claim, None, said)
    return Check(claim, True, said)


def _never_turns_up(rows: Mapping[str, Any], task: str, row: str, head: str) -> Check:
    claim = f"{task}, {row}, {head}: more labels never make a larger error"
    cells = rows.get(f"{task}/{row}", {}).get("heads", {}).get(head, {})
    curve = [(budget, cells[budget]["mean"]) for budget in sorted(cells, key=_size)]
    said = ", ".join(f"{budget}: {mean:.2f}" for budget, mean in curve) or "not measured"
    if len(curve) < 2:
        return Check(claim, None, said)
    return Check(claim, all(after <= before for (_, before), (_, after) in pairwise(curve)), said)


def headlines(rows: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Give the figures that are quoted, errors in percent, by data set; those that were measured."""
    found: dict[str, dict[str, float]] = {}
    for task, names in _HEADLINES.items():
        means = {name: _mean(rows, task, *where) for name, where in names.items()}
        found[task] = {name: round(mean, 2) for name, mean in means.items() if mean is not None}
    return found


def merge(path: Path, new: Mapping[str, Any], listed: Mapping[str, Any], *, split: str) -> dict[str, Any]:
    """Lay rows over those of a results file, which may not be there yet; rows that were not run stay as they are.

    Parameters
    ----------
    path : Path
    new : mapping
        Rows by ``data set/row``.
    listed : mapping
        The draws by data set; the longer list stays.
    split : {"test", "validation"}

    Raises
    ------
    InputError
        The file is not one of ours, or its figures are of the other split.
    """
    try:
        before: dict[str, Any] = {"split": split, "rows": {}, "draws": {}}
        if path.is_file():
            before = json.loads(path.read_text())
        rows, draws, of = {**before["rows"], **new}, {**before["draws"]}, before["split"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"got {path}, which is no results file of this benchmark; choose another --results") from error
    if of != split:
        raise InputError(
            f"got {path} with errors on {of} rows, wanted a file for {split} rows; choose another --results"
        )
    for task, budgets in listed.items():
        longest = max((len(seeds) for seeds in draws.get(task, {}).values()), default=0)
        if max(map(len, budgets.values()), default=0) >= longest:
            draws[task] = budgets
    found = _in_order(rows)
    known = {
        "split": split,
        **(headlines(found) if split == "test" else {}),
        "checks": [asdict(check) for check in checks(found)],
        "rows": found,
        "draws": draws,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(known, indent=1, ensure_ascii=False) + "\n").encode())
    return known


def tables(rows: Mapping[str, Any]) -> list[Table]:
    """Show errors by data set: a line for each row and head, a column for each number of labels."""
    found = []
    for task in TASKS:
        own = {name: row for name, row in rows.items() if name.startswith(f"{task}/")}
        budgets = sorted({b for row in own.values() for cells in row["heads"].values() for b in cells}, key=_size)
        if not own:
            continue
        table = Table(title=f"{task}: error in percent ± half of the 95 % interval", title_justify="left")
        table.add_column("features or network")
        table.add_column("head")
        for budget in budgets:
            table.add_column(f"{budget} labels", justify="right")
        for column in ("draws", "pretraining s", "fit s"):
            table.add_column(column, justify="right")
        for row in own.values():
            for head, cells in row["heads"].items():
                seconds = max(cell["fit_seconds"] for cell in cells.values())
                table.add_row(
                    row["title"],
                    head,
                    *(_shown(cells.get(budget)) for budget in budgets),
                    str(row["draws"]),
                    f"{row['pretraining_seconds']:.0f}",
                    f"{seconds:.2f}",
                )
        found.append(table)
    return found


def figure(rows: Mapping[str, Any]) -> Figure | None:
    """Draw error against number of labels, a panel for each data set; None where nothing was measured."""
    tasks = [task for task in TASKS if any(name.startswith(f"{task}/") for name in rows)]
    if not tasks:
        return None
    with style():
        across = min(3, len(tasks))
        down = -(-len(tasks) // across)
        made = Figure(figsize=(3.2 * across + 3.4, 3.2 * down), layout="constrained")
        panels = list(made.subplots(down, across, squeeze=False).flat)
        for spare in panels[len(tasks) :]:
            spare.remove()
        panels = panels[: len(tasks)]
        lines: dict[str, Any] = {}
        for axes, task in zip(panels, tasks, strict=True):
            lines |= _draw_panel(axes, task, rows)
        for axes in panels[::across]:
            axes.set_ylabel("error (%), with 95 % interval")
        made.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False, fontsize=8)
    return made


def _draw_panel(axes: Axes, task: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    lines, lowest = {}, 100.0
    for (row, head), look in _DRAWN.items():
        cells = rows.get(f"{task}/{row}", {}).get("heads", {}).get(head, {})
        budgets = sorted((budget for budget in cells if budget != ALL), key=_size)
        if not budgets:
            continue
        means = [cells[budget]["mean"] for budget in budgets]
        # Of two draws that differ, an interval says nothing but that they are two.
        found = [cells[budget]["interval"] or 0.0 for budget in budgets]
        halves = [half if half < mean else 0.0 for half, mean in zip(found, means, strict=True)]
        labels = [int(budget) for budget in budgets]
        name = ROWS[row].title + _OF_HEAD.get(head, "")
        lines[name] = axes.errorbar(labels, means, yerr=halves, lw=1.5, ms=4, capsize=2, elinewidth=0.8, **look)
        lowest = min(lowest, *means)
    # Of two or three draws an interval may reach below zero: means say where the axis ends.
    axes.set(xscale="log", yscale="log", xlabel="labels", ylim=(max(0.1, 0.7 * lowest), 100))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    draw_title(axes, task)
    return lines


def _in_order(rows: Mapping[str, Any]) -> dict[str, Any]:
    known = [f"{task}/{row}" for task in TASKS for row in ROWS]
    return {name: rows[name] for name in known if name in rows}


def _mean(rows: Mapping[str, Any], task: str, row: str, head: str, budget: str) -> float | None:
    cell = rows.get(f"{task}/{row}", {}).get("heads", {}).get(head, {}).get(budget)
    return None if cell is None else float(cell["mean"])


def _shown(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    return f"{cell['mean']:.2f}" + ("" if cell["interval"] is None else f" ± {cell['interval']:.2f}")


def _size(budget: str) -> float:
    return float("inf") if budget == ALL else int(budget)
