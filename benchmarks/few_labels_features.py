"""What rows become before a cheap classifier sees them, in :mod:`benchmarks.few_labels`: baselines and encoders.

Each is made without labels, from training rows alone. Encoders are kept on the disk and used again; a training that was
stopped goes on.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch.nn import functional

from benchmarks.few_labels_tasks import Task
from vaefeat import Bundle, OnnxEncoder, load_bundle, pretrain
from vaefeat.atomic import replace_file
from vaefeat.data import fingerprint
from vaefeat.errors import InputError
from vaefeat.placement import using_threads

__all__ = ["FEATURES", "Features", "Plan", "bundle_of", "pretrain_ours", "pretrain_textbook"]

_PCA_COMPONENTS = 32
_PCA_ROWS = 20_000
_RANDOM_FILTERS, _RANDOM_SIDE, _RANDOM_POOL = 128, 5, 4
_ROWS_AT_A_TIME = 1000
_PYTHAE_LATENTS, _PYTHAE_BATCH, _PYTHAE_RATE, _PYTHAE_SEED = 32, 128, 1e-3, 0
_PYTHAE_EPOCHS, _PYTHAE_STEPS = 20, 5000


@dataclass(frozen=True)
class Plan:
    """How rows of the benchmark are run.

    Attributes
    ----------
    work : Path
        Folder of encoders and unfinished figures.
    threads : int
    quick : bool
        Networks and trainings so small that figures mean nothing.
    """

    work: Path
    threads: int = 1
    quick: bool = False

    def folder(self, task: Task, name: str) -> Path:
        """Say where what `name` makes of a data set is kept: apart for test and validation, whose rows differ."""
        return self.work / ("quick" if self.quick else task.split) / task.name / name


@dataclass(frozen=True)
class Features:
    """A map from rows to features.

    Attributes
    ----------
    embed : callable
        Rows (n, ...) to features (n, d), float32.
    seconds : float
        Of making it.
    settings : mapping
    """

    embed: Callable[[NDArray[Any]], NDArray[np.float32]]
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)


def pretrain_ours(rows: NDArray[Any], effort: str, out: Path, *, plan: Plan) -> Bundle:
    """Pretrain with the default preset, the same for every data set, or go on with it."""
    model: dict[str, Any] = {}
    # One thread is the fastest beside other work, and bits are the same wherever it is continued.
    train: dict[str, Any] = {"threads": plan.threads, "seed": 0}
    if plan.quick:
        model |= {"latent_dim": 18, "hidden_dims": (32,), "channels": (8, 16)}
        train |= {"max_epochs": 2}
    return pretrain(rows, preset="features", effort=effort, model=model, train=train, out=out, resume=True)


def pretrain_textbook(rows: NDArray[Any], out: Path, *, plan: Plan) -> Bundle:
    """Pretrain the textbook variational auto-encoder, or go on with it; its mean gains nothing from more epochs."""
    train: dict[str, Any] = {"threads": plan.threads, "seed": 0}
    if plan.quick:
        train |= {"max_epochs": 2}
    return pretrain(rows, preset="textbook", effort="fast", train=train, out=out, resume=True)


def _raw(task: Task, plan: Plan) -> Features:
    highest = _highest(task)
    return Features(lambda rows: _flat(rows, highest))


def _pca(task: Task, plan: Plan) -> Features:
    highest = _highest(task)
    began = time.perf_counter()
    rows = _flat(task.train[:_PCA_ROWS], highest)
    pca = PCA(min(_PCA_COMPONENTS, rows.shape[1]), random_state=0).fit(rows)
    seconds = time.perf_counter() - began
    return Features(
        lambda rows: np.asarray(pca.transform(_flat(rows, highest)), dtype=np.float32),
        seconds,
        {"components": pca.n_components_, "rows": len(rows)},
    )


def _random(task: Task, plan: Plan) -> Features:
    """Random filters, rectified, averaged over 4 by 4 parts of an image (Jarrett et al. 2009); for tables, neurons."""
    highest = _highest(task)
    some = _scaled(task.train[:_PCA_ROWS], highest)
    mean, spread = torch.from_numpy(some.mean(axis=0)), torch.from_numpy(some.std(axis=0).clip(1e-6))
    noise = torch.Generator().manual_seed(0)
    image = mean.ndim == 3
    shape = (_RANDOM_FILTERS, mean.shape[0], *(_RANDOM_SIDE, _RANDOM_SIDE)[: 2 if image else 0])
    weights = torch.randn(shape, generator=noise) / math.sqrt(math.prod(shape[1:]))

    def embed(rows: NDArray[Any]) -> NDArray[np.float32]:
        found = []
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            x = torch.from_numpy(_scaled(rows[start : start + _ROWS_AT_A_TIME], highest)) - mean
            if image:
                rectified = functional.conv2d(x, weights, padding=_RANDOM_SIDE // 2).relu()
                found.append(functional.adaptive_avg_pool2d(rectified, _RANDOM_POOL).flatten(1).numpy())
            else:
                found.append((x / spread @ weights.T).relu().numpy())
        return np.concatenate(found)

    return Features(embed, settings={"filters": _RANDOM_FILTERS, "side": _RANDOM_SIDE, "pooled_to": _RANDOM_POOL})


def _ours(task: Task, plan: Plan) -> Features:
    return _of_bundle(task, plan, "ours", lambda out: pretrain_ours(task.train, "best", out, plan=plan))


def _ours_fast(task: Task, plan: Plan) -> Features:
    return _of_bundle(task, plan, "ours_fast", lambda out: pretrain_ours(task.train, "fast", out, plan=plan))


def _textbook(task: Task, plan: Plan) -> Features:
    return _of_bundle(task, plan, "textbook", lambda out: pretrain_textbook(task.train, out, plan=plan))


def bundle_of(task: Task, plan: Plan, name: str, train: Callable[[Path], Bundle]) -> Bundle:
    """Take the bundle that is on the disk, or train it.

    Raises
    ------
    InputError
        The one on the disk was trained on other rows.
    """
    out = plan.folder(task, name)
    if not (out / "bundle.json").is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        return train(out)
    bundle = load_bundle(out)
    if bundle.manifest.data["fingerprint"] != fingerprint(task.train):
        raise InputError(f"got {out}, an encoder of other rows than these; remove it, or choose another --work")
    return bundle


def _of_bundle(task: Task, plan: Plan, name: str, train: Callable[[Path], Bundle]) -> Features:
    bundle = bundle_of(task, plan, name, train)
    encoder = OnnxEncoder(bundle, device="cpu", threads=plan.threads)
    history = json.loads((plan.folder(task, name) / "training" / "history.json").read_text())
    manifest = bundle.manifest
    settings = {"model": dict(manifest.model), "train": dict(manifest.train), "digest": bundle.digest}
    return Features(encoder.embed, math.fsum(record["seconds"] for record in history), settings)


def _pythae(task: Task, plan: Plan) -> Features:
    """Its default networks and trainer, its published package; the mean, where its ``embed`` would draw a sample."""
    if importlib.util.find_spec("pythae") is None:
        raise InputError(
            "got no package pythae to measure against; `make test` installs it, or `pip install --no-deps pythae "
            "imageio tqdm` (its list of requirements cannot be installed as it is)"
        )
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig

    epochs = 1 if plan.quick else max(_PYTHAE_EPOCHS, math.ceil(_PYTHAE_STEPS * _PYTHAE_BATCH / len(task.train)))
    settings = {
        "latent_dim": _PYTHAE_LATENTS,
        "reconstruction_loss": "bce",
        "epochs": epochs,
        "batch_size": _PYTHAE_BATCH,
        "learning_rate": _PYTHAE_RATE,
    }
    scale, shift = _pythae_scaling(task)
    config = VAEConfig(
        input_dim=task.train.shape[1:],
        latent_dim=_PYTHAE_LATENTS,
        reconstruction_loss=settings["reconstruction_loss"],
    )
    torch.manual_seed(_PYTHAE_SEED)
    model = PythaeVAE(config)
    folder = plan.folder(task, "pythae")
    weights, note = folder / "weights.pt", folder / "training.json"
    known = {"settings": settings, "fingerprint": fingerprint(task.train)}
    if note.is_file() and (kept := json.loads(note.read_text()))["of"] == known:
        model.load_state_dict(torch.load(weights, weights_only=True))
        seconds = kept["seconds"]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        seconds = _train_pythae(model, (task.train - shift) / scale, epochs, folder, plan.threads)
        torch.save(model.state_dict(), weights)
        replace_file(note, (json.dumps({"of": known, "seconds": seconds}) + "\n").encode())
    model.eval()

    def embed(rows: NDArray[Any]) -> NDArray[np.float32]:
        found = []
        with torch.no_grad(), using_threads(plan.threads):
            for start in range(0, len(rows), _ROWS_AT_A_TIME):
                x = torch.from_numpy(((rows[start : start + _ROWS_AT_A_TIME] - shift) / scale).astype(np.float32))
                found.append(model.encoder(x).embedding.numpy())
        return np.concatenate(found)

    return Features(embed, seconds, settings)


def _train_pythae(model: Any, rows: NDArray[Any], epochs: int, folder: Path, threads: int) -> float:
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    config = BaseTrainerConfig(
        output_dir=str(folder / "trainer"),
        num_epochs=epochs,
        per_device_train_batch_size=_PYTHAE_BATCH,
        learning_rate=_PYTHAE_RATE,
        seed=_PYTHAE_SEED,
        no_cuda=True,
    )
    data = BaseDataset(torch.from_numpy(rows.astype(np.float32)), torch.zeros(len(rows)))
    # Its progress bars are drawn, but nobody sees them.
    with using_threads(threads), Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        trainer = BaseTrainer(model, data, training_config=config)
        began = time.perf_counter()
        trainer.train()
    return time.perf_counter() - began


def _pythae_scaling(task: Task) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Give what to divide by and what to subtract first: values lie in [0, 1], for its decoder ends in a sigmoid."""
    if task.train.ndim == 4:
        return np.array(_highest(task)), np.zeros((), dtype=np.float32)
    lowest = task.train.min(axis=0)
    return (task.train.max(axis=0) - lowest).clip(1e-6), lowest


def _highest(task: Task) -> np.float32:
    """Give what white is in images; tables are taken as they are."""
    return np.float32(task.train.max()) if task.train.ndim == 4 else np.float32(1)


def _scaled(rows: NDArray[Any], highest: np.float32) -> NDArray[np.float32]:
    return np.asarray(rows, dtype=np.float32) / highest


def _flat(rows: NDArray[Any], highest: np.float32) -> NDArray[np.float32]:
    return _scaled(rows, highest).reshape(len(rows), -1)


FEATURES: Mapping[str, Callable[[Task, Plan], Features]] = {
    "raw": _raw,
    "pca": _pca,
    "random": _random,
    "textbook": _textbook,
    "pythae": _pythae,
    "ours_fast": _ours_fast,
    "ours": _ours,
}
