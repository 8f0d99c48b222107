"""Training and evaluation of one row, both of which can be stopped and continued."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.likelihood_rows import Row
from benchmarks.surroundings import surroundings
from vaefeat.atomic import replace_file
from vaefeat.checkpoint import read_checkpoint
from vaefeat.config import TrainConfig
from vaefeat.data import fingerprint
from vaefeat.errors import CheckpointError, InputError, TrainingInterrupted
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.marginal_likelihood import importance_sampling
from vaefeat.model.vae import VAE
from vaefeat.observers import EpochRecord, Observer, ProgressBar
from vaefeat.placement import resolve_device, using_threads
from vaefeat.processors import available_cpus
from vaefeat.training import Trainer

__all__ = ["Trained", "checkpoint_of", "evaluate_row", "read_row", "shortened", "train_row"]

_SESSIONS = "sessions.json"
#: Test rows evaluated between two writings to the disk.
_ROWS_AT_A_TIME = 500
_BATCH = 50


@dataclass(frozen=True)
class Trained:
    """A row's model with its best weights so far, and what its training was.

    Attributes
    ----------
    row : Row
        With the settings that it was trained with.
    history : list of dict
        The fields of :class:`vaefeat.observers.EpochRecord` for each epoch.
    finished : bool
        Whether all its epochs were trained.
    sessions : list of dict
        One for each time that training was started or continued: on what, with which commit, for how many seconds.
    """

    row: Row
    vae: VAE
    history: list[dict[str, Any]]
    finished: bool
    sessions: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """Of training, over every continuation."""
        return math.fsum(session["seconds"] for session in self.sessions)


def checkpoint_of(name: str, folder: Path) -> Path:
    """Say where the checkpoint of a row is kept."""
    return folder / name / "checkpoint.safetensors"


def train_row(
    row: Row, rows: NDArray[Any], folder: Path, *, resume: bool, minutes: float | None = None, progress: bool = True
) -> Trained:
    """Train one row to its end, or until `minutes` are over.

    Raises
    ------
    InputError
        The row begins with another one's weights, and that one is not trained.
    CheckpointError
        The checkpoint is that of other settings or other images.
    TrainingInterrupted
        SIGINT or SIGTERM arrived; the state is in the checkpoint.
    """
    path = checkpoint_of(row.name, folder)
    with fixed_noise(row.train.seed, torch.device("cpu")):
        vae = VAE.for_rows(row.model, rows)
    sessions = _sessions(path) if resume and path.is_file() else []
    data = fingerprint(rows)
    if any(session.get("data", data) != data for session in sessions):
        raise CheckpointError(
            f"got the checkpoint {path} of other training images; continue with those, or choose another --out"
        )
    if row.after is not None and not sessions:
        vae.load_state_dict(_weights_to_begin_with(row, folder))
    if not sessions:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("evaluation-*.npy"):
            old.unlink()
    clock = _Clock(minutes)
    observers: list[Observer] = [clock, _Diary(path.parent / _SESSIONS, sessions, data)]
    observers += [ProgressBar()] if progress else []
    identity = {"model": row.model.to_dict(), "row": {"name": row.name}}
    trainer = Trainer(vae, rows, row.train, checkpoint=path, identity=identity, observers=observers)
    try:
        trainer.run(resume=resume)
    except TrainingInterrupted:
        if not clock.rang:
            raise
    return read_row(row, rows, folder)


def read_row(row: Row, rows: NDArray[Any], folder: Path) -> Trained:
    """Read what has been trained of a row; nothing in its folder is changed, so that it may be in training.

    Raises
    ------
    InputError
        There is nothing yet.
    CheckpointError
        The checkpoint is that of another model.
    """
    path = checkpoint_of(row.name, folder)
    if not path.is_file():
        raise InputError(f"got {folder} without a checkpoint of row {row.name!r}, wanted {path}; train it first")
    tensors, meta = read_checkpoint(path)
    identity, history = meta["identity"], meta["history"]
    if identity["model"] != row.model.to_dict():
        raise CheckpointError(f"got the checkpoint {path} of another model than row {row.name!r} now has; train anew")
    if not history:
        raise InputError(f"got the checkpoint {path} from within the first epoch, wanted at least one whole epoch")
    train = TrainConfig.from_dict({**row.train.to_dict(), **identity["train"]})
    vae = VAE.for_rows(row.model, rows)
    vae.load_state_dict(_best_weights(tensors))
    return Trained(
        row=replace(row, train=train),
        vae=vae.to(resolve_device(train.device)).eval(),
        history=history,
        finished=meta["epoch"] == train.max_epochs or meta["stopped_early"],
        sessions=_sessions(path),
    )


def evaluate_row(
    trained: Trained,
    rows: NDArray[Any],
    folder: Path,
    *,
    n_samples: int,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Estimate the negative log-likelihood of test rows by importance sampling; continues where it was stopped.

    Returns
    -------
    dict
        Nats per image: ``nll``, its ``monte_carlo_error`` and ``sampling_error`` (of the choice of test rows),
        ``elbo``; the median and the least of the rows' ``effective_samples``; ``evaluation_seconds``.
    """
    name = trained.row.name
    # Weights that were trained on since, and other rows, give another name: figures of the old ones are not found.
    path = folder / name / f"evaluation-{n_samples}-{_digest(trained.vae, rows)}.npy"
    # Of each row: log-likelihood, its standard error, bound, effective samples, seconds.
    known = np.load(path) if path.is_file() else np.empty((0, 5))
    for start in range(len(known), len(rows), _ROWS_AT_A_TIME):
        some = rows[start : start + _ROWS_AT_A_TIME]
        began = time.perf_counter()
        with using_threads(threads or available_cpus()):
            estimate = importance_sampling(
                trained.vae,
                some,
                n_samples=n_samples,
                batch_size=_BATCH,
                samples_per_chunk=trained.row.samples_per_chunk,
                first_row=start,
            )
        seconds = np.full(len(some), (time.perf_counter() - began) / len(some))
        assert estimate.elbo is not None
        columns = (estimate.values, estimate.standard_errors, estimate.elbo, estimate.effective_samples, seconds)
        known = np.concatenate([known, np.stack(columns, axis=1)])
        _write_array(path, known)
        if progress:
            said = f"  {name}: {len(known):,} of {len(rows):,} test rows, {-known[:, 0].mean():.2f} nats"
            print(said, file=sys.stderr, flush=True)
    values, errors, bounds, effective, spent = known.T
    return {
        "nll": float(-values.mean()),
        "monte_carlo_error": float(np.sqrt(np.square(errors).sum()) / len(errors)),
        "sampling_error": float(values.std(ddof=1) / math.sqrt(len(values))),
        "elbo": float(bounds.mean()),
        "effective_samples": {
            "median": round(float(np.median(effective)), 1),
            "least": round(float(effective.min()), 1),
        },
        "evaluation_seconds": round(spent.sum()),
    }


