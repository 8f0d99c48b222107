"""Rows in batches, each with randomness of its own.

Everything random about a row depends on the seed and on the row's number alone: not on its neighbours, on the sizes of
batches and chunks, or on how a caller divides the rows. Rows 200 to 299 with ``first_row=200`` get the numbers that
they have among all rows. Where the model binarizes, a row is drawn once, and all who look at it with the same seed see
the same binary row.

B batch, L latents, S samples, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution

from vaefeat.data import batches
from vaefeat.errors import InputError
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.networks import parameters_device
from vaefeat.model.vae import VAE
from vaefeat.settings import check_int

__all__ = ["Observed", "Progress", "RowNoise", "observed"]

#: Called with the rows done and the rows in all.
Progress = Callable[[int, int], None]

#: Draws of a row's noise made at once, whoever asks for how many: it is a part of what the seed means.
_PAGE = 256


class RowNoise:
    """Standard normal noise for B rows, from a stream for each.

    Parameters
    ----------
    seeds : sequence of int
        One a row.
    width : int
        W.
    device : torch.device
    """

    def __init__(self, seeds: Sequence[int], width: int, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._width, self._device = width, device
        self._page = torch.empty(0)

    def __call__(self, n: int) -> Tensor:
        """Give the next n draws of every row, (n, B, W)."""
        parts = []
        while n:
            if not len(self._page):
                self._page = self._fresh()
            part, self._page = self._page[:n], self._page[n:]
            parts.append(part)
            n -= len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _fresh(self) -> Tensor:
        shape = (_PAGE, self._width)
        return torch.stack([torch.randn(shape, generator=g, device=self._device) for g in self._generators], dim=1)


@dataclass(frozen=True)
class Observed:
    """A batch of rows as the model sees them.

    Attributes
    ----------
    first : int
        The number of the first row.
    rows : Tensor
        As they came, (B, ...).
    x : Tensor
        Scaled, and drawn where the model binarizes, (B, ...).
    """

    first: int
    rows: Tensor
    x: Tensor
    _seeds: NDArray[np.uint64]

    def noise(self, width: int) -> RowNoise:
        """Give a source of noise (n, B, width), which begins anew each time."""
        return RowNoise(self._seeds[:, 1].tolist(), width, self.x.device)

    def draws(self, distribution: Distribution, n: int) -> Tensor:
        """Draw from a distribution that all rows share, n for each: (n, B, L)."""
        drawn = []
        with fixed_noise(0, self.x.device):
            for seed in self._seeds[:, 2].tolist():
                _reseed(seed, self.x.device)
                drawn.append(distribution.sample(torch.Size([n])))
        return torch.stack(drawn, dim=1)


def observed(
    vae: VAE,
    rows: NDArray[Any],
    *,
    batch_size: int,
    seed: int,
    first_row: int = 0,
    on_rows: Progress | None = None,
) -> Iterator[Observed]:
    """Go through rows (n, ...) as they come, batch by batch.

    Parameters
    ----------
    vae : VAE
    rows : ndarray of shape (n, ...)
    batch_size : int
    seed : int
    first_row : int
        The number of ``rows[0]`` among all rows.
    on_rows : callable, optional
        Called after each batch with the rows done and the rows in all.

    Raises
    ------
    InputError
        No rows, rows of another shape, or a `batch_size` that is not a positive integer.
    ConfigError
        A negative `seed` or `first_row`.
    """
    check_int("seed", seed, at_least=0)
    check_int("first_row", first_row, at_least=0)
    if not len(rows):
        raise InputError(f"got no rows (an array of shape {rows.shape}), wanted at least one")
    if rows.shape[1:] != vae.row_shape:
        raise InputError(f"got rows of shape {rows.shape[1:]}, wanted {vae.row_shape}, as the model was trained on")
    device = parameters_device(vae)
    done = 0
    for chunk in batches(rows, batch_size):
        first = first_row + done
        seeds = np.stack([_seeds(seed, number) for number in range(first, first + len(chunk))])
        batch = torch.from_numpy(np.array(chunk)).to(device)
        yield Observed(first, batch, _observe(vae, batch, seeds[:, 0].tolist()), seeds)
        done += len(chunk)
        if on_rows is not None:
            on_rows(done, len(rows))


def _seeds(seed: int, number: int) -> NDArray[np.uint64]:
    """Give a row's seeds: for its observation, for its noise, and for what it draws of the prior."""
    return np.random.SeedSequence((seed, number)).generate_state(3, np.uint64).astype(np.uint64)


def _observe(vae: VAE, rows: Tensor, seeds: Sequence[int]) -> Tensor:
    if not vae.config.binarize:
        return vae.observe(rows)
    drawn = []
    with fixed_noise(0, rows.device):
        for row, seed in zip(rows.split(1), seeds, strict=True):
            _reseed(seed, rows.device)
            drawn.append(vae.observe(row))
    return torch.cat(drawn)


def _reseed(seed: int, device: torch.device) -> None:
    # torch.manual_seed would write down a traceback each time, for devices that are not in use yet.
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
