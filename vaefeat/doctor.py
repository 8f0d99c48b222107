"""What this machine can do for training, measured, and what would make it do more."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.errors import CompileError
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.vae import VAE
from vaefeat.placement import resolve_device, using_threads
from vaefeat.processors import available_cpus, available_memory
from vaefeat.runtime import choose_device
from vaefeat.step import Knobs, TrainingStep
from vaefeat.tensorrt import why_no_tensorrt
from vaefeat.world import World

__all__ = ["Examination", "Measured", "examine"]

_BATCH_SIZE = 128
_IMAGE = (1, 28, 28)
#: The two networks that are tried: one of matrix products, and the default for images.
_MODELS = {
    "MLP 784-400-20": ModelConfig(
        latent_dim=20, network="mlp", hidden_dims=(400,), activation="relu", normalization=False
    ),
    "default convolutions": ModelConfig(),
}
_BUSY = 0.9
_LEAST_GAIN = 1.1
_SMALL_MEMORY = 2 << 30


@dataclass(frozen=True)
class Measured:
    """The rate of a training step.

    Attributes
    ----------
    model, how : str
    rows_per_s : float
        Rows of 28 by 28 values in minibatches of 128, in a second.
    """

    model: str
    how: str
    rows_per_s: float


@dataclass
class Examination:
    """What was found.

    Attributes
    ----------
    facts : dict of str to str
        About the machine.
    measured : list of Measured
    advice : list of str
        What to change; empty where nothing is to be gained.
    """

    facts: dict[str, str] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def examine(*, seconds: float = 10.0) -> Examination:
    """Look at the machine, and train on random images for about so many seconds.

    Parameters
    ----------
    seconds : float
        Of measuring; compiling comes on top, and takes as long as it takes.
    """
    found = Examination()
    device = resolve_device("auto")
    _look_at_device(found, device)
    _look_at_runtime(found, device)
    _look_at_processors(found)
    _look_at_memory(found)
    with fixed_noise(0, device):
        _measure(found, device, share_s=seconds / 8)
    if not found.advice:
        found.advice.append("nothing: leave precision, compile and threads to their defaults")
    return found


def _look_at_device(found: Examination, device: torch.device) -> None:
    found.facts["torch"] = str(torch.__version__)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found.facts["device"] = f"cuda: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        return
    found.facts["device"] = "cpu: torch finds no CUDA device"
    if Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi"):
        found.advice.append(
            "an NVIDIA driver is installed, but torch finds no CUDA device: compare the CUDA version of torch "
            f"({torch.version.cuda or 'a build without CUDA'}) with the driver's (nvidia-smi)"
        )


def _look_at_runtime(found: Examination, device: torch.device) -> None:
    """See where bundles are embedded; ONNX Runtime finds CUDA by other libraries than torch."""
    chosen, reason = choose_device("auto")
    found.facts["ONNX Runtime"] = f"{ort.__version__}, {chosen}: {reason}"
    if chosen == "cuda":
        found.facts["TensorRT"] = why_no_tensorrt() or "there, for device='tensorrt'"
    elif device.type == "cuda":
        found.advice.append(f"torch finds a CUDA device and ONNX Runtime does not: {reason}")


def _look_at_processors(found: Examination) -> None:
    n_cpus = available_cpus()
    found.facts["processors"] = f"{n_cpus} of {os.cpu_count()}"
    found.facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    compilers = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
    found.facts["C++ compiler"] = compilers[0] if compilers else "none"
    if not compilers:
        found.advice.append("install a C++ compiler (g++): without one torch.compile does not work on processors")
    found.facts["torch's threads"] = f"{torch.get_num_threads()} (train.threads overrides them)"
    with using_threads(1):
        matrix = torch.randn(512, 512)
        started, used = time.perf_counter(), time.process_time()
        while time.perf_counter() - started < 0.3:
            matrix = torch.tanh(matrix @ matrix)
        share = (time.process_time() - used) / (time.perf_counter() - started)
    found.facts["share of a processor"] = f"{share:.0%}"
    if share < _BUSY:
        found.advice.append(
            f"other work takes {1 - share:.0%} of a processor: stop it, or set train.threads=1, since threads that "
            "wait for each other lose most on a busy machine"
        )


def _look_at_memory(found: Examination) -> None:
    free = available_memory()
    if free is None:
        return
    found.facts["free memory"] = f"{free / 2**30:.1f} GiB"
    if free < _SMALL_MEMORY:
        found.advice.append("little memory is free: read larger data with `vaefeat pretrain --stream`")


def _measure(found: Examination, device: torch.device, *, share_s: float) -> None:
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (_BATCH_SIZE, *_IMAGE), dtype=np.uint8))
    n_cpus = available_cpus()
    for name, model in _MODELS.items():
        step = _step(model, rows, device)
        take = _taker(step, rows.to(device))
        with using_threads(n_cpus):
            rates = {precision: _rate(step, take, precision, share_s) for precision in ("float32", "bfloat16")}
        found.measured += [Measured(name, f"{precision}", rate) for precision, rate in rates.items()]
        better = max(rates, key=lambda precision: rates[precision])
        if n_cpus > 1 and device.type == "cpu":
            with using_threads(1):
                alone = _rate(step, take, better, share_s)
            found.measured.append(Measured(name, f"{better}, one thread", alone))
            if alone > _LEAST_GAIN * rates[better]:
                found.advice.append(
                    f"{name}: one thread is {alone / rates[better]:.1f} times as fast as {n_cpus}; set train.threads=1"
                )
        if rates["bfloat16"] < rates["float32"]:
            found.facts.setdefault("bfloat16", "slower than float32: precision='auto' will not take it")
        else:
            found.facts["bfloat16"] = f"{rates['bfloat16'] / rates['float32']:.1f} times as fast as float32"
        if model.network == "mlp":
            _measure_compiled(found, step, take, rows.to(device), name, better, rates[better], share_s)


def _measure_compiled(
    found: Examination,
    step: TrainingStep,
    take: Callable[[], Tensor],
    rows: Tensor,
    name: str,
    precision: str,
    plain: float,
    share_s: float,
) -> None:
    step.vae.network_dtype = getattr(torch, precision)
    started = time.perf_counter()
    with using_threads(available_cpus()):
        try:
            step.compile(rows)
        except CompileError as error:
            found.facts["torch.compile"] = f"does not work: {error}"
            return
        compile_s = time.perf_counter() - started
        rate = _rate(step, take, precision, share_s)
    found.measured.append(Measured(name, f"{precision}, compiled", rate))
    found.facts["torch.compile"] = f"works: {rate / plain:.1f} times as fast after {compile_s:.0f} s"


def _step(model: ModelConfig, rows: Tensor, device: torch.device) -> TrainingStep:
    config = TrainConfig(batch_size=len(rows))
    vae = VAE.for_rows(model, rows.numpy()).to(device).train()
    objective = OBJECTIVES[config.objective](config)
    return TrainingStep(vae, objective, config, n_train=len(rows), full=len(rows), world=World())


def _taker(step: TrainingStep, rows: Tensor) -> Callable[[], Tensor]:
    knobs = Knobs(1e-3, 1.0, 0.0)
    return lambda: step(rows, knobs, n_rows=len(rows))


def _rate(step: TrainingStep, take: Callable[[], Tensor], precision: str, for_s: float) -> float:
    """Give rows/s over about so many seconds, the median of pieces."""
    step.vae.network_dtype = getattr(torch, precision)
    # A captured graph would go on in the precision of before.
    step.forget_captured()
    for _ in range(4):
        take().tolist()
    rates: list[float] = []
    started = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - started < for_s:
        begun = time.perf_counter()
        for _ in range(5):
            figures = take()
        figures.tolist()  # waits for a GPU
        rates.append(5 * _BATCH_SIZE / (time.perf_counter() - begun))
    return statistics.median(rates)
