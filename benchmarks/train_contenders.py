"""One contender of :mod:`benchmarks.train`, in a process of its own: ``python -m benchmarks.train_contenders '{...}'``.

Prints one line of JSON. All contenders train the same network, in the same minibatches, on the same rows and threads,
with Adam at 1e-3 where they do not say otherwise; it is built by the library and handed to pythae's trainer as it is.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from vaefeat import ModelConfig, TrainConfig
from vaefeat.data import load_rows
from vaefeat.model.evaluation import evaluate, fixed_noise
from vaefeat.model.objectives import ELBO
from vaefeat.model.vae import VAE
from vaefeat.observers import EpochRecord, Observer
from vaefeat.training import Trainer

__all__ = ["CONTENDERS", "NETWORKS", "Task", "run"]

#: The network of PyTorch's example (784-400-20-400-784), and the library's convolutions.
NETWORKS = {
    "mlp": ModelConfig(latent_dim=20, network="mlp", hidden_dims=(400,), activation="relu", normalization=False),
    "conv28": ModelConfig(latent_dim=20, likelihood="bernoulli"),
    "conv32": ModelConfig(latent_dim=20, likelihood="bernoulli"),
}
_FOLDERS = {"mlp": "MNIST", "conv28": "MNIST", "conv32": "CIFAR10"}
_HELDOUT = 5000
#: Steps that are not counted: libraries make themselves ready, and compilers compile.
_WARM_UP_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a contender is to do.

    Parameters
    ----------
    contender : str
        A name in :data:`CONTENDERS`.
    data : str
        Folder with MNIST and CIFAR-10.
    network : str
        A name in :data:`NETWORKS`.
    batch_size, threads : int
    seconds : float
        Of training at the steady rate.
    n_rows : int
        Rows in the set; real ones are repeated where there are fewer.
    epochs : int
        Passes, where a held-out bound is to be reached.
    level : float or None
        That bound, in nats per row.
    device : str
    train : dict
        Ours alone: other settings.
    """

    contender: str
    data: str
    network: str = "mlp"
    batch_size: int = 128
    threads: int = 1
    seconds: float = 3.0
    n_rows: int = 20_000
    epochs: int = 0
    level: float | None = None
    device: str = "cpu"
    train: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> NDArray[np.uint8]:
        """Give the training rows, real ones repeated as often as it takes."""
        real = load_rows(Path(self.data) / _FOLDERS[self.network]).array[_HELDOUT:]
        repeated = -(-self.n_rows // len(real))
        return np.tile(real, (repeated, 1, 1, 1))[: self.n_rows] if repeated > 1 else real[: self.n_rows]

    def heldout(self) -> NDArray[np.uint8]:
        """Give rows that nobody trains on."""
        return load_rows(Path(self.data) / _FOLDERS[self.network]).array[:_HELDOUT]

    def vae(self, rows: NDArray[Any]) -> VAE:
        """Give the network, with the same weights for all."""
        with fixed_noise(0, torch.device("cpu")):
            return VAE.for_rows(NETWORKS[self.network], rows[:10_000])


class _EnoughError(Exception):
    """Ends a training from inside."""


class _Clock:
    """Rates of pieces of training after a warm-up."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._started, self.rates = seconds, time.perf_counter(), list[float]()
        self._last = self._started

    def lap(self, n_rows: int) -> None:
        now = time.perf_counter()
        if self._last - self._started >= _WARM_UP_S:
            self.rates.append(n_rows / (now - self._last))
        self._last = now
        if len(self.rates) >= 3 and now - self._started > self._seconds + _WARM_UP_S:
            raise _EnoughError


def with_pythae(task: Task) -> dict[str, Any]:
    """Train with pythae's own trainer (Chadebec et al. 2022, arXiv:2206.08309), its published package."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    rows = task.rows()
    ours = task.vae(rows)
    scaled = torch.from_numpy(rows).float() / 255
    model = PythaeVAE(
        VAEConfig(input_dim=rows.shape[1:], latent_dim=20, reconstruction_loss="bce"), *_wrapped(ours, rows.shape[1:])
    )
    clock = _Clock(task.seconds)
    history: list[tuple[float, float]] = []
    heldout = task.heldout() if task.epochs else None

    class Watch(TrainingCallback):  # type: ignore[misc]
        spent = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            if heldout is None:
                clock.lap(len(rows))
                return
            begun = time.perf_counter()
            elbo = _elbo(ours, heldout)
            self.spent += time.perf_counter() - begun
            history.append((time.perf_counter() - self.started - self.spent, elbo))

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        settings = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=task.epochs or 10_000,
            per_device_train_batch_size=task.batch_size,
            learning_rate=1e-3,
            no_cuda=task.device == "cpu",
        )
        trainer = BaseTrainer(model, BaseDataset(scaled, torch.zeros(len(scaled))), None, settings, [Watch()])
        try:
            trainer.train()
        except _EnoughError:
            pass
    return {"rates": clock.rates, "history": history}


