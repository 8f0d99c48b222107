"""One contender of :mod:`benchmarks.train`, in a process of its own.

``python -m benchmarks.train_contenders NAME '{"data": PATH, ...}'`` prints one line of JSON. Whoever trains does so
with the same network, minibatches, rows and threads. Rows lie in memory, or in the files that a contender reads, before
a clock starts.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.train_tasks import NETWORKS, Task
from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.model.evaluation import evaluate, fixed_noise
from vaefeat.model.objectives import ELBO
from vaefeat.model.posteriors import DiagonalGaussian
from vaefeat.model.vae import VAE
from vaefeat.observers import EpochRecord, Observer
from vaefeat.training import Trainer

__all__ = ["CONTENDERS", "ExampleVAE", "Stopwatch", "make_pythae", "make_vae", "run", "write_mnist"]

#: What every peer trains with.
_LEARNING_RATE = 1e-3
#: Samples of the posterior for each held-out row.
_BOUND_SAMPLES = 8
#: Weights (from, to) of the fully connected network.
_LAYERS = ((784, 400), (400, 20), (400, 20), (20, 400), (400, 784))
_GRID: dict[str, list[Any]] = {"latent_dim": [4, 8, 16], "kl_weight": [0.5, 1.0], "seed": [0, 1]}


class _EnoughError(Exception):
    """Ends a training from inside."""


class Stopwatch:
    """Times a training: a rate after its warm-up, or the bound after each epoch.

    Parameters
    ----------
    task : Task
    n_rows : int
        Rows in an epoch.

    Attributes
    ----------
    first_s : float
        Seconds from the start to the end of the first steps: what making ready, measuring and compiling take.
    history : list of (float, float)
        After each epoch: seconds since the start, those of measuring left out, and the held-out bound in nats.
    """

    def __init__(self, task: Task, n_rows: int) -> None:
        self._task, self._n_rows = task, n_rows
        self._began = time.perf_counter()
        self._warm: tuple[float, int] | None = None
        self._measuring_s = 0.0
        self._heldout = task.heldout() if task.epochs else None
        self.first_s = self.rows_per_s = math.nan
        self.history: list[tuple[float, float]] = []
        self.start()

    def start(self) -> None:
        """Begin to count."""
        self._began = time.perf_counter()

    def took_steps(self, n_steps: int) -> None:
        """Take note of the number of steps since the start.

        Raises
        ------
        _EnoughError
            The time that was to be measured is over.
        """
        since = time.perf_counter() - self._began
        if math.isnan(self.first_s):
            self.first_s = since
        if self._task.epochs:
            return
        seen = self._rows_in(n_steps)
        if self._warm is None:
            if since - self.first_s >= self._task.warm_up_s:
                self._warm = since, seen
            return
        warm_s, warm_rows = self._warm
        if since - warm_s >= self._task.seconds:
            self.rows_per_s = (seen - warm_rows) / (since - warm_s)
            raise _EnoughError

    def finished_epoch(self, vae: VAE) -> None:
        """Measure the held-out bound, with the clock held."""
        if self._heldout is None:
            return
        stopped = time.perf_counter()
        elbo = _heldout_elbo(vae, self._heldout)
        self.history.append((stopped - self._began - self._measuring_s, elbo))
        self._measuring_s += time.perf_counter() - stopped

    def figures(self) -> dict[str, Any]:
        """Give what was found."""
        found = {"history": self.history} if self._task.epochs else {"rows_per_s": self.rows_per_s}
        return {**found, "first_s": self.first_s}

    def _rows_in(self, n_steps: int) -> int:
        # The last minibatch of an epoch may be short.
        epochs, steps = divmod(n_steps, math.ceil(self._n_rows / self._task.batch_size))
        return epochs * self._n_rows + min(steps * self._task.batch_size, self._n_rows)


class ExampleVAE(nn.Module):
    """The network of PyTorch's example: 784-400-20-400-784, ReLU inside and a sigmoid at the end."""

    def __init__(self) -> None:
        super().__init__()
        into_hidden, into_mean, into_logvar, from_latent, into_pixels = (nn.Linear(*widths) for widths in _LAYERS)
        self.into_hidden, self.into_mean, self.into_logvar = into_hidden, into_mean, into_logvar
        self.from_latent, self.into_pixels = from_latent, into_pixels

    def forward(self, x_BF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give reconstruction (B, 784), mean and log-variance (B, 20)."""
        hidden = functional.relu(self.into_hidden(x_BF))
        mean, logvar = self.into_mean(hidden), self.into_logvar(hidden)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        return torch.sigmoid(self.into_pixels(functional.relu(self.from_latent(z)))), mean, logvar


def make_vae(task: Task, rows: NDArray[Any]) -> VAE:
    """Build the network, with the same weights each time."""
    with fixed_noise(0, torch.device("cpu")):
        return VAE.for_rows(NETWORKS[task.network], rows)


def make_pythae(vae: VAE) -> Any:
    """Build pythae's model around our encoder and decoder: the same weights, trained by either."""
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    assert isinstance(vae.posterior, DiagonalGaussian)
    mean, logvar = vae.posterior.mean, vae.posterior.logvar

    class Encoder(BaseEncoder):  # type: ignore[misc]  # pythae has no types
        def __init__(self) -> None:
            super().__init__()
            self.network, self.mean, self.logvar = vae.encoder, mean, logvar

        def forward(self, x: Tensor) -> Any:
            hidden = self.network(x)
            return ModelOutput(embedding=self.mean(hidden), log_covariance=self.logvar(hidden))

    class Decoder(BaseDecoder):  # type: ignore[misc]  # pythae has no types
        def __init__(self) -> None:
            super().__init__()
            self.network = vae.decoder

        def forward(self, z: Tensor) -> Any:
            # Ours has an axis for parameters of the likelihood, here of one.
            return ModelOutput(reconstruction=torch.sigmoid(self.network(z)).squeeze(1))

    config = VAEConfig(input_dim=vae.row_shape, latent_dim=vae.config.latent_dim, reconstruction_loss="bce")
    return PythaeVAE(config, Encoder(), Decoder())


def with_pythae(task: Task) -> dict[str, Any]:
    """Train with pythae's own trainer (Chadebec et al. 2022, arXiv:2206.08309), its published package."""
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    rows = task.rows()
    vae = make_vae(task, rows)
    model = make_pythae(vae)
    # In place, and without the rows as they came: the memory that its users need, not ours.
    data = BaseDataset(torch.from_numpy(rows).float().div_(255), torch.zeros(len(rows)))
    del rows
    watch = Stopwatch(task, len(data))
    steps = count(1)

    class Watch(TrainingCallback):  # type: ignore[misc]  # pythae has no types
        def on_train_step_end(self, training_config: Any, **_: Any) -> None:
            watch.took_steps(next(steps))

        def on_epoch_end(self, training_config: Any, **_: Any) -> None:
            watch.finished_epoch(vae)

    # Its progress bars are drawn, but nobody sees them.
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        config = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=task.epochs or 1_000_000,
            per_device_train_batch_size=task.batch_size,
            learning_rate=_LEARNING_RATE,
            no_cuda=task.device == "cpu",
        )
        trainer = BaseTrainer(model, data, training_config=config, callbacks=[Watch()])
        watch.start()
        with suppress(_EnoughError):
            trainer.train()
    return watch.figures()


