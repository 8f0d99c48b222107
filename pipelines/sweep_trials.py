"""The trials of a sweep under Ray Tune: each trains and is judged in a process of its own.

Importing this module imports Ray, which reads its environment then: :mod:`pipelines.ray_environment` comes first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import ray
from ray import tune

from pipelines.config import RunConfig
from pipelines.datasets import Dataset
from pipelines.probes import draw_labels, probe
from pipelines.ray_session import last_line
from pipelines.sweep_space import TRIALS_FOLDER, with_settings
from vaefeat.atomic import replace_file
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import TrainingInterrupted
from vaefeat.pretraining import pretrain

__all__ = ["Trial", "name_of", "run_trials"]

_RAY_FOLDER, _RESULT_FILE = "ray", "result.json"
#: What Ray Tune prints of its own; standard output is for the result.
_LOG_FILE = "ray.log"
_FEATURES = "vaefeat, posterior mean"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One combination of settings and what became of it.

    Attributes
    ----------
    name : str
        Of its folder: a digest of its settings and rows.
    settings : dict
        Values by key, such as ``model.latent_dim``.
    figures : dict
        ``few_label_error`` and ``spread`` in percent, of the better head, ``head``; all ``errors`` by head;
        ``elbo``, ``log_likelihood``, ``kl`` in nats per row; ``active_units``, ``epochs``, ``seconds``. Empty where it
        failed.
    failed : str or None
        Why.
    """

    name: str
    settings: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None


def name_of(values: dict[str, Any], fingerprint: str) -> str:
    """Name a trial by everything that its result depends on."""
    kept = {key: value for key, value in values.items() if key not in ("out", "name", "workers", "serve")}
    return hashlib.sha256(json.dumps([kept, fingerprint], sort_keys=True).encode()).hexdigest()[:12]


def run_trials(
    config: RunConfig,
    settings: Sequence[dict[str, Any]],
    data: Dataset,
    *,
    side_by_side: int,
    resume: bool,
    on_end: Callable[[], None],
) -> list[Trial]:
    """Train and judge all combinations, as many side by side as is said; Ray must be running.

    Parameters
    ----------
    config : RunConfig
        Its ``out`` is a folder that all machines see.
    settings : sequence of dict
    data : Dataset
        Validation rows in the place of test rows.
    side_by_side : int
    resume : bool
        Keep what finished trials found out, and continue the others from their checkpoints.
    on_end : callable
        Called after each trial.

    Returns
    -------
    list of Trial
        In the order of `settings`; those that failed say why.

    Raises
    ------
    TrainingInterrupted
        SIGINT or SIGTERM arrived.
    """
    out, fingerprint = Path(config.out), data.pretraining.fingerprint()
    tasks = []
    for chosen in settings:
        values = with_settings(config.to_dict(), chosen)
        name = name_of(values, fingerprint)
        folder = out / TRIALS_FOLDER / name
        values |= {"out": str(folder)}
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        tasks.append({"name": name, "settings": chosen, "values": values})
    resources = _share(config, side_by_side)
    trainable = tune.with_resources(
        tune.with_parameters(_try_out, data=data, threads=int(max(1, resources["cpu"]))), resources
    )
    # Tracebacks of trials that failed; the result says why they did.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    storage = out / _RAY_FOLDER
    shutil.rmtree(storage, ignore_errors=True)  # of a sweep that was killed
    try:
        tuner = tune.Tuner(
            trainable,
            param_space={"task": tune.grid_search(tasks)},
            tune_config=tune.TuneConfig(max_concurrent_trials=side_by_side, reuse_actors=True),
            run_config=tune.RunConfig(
                name=storage.name,
                storage_path=str(out.resolve()),
                callbacks=[_Ending(on_end)],
                verbose=0,
            ),
        )
        with (out / _LOG_FILE).open("w", buffering=1) as log, redirect_stdout(log), _sigterm_as_sigint():
            results = tuner.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return _collected(tasks, results)


