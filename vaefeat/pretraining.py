"""From unlabelled rows to a bundle: load, train, export, prove, write."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike, NDArray

from vaefeat.atomic import replace_file
from vaefeat.blocks import Blocks
from vaefeat.bundle import Bundle, check_name, load_bundle
from vaefeat.bundle_making import make_bundle, resolved_model, warn_of_collapse
from vaefeat.combinations import refuse_pair
from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.data import Rows, fingerprint, load_rows
from vaefeat.errors import BundleError, CheckpointError, ConfigError, InputError, OutOfMemoryError, TrainingError
from vaefeat.input_spec import InputSpec
from vaefeat.memory import ran_out_of_memory
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.likelihoods import refuse_rows
from vaefeat.model.networks import parameters_device
from vaefeat.model.vae import VAE
from vaefeat.observers import EventLog, Observer, ProgressBar, shown_activity
from vaefeat.presets import choose_settings, plain_changes, refuse_changes
from vaefeat.settings import refuse_other_model
from vaefeat.streams import RowStream
from vaefeat.table_schema import TableSchema
from vaefeat.training import Trainer, TrainingResult
from vaefeat.weights import restore_vae
from vaefeat.world import World

__all__ = [
    "CHECKPOINT_FILE",
    "HISTORY_FILE",
    "ONE_AT_A_TIME",
    "TRAINING_FOLDER",
    "export_checkpoint",
    "make_folder",
    "pretrain",
    "refuse_untrainable",
    "train_checkpoint",
]

#: Inside the output folder: what training leaves besides the bundle.
TRAINING_FOLDER = "training"
CHECKPOINT_FILE = "checkpoint.safetensors"
HISTORY_FILE = "history.json"
#: torch's random generator, its number of threads and its exporter belong to the whole process: two trainings in
#: threads of it would disturb each other, so the second waits.
ONE_AT_A_TIME = threading.RLock()
_LOG = logging.getLogger("vaefeat")
#: Fields of TrainConfig that the split of the rows depends on; no preset sets them.
_SPLIT = ("heldout", "seed")


def pretrain(
    data: str | PathLike[str] | ArrayLike | Rows | Blocks,
    *,
    preset: str = "features",
    effort: str = "fast",
    model: ModelConfig | Mapping[str, Any] | None = None,
    train: TrainConfig | Mapping[str, Any] | None = None,
    out: str | PathLike[str] | None = None,
    name: str | None = None,
    resume: bool = False,
    progress: bool = True,
    observers: Sequence[Observer] = (),
    start: Bundle | None = None,
) -> Bundle:
    """Train a variational auto-encoder on unlabelled rows and export its encoder.

    Parameters
    ----------
    data : path-like, array-like, data frame, Rows or Blocks
        Anything that :func:`vaefeat.data.load_rows` reads, which also says what makes a table of it; what it gives can
        be given here. Labels in it are not looked at. What
        :func:`vaefeat.blocks.open_blocks` opens is read while training, block by block, and never held in memory
        whole.
    preset : {"features", "textbook"}
    effort : {"fast", "best"}
        What the model is for, and how long training may take; see :func:`vaefeat.presets.choose_settings`.
    model, train : mapping or configuration, optional
        A mapping changes the preset, such as ``train={"max_epochs": 5}``. A :class:`ModelConfig` or
        :class:`TrainConfig` takes its place: what is missing of the two then has its class's defaults.
    out : path-like, optional
        The folder of the bundle. While training, its sub-folder ``training`` gets the checkpoint and TensorBoard's
        event files. Without it the bundle stays in memory and nothing is written.
    name : str, optional
        Name of the encoder; the folder's name when None.
    resume : bool
        Continue from the checkpoint in `out`, if there is one, to the same result as a run that was never stopped.
    progress : bool
        Show a progress bar on standard error.
    observers : sequence of Observer
        Told what happens.
    start : Bundle, optional
        Weights and scaling to begin with, from a model of the same settings and rows of the same kind. The optimizer
        and all schedules begin anew.

    Returns
    -------
    Bundle
        Loaded and verified.

    Notes
    -----
    Where torch's process group is there, every one of its processes calls this with the same arguments, and they train
    together: the first one writes and shows progress, all get the bundle.

    The scaling is fitted to all rows (of blocks, to some thousands spread over them); the weights are not: held-out
    figures come from rows that no gradient saw.
    In one process trainings run one at a time: a second thread waits. Use processes to train side by side.

    Raises
    ------
    InputError
        Rows that cannot be trained on: fewer than two, not finite, all the same, unreadable.
    ConfigError
        Settings that do not fit each other or the rows.
    TrainingError
        See :meth:`vaefeat.training.Trainer.run`.
    ExportError
        The ONNX graph does not compute what the model computes; nothing is written.
    BundleError
        The folder cannot be written.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from vaefeat import pretrain
    >>> images = load_digits().images.astype("uint8")[:, None]
    >>> bundle = pretrain(images, model={"latent_dim": 8}, train={"max_epochs": 1}, name="digits", progress=False)
    >>> bundle.manifest.latent_dim
    8
    """
    planned = _Planned.of(data, preset=preset, effort=effort, model=model, train=train, out=out, name=name)
    folder = planned.folder
    if resume and folder is None:
        raise InputError("got resume=True without out=, wanted the folder that holds the checkpoint")
    world = World.current()
    with ONE_AT_A_TIME:
        vae, result = planned.trained(resume=resume, progress=progress, observers=observers, start=start)
        if folder is not None and not world.leads:
            world.wait(parameters_device(vae))
            return load_bundle(folder)
        device = parameters_device(vae)  # of the training: exporting moves the model
        with shown_activity("export to ONNX, and compare with torch", shown=progress and world.leads):
            bundle = planned.exported(vae, result)
    warn_of_collapse(bundle)
    if folder is None:
        return bundle
    saved = bundle.save(folder)
    world.wait(device)
    return saved


def train_checkpoint(
    data: str | PathLike[str] | ArrayLike | Rows | Blocks,
    *,
    out: str | PathLike[str],
    preset: str = "features",
    effort: str = "fast",
    model: ModelConfig | Mapping[str, Any] | None = None,
    train: TrainConfig | Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
    observers: Sequence[Observer] = (),
) -> None:
    """Do the first half of :func:`pretrain`: train, and leave the checkpoint and the history in `out`.

    Parameters and errors are those of :func:`pretrain`; :func:`export_checkpoint` does the second half.
    """
    planned = _Planned.of(data, preset=preset, effort=effort, model=model, train=train, out=out, name=None)
    with ONE_AT_A_TIME:
        vae, _ = planned.trained(resume=resume, progress=progress, observers=observers)
    World.current().wait(parameters_device(vae))


def export_checkpoint(
    data: str | PathLike[str] | ArrayLike | Rows | Blocks,
    *,
    out: str | PathLike[str],
    preset: str = "features",
    effort: str = "fast",
    model: ModelConfig | Mapping[str, Any] | None = None,
    train: TrainConfig | Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Bundle:
    """Do the second half of :func:`pretrain`: write the bundle of what :func:`train_checkpoint` left in `out`.

    Rows and settings must be those of the training. The bundle is the one, to its digest, that :func:`pretrain` writes
    in one go; a training that was not finished is finished first.

    Raises
    ------
    CheckpointError
        There is no checkpoint, or it is one of other rows or settings.
    ExportError, BundleError
        As :func:`pretrain`.
    """
    planned = _Planned.of(data, preset=preset, effort=effort, model=model, train=train, out=out, name=name)
    assert planned.checkpoint is not None  # there is a folder
    if not planned.checkpoint.is_file():
        raise CheckpointError(f"got no {planned.checkpoint}, wanted that of a training; train first")
    with ONE_AT_A_TIME:
        vae = _built(planned.model, planned.source.sample)
        result = planned.trainer(vae).run(resume=True)
        bundle = planned.exported(vae, result)
    warn_of_collapse(bundle)
    return bundle.save(out)


@dataclass(frozen=True)
class _Planned:
    """Rows, and settings that fit them."""

    source: _Source
    model: ModelConfig
    train: TrainConfig
    name: str
    folder: Path | None

    @classmethod
    def of(
        cls,
        data: Any,
        *,
        preset: str,
        effort: str,
        model: ModelConfig | Mapping[str, Any] | None,
        train: TrainConfig | Mapping[str, Any] | None,
        out: str | PathLike[str] | None,
        name: str | None,
    ) -> _Planned:
        model, train = plain_changes(model, what="model"), plain_changes(train, what="train")
        if not isinstance(model, ModelConfig) and not isinstance(train, TrainConfig):
            refuse_changes(model or {}, train or {}, preset=preset)
        folder = Path(out) if out is not None else None
        name = name or (folder.resolve().name if folder else "encoder")
        check_name(name)
        source = _Source.opened(data, _split_of(train))
        refuse_untrainable(source.sample, source.name)
        model, train = choose_settings(
            source.sample, n_rows=source.n_rows, preset=preset, effort=effort, model=model, train=train
        )
        if source.table is not None:
            if model.columns not in ((), source.table.sizes):
                raise ConfigError(
                    f"got columns={model.columns} for {source.table}, whose columns are {source.table.sizes}; leave "
                    "them out: they are read off the data"
                )
            model = replace(model, columns=source.table.sizes, optional_columns=source.table.optional_columns)
        refuse_pair(model, train)
        return cls(source, model, train, name, folder)

    @property
    def checkpoint(self) -> Path | None:
        return None if self.folder is None else self.folder / TRAINING_FOLDER / CHECKPOINT_FILE

    def trained(
        self, *, resume: bool, progress: bool, observers: Sequence[Observer], start: Bundle | None = None
    ) -> tuple[VAE, TrainingResult]:
        """Train, and write the history; every process of torch's group calls this."""
        world = World.current()
        watching = [*observers, *([ProgressBar()] if progress else [])]
        if self.folder is not None:
            if world.leads:
                _warn_of_checkpoint(self.folder, resume=resume)
                make_folder(self.folder / TRAINING_FOLDER)
            watching.append(EventLog(self.folder / TRAINING_FOLDER))
        with fixed_noise(self.train.seed, torch.device("cpu")):
            vae = (
                _built(self.model, self.source.sample) if start is None else _continued(start, self.model, self.source)
            )
        trainer = self.trainer(vae, watching, start=start)
        for observer in watching if world.size == 1 else ():
            observer.on_model(partial(_bundle_of_now, trainer, self.source.sample, **self.described()))
        result = trainer.run(resume=resume)
        if self.folder is not None and world.leads:
            _write_history(self.folder / TRAINING_FOLDER / HISTORY_FILE, result)
        return vae, result

    def trainer(self, vae: VAE, observers: Sequence[Observer] = (), *, start: Bundle | None = None) -> Trainer:
        begun = {} if start is None else {"start": start.digest}
        return Trainer(
            vae,
            self.source.rows,
            self.train,
            checkpoint=self.checkpoint,
            identity={"model": self.model.to_dict(), "data": self.source.identity, **begun},
            observers=observers,
        )

    def exported(self, vae: VAE, result: TrainingResult) -> Bundle:
        return make_bundle(vae, self.source.sample, result, **self.described())

    def described(self) -> dict[str, Any]:
        """Give what :func:`make_bundle` says besides what it measures."""
        return {
            "train": self.train,
            "name": self.name,
            "data": {"fingerprint": self.source.identity["fingerprint"], "n_rows": self.source.n_rows},
            "table": self.source.table,
            "columns": self.source.columns,
        }