def with_dataloader(task: Task) -> dict[str, Any]:
    """Train as PyTorch's well-known example does: torchvision's MNIST, ToTensor, DataLoader, a loss read every step."""
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    rows = task.rows()
    device = torch.device(task.device)
    network = ExampleVAE().to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    watch = Stopwatch(task, len(rows))
    steps = count(1)
    with tempfile.TemporaryDirectory() as folder:
        write_mnist(Path(folder), rows)
        del rows
        # As the example does, which has a worker where it has a GPU.
        on_gpu = {"num_workers": 1, "pin_memory": True} if device.type == "cuda" else {}
        data = MNIST(folder, train=True, transform=ToTensor())
        loader = torch.utils.data.DataLoader(data, batch_size=task.batch_size, shuffle=True, **on_gpu)  # type: ignore[arg-type]  # a mix
        watch.start()
        with suppress(_EnoughError):
            while True:
                train_loss = 0.0
                for images, _ in loader:
                    x_BF = images.to(device).flatten(1)
                    optimizer.zero_grad()
                    output, mean, logvar = network(x_BF)
                    loss = functional.binary_cross_entropy(output, x_BF, reduction="sum")
                    loss = loss - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
                    loss.backward()
                    train_loss += loss.item()
                    optimizer.step()
                    watch.took_steps(next(steps))
    return watch.figures()


