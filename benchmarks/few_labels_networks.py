"""The same architecture with labels alone, in :mod:`benchmarks.few_labels`: what pretraining has to beat."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from benchmarks.few_labels_tasks import Task
from vaefeat.config import ModelConfig
from vaefeat.model.augmentation import augment
from vaefeat.model.classifier import Classifier
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.vae import VAE
from vaefeat.placement import using_threads

__all__ = ["SETTINGS", "train_supervised"]

#: Of every data set and number of labels.
_BATCH, _RATE, _DECAY = 64, 2e-3, 1e-2
SETTINGS = {"batch_size": _BATCH, "learning_rate": _RATE, "weight_decay": _DECAY, "schedule": "one cycle"}
_ROWS_AT_A_TIME = 1000


def train_supervised(
    task: Task,
    chosen: NDArray[np.int64],
    judges: NDArray[Any],
    *,
    model: ModelConfig,
    augmentations: tuple[str, ...],
    seed: int,
    threads: int,
    steps: int,
) -> tuple[NDArray[np.int64], float]:
    """Train encoder and linear head on labelled rows from nothing.

    Parameters
    ----------
    task : Task
        Of rows without a label, only their scaling is used.
    chosen : ndarray of shape (n,)
        The labelled rows.
    judges : ndarray of shape (m, ...)
    model : ModelConfig
        Whose encoder it is.
    augmentations : tuple of str
        Changes of the rows at each look; none for the plain network.
    seed, threads, steps : int

    Returns
    -------
    predictions : ndarray of shape (m,)
    seconds : float
        Of training.
    """
    with fixed_noise(seed, torch.device("cpu")), using_threads(threads):
        classifier = Classifier(VAE.for_rows(model, task.train), task.n_classes).train()
        began = time.perf_counter()
        with torch.no_grad():
            x = classifier.vae.observe(torch.from_numpy(np.array(task.train[chosen])))
        y = torch.from_numpy(task.train_labels[chosen])
        weights = [weight for layer in classifier.layers() for weight in layer]
        optimizer = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        batch_size = min(_BATCH, len(x))
        for _ in range(steps):
            some = torch.randperm(len(x))[:batch_size]
            loss = functional.cross_entropy(classifier(augment(x[some], augmentations)), y[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - began
        return _predict(classifier.eval(), judges), seconds


def _predict(classifier: Classifier, rows: NDArray[Any]) -> NDArray[np.int64]:
    found = []
    with torch.no_grad():
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            x = classifier.vae.observe(torch.from_numpy(np.array(rows[start : start + _ROWS_AT_A_TIME])))
            found.append(classifier(x).argmax(dim=1).numpy())
    return np.concatenate(found)
