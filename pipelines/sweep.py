"""The job that tries settings out and ranks them by what their features are worth."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from rich.console import Console
from rich.table import Table

from pipelines.config import RunConfig
from pipelines.datasets import Dataset, load_validation
from pipelines.folder_lock import working_in
from pipelines.probes import draw_labels
from pipelines.progress import shown_progress
from pipelines.ray_environment import prepare_environment
from pipelines.sweep_space import TRIALS_FOLDER, choose_settings, read_space, with_settings
from vaefeat.atomic import replace_file
from vaefeat.errors import ConfigError, TrainingError
from vaefeat.plots import png, trade_off

if TYPE_CHECKING:
    from pipelines.sweep_trials import Trial

__all__ = ["sweep"]

TABLE_FILE, PICTURE_FILE, BEST_FILE = "sweep.csv", "sweep.png", "best.toml"
_FIGURES = ("few_label_error", "spread", "head", "elbo", "log_likelihood", "kl", "active_units", "epochs", "seconds")


def sweep(
    config: RunConfig,
    *,
    over: Sequence[str],
    trials: int | None = None,
    side_by_side: int = 2,
    resume: bool = False,
    console: Console,
) -> list[Trial]:
    """Train a model for each combination of settings, and rank them by the error with few labels.

    The error is that of the better linear head on training rows that are held back; test rows are not read.

    Parameters
    ----------
    config : RunConfig
        What the settings are laid over. Its probe says how many labels; its out is the sweep's folder.
    over : sequence of str
        As :func:`pipelines.sweep_space.read_space` takes it.
    trials : int, optional
        So many combinations at random; all when None.
    side_by_side : int
        Trials at a time, at most; each gets its share of the processors.
    resume : bool
        Go on with a sweep that was stopped or gets more values; failed trials are tried again.
    console : Console
        Where the table goes; progress goes to standard error.

    Returns
    -------
    list of Trial
        The best first; failed ones last.

    Raises
    ------
    ConfigError
        Settings that are not known, or nothing to sweep over.
    TrainingInterrupted
        Stopped on request.
    TrainingError
        All trials failed.
    """
    if config.workers.count:
        raise ConfigError(
            f"got {config.workers.count!r} workers for a sweep, wanted none: trials take the processors; set "
            "workers.count=0"
        )
    settings = choose_settings(read_space(over), trials=trials, seed=config.probe.seed)
    out = Path(config.out).resolve()
    here = replace(config, out=str(out))
    data = load_validation(config.data, seed=config.probe.seed)
    # An impossible number of labels would fail in every trial.
    draw_labels(data.train_labels, n_labels=config.probe.n_labels, seed=config.probe.seed)
    with working_in(out, lock=f"{TRIALS_FOLDER}/lock"):
        # What an earlier sweep found is not taken for what this one will; the manifest of its choice goes first.
        for name in (BEST_FILE, PICTURE_FILE, TABLE_FILE):
            (out / name).unlink(missing_ok=True)
        ranked = _ranked(here, settings, data, side_by_side=side_by_side, resume=resume)
        _write(config, out, ranked)
    console.print(_table(config, ranked, n_validation=len(data.test)))
    for trial in ranked:
        if trial.failed is not None:
            console.print(
                f"failed: {_told(trial.settings)}: {trial.failed}", style="red", highlight=False, markup=False
            )
    if ranked[0].failed is not None:
        raise TrainingError(f"all {len(ranked)} trials failed, the first of them: {ranked[0].failed}")
    console.print(
        f"best     python -m pipelines run {config.out}/{BEST_FILE}\n"
        f"table    {config.out}/{TABLE_FILE}\npicture  {config.out}/{PICTURE_FILE}",
        highlight=False,
        soft_wrap=True,
    )
    return ranked


def _ranked(
    config: RunConfig, settings: Sequence[dict[str, Any]], data: Dataset, *, side_by_side: int, resume: bool
) -> list[Trial]:
    """Train all trials on Ray; the best first, failed ones last."""
    prepare_environment(config.workers.address)
    from pipelines.ray_session import ray_errors_told_plainly, running_ray
    from pipelines.sweep_trials import run_trials

    n_bytes = data.pretraining.array.nbytes + data.train.nbytes + data.test.nbytes
    with (
        ray_errors_told_plainly(),
        running_ray(config.workers.address, store_bytes=n_bytes),
        shown_progress() as progress,
    ):
        task = progress.add_task("trials", total=len(settings))
        found = run_trials(
            config,
            settings,
            data,
            side_by_side=side_by_side,
            resume=resume,
            on_end=lambda: progress.advance(task),
        )
    return sorted(found, key=lambda trial: (trial.failed is not None, trial.figures.get("few_label_error", 0)))


def _write(config: RunConfig, out: Path, ranked: Sequence[Trial]) -> None:
    replace_file(out / TABLE_FILE, _csv(ranked))
    done = [trial for trial in ranked if trial.failed is None]
    if not done:
        return
    drawn = trade_off(
        [trial.figures["elbo"] for trial in done],
        [trial.figures["few_label_error"] for trial in done],
        [trial.figures["spread"] for trial in done],
        {key: [trial.settings[key] for trial in done] for key in done[0].settings},
        n_labels=config.probe.n_labels,
    )
    replace_file(out / PICTURE_FILE, png(drawn))
    best = with_settings(config.to_dict(), done[0].settings) | {"out": f"{config.out}/best"}
    replace_file(out / BEST_FILE, tomli_w.dumps(best).encode())


def _csv(ranked: Sequence[Trial]) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", *ranked[0].settings, *_FIGURES, "failed"])
    for trial in ranked:
        figures = [trial.figures.get(name, "") for name in _FIGURES]
        writer.writerow([trial.name, *trial.settings.values(), *figures, trial.failed or ""])
    return file.getvalue().encode()


def _table(config: RunConfig, ranked: Sequence[Trial], *, n_validation: int) -> Table:
    table = Table(
        title=f"{config.name}: error (%) with {config.probe.n_labels} labels on {n_validation:,} held-back training "
        f"rows, mean and standard deviation over {config.probe.n_draws} draws",
        title_justify="left",
    )
    # What is before the dot says little, and columns are many.
    names = [key.rpartition(".")[2] for key in ranked[0].settings]
    for name in (*names, "error", "ELBO", "KL", "active", "epochs", "s"):
        table.add_column(name, justify="right", no_wrap=name == "error")
    for place, trial in enumerate(ranked):
        shown = [str(value) for value in trial.settings.values()]
        if trial.failed is not None:
            table.add_row(*shown, "failed", style="red")
            continue
        figures: dict[str, Any] = trial.figures
        table.add_row(
            *shown,
            f"{figures['few_label_error']:.1f} ± {figures['spread']:.1f}",
            f"{figures['elbo']:.2f}",
            f"{figures['kl']:.2f}",
            str(figures["active_units"]),
            str(figures["epochs"]),
            f"{figures['seconds']:.0f}",
            style="bold" if place == 0 else None,
        )
    return table


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