def with_vaefeat(task: Task) -> dict[str, Any]:
    """Train with the library, which chooses precision and compilation itself where the task does not."""
    rows = task.rows()
    settings: dict[str, Any] = {"max_epochs": task.epochs or 1_000_000}
    if not task.epochs:
        # A single held-out row: peers hold none out. No warm-up, which would last as long as the million epochs.
        settings |= {"heldout": 1e-9, "kl_warmup": 0.0, "lr_warmup": 0.0}
    settings |= {"batch_size": task.batch_size, "threads": task.threads, "device": task.device, **task.train}
    watch = Stopwatch(task, len(rows) - 1)
    notes: list[str] = []

    class Watch(Observer):
        def on_start(self, *, epochs: int, steps_per_epoch: int, epoch: int) -> None:
            self._steps_per_epoch = steps_per_epoch

        def on_note(self, text: str) -> None:
            notes.append(text)

        def on_steps(self, *, epoch: int, step: int, **figures: float) -> None:
            watch.took_steps((epoch - 1) * self._steps_per_epoch + step)

        def on_epoch(self, record: EpochRecord) -> None:
            watch.finished_epoch(vae)

    vae = make_vae(task, rows)
    watch.start()
    trainer = Trainer(vae, rows, TrainConfig.from_dict(settings), observers=[Watch()])
    with suppress(_EnoughError):
        trainer.run()
    assert trainer.engine is not None
    engine = {"precision": trainer.engine.precision, "compiled": trainer.engine.compiled, "notes": notes}
    return {**watch.figures(), **engine}


def with_grid(task: Task) -> dict[str, Any]:
    """Train twelve small models on scikit-learn's digits, as one batch and one after another."""
    from sklearn.datasets import load_digits

    from vaefeat.grid import pretrain_grid

    rows = load_digits().images.astype(np.uint8)[:, None]
    model = ModelConfig(latent_dim=8, network="mlp", hidden_dims=(64,))
    # Neither side has steps that are worth compiling.
    train = TrainConfig(max_epochs=5, batch_size=32, threads=task.threads, device="cpu", compile=False)
    together, alone = [], []
    for _ in range(3):
        together.append(_timed(lambda: pretrain_grid(rows, model=model, train=train, grid=_GRID, progress=False)))
        alone.append(_timed(lambda: _one_after_another(rows, model, train)))
    n_models = math.prod(len(values) for values in _GRID.values())
    return {"together_s": statistics.median(together), "alone_s": statistics.median(alone), "models": n_models}