def with_dataloader(task: Task) -> dict[str, Any]:
    """Train as PyTorch's well-known example does: torchvision's MNIST, ToTensor, DataLoader, a loss read every step."""
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    rows = task.rows()
    network = task.vae(rows)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    clock = _Clock(task.seconds)
    with tempfile.TemporaryDirectory() as folder:
        _write_mnist(Path(folder), rows)
        loader = torch.utils.data.DataLoader(
            MNIST(folder, train=True, transform=ToTensor()), batch_size=task.batch_size, shuffle=True
        )
        try:
            while True:
                total = 0.0
                for batch, _ in loader:
                    optimizer.zero_grad()
                    mean, logvar = _encoded(network, batch)
                    z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
                    output = torch.sigmoid(network.decoder(z).flatten(1))
                    loss = functional.binary_cross_entropy(output, batch.flatten(1), reduction="sum")
                    loss = loss - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
                    loss.backward()
                    total += loss.item()
                    optimizer.step()
                clock.lap(len(rows))
        except _EnoughError:
            pass
    return {"rates": clock.rates}


def with_vaefeat(task: Task) -> dict[str, Any]:
    """Train with the library, which chooses precision and compilation itself."""
    rows = task.rows()
    if task.level is not None:
        rows = np.concatenate([rows, task.heldout()])
    started = time.perf_counter()
    vae = task.vae(rows)
    clock = _Clock(task.seconds)
    notes: list[str] = []
    history: list[tuple[float, float]] = []

    class Watch(Observer):
        def on_note(self, text: str) -> None:
            notes.append(text)

        def on_steps(self, *, rows_per_s: float, **figures: Any) -> None:
            # Steps are read fifty at a time.
            if not task.epochs:
                clock.lap(0)
                if clock.rates:
                    clock.rates[-1] = rows_per_s

        def on_epoch(self, record: EpochRecord) -> None:
            if task.epochs:
                history.append((time.perf_counter() - started, _elbo(vae, task.heldout())))

    config = TrainConfig.from_dict(
        {
            "max_epochs": task.epochs or 100_000,
            "batch_size": task.batch_size,
            "threads": task.threads,
            "learning_rate": 1e-3,
            "lr_schedule": "cosine" if task.epochs else "constant",
            "optimizer": "adamw" if task.epochs else "adam",
            "heldout": 0.01,
            "device": task.device,
            **task.train,
        }
    )
    trainer = Trainer(vae, rows, config, observers=[Watch()])
    try:
        trainer.run()
    except _EnoughError:
        pass
    engine = trainer.engine
    assert engine is not None
    return {
        "rates": clock.rates,
        "history": history,
        "notes": notes,
        "precision": engine.precision,
        "compiled": engine.compiled,
    }


