"""Generative classifiers over NumPy arrays: made, trained, asked for classes and for rows.

K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vaefeat.bundle import Bundle
from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.data import batches
from vaefeat.estimator_inputs import named_augmentations
from vaefeat.labelled_training import LabelledTrainer
from vaefeat.model.augmentation import suitable
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.labelled import LABELLED_MODELS, M1M2, LabelledVAE
from vaefeat.model.vae import VAE
from vaefeat.observers import ProgressBar, TaskObserver
from vaefeat.pretraining import ONE_AT_A_TIME, refuse_untrainable
from vaefeat.settings import unknown_name
from vaefeat.targets import Targets
from vaefeat.training import Trainer
from vaefeat.weights import restore_vae

__all__ = ["analogies", "class_probabilities", "generate", "train_classifier"]

#: Rows that are looked at together, always as many: a row's answer must not depend on how many others there are.
_ROWS_AT_A_TIME = 128
#: Latents of an M1 that is trained here, as many as Kingma et al. 2014 took; M2's are the caller's to choose.
_BASE_LATENTS = 50
#: Rows that are decoded together.
_DECODED_AT_A_TIME = 4096


def train_classifier(
    kind: str,
    rows: NDArray[Any],
    targets: Targets,
    *,
    model: ModelConfig,
    train: TrainConfig,
    auxiliary_dim: int,
    encoder: Bundle | None,
    classification_weight: float,
    labelled_batch_size: int,
    consistency: float,
    augmentations: str | tuple[str, ...],
    progress: bool,
    observer: TaskObserver | None = None,
    start: LabelledVAE | None = None,
) -> tuple[LabelledVAE, int]:
    """Train a generative classifier, for M1+M2 its encoder first.

    Parameters
    ----------
    kind : str
        A name in :data:`vaefeat.model.labelled.LABELLED_MODELS`.
    rows : ndarray of shape (n, ...)
    targets : Targets
    model, train : ModelConfig, TrainConfig
    auxiliary_dim : int
    encoder : Bundle or None
        M1; trained on the same rows when None.
    classification_weight : float
    labelled_batch_size : int
    consistency : float
    augmentations : "auto" or tuple of str
    progress : bool
    observer : TaskObserver, optional
        Told of each epoch, those of the encoder of M1+M2 left out.
    start : LabelledVAE, optional
        Weights and scaling to begin with, of a model of the same settings; p(y) is that of the new labels.

    Returns
    -------
    model : LabelledVAE
        On the CPU, in evaluation mode.
    n_epochs : int

    Raises
    ------
    ConfigError
        An unknown model or augmentation, or settings that do not fit each other or the rows.
    InputError
        Rows that are all the same, or that the likelihood has no meaning for; an encoder whose decoder was left behind.
    TrainingError
        See :meth:`vaefeat.labelled_training.LabelledTrainer.run`.
    """
    if kind not in LABELLED_MODELS:
        raise unknown_name("model", kind, LABELLED_MODELS)
    rows, targets = targets.rows_to_use(rows)
    refuse_untrainable(rows, "X")
    if encoder:
        encoder.refuse_decoding()
    likelihood = encoder.manifest.model["likelihood"] if encoder else model.likelihood
    chosen = _augmentations(augmentations, rows.shape[1:], ids=likelihood == "tokens")
    log_prior_K = _log_class_prior(targets.class_counts())
    made: LabelledVAE
    with ONE_AT_A_TIME, fixed_noise(train.seed, torch.device("cpu")):
        if start is not None:
            made = copy.deepcopy(start)
            made.log_prior_K.copy_(log_prior_K)
        elif kind == "m1m2":
            base = restore_vae(encoder) if encoder else _train_base(model, train, rows, progress=progress)
            made = M1M2(model, base, log_prior_K=log_prior_K)
        else:
            made = LABELLED_MODELS[kind].for_rows(model, rows, log_prior_K=log_prior_K, auxiliary_dim=auxiliary_dim)
        history = LabelledTrainer(
            made,
            rows,
            targets,
            train,
            labelled_batch_size=labelled_batch_size,
            classification_weight=classification_weight,
            consistency=consistency,
            augmentations=chosen,
            progress=ProgressBar() if progress else None,
            observer=observer,
        ).run()
    return made.cpu(), len(history)


def class_probabilities(model: LabelledVAE, rows: NDArray[Any]) -> NDArray[np.float64]:
    """Give q(y|x) of rows (n, ...), (n, K); a row's depend on the row alone."""
    found = np.empty((len(rows), model.n_classes))
    start = 0
    with torch.no_grad():
        for chunk, n_rows in _padded(rows):
            log_q = model.class_log_probabilities(model.observe(torch.from_numpy(chunk)))
            found[start : start + n_rows] = log_q[:n_rows].exp().numpy()
            start += n_rows
    return found


