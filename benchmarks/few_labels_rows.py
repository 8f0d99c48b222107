"""The rows of :mod:`benchmarks.few_labels`: each measures one way to classify one data set, draw by draw of labels.

What is measured is written down after each draw, so a row that is stopped goes on where it was.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks.few_labels_features import FEATURES, Features, Plan, bundle_of, pretrain_ours
from benchmarks.few_labels_networks import SETTINGS, train_supervised
from benchmarks.few_labels_tasks import ALL, Task
from benchmarks.surroundings import commit, surroundings
from vaefeat import FewLabelHead, FineTuneClassifier, VAEClassifier
from vaefeat.atomic import replace_file
from vaefeat.presets import choose_settings

__all__ = ["ROWS", "Ledger", "Row", "run_row"]

#: Logistic regression as it is measured everywhere, on the labelled rows alone.
_LOGISTIC: Mapping[str, Callable[[], Any]] = {
    "lr_scaled": lambda: make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)),
    "lr": lambda: LogisticRegression(C=1.0, max_iter=1000),
}
#: Heads that also look at the rows without a label.
_FEW_LABEL: Mapping[str, Callable[[], Any]] = {
    kind: partial(FewLabelHead, kind, random_state=0) for kind in ("prototype", "logistic", "mixture", "auto")
}
_FEW_DRAWS, _DRAWS = 3, 10
_SUPERVISED_STEPS, _EPOCHS = 1000, 20
#: Of fine-tuning, in labels; other rows take all that a data set has.
_FINETUNED = {"mnist": (20, 100), "cifar10": (250, 4000), "digits": (10, 100), "table": (4, 40), "traits": (2, 20)}
_GENERATIVE_LABELS = {"mnist": 100, "digits": 100}

#: Gives a class for each row that judges, and the seconds of fitting.
Answer = tuple[NDArray[np.int64], float]
_Asked = Callable[[], Answer]


class Ledger:
    """Errors by head, number of labels and draw, on the disk after each of them.

    Parameters
    ----------
    path : Path
    settings : mapping
        What was measured; a file of other settings is begun anew.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        plain = json.loads(json.dumps(settings))
        self._known: dict[str, Any] = {"settings": plain, "commits": [], "cells": {}}
        if path.is_file() and (before := json.loads(path.read_text()))["settings"] == plain:
            self._known = before

    @property
    def commits(self) -> list[str]:
        """Commits that measured some of it."""
        return list(self._known["commits"])

    def measure(self, head: str, budget: int | str, seed: int, truth: NDArray[Any], answer: _Asked) -> None:
        """Measure one draw, unless that was done before."""
        cell = self._known["cells"].setdefault(head, {}).setdefault(str(budget), {})
        if str(seed) in cell:
            return
        predicted, seconds = answer()
        error = 100 * float((predicted != truth).mean())
        cell[str(seed)] = {"error": round(error, 3), "seconds": round(seconds, 3)}
        if (now := commit()) not in self._known["commits"]:
            self._known["commits"].append(now)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, (json.dumps(self._known) + "\n").encode())
        print(f"  {head}, {budget} labels, draw {seed}: {error:.2f} %", file=sys.stderr, flush=True)

    def cells(self, n_draws: int) -> dict[str, dict[str, Any]]:
        """Give errors in percent and mean seconds by head and number of labels, of the first draws."""
        return {
            head: {budget: _cell(draws, n_draws) for budget, draws in budgets.items()}
            for head, budgets in self._known["cells"].items()
        }


@dataclass(frozen=True)
class Row:
    """One way to classify.

    Attributes
    ----------
    title : str
    run : callable
        Measures it: task, plan, number of draws, folder; gives the ledger, the seconds of pretraining and settings.
    draws : int
        Unless another number is asked for.
    only : tuple of str
        Data sets that it is for; all when empty.
    """

    title: str
    run: Callable[[Task, Plan, int], tuple[Ledger, float, Mapping[str, Any]]]
    draws: int = _DRAWS
    only: tuple[str, ...] = ()