def shortened(row: Row, *, epochs: int | None = None, threads: int | None = None) -> Row:
    """Change a row's length or threads."""
    train = replace(row.train, max_epochs=epochs or row.train.max_epochs, threads=threads or row.train.threads)
    return replace(row, train=train)


class _Clock(Observer):
    """Stops a run at the end of the epoch in which its minutes are over, as a signal would."""

    def __init__(self, minutes: float | None) -> None:
        self.left = math.inf if minutes is None else 60 * minutes
        self.rang = False

    def on_epoch(self, record: EpochRecord) -> None:
        """Count the epoch."""
        self.left -= record.seconds
        if self.left <= 0 and not self.rang:
            self.rang = True
            signal.raise_signal(signal.SIGTERM)


class _Diary(Observer):
    """Keeps the sessions of a row's training: hardware, commit, and the seconds, also those of an epoch cut short."""

    def __init__(self, path: Path, before: list[dict[str, Any]], data: str) -> None:
        self._path, self._before, self._data = path, before, data

    def on_start(self, *, epochs: int, steps_per_epoch: int, epoch: int) -> None:
        """Begin a session; none where all epochs are there already."""
        self._skip = epoch == epochs
        self._session = {"from_epoch": epoch, "data": self._data, **surroundings()}
        self._began = time.perf_counter()
        self._write()

    def on_epoch(self, record: EpochRecord) -> None:
        """Write the seconds so far, for the case of a kill."""
        self._write()

    def on_end(self) -> None:
        """Write the seconds."""
        self._write()

    def _write(self) -> None:
        if not self._skip:
            session = {**self._session, "seconds": round(time.perf_counter() - self._began, 2)}
            replace_file(self._path, (json.dumps([*self._before, session], indent=1) + "\n").encode())


def _sessions(path: Path) -> list[dict[str, Any]]:
    """Read the sessions of a checkpoint; one that came without them is known by its epochs alone."""
    note = path.parent / _SESSIONS
    if note.is_file():
        known: list[dict[str, Any]] = json.loads(note.read_text())
        return known
    _, meta = read_checkpoint(path)
    return [{"from_epoch": 0, "seconds": math.fsum(record["seconds"] for record in meta["history"])}]


def _weights_to_begin_with(row: Row, folder: Path) -> dict[str, torch.Tensor]:
    assert row.after is not None
    path = checkpoint_of(row.after, folder)
    if not path.is_file():
        raise InputError(f"got row {row.name!r}, which begins with the weights of {row.after!r}; train that one first")
    return _best_weights(read_checkpoint(path)[0])


def _best_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}


def _digest(vae: VAE, rows: NDArray[Any]) -> str:
    digest = hashlib.sha256(fingerprint(rows).encode())
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _write_array(path: Path, values: NDArray[np.float64]) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, values)
    part.replace(path)