def _try_out(task: dict[str, Any], *, data: Dataset, threads: int) -> None:
    """Train, and measure the error with few labels on the rows that are held back."""
    given = task["task"]
    config = RunConfig.from_dict(given["values"])
    out = Path(config.out)
    found = out / _RESULT_FILE
    if found.is_file():
        tune.report(json.loads(found.read_text()))
        return
    started = time.perf_counter()
    bundle = pretrain(
        data.pretraining,
        preset=config.preset,
        effort=config.effort,
        model=config.model,
        train={"threads": threads, **config.train},
        out=out,
        name=config.name,
        resume=True,
        progress=False,
    )
    encoder = OnnxEncoder(bundle, threads=threads)
    metrics = bundle.manifest.metrics
    figures = {
        **_judge(config, encoder, data),
        **{name: float(metrics[name]) for name in ("elbo", "log_likelihood", "kl")},
        "active_units": len(bundle.manifest.active_units),
        "epochs": int(metrics["epochs"]),
        "seconds": round(time.perf_counter() - started, 2),
    }
    replace_file(found, (json.dumps(figures, indent=1) + "\n").encode())
    tune.report(figures)


def _judge(config: RunConfig, encoder: OnnxEncoder, data: Dataset) -> dict[str, Any]:
    seeds = range(config.probe.seed, config.probe.seed + config.probe.n_draws)
    draws = [draw_labels(data.train_labels, n_labels=config.probe.n_labels, seed=seed) for seed in seeds]
    # Only rows that some draw has a label of need features.
    drawn, places = np.unique(np.concatenate(draws), return_inverse=True)
    features = {_FEATURES: (encoder.embed(data.train[drawn]), encoder.embed(data.test))}
    placed = np.split(places, len(draws))
    probes = probe(features, data.train_labels[drawn], data.test_labels, draws=placed)
    best = min(probes, key=lambda one: one.mean)
    return {
        "few_label_error": best.mean,
        "spread": best.spread,
        "head": best.head,
        "errors": {one.head: list(one.errors) for one in probes},
    }


def _share(config: RunConfig, side_by_side: int) -> dict[str, float]:
    """Give each trial its part of the processors, and of the GPUs where there are some to train on."""
    there = ray.cluster_resources()
    share: dict[str, float] = {"cpu": max(1.0, there.get("CPU", 1) // side_by_side)}
    if config.device != "cpu" and there.get("GPU", 0):
        share["gpu"] = min(1.0, there["GPU"] / side_by_side)
    return share


def _collected(tasks: Sequence[dict[str, Any]], results: tune.ResultGrid) -> list[Trial]:
    by_name: dict[str, Trial] = {}
    for result in (results[place] for place in range(len(results))):
        given = (result.config or {})["task"]
        name, settings = given["name"], given["settings"]
        if result.error is not None:
            by_name[name] = Trial(name=name, settings=settings, failed=_reason(result.error))
        elif "few_label_error" in (metrics := result.metrics or {}):
            wanted = ("few_label_error", "spread", "head", "errors", "elbo", "log_likelihood", "kl")
            counts = ("active_units", "epochs", "seconds")
            by_name[name] = Trial(
                name=name, settings=settings, figures={key: metrics[key] for key in (*wanted, *counts)}
            )
    if len(by_name) < len(tasks):
        raise TrainingInterrupted(
            f"stopped with {len(by_name)} of {len(tasks)} trials finished; continue with resume=True"
        )
    return [by_name[task["name"]] for task in tasks]


def _reason(error: Exception) -> str:
    """Give what a trial raised, without its traceback and the path of its class."""
    return re.sub(r"^[\w.]+: ", "", last_line(str(error)))


class _Ending(tune.Callback):
    """Tells that a trial is over."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune keeps a copy of everything on the disk, which nobody opens.
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._on_end()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._on_end()


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """Ray Tune ends in order on SIGINT alone."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
