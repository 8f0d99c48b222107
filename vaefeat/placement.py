"""Where training runs: device, processor threads, and rows on their way to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaefeat.errors import DeviceError
from vaefeat.model.networks import count_multiply_adds, parameters_device
from vaefeat.model.vae import VAE
from vaefeat.processors import available_cpus

__all__ = ["resolve_device", "row_taker", "threads_for", "using_threads"]

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


def threads_for(vae: VAE, batch_size: int, n_samples: int = 1) -> int:
    """Choose threads by the work in a step: one where it is small, else all processors.

    The choice depends on the model alone, not on a measurement, so that a seed gives the same weights every time.
    """
    device = parameters_device(vae)
    per_row = count_multiply_adds(vae.encoder, torch.zeros((1, *vae.row_shape), device=device))
    per_row += n_samples * count_multiply_adds(vae.decoder, torch.zeros((1, vae.config.latent_dim), device=device))
    # The backward pass is twice the forward one.
    return available_cpus() if 3 * per_row * batch_size >= _THREADED_STEP else 1


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row_taker(rows: NDArray[Any], device: torch.device) -> Callable[[NDArray[np.int64]], Tensor]:
    """Give a function that takes a minibatch of rows by their indices: one indexing operation, no loop over rows."""
    if device.type == "cpu":
        return lambda indices: torch.from_numpy(rows[indices])
    on_device = torch.from_numpy(np.array(rows)).to(device)
    return lambda indices: on_device[torch.from_numpy(indices).to(device, non_blocking=True)]
