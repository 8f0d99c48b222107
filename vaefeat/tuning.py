"""How a run computes: in which precision, and compiled or not; measured on the machine that runs it.

What ``auto`` chooses depends on measurements, so it can differ between machines, and with it the last digits of a
result. Two things keep that in bounds. Short runs are never measured: they take float32 and are not compiled, on any
machine. And within a process what was measured for a model counts for every later run of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vaefeat.config import TrainConfig
from vaefeat.errors import CompileError
from vaefeat.model.networks import parameters_device
from vaefeat.model.vae import VAE
from vaefeat.placement import multiply_adds
from vaefeat.step import TrainingStep
from vaefeat.world import World

__all__ = ["Engine", "choose_engine", "faster_precision", "is_short", "settle_engine", "take_up"]

#: Seconds of training, by rule of thumb, from which measuring pays.
_SHORT_S = 20.0
#: What a rule of thumb supposes of a processor: multiply-adds in a second, and seconds a step takes besides them.
_MULTIPLY_ADDS_PER_S = 5e10
_STEP_S = 1e-3
#: Compiling takes 5 to 30 seconds, and what it brings is not known before: left to `auto`, it may cost that share.
_COMPILE_S = 10.0
_COMPILE_SHARE = 0.1
#: A gain below this is not worth another rounding, or may be noise.
_LEAST_GAIN = 1.1
_TIMED_STEPS = 5
_MEASURED: dict[tuple[Any, ...], float] = {}


@dataclass(frozen=True)
class Engine:
    """How steps are computed.

    Attributes
    ----------
    precision : {"float32", "bfloat16"}
        Of the networks' arithmetic.
    compiled : bool
        Whether torch.compile made one graph of forward pass, loss, backward pass and clipping.
    notes : tuple of str
        What was measured and why this was chosen, for people.
    """

    precision: str = "float32"
    compiled: bool = False
    notes: tuple[str, ...] = ()


def settle_engine(
    step: TrainingStep,
    rows: Tensor,
    config: TrainConfig,
    *,
    before: Engine | None,
    n_rows: int,
    n_steps: int,
    threads: int,
    world: World,
    device: torch.device,
) -> Engine:
    """Bring all workers' steps into one state: what the first worker chooses, or what the run before had chosen.

    Parameters
    ----------
    step, rows, config, n_rows, n_steps, threads
        See :func:`choose_engine`.
    before : Engine, optional
        Of the run that is continued.
    world : World
        The workers, all of which call this together.
    device : torch.device

    Raises
    ------
    CompileError
        ``compile=True``, and the step cannot be compiled.
    """
    if before is None and world.leads:
        engine = choose_engine(step, rows, config, n_rows=n_rows, n_steps=n_steps, threads=threads)
        _agreed(engine, world, device)
    else:
        engine = take_up(step, rows, before or _agreed(Engine(), world, device), config)
    if world.any(not engine.compiled, device) and engine.compiled:
        step.forget_compiled()
        return Engine(engine.precision, notes=("not compiled: another worker cannot",))
    return engine


def _agreed(engine: Engine, world: World, device: torch.device) -> Engine:
    """Give all workers what the first one chose."""
    chosen = torch.tensor([float(engine.precision == "bfloat16"), float(engine.compiled)], device=device)
    half, compiled = world.agree(chosen).tolist()
    return Engine("bfloat16" if half else "float32", bool(compiled))


def choose_engine(
    step: TrainingStep,
    rows: Tensor,
    config: TrainConfig,
    *,
    n_rows: int,
    n_steps: int,
    threads: int,
) -> Engine:
    """Settle what `config` leaves to ``auto``, and bring the step into that state.

    Parameters
    ----------
    step : TrainingStep
        No weight of its model changes.
    rows : Tensor
        A minibatch of this worker.
    config : TrainConfig
    n_rows : int
        Rows of all workers in it.
    n_steps : int
        Steps that are to come.
    threads : int
        Of the processor, which are a part of what is measured.

    Raises
    ------
    CompileError
        ``compile=True`` and it cannot be compiled.
    """
    notes: list[str] = []
    with step.untouched():
        precision, step_s = _precision(step, rows, config, n_rows, n_steps, threads, notes)
        step.vae.network_dtype = getattr(torch, precision)
        compiled = _compile(step, rows, config, n_rows, n_steps, threads, step_s, notes)
    return Engine(precision, compiled, tuple(notes))


def take_up(step: TrainingStep, rows: Tensor, engine: Engine, config: TrainConfig) -> Engine:
    """Bring a step into the state that was chosen before, by a run that is continued or by the first worker.

    Raises
    ------
    CompileError
        ``compile=True`` and it cannot be compiled.
    """
    step.vae.network_dtype = getattr(torch, engine.precision)
    if not engine.compiled:
        return engine
    try:
        step.compile(rows)
    except CompileError as error:
        if config.compile is True:
            raise
        # Only on another machine, or after an upgrade: the run goes on, with other roundings.
        return Engine(engine.precision, compiled=False, notes=(f"no longer compiled: {error}",))
    return engine


def _precision(
    step: TrainingStep, rows: Tensor, config: TrainConfig, n_rows: int, n_steps: int, threads: int, notes: list[str]
) -> tuple[str, float | None]:
    """Settle the precision; give the seconds of a step where they were measured."""
    if "auto" not in (config.precision, config.compile):
        return config.precision, None
    if is_short(step.vae, n_steps=n_steps, n_rows=len(rows), n_samples=config.n_samples):
        return ("float32" if config.precision == "auto" else config.precision), None

    def compute() -> None:
        step.gradients(rows, n_rows=n_rows)

    if config.precision != "auto":
        return config.precision, _time(step.vae, compute, [config.precision])[config.precision]
    precision, gain, step_s = faster_precision(step.vae, compute, key=_key(step, rows, config, threads))
    notes.append(f"precision {precision}: bfloat16 is {gain:.1f} times as fast as float32 here")
    return precision, step_s


def is_short(vae: VAE, *, n_steps: int, n_rows: int, n_samples: int = 1) -> bool:
    """Tell, by rule of thumb, whether steps of so many rows are over too soon for measuring to pay."""
    step_s = _STEP_S + multiply_adds(vae, n_samples=n_samples) * n_rows / _MULTIPLY_ADDS_PER_S
    return n_steps * step_s < _SHORT_S


def faster_precision(vae: VAE, compute: Callable[[], object], *, key: tuple[Any, ...]) -> tuple[str, float, float]:
    """Measure which precision of the networks' arithmetic is faster.

    Parameters
    ----------
    vae : VAE
        Its ``network_dtype`` is left at what was measured last.
    compute : callable
        What a step computes with it, changing no weight.
    key : tuple
        What the measurement depends on: within a process, the first of a key counts for all.

    Returns
    -------
    precision : {"float32", "bfloat16"}
    gain : float
        How many times as fast as float32 bfloat16 is.
    seconds : float
        Of a step in that precision.
    """
    seconds = _time(vae, compute, ["float32", "bfloat16"])
    gain = _MEASURED.setdefault((*key, "bfloat16"), seconds["float32"] / seconds["bfloat16"])
    precision = "bfloat16" if gain >= _LEAST_GAIN else "float32"
    return precision, gain, seconds[precision]


def _compile(
    step: TrainingStep,
    rows: Tensor,
    config: TrainConfig,
    n_rows: int,
    n_steps: int,
    threads: int,
    step_s: float | None,
    notes: list[str],
) -> bool:
    if config.compile is False or (config.compile == "auto" and step_s is None):
        return False
    if config.compile is True:
        step.compile(rows)
        return True
    assert step_s is not None
    if _COMPILE_SHARE * n_steps * step_s < _COMPILE_S:
        notes.append(f"not compiled: {n_steps * step_s:.0f} s of training would not earn it back")
        return False
    key = (*_key(step, rows, config, threads), step.vae.network_dtype, "compiled")
    if _MEASURED.get(key, _LEAST_GAIN) < _LEAST_GAIN:
        notes.append(f"not compiled: it was {_MEASURED[key]:.1f} times as fast when it was tried")
        return False
    started = time.perf_counter()
    try:
        step.compile(rows)
    except CompileError as error:
        notes.append(f"not compiled: {error}")
        _MEASURED[key] = 0.0
        return False
    compile_s = time.perf_counter() - started
    name = str(step.vae.network_dtype).removeprefix("torch.")
    seconds = _time(step.vae, lambda: step.gradients(rows, n_rows=n_rows), [name])
    gain = _MEASURED.setdefault(key, step_s / seconds[name])
    if gain < _LEAST_GAIN:
        step.forget_compiled()
        notes.append(f"not compiled: {compile_s:.0f} s of compiling made it {gain:.1f} times as fast")
        return False
    notes.append(f"compiled in {compile_s:.0f} s: {gain:.1f} times as fast")
    return True


def _time(vae: VAE, compute: Callable[[], object], names: list[str]) -> dict[str, float]:
    """Give the median seconds of a step in each precision, measured in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(_TIMED_STEPS + 1):
        for name in names:
            vae.network_dtype = getattr(torch, name)
            taken = _timed(compute, parameters_device(vae))
            # The first of each makes its libraries ready.
            if repetition:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _timed(act: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _key(step: TrainingStep, rows: Tensor, config: TrainConfig, threads: int) -> tuple[Any, ...]:
    return step.vae.config, rows.shape, rows.dtype, rows.device, config.objective, config.n_samples, threads
