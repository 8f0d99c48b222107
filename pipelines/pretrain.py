"""The stages that make the bundle: training in this process, as one of torchrun's, or in the workers of Ray; exporting.

All trainings are :func:`train_worker`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig
from pipelines.datasets import open_rows
from pipelines.group import in_group, leads_group, process_group
from pipelines.job import Job
from pipelines.stages import Outcome, Stage
from vaefeat.atomic import replace_file
from vaefeat.blocks import Blocks
from vaefeat.bundle import MANIFEST_FILE
from vaefeat.config import FREE_SETTINGS
from vaefeat.data import Rows
from vaefeat.errors import ConfigError, InputError, NonFiniteLossError, TrainingInterrupted, WorkerLostError
from vaefeat.observers import Observer, shown_activity
from vaefeat.placement import resolve_device
from vaefeat.pretraining import (
    CHECKPOINT_FILE,
    HISTORY_FILE,
    TRAINING_FOLDER,
    export_checkpoint,
    train_checkpoint,
)
from vaefeat.world import World

__all__ = ["EXPORT", "HISTORY", "PRETRAIN", "train_worker"]

CHECKPOINT, HISTORY = f"{TRAINING_FOLDER}/{CHECKPOINT_FILE}", f"{TRAINING_FOLDER}/{HISTORY_FILE}"
#: Names what is being attempted: within it, training always goes on from the checkpoint.
_LAUNCH_FILE = "launch"


def train_worker(
    config: RunConfig,
    *,
    launch: str,
    rows: Rows | Blocks | None = None,
    observers: Sequence[Observer] = (),
    progress: bool = True,
) -> None:
    """Train as one of the workers that torch's process group has, or alone, and leave checkpoint and history.

    Parameters
    ----------
    config : RunConfig
        The same for all workers.
    launch : str
        Names the attempt. A worker that is started again within it continues from the checkpoint; the checkpoint of
        another one is removed first.
    rows : Rows or Blocks, optional
        What to train on; read from the configuration's path when None.
    observers : sequence of Observer
        Told by the first worker.
    progress : bool
        Let the first worker show a bar.
    """
    data = open_rows(config) if rows is None else rows
    folder = Path(config.out) / TRAINING_FOLDER
    _open_launch(folder, config, launch=launch)
    train_checkpoint(
        data,
        **_settings_of_training(config),
        out=config.out,
        resume=(folder / CHECKPOINT_FILE).is_file(),
        progress=progress,
        observers=observers,
    )


def _settings_of_training(config: RunConfig) -> dict[str, Any]:
    return {"preset": config.preset, "effort": config.effort, "model": config.model, "train": config.train}


def _read_for_training(config: RunConfig) -> dict[str, Any]:
    """Give the settings that weights depend on; which rows they are of is told by the rows themselves."""
    picked = config.picked("preset", "effort", "model", "train")
    return {
        **{key: value for key, value in picked.items() if key.removeprefix("train.") not in FREE_SETTINGS},
        # Read block by block, rows come in another order.
        "streamed": config.workers.rows == "stream",
    }


def _open_launch(folder: Path, config: RunConfig, *, launch: str) -> None:
    """Remove the checkpoint of an earlier launch, which workers that are started again would take for their own."""
    world = World.current()
    # Before anything of the launch before is removed.
    if (given := config.train.get("batch_size", world.size)) < world.size:
        raise ConfigError(f"got train.batch_size={given} for {world.size} workers, wanted a row each")
    if world.leads:
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / _LAUNCH_FILE
        if not (mark.is_file() and mark.read_text() == launch):
            (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        replace_file(mark, launch.encode())
    world.wait(resolve_device(config.device))


def _train(job: Job, attempt: str) -> Outcome:
    if in_group():
        _train_in_group(job, attempt)
    elif job.config.workers.count:
        from pipelines.ray_environment import prepare_environment

        prepare_environment(job.config.workers.address, timeout_s=job.config.workers.timeout_s)
        from pipelines.workers import train_on_workers

        train_on_workers(job.config, launch=attempt)
    else:
        train_worker(job.config, launch=attempt, rows=job.rows)
    history = json.loads((job.folder / HISTORY).read_text())
    summary = f"{len(history)} epochs, held-out ELBO {history[-1]['heldout_elbo']:.2f} nats per row"
    return Outcome((CHECKPOINT, HISTORY), summary, _figures(history))


def _figures(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    rates = sorted(record["rows_per_s"] for record in history)
    # Of all attempts together, where the record's seconds are those of the last.
    trained_s = sum(record["seconds"] for record in history)
    return {"epochs": len(history), "rows_per_s": rates[len(rates) // 2], "trained_s": trained_s}


def _train_in_group(job: Job, attempt: str) -> None:
    """Train as one of torchrun's processes; all but the first keep to themselves what happens to all of them."""
    if job.config.workers.count:
        raise InputError("got --workers under torchrun, which has started its own; leave one of them out")
    try:
        with process_group(job.config.device):
            train_worker(job.config, launch=attempt, rows=job.rows)
    except (TrainingInterrupted, WorkerLostError, NonFiniteLossError) as error:
        if leads_group():
            raise
        raise SystemExit(130 if isinstance(error, TrainingInterrupted) else 2) from None


def _export(job: Job, attempt: str) -> Outcome:
    del attempt  # nothing is left over from an attempt: a bundle is written whole or not at all
    with shown_activity("export to ONNX, and compare with torch"):
        bundle = export_checkpoint(job.rows, **_settings_of_training(job.config), out=job.folder, name=job.config.name)
    metrics, n_active = bundle.manifest.metrics, len(bundle.manifest.active_units)
    summary = (
        f"held-out ELBO {metrics['elbo']:.2f} nats per row, {n_active} of {bundle.manifest.latent_dim} latent units "
        f"active, {bundle.digest}"
    )
    return Outcome((MANIFEST_FILE, *bundle.files), summary)


PRETRAIN = Stage(
    name="pretrain",
    does="train the encoder",
    settings=_read_for_training,
    rows="pretraining",
    reads=(),
    writes=(CHECKPOINT, HISTORY),
    work=_train,
)
EXPORT = Stage(
    name="export",
    does="write the bundle",
    settings=lambda config: {"name": config.name},
    rows="pretraining",
    reads=(CHECKPOINT,),
    writes=(MANIFEST_FILE,),
    work=_export,
)