def run_row(name: str, task: Task, plan: Plan, *, draws: int | None = None) -> dict[str, Any]:
    """Measure one row, or what is missing of it.

    Returns
    -------
    dict
        ``heads``: by head and number of labels ``mean`` and half the width of its 95 % ``interval`` in percent (None
        of one draw), ``errors`` of the draws and ``fit_seconds``; ``pretraining_seconds``; with settings, commits,
        hardware and date.
    """
    row = ROWS[name]
    n_draws = draws or row.draws
    began = time.perf_counter()
    with threadpool_limits(plan.threads):
        ledger, seconds, settings = row.run(task, plan, n_draws)
    return {
        "title": row.title,
        "heads": ledger.cells(n_draws),
        "draws": n_draws,
        "pretraining_seconds": round(seconds, 1),
        "session_seconds": round(time.perf_counter() - began, 1),
        "settings": dict(settings),
        "threads": plan.threads,
        "n_train_rows": len(task.train),
        "commits": ledger.commits,
        **surroundings(),
    }


def _cell(draws: Mapping[str, Mapping[str, float]], n_draws: int) -> dict[str, Any]:
    from scipy.stats import t

    chosen = [draws[str(seed)] for seed in range(n_draws) if str(seed) in draws]
    errors = [draw["error"] for draw in chosen]
    n = len(errors)
    half = float(t.ppf(0.975, n - 1) * np.std(errors, ddof=1) / np.sqrt(n)) if n > 1 else None
    return {
        "mean": round(float(np.mean(errors)), 3),
        "interval": None if half is None else round(half, 3),
        "errors": errors,
        "fit_seconds": round(float(np.mean([draw["seconds"] for draw in chosen])), 3),
    }


def _frozen(
    task: Task, plan: Plan, n_draws: int, *, name: str, few_label: bool = False
) -> tuple[Ledger, float, Mapping[str, Any]]:
    features = FEATURES[name](task, plan)
    ledger = _ledger(task, plan, name, features.settings)
    rows, truth = task.judges()
    judges = features.embed(rows)
    # Baselines embed the labelled rows alone: what their heads look at.
    train = features.embed(task.train) if few_label else None
    for budget, seed in _draws_of(task, n_draws, everything=few_label and task.name in ("mnist", "cifar10")):
        chosen = task.draw(budget, seed)
        labelled = features.embed(task.train[chosen]) if train is None else train[chosen]
        for head, make in _LOGISTIC.items():
            fit = partial(_fit, make, labelled, task.train_labels[chosen], judges)
            ledger.measure(head, budget, seed, truth, fit)
        if train is None or budget == ALL:
            continue
        for head, make in _FEW_LABEL.items():
            ledger.measure(head, budget, seed, truth, partial(_fit, make, train, task.partial(chosen), judges))
    return ledger, features.seconds, features.settings


def _fit(make: Callable[[], Any], X: NDArray[Any], y: NDArray[np.int64], judges: NDArray[Any]) -> Answer:
    began = time.perf_counter()
    with warnings.catch_warnings():
        # A thousand steps are enough for the error; nobody reads the coefficients.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # One label a class is what this is about.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        head = make().fit(X, y)
    seconds = time.perf_counter() - began
    return head.predict(judges), seconds


def _finetune(task: Task, plan: Plan, n_draws: int) -> tuple[Ledger, float, Mapping[str, Any]]:
    bundle = bundle_of(task, plan, "ours_fast", lambda out: pretrain_ours(task.train, "fast", out, plan=plan))
    features: Features = FEATURES["ours_fast"](task, plan)
    shorter: dict[str, Any] = {"max_steps": 20, "patience": None} if plan.quick else {}
    make = partial(FineTuneClassifier, bundle, threads=plan.threads, **shorter)
    shown = {key: value for key, value in make().get_params().items() if key != "bundle"}
    settings = {"bundle": bundle.digest, **shown}
    ledger = _ledger(task, plan, "finetune", settings)
    rows, truth = task.judges()
    for budget, seed in _draws_of(task, n_draws, among=_FINETUNED[task.name]):
        partial_labels = task.partial(task.draw(budget, seed))
        fit = partial(_fit, partial(make, random_state=seed), np.array(task.train), partial_labels, np.array(rows))
        ledger.measure("finetune", budget, seed, truth, fit)
    return ledger, features.seconds, settings