def _bundle_of_now(trainer: Trainer, rows: NDArray[Any], **described: Any) -> Bundle:
    with fixed_noise(trainer.config.seed, torch.device("cpu")):
        vae, result = trainer.end_of_copy()
        return make_bundle(vae, rows, result, **described)


def _split_of(train: TrainConfig | Mapping[str, Any] | None) -> TrainConfig:
    """Give what is asked for of the held-out rows, which are drawn before a preset has seen a row."""
    if isinstance(train, TrainConfig):
        return train
    return TrainConfig.from_dict({key: value for key, value in (train or {}).items() if key in _SPLIT})


def _built(model: ModelConfig, rows: NDArray[Any]) -> VAE:
    try:
        return VAE.for_rows(model, rows)
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"a model of latent_dim={model.latent_dim}, hidden_dims={model.hidden_dims} and "
            f"channels={model.channels} does not fit into memory; make it smaller"
        ) from error


def _continued(start: Bundle, model: ModelConfig, source: _Source) -> VAE:
    """Take weights and scaling from a bundle, for a model of the same settings."""
    given, taken = InputSpec.of(source.sample, table=source.table), start.manifest.input
    has = {"shape of rows": taken.shape, "dtype of rows": taken.dtype, "table": _unscaled(taken.table)}
    asked = {"shape of rows": given.shape, "dtype of rows": given.dtype, "table": _unscaled(given.table)}
    refuse_other_model(has | start.manifest.model, asked | resolved_model(model, given.shape).to_dict())
    refuse_rows(model.likelihood, model, source.sample)
    vae = restore_vae(start)
    # The axes of the features are chosen anew when training ends.
    vae.basis = None
    return vae


