"""What ``python -m benchmarks.train`` measures: networks, rows, and the tasks that contenders are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaefeat.config import ModelConfig
from vaefeat.data import load_rows
from vaefeat.errors import InputError
from vaefeat.processors import available_memory

__all__ = ["DATA_SETS", "NETWORKS", "OURS_TO_BOUND", "SCALES", "Entry", "Part", "Task", "gpu_parts", "parts"]

#: The network of PyTorch's example (784-400-20-400-784), and the library's default convolutions.
NETWORKS: Mapping[str, ModelConfig] = {
    "mlp": ModelConfig(
        latent_dim=20,
        network="mlp",
        hidden_dims=(400,),
        activation="relu",
        normalization=False,
        likelihood="bernoulli",
    ),
    "conv28": ModelConfig(latent_dim=20, network="conv", likelihood="bernoulli"),
    "conv32": ModelConfig(latent_dim=20, network="conv", likelihood="bernoulli"),
}
#: Folder and shape of the rows of each network.
DATA_SETS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "mlp": ("MNIST", (1, 28, 28)),
    "conv28": ("MNIST", (1, 28, 28)),
    "conv32": ("CIFAR10", (3, 32, 32)),
}
#: Rows of sets whose cost per row must be the same.
SCALES = (10_000, 1_000_000, 10_000_000)
#: The first rows judge, and nobody trains on them.
N_HELDOUT = 5_000
_N_MNIST = 55_000
#: Enough for convolutions, of which a processor sees some thousand rows in a second; an epoch is to end in a quick run,
#: and reading as many JPEGs takes its time, too.
_N_CONV, _N_QUICK_CONV = 10_000, 2_500
#: Our own settings on the way to a held-out bound; same minibatches and network. A run of a few seconds has no time to
#: find out by itself which precision is fast, nor to earn back a compilation.
OURS_TO_BOUND: Mapping[str, Any] = {
    "learning_rate": 8e-3,
    "kl_warmup": 0.0,
    "heldout": 0.01,
    "precision": "bfloat16",
    "compile": False,
}
#: Passes after which pythae's bound is the level to reach, and as many as we plan to need for it.
_EPOCHS, _OUR_EPOCHS = 10, 4
_QUICK_EPOCHS, _OUR_QUICK_EPOCHS = 4, 2
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a contender is to do, as JSON can hold it.

    Parameters
    ----------
    data : str
        Folder with MNIST and CIFAR-10.
    network : str
        A name in :data:`NETWORKS`.
    batch_size, threads : int
    n_rows : int
        Rows in the set; real ones are repeated where there are fewer.
    seconds, warm_up_s : float
        Of training that is timed, and before it, from the end of the first steps on.
    epochs : int or None
        Train so many passes, and measure the held-out bound after each, instead of timing a rate.
    device : {"cpu", "cuda"}
    train : dict
        For our trainer alone: settings other than its defaults.
    """

    data: str
    network: str = "mlp"
    batch_size: int = 128
    threads: int = 1
    n_rows: int = _N_MNIST
    seconds: float = 3.0
    warm_up_s: float = 1.0
    epochs: int | None = None
    device: str = "cpu"
    train: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> NDArray[np.uint8]:
        """Give the rows to train on, (n_rows, C, H, W)."""
        real = self._real(N_HELDOUT + min(self.n_rows, _N_MNIST))[N_HELDOUT:]
        if len(real) >= self.n_rows:
            return real[: self.n_rows]
        # Filled piece by piece: a second copy of eight gigabytes would not fit everywhere.
        repeated = np.empty((self.n_rows, *real.shape[1:]), dtype=np.uint8)
        for start in range(0, self.n_rows, len(real)):
            piece = repeated[start : start + len(real)]
            piece[:] = real[: len(piece)]
        return repeated

    def heldout(self) -> NDArray[np.uint8]:
        """Give the rows that judge: none of them is among those to train on."""
        return self._real(N_HELDOUT)

    def _real(self, n_rows: int) -> NDArray[np.uint8]:
        folder, shape = DATA_SETS[self.network]
        array = load_rows(Path(self.data) / folder, max_rows=n_rows).array
        if array.shape[1:] != shape or array.dtype != np.uint8 or len(array) < min(n_rows, N_HELDOUT + 1):
            raise InputError(
                f"got {len(array)} rows of shape {array.shape[1:]} and dtype {array.dtype} in "
                f"{Path(self.data) / folder}, wanted at least {n_rows} of shape {shape} and uint8"
            )
        return array