def _supervised(task: Task, plan: Plan, n_draws: int, *, augmented: bool) -> tuple[Ledger, float, Mapping[str, Any]]:
    model, train = choose_settings(task.train, n_rows=len(task.train), preset="features", effort="best")
    assert not isinstance(train.augmentations, str) or task.train.ndim == 2
    names = ("replacement",) if isinstance(train.augmentations, str) else train.augmentations
    augmentations = names if augmented else ()
    steps = 20 if plan.quick else _SUPERVISED_STEPS
    settings = {"model": model.to_dict(), "augmentations": list(augmentations), "steps": steps, **SETTINGS}
    ledger = _ledger(task, plan, "supervised_augmented" if augmented else "supervised", settings)
    rows, truth = task.judges()
    for budget, seed in _draws_of(task, n_draws):
        fit = partial(
            train_supervised,
            task,
            task.draw(budget, seed),
            rows,
            model=model,
            augmentations=augmentations,
            seed=seed,
            threads=plan.threads,
            steps=steps,
        )
        ledger.measure("network", budget, seed, truth, fit)
    return ledger, 0.0, settings


def _generative(task: Task, plan: Plan, n_draws: int, *, name: str) -> tuple[Ledger, float, Mapping[str, Any]]:
    epochs = 1 if plan.quick else _EPOCHS
    make = partial(VAEClassifier, name, max_epochs=epochs, train_options={"threads": plan.threads})
    settings, seconds = make().get_params(), 0.0
    if name == "m1m2":
        bundle = bundle_of(task, plan, "ours_fast", lambda out: pretrain_ours(task.train, "fast", out, plan=plan))
        make = partial(make, encoder=bundle)
        settings, seconds = {**settings, "encoder": bundle.digest}, FEATURES["ours_fast"](task, plan).seconds
    ledger = _ledger(task, plan, name, settings)
    rows, truth = task.judges()
    for budget, seed in _draws_of(task, n_draws, among=(_GENERATIVE_LABELS[task.name],)):
        labels = task.partial(task.draw(budget, seed))
        fit = partial(_fit, partial(make, random_state=seed), np.array(task.train), labels, np.array(rows))
        ledger.measure(name, budget, seed, truth, fit)
    return ledger, seconds, settings


def _ledger(task: Task, plan: Plan, name: str, settings: Mapping[str, Any]) -> Ledger:
    path = plan.folder(task, name)
    return Ledger(path.with_name(f"{name}.json"), settings)


def _draws_of(
    task: Task, n_draws: int, *, among: Sequence[int] | None = None, everything: bool = False
) -> list[tuple[int | str, int]]:
    budgets = [budget for budget in task.budgets() if among is None or budget in among]
    found: list[tuple[int | str, int]] = [(budget, seed) for budget in budgets for seed in range(n_draws)]
    return found + ([(ALL, 0)] if everything else [])


ROWS: Mapping[str, Row] = {
    "raw": Row("raw values", partial(_frozen, name="raw")),
    "pca": Row("PCA, 32 components", partial(_frozen, name="pca")),
    "random": Row("random features, of images by convolutions", partial(_frozen, name="random")),
    "textbook": Row("textbook VAE, mean", partial(_frozen, name="textbook", few_label=True)),
    "pythae": Row("pythae's VAE, mean", partial(_frozen, name="pythae")),
    "ours_fast": Row("vaefeat, fast, mean", partial(_frozen, name="ours_fast", few_label=True)),
    "ours": Row("vaefeat, best, mean", partial(_frozen, name="ours", few_label=True)),
    "finetune": Row("vaefeat, fast, fine-tuned", _finetune, _FEW_DRAWS),
    "supervised": Row("the same network, labels alone", partial(_supervised, augmented=False), _FEW_DRAWS),
    "supervised_augmented": Row(
        "the same with vaefeat's augmentations", partial(_supervised, augmented=True), _FEW_DRAWS
    ),
    "m2": Row("VAEClassifier, M2", partial(_generative, name="m2"), _FEW_DRAWS, tuple(_GENERATIVE_LABELS)),
    "m1m2": Row("VAEClassifier, M1+M2", partial(_generative, name="m1m2"), _FEW_DRAWS, tuple(_GENERATIVE_LABELS)),
    "adgm": Row("VAEClassifier, ADGM", partial(_generative, name="adgm"), _FEW_DRAWS, tuple(_GENERATIVE_LABELS)),
}