def measure_limit(task: Task) -> dict[str, Any]:
    """Time the matrix products of a step of the fully connected network, and nothing else, in both precisions.

    Returns
    -------
    dict
        ``step_s``: least seconds of all products of a step, by precision; ``gflops``: their rate; ``step_gflop``: their
        operations. The least of many, because a limit is what the machine can do: the median on a busy one is what
        others leave, and training would come out beyond it.
    """
    device = torch.device(task.device)
    operations = 0
    step_s = {}
    for dtype in (torch.float32, torch.bfloat16):
        pairs: list[tuple[Tensor, Tensor]] = []
        for n_in, n_out in _LAYERS:
            x, w, g = (
                torch.randn(shape, device=device).to(dtype)
                for shape in ((task.batch_size, n_in), (n_out, n_in), (task.batch_size, n_out))
            )
            # Forward, gradient of the weights, gradient of the input, which the rows themselves need not have.
            pairs += [(x, w.t()), (g.t(), x), *([(g, w)] if n_in != math.prod((28, 28)) else [])]
        multiply = _replayed(pairs) if device.type == "cuda" else _multiplier(pairs)
        operations = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in pairs)
        for _ in range(3):
            _waited(multiply, device)
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - began < task.seconds / 2:
            times.append(_timed(lambda act=multiply: _waited(act, device)))  # type: ignore[misc]  # a default
        step_s[str(dtype).removeprefix("torch.")] = min(times)
    gflops = {name: operations / seconds / 1e9 for name, seconds in step_s.items()}
    return {"step_s": step_s, "gflops": gflops, "step_gflop": operations / 1e9}


CONTENDERS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "pythae": with_pythae,
    "dataloader": with_dataloader,
    "vaefeat": with_vaefeat,
    "limit": measure_limit,
    "grid": with_grid,
}


def run(contender: str, task: Task) -> dict[str, Any]:
    """Do a task, and add the most memory that it took."""
    torch.set_num_threads(task.threads)
    found = CONTENDERS[contender](task)
    # Kibibytes on Linux. A new process begins with those of the one that started it, which holds no rows.
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if task.device == "cuda":
        found["gpu_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def write_mnist(folder: Path, rows: NDArray[np.uint8]) -> None:
    """Write rows (n, 1, 28, 28) as the IDX files that torchvision's MNIST looks for, with labels of zero."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, some in (("train", rows), ("t10k", rows[:1])):
        # IDX: two zeros, the type (8 is uint8), the number of axes, their lengths, the values.
        shapes = {"images-idx3-ubyte": (len(some), *some.shape[2:]), "labels-idx1-ubyte": (len(some),)}
        for name, shape in shapes.items():
            header = bytes((0, 0, 8, len(shape))) + b"".join(length.to_bytes(4, "big") for length in shape)
            with (raw / f"{part}-{name}").open("wb") as file:
                file.write(header)
                file.write(np.ascontiguousarray(some).data if len(shape) > 1 else bytes(len(some)))


def _heldout_elbo(vae: VAE, rows: NDArray[np.uint8]) -> float:
    """Measure everybody's bound with the same estimator and noise."""
    objective = ELBO(TrainConfig(n_samples=_BOUND_SAMPLES))
    return evaluate(vae, objective, rows, kl_weight=1.0, batch_size=500, seed=0).elbo


def _one_after_another(rows: NDArray[Any], model: ModelConfig, train: TrainConfig) -> None:
    for latent_dim, kl_weight, seed in product(*(_GRID[key] for key in ("latent_dim", "kl_weight", "seed"))):
        with fixed_noise(seed, torch.device("cpu")):
            vae = VAE.for_rows(replace(model, latent_dim=latent_dim), rows)
        Trainer(vae, rows, replace(train, kl_weight=kl_weight, seed=seed)).run()


def _multiplier(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    def multiply() -> None:
        for a, b in pairs:
            # Into memory of its own: for small matrices `out=` was measured to be slower.
            a @ b

    return multiply


def _replayed(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Capture the products as a CUDA graph: launching them one by one would be the limit otherwise."""
    multiply = _multiplier(pairs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        multiply()
    return graph.replay


def _waited(act: Callable[[], None], device: torch.device) -> None:
    act()
    if device.type == "cuda":
        torch.cuda.synchronize()


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Task(**json.loads(sys.argv[2])))))