def generate(model: LabelledVAE, labels: NDArray[np.int64], *, seed: int) -> NDArray[np.float32]:
    """Draw a row's style for each label and give E[x|y, z], (n, ...), in the units of the training rows."""
    with fixed_noise(seed, torch.device("cpu")):
        z = torch.randn(len(labels), model.config.latent_dim)
    return _decoded(model, z, torch.from_numpy(labels))


def analogies(model: LabelledVAE, rows: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """Give each row's style in every class, (n, K, ...)."""
    styles: list[Tensor] = []
    with torch.no_grad():
        for chunk, n_rows in _padded(rows):
            y = np.zeros(len(chunk), dtype=np.int64)
            y[:n_rows] = labels[len(styles) * _ROWS_AT_A_TIME :][:n_rows]
            y_BK = functional.one_hot(torch.from_numpy(y), model.n_classes).float()
            styles.append(model.style(torch.from_numpy(chunk), y_BK)[:n_rows])
    z = torch.cat(styles).repeat_interleave(model.n_classes, dim=0)
    made = _decoded(model, z, torch.arange(model.n_classes).repeat(len(rows)))
    return made.reshape(len(rows), model.n_classes, *made.shape[1:])


@torch.no_grad()
def _decoded(model: LabelledVAE, z: Tensor, labels: Tensor) -> NDArray[np.float32]:
    parts = []
    for start in range(0, len(z), _DECODED_AT_A_TIME):
        some = slice(start, start + _DECODED_AT_A_TIME)
        y_BK = functional.one_hot(labels[some], model.n_classes).float()
        parts.append(model.generate(z[some], y_BK).numpy())
    return np.concatenate(parts)


def _padded(rows: NDArray[Any]) -> Iterator[tuple[NDArray[Any], int]]:
    """Give chunks of one size, filled up with zeros, and how many rows of each are real."""
    for chunk in batches(rows, _ROWS_AT_A_TIME):
        padded = np.zeros((_ROWS_AT_A_TIME, *chunk.shape[1:]), dtype=chunk.dtype)
        padded[: len(chunk)] = chunk
        yield padded, len(chunk)


def _log_class_prior(counts_K: NDArray[np.float64]) -> Tensor:
    """Estimate log p(y) from the labels, with one more of each: a class seen once is rare, not impossible."""
    counts_K = counts_K + 1
    return torch.from_numpy(np.log(counts_K / counts_K.sum())).float()


def _augmentations(asked: str | tuple[str, ...], row_shape: tuple[int, ...], *, ids: bool) -> tuple[str, ...]:
    if asked == "auto":
        return ("affine", "erasing") if len(row_shape) == 3 and not ids else ()
    return suitable(row_shape, named_augmentations(asked), ids=ids)


def _train_base(model: ModelConfig, train: TrainConfig, rows: NDArray[Any], *, progress: bool) -> VAE:
    """Train M1 on all rows, with and without labels; labels are not looked at."""
    vae = VAE.for_rows(replace(model, latent_dim=_BASE_LATENTS), rows)
    Trainer(vae, rows, train, observers=[ProgressBar()] if progress else []).run()
    return vae.cpu()
