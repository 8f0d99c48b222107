"""Where training runs: device and processor threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vaefeat.errors import DeviceError
from vaefeat.model.networks import count_multiply_adds, parameters_device
from vaefeat.model.vae import VAE
from vaefeat.processors import available_cpus

__all__ = ["multiply_adds", "resolve_device", "threads_for", "threads_for_step", "using_threads"]

#: Multiply-adds of a step from which more than one thread pays: about 10 ms of work for one.
_THREADED_STEP = 500_000_000


def resolve_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into a device that is there.

    Raises
    ------
    DeviceError
        CUDA was asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("got device='cuda', but torch finds no CUDA device; use device='cpu' or 'auto'")
    return torch.device(device)


def threads_for(vae: VAE, batch_size: int, n_samples: int = 1, *, sharing: int = 1) -> int:
    """Choose threads by the work in a step: one where it is small, else a process's part of all processors.

    No more than torch was given (``OMP_NUM_THREADS``). `sharing` is the number of processes that train on this machine.
    The choice depends on the model alone, not on a measurement, so that a seed gives the same weights every time.
    """
    return threads_for_step(multiply_adds(vae, n_samples=n_samples) * batch_size, sharing=sharing)


def threads_for_step(n_multiply_adds: int, *, sharing: int = 1) -> int:
    """Choose threads by a step's multiplications; see :func:`threads_for`."""
    return 1 if n_multiply_adds < _THREADED_STEP else max(1, min(available_cpus(), torch.get_num_threads()) // sharing)


def multiply_adds(vae: VAE, *, n_samples: int = 1) -> int:
    """Count the multiplications with weights in one row's step: forward, and twice as many backward."""
    device = parameters_device(vae)
    count = count_multiply_adds(vae.encoder, torch.zeros((1, *vae.row_shape), device=device))
    count += n_samples * count_multiply_adds(vae.decoder, torch.zeros((1, vae.config.latent_dim), device=device))
    return 3 * count


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