def with_grid(task: Task) -> dict[str, Any]:
    """Train twelve small models as one batch, and one after another."""
    from sklearn.datasets import load_digits

    from vaefeat import pretrain_grid

    rows = load_digits().images.astype(np.uint8)[:, None]
    model = ModelConfig(latent_dim=8, network="mlp", hidden_dims=(64,))
    train = TrainConfig(max_epochs=5, batch_size=32, threads=task.threads, device="cpu", compile=False)
    grid: dict[str, list[Any]] = {"latent_dim": [4, 8, 16], "kl_weight": [0.5, 1.0], "seed": [0, 1]}
    together, alone = [], []
    for _ in range(3):
        together.append(_timed(lambda: pretrain_grid(rows, model=model, train=train, grid=grid, progress=False)))
        alone.append(_timed(lambda: _one_after_another(rows, model, train, grid)))
    return {"together_s": statistics.median(together), "alone_s": statistics.median(alone), "models": 12}


def matmul_limit(task: Task) -> dict[str, Any]:
    """Time the matrix products of a step of the fully connected network alone, in both precisions."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        products: list[tuple[Tensor, Tensor]] = []
        for n_in, n_out in ((784, 400), (400, 20), (400, 20), (20, 400), (400, 784)):
            x, w = torch.randn(task.batch_size, n_in, dtype=dtype), torch.randn(n_out, n_in, dtype=dtype)
            g = torch.randn(task.batch_size, n_out, dtype=dtype)
            products += [(x, w.t()), (g.t(), x)]
            if n_in != 784:  # the rows themselves need no gradient
                products.append((g, w))
        times = []
        started = time.perf_counter()
        while time.perf_counter() - started < task.seconds / 2:
            times.append(_timed(lambda made=products: [a @ b for a, b in made]))  # type: ignore[misc]
        seconds[str(dtype).removeprefix("torch.")] = statistics.median(times)
    return {"seconds": seconds}


CONTENDERS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "pythae": with_pythae,
    "dataloader": with_dataloader,
    "vaefeat": with_vaefeat,
    "grid": with_grid,
    "matmul": matmul_limit,
}


def run(task: Task) -> dict[str, Any]:
    """Do a task, and add its memory."""
    torch.set_num_threads(task.threads)
    done = CONTENDERS[task.contender](task)
    if rates := done.pop("rates", None):
        done["rows_per_s"] = statistics.median(rates)
    return {**done, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _wrapped(ours: VAE, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Give our encoder and decoder the form that pythae asks for."""
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network, self.posterior = ours.encoder, ours.posterior

        def forward(self, x: Tensor) -> Any:
            mean, logvar = self.posterior.statistics(self.network(x))
            return ModelOutput(embedding=mean, log_covariance=logvar)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = ours.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.network(z)).reshape(-1, *shape))

    return Encoder(), Decoder()


def _encoded(network: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    return network.posterior.statistics(network.encoder(x))


def _elbo(vae: VAE, rows: NDArray[np.uint8]) -> float:
    """Measure everybody's held-out bound with the same estimator and noise."""
    return evaluate(vae, ELBO(TrainConfig()), rows, kl_weight=1.0, batch_size=1000, seed=0).elbo


def _one_after_another(rows: NDArray[Any], model: ModelConfig, train: TrainConfig, grid: dict[str, list[Any]]) -> None:
    from dataclasses import replace
    from itertools import product

    for latent_dim, kl_weight, seed in product(grid["latent_dim"], grid["kl_weight"], grid["seed"]):
        with fixed_noise(seed, torch.device("cpu")):
            vae = VAE.for_rows(replace(model, latent_dim=latent_dim), rows)
        Trainer(vae, rows, replace(train, kl_weight=kl_weight, seed=seed)).run()


def _timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _write_mnist(folder: Path, rows: NDArray[np.uint8]) -> None:
    """Write rows in the files that torchvision's MNIST reads."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = b"".join(n.to_bytes(4, "big") for n in (2051, len(rows), 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + rows.tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (2049, len(rows)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(len(rows)))


if __name__ == "__main__":
    print(json.dumps(run(Task(**json.loads(sys.argv[1])))))
