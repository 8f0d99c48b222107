"""Training and evaluation of one row, both of which can be stopped and continued."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.likelihood_rows import Row
from benchmarks.surroundings import commit
from vaefeat.atomic import replace_file
from vaefeat.checkpoint import read_checkpoint
from vaefeat.errors import InputError, TrainingInterrupted
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.marginal_likelihood import importance_sampling
from vaefeat.model.vae import VAE
from vaefeat.observers import EpochRecord, Observer, ProgressBar
from vaefeat.training import Trainer

__all__ = ["Trained", "evaluate_row", "train_row"]

_CHECKPOINT = "checkpoint.safetensors"
_COMMIT = "commit"
#: Test rows evaluated between two writings to the disk.
_ROWS_AT_A_TIME = 500
_BATCH = 50


@dataclass(frozen=True)
class Trained:
    """A row's model with its best weights so far, and what its training was.

    Attributes
    ----------
    history : list of dict
        The fields of :class:`vaefeat.observers.EpochRecord` for each epoch.
    finished : bool
        Whether all its epochs were trained.
    commit : str
        Of the code that training started with.
    """

    vae: VAE
    history: list[dict[str, Any]]
    finished: bool
    commit: str

    @property
    def seconds(self) -> float:
        """Of all epochs, over every continuation."""
        return math.fsum(record["seconds"] for record in self.history)


def train_row(
    row: Row, rows: NDArray[Any], folder: Path, *, resume: bool, minutes: float | None = None, progress: bool = True
) -> Trained:
    """Train one row to its end, or until `minutes` are over.

    Raises
    ------
    InputError
        The row begins with another one's weights, and that one is not trained.
    TrainingInterrupted
        SIGINT or SIGTERM arrived; the state is in the checkpoint.
    """
    path = folder / row.name / _CHECKPOINT
    with fixed_noise(row.train.seed, torch.device("cpu")):
        vae = VAE.for_rows(row.model, rows)
    if row.after is not None:
        vae.load_state_dict(_best_weights(folder / row.after / _CHECKPOINT, row))
    if not (resume and path.is_file()):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path.parent / _COMMIT, commit().encode())
        for old in path.parent.glob("evaluation-*.npy"):
            old.unlink()
    clock = _Clock(minutes)
    observers: list[Observer] = [clock, *([ProgressBar()] if progress else [])]
    identity = {"model": row.model.to_dict(), "row": {"name": row.name}}
    trainer = Trainer(vae, rows, row.train, checkpoint=path, identity=identity, observers=observers)
    try:
        result = trainer.run(resume=resume)
    except TrainingInterrupted:
        if not clock.rang:
            raise
        _, meta = read_checkpoint(path)
        vae.load_state_dict(_best_weights(path, row))
        return Trained(vae.eval(), meta["history"], False, _started_at(path))
    history = [json.loads(json.dumps(vars(record))) for record in result.history]
    return Trained(vae, history, True, _started_at(path))


def evaluate_row(
    row: Row, trained: Trained, rows: NDArray[Any], folder: Path, *, n_samples: int, progress: bool = True
) -> dict[str, float]:
    """Estimate the row's negative log-likelihood on test rows by importance sampling; continues where it was stopped.

    Returns
    -------
    dict
        In nats per image: ``nll``, its ``monte_carlo_error`` and ``sampling_error`` (of the choice of test rows), and
        ``elbo``.
    """
    path = folder / row.name / f"evaluation-{n_samples}-{len(rows)}.npy"
    # Of each row: log-likelihood, its standard error, bound.
    known = np.load(path) if path.is_file() else np.empty((0, 3))
    for start in range(len(known), len(rows), _ROWS_AT_A_TIME):
        estimate = importance_sampling(
            trained.vae,
            rows[start : start + _ROWS_AT_A_TIME],
            n_samples=n_samples,
            batch_size=_BATCH,
            samples_per_chunk=row.samples_per_chunk,
            first_row=start,
        )
        assert estimate.elbo is not None  # importance sampling always gives it
        some = np.stack([estimate.values, estimate.standard_errors, estimate.elbo], axis=1)
        known = np.concatenate([known, some])
        _write_array(path, known)
        if progress:
            print(
                f"  {row.name}: {len(known):,} of {len(rows):,} test rows, {-known[:, 0].mean():.2f} nats", flush=True
            )
    values, errors, bounds = known.T
    return {
        "nll": float(-values.mean()),
        "monte_carlo_error": float(np.sqrt(np.square(errors).sum()) / len(errors)),
        "sampling_error": float(values.std(ddof=1) / math.sqrt(len(values))),
        "elbo": float(bounds.mean()),
    }


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


def shortened(row: Row, *, epochs: int | None = None, threads: int | None = None) -> Row:
    """Change a row's length or threads."""
    train = replace(row.train, max_epochs=epochs or row.train.max_epochs, threads=threads or row.train.threads)
    return replace(row, train=train)


def _best_weights(path: Path, row: Row) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise InputError(f"got row {row.name!r}, which begins with the weights of {row.after!r}; train that one first")
    tensors, _ = read_checkpoint(path)
    return {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}


def _started_at(path: Path) -> str:
    note = path.parent / _COMMIT
    return note.read_text() if note.is_file() else "unknown"


def _write_array(path: Path, values: NDArray[np.float64]) -> None:
    part = path.with_suffix(".part.npy")
    np.save(part, values)
    part.replace(path)
