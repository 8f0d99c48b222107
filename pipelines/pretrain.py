"""Pretraining alone: in this process, as one of torchrun's, or in the workers of Ray Train.

All of them call :func:`train_worker`.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from pipelines.config import RunConfig
from pipelines.datasets import load_dataset, refuse_table
from pipelines.group import in_group, launch_of_group, leads_group, process_group
from vaefeat.atomic import replace_file
from vaefeat.blocks import Blocks, open_blocks
from vaefeat.bundle import Bundle
from vaefeat.data import Rows, load_rows
from vaefeat.errors import (
    ConfigError,
    InputError,
    MissingSplitError,
    NonFiniteLossError,
    TrainingInterrupted,
    WorkerLostError,
)
from vaefeat.observers import Observer
from vaefeat.placement import resolve_device
from vaefeat.pretraining import CHECKPOINT_FILE, TRAINING_FOLDER
from vaefeat.pretraining import pretrain as pretrain_rows
from vaefeat.world import World

__all__ = ["open_rows", "pretrain", "train_worker"]

#: Names what was started once: within it, training always goes on from the checkpoint.
_LAUNCH_FILE = "launch"


def pretrain(config: RunConfig, *, console: Console, resume: bool = False) -> Bundle:
    """Do the job, and tell where the bundle is.

    Parameters
    ----------
    config : RunConfig
    console : Console
        Where the result is told; progress goes to standard error.
    resume : bool
        Continue an interrupted training.

    Returns
    -------
    Bundle

    Raises
    ------
    VaefeatError
        Whatever training raises.
    """
    if in_group():
        bundle = _pretrain_in_group(config, resume=resume)
    elif config.workers.count:
        from pipelines.ray_environment import prepare_environment

        prepare_environment(config.workers.address, timeout_s=config.workers.timeout_s)
        from pipelines.workers import pretrain_on_workers

        bundle = pretrain_on_workers(config, resume=resume)
    else:
        bundle = train_worker(config, launch=uuid.uuid4().hex, resume=resume)
    if leads_group():
        metrics = bundle.manifest.metrics
        console.print(
            f"{config.out}: held-out ELBO {metrics['elbo']:.2f} nats per row, {len(bundle.manifest.active_units)} of "
            f"{bundle.manifest.latent_dim} latent units active, {bundle.digest}",
            highlight=False,
            soft_wrap=True,
        )
    return bundle


def train_worker(
    config: RunConfig,
    *,
    launch: str,
    resume: bool = False,
    rows: NDArray[Any] | None = None,
    observers: Sequence[Observer] = (),
    progress: bool = True,
) -> Bundle:
    """Train as one of the workers that torch's process group has, or alone.

    Parameters
    ----------
    config : RunConfig
        The same for all workers.
    launch : str
        Names what was started once. A worker that is started again in the same launch continues from the checkpoint.
    resume : bool
        Continue from the checkpoint of an earlier launch.
    rows : ndarray of shape (n, ...), optional
        What to train on; read from the configuration's path when None.
    observers : sequence of Observer
        Told by the first worker.
    progress : bool
        Let the first worker show a bar.

    Returns
    -------
    Bundle
    """
    data = open_rows(config) if rows is None else Rows(array=rows, source=config.data.path)
    _open_launch(Path(config.out) / TRAINING_FOLDER, config, launch=launch, resume=resume)
    return pretrain_rows(
        data,
        preset=config.preset,
        effort=config.effort,
        model=config.model,
        train=config.train,
        out=config.out,
        name=config.name,
        resume=(Path(config.out) / TRAINING_FOLDER / CHECKPOINT_FILE).is_file(),
        progress=progress,
        observers=observers,
    )


def open_rows(config: RunConfig) -> Rows | Blocks:
    """Read or open what the configuration trains on: the training rows, or all; labels are not needed.

    Rows with labels but without a split of their own are split as the main job splits them, so that an encoder never
    sees the rows which that job tests on.

    Raises
    ------
    ConfigError
        Rows are to be read while training, and the configuration wants other rows than a source's training rows.
    InputError
        They cannot be read.
    """
    data = config.data
    streamed = config.workers.rows == "stream"
    if data.path == "digits":
        if streamed:
            raise ConfigError("got workers.rows='stream' for the embedded digits, wanted 'load' or 'share'")
        return load_dataset(data, seed=config.probe.seed).pretraining
    has_test_rows = _has_test_rows(data.path)
    if streamed:
        if has_test_rows and data.pretrain_on == "all":
            raise ConfigError(
                "got workers.rows='stream' with data.pretrain_on='all', wanted 'train': training and test rows are two "
                "sources, and one can be streamed"
            )
        return open_blocks(data.path)
    train = load_rows(data.path)
    refuse_table(train)
    if not has_test_rows:
        whole = data.pretrain_on == "all" or train.labels is None
        return train if whole else load_dataset(data, seed=config.probe.seed).pretraining
    if data.pretrain_on == "train":
        return train
    return Rows(array=np.concatenate([train.array, load_rows(data.path, split="test").array]), source=train.source)


def _has_test_rows(path: str) -> bool:
    try:
        load_rows(path, split="test", max_rows=1)
    except MissingSplitError:
        return False
    return True


def _open_launch(folder: Path, config: RunConfig, *, launch: str, resume: bool) -> None:
    """Remove the checkpoint of an earlier launch, which workers that are started again would take for their own."""
    world = World.current()
    # Before anything of the launch before is removed.
    if (given := config.train.get("batch_size", world.size)) < world.size:
        raise ConfigError(f"got train.batch_size={given} for {world.size} workers, wanted a row each")
    if world.leads:
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / _LAUNCH_FILE
        if not resume and not (mark.is_file() and mark.read_text() == launch):
            (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        replace_file(mark, launch.encode())
    world.wait(resolve_device(config.device))


def _pretrain_in_group(config: RunConfig, *, resume: bool) -> Bundle:
    """Train as one of torchrun's processes; all but the first keep to themselves what happens to all of them."""
    if config.workers.count:
        raise InputError("got --workers under torchrun, which has started its own; leave one of them out")
    try:
        with process_group(config.device):
            return train_worker(config, launch=launch_of_group(), resume=resume)
    except (TrainingInterrupted, WorkerLostError, NonFiniteLossError) as error:
        if leads_group():
            raise
        raise SystemExit(130 if isinstance(error, TrainingInterrupted) else 2) from None