@dataclass(frozen=True)
class Entry:
    """One process of a part.

    Attributes
    ----------
    key : str
        A name of its own within the part.
    contender : str
        A name in :data:`benchmarks.train_contenders.CONTENDERS`.
    task : Task
    """

    key: str
    contender: str
    task: Task


@dataclass(frozen=True)
class Part:
    """Entries that are compared, measured in turns.

    Attributes
    ----------
    name : str
    entries : tuple of Entry
    once : bool
        Measured in the first round alone.
    notes : tuple of str
        What is not measured, and why.
    """

    name: str
    entries: tuple[Entry, ...]
    once: bool = False
    notes: tuple[str, ...] = ()


def parts(data: Path, *, threads: int, quick: bool) -> tuple[Part, ...]:
    """Give everything that is measured on the processor, the most important first."""
    window: dict[str, Any] = {"seconds": 2.0, "warm_up_s": 0.5} if quick else {"seconds": 6.0, "warm_up_s": 2.0}
    base: dict[str, Any] = {"data": str(data), "threads": threads, **window}
    # Compiled kernels of convolutions are slower on processors: `auto` compiles them, finds that out and drops them,
    # which takes it longer than a quick run lasts.
    eager: dict[str, Any] = {"train": {"compile": False}} if quick else {}
    conv: dict[str, Any] = {"n_rows": _N_QUICK_CONV if quick else _N_CONV, **eager}
    found = [
        _rates("mlp_b128", ("pythae", "dataloader", "vaefeat", "limit"), Task(**base)),
        _rates("mlp_b512", ("pythae", "dataloader", "vaefeat", "limit"), Task(**base, batch_size=512)),
        _rates("conv28", ("pythae", "vaefeat"), Task(**base, network="conv28", **conv)),
        _rates("conv32", ("pythae", "vaefeat"), Task(**base, network="conv32", **conv)),
        _to_bound(base, *((_QUICK_EPOCHS, _OUR_QUICK_EPOCHS) if quick else (_EPOCHS, _OUR_EPOCHS))),
        _scaling({**base, **eager}, once=quick),
        # Small models are overhead above all, which threads only add to.
        Part("grid", (Entry("grid", "grid", Task(**{**base, "threads": 1})),), once=True),
        _rates("mlp_b1024", ("vaefeat", "limit"), Task(**base, batch_size=1024), once=quick),
    ]
    return tuple(found)


def gpu_parts(data: Path, *, threads: int, quick: bool) -> tuple[Part, ...]:
    """Give everything that is measured on a CUDA device."""
    seconds = 2.0 if quick else 6.0
    # Ten repeats of MNIST: an epoch of MNIST itself would be over in hundredths of a second.
    base: dict[str, Any] = {"data": str(data), "threads": threads, "seconds": seconds, "device": "cuda"}
    everybody = ("pythae", "dataloader", "vaefeat", "limit")
    return (
        *(
            _rates(f"gpu_mlp_b{size}", everybody, Task(**base, batch_size=size, n_rows=10 * _N_MNIST))
            for size in (128, 512, 4096)
        ),
        _rates("gpu_mlp_b16384", ("vaefeat", "limit"), Task(**base, batch_size=16_384, n_rows=10 * _N_MNIST)),
        _rates("gpu_conv28", ("pythae", "vaefeat"), Task(**base, network="conv28", batch_size=512)),
        _rates("gpu_conv32", ("pythae", "vaefeat"), Task(**base, network="conv32", batch_size=512, n_rows=40_000)),
    )


def _rates(name: str, contenders: tuple[str, ...], task: Task, *, once: bool = False) -> Part:
    return Part(name, tuple(Entry(contender, contender, task) for contender in contenders), once=once)


def _to_bound(base: Mapping[str, Any], theirs: int, ours: int) -> Part:
    entries = (
        Entry("pythae", "pythae", Task(**base, epochs=theirs)),
        Entry("vaefeat", "vaefeat", Task(**base, epochs=ours, train=dict(OURS_TO_BOUND))),
    )
    return Part("time_to_elbo", entries)


def _scaling(base: Mapping[str, Any], *, once: bool) -> Part:
    entries, notes = [], []
    for n_rows in SCALES:
        # The rows, their order in several copies of int64, and the process itself.
        needed, free = n_rows * (784 + 48) + 2 * _GIB, available_memory()
        if free is not None and free < needed:
            notes.append(f"{n_rows:,} rows: not measured: {free / _GIB:.1f} GiB free, {needed / _GIB:.1f} needed")
        else:
            entries.append(Entry(str(n_rows), "vaefeat", Task(**base, n_rows=n_rows)))
    return Part("scaling", tuple(entries), once=once, notes=tuple(notes))