def _warn_of_checkpoint(folder: Path, *, resume: bool) -> None:
    """Say what `resume` would have done, or had nothing to do."""
    found = (folder / TRAINING_FOLDER / CHECKPOINT_FILE).is_file()
    if resume and not found:
        _LOG.warning("%s holds no checkpoint to resume from: training begins at the start", folder)
    if found and not resume and not (folder / "bundle.json").is_file():
        _LOG.warning(
            "%s holds the checkpoint of a run that was interrupted; the first checkpoint of this one replaces it "
            "(resume=True, or --resume, would go on from there)",
            folder,
        )


@dataclass(frozen=True)
class _Source:
    """What is trained on, and what is known of it."""

    rows: NDArray[Any] | RowStream
    sample: NDArray[Any]
    n_rows: int
    name: str
    identity: dict[str, Any]
    table: TableSchema | None = None
    columns: tuple[str, ...] | None = None

    @classmethod
    def opened(cls, data: Any, train: TrainConfig) -> _Source:
        if isinstance(data, Blocks):
            stream = RowStream(data, heldout=train.heldout, seed=train.seed)
            identity = {"fingerprint": stream.fingerprint(), "order": stream.layout()}
            return cls(stream, stream.sample, stream.n_rows, stream.source, identity, columns=data.names)
        loaded = data if isinstance(data, Rows) else load_rows(data)
        identity = {"fingerprint": fingerprint(loaded.array)}
        return cls(loaded.array, loaded.array, len(loaded), loaded.source, identity, loaded.table, loaded.columns)


def make_folder(folder: Path) -> None:
    """Find out before an hour of training whether its result can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise BundleError(
            f"could not make or write the folder {folder}: {error.strerror or error}; choose another with out="
        ) from error


def _write_history(path: Path, result: TrainingResult) -> None:
    records = [asdict(record) for record in result.history]
    try:
        replace_file(path, (json.dumps(records, indent=1) + "\n").encode())
    except OSError as error:
        raise TrainingError(
            f"could not write {path}: {error.strerror or error}; free some space and continue with resume=True"
        ) from error


def refuse_untrainable(rows: NDArray[Any], source: str) -> None:
    """Refuse fewer than two rows, and rows that are all the same."""
    if len(rows) < 2:
        raise InputError(
            f"got {len(rows)} row from {source} to train on, wanted at least 2: one to train on and one to measure"
        )
    # all() stops at the first row that differs, which for nearly every data set is the second.
    chunks = (rows[start : start + 4096] for start in range(0, len(rows), 4096))
    if all(bool(((chunk == rows[0]) | ((chunk != chunk) & (rows[0] != rows[0]))).all()) for chunk in chunks):
        raise InputError(
            f"got {len(rows)} rows from {source} that are all the same, wanted rows that differ: "
            "there is nothing to learn from constant columns alone"
        )


def _unscaled(table: TableSchema | None) -> TableSchema | None:
    """Leave out what is of rows and not of columns."""
    if table is None:
        return None
    return replace(table, columns=tuple(replace(column, mean=None, std=None) for column in table.columns))
