"""How training gets its minibatches: from an array, from the device, or from a stream that memory need not hold.

A feed gives the same minibatches for the same seed, epoch and place in the epoch, whenever it is asked, so that a run
that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import closing
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaefeat.errors import InputError
from vaefeat.streams import RowStream
from vaefeat.world import World

__all__ = ["ArrayFeed", "DeviceFeed", "Feed", "StreamFeed", "make_feed", "sample_of", "split_heldout"]

_MAX_HELDOUT_ROWS = 10_000
_SAMPLED_ROWS = 4096
#: Of the memory that is free on a device, what the rows may take.
_DEVICE_SHARE = 0.5


def sample_of(rows: NDArray[Any] | RowStream) -> NDArray[Any]:
    """Give some thousands of the rows (n, ...), spread over them, which may be sorted."""
    if isinstance(rows, RowStream):
        return rows.sample
    return rows[:: max(1, len(rows) // _SAMPLED_ROWS)][:_SAMPLED_ROWS]


class Feed(ABC):
    """Minibatches of training rows for one worker.

    Attributes
    ----------
    n_train : int
        Rows in an epoch, of all workers.
    batch_size : int
        Rows in a minibatch, of all workers.
    order_of_workers : bool
        Whether another number of workers takes other rows in a minibatch.
    heldout : ndarray of shape (m,), int64
        Numbers of the rows that are never trained on.
    heldout_rows : ndarray of shape (m, ...)
    """

    n_train: int
    batch_size: int
    order_of_workers: ClassVar[bool] = False
    heldout: NDArray[np.int64]

    @property
    @abstractmethod
    def heldout_rows(self) -> NDArray[Any]:
        """The rows that measure the bound."""

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches in an epoch; the last may be short."""
        return math.ceil(self.n_train / self.batch_size)

    def rows_in(self, step: int) -> int:
        """Count the rows of all workers in a minibatch of the epoch."""
        return min(self.batch_size, self.n_train - step * self.batch_size)

    @abstractmethod
    def epoch(self, epoch: int, first_step: int = 0) -> Generator[Tensor]:
        """Give this worker's part (b, ...) of each minibatch from `first_step` on, on the device."""


class ArrayFeed(Feed):
    """Rows of an array, which may be a memory map: one indexing operation a minibatch."""

    def __init__(
        self,
        rows: NDArray[Any],
        *,
        heldout: float,
        seed: int,
        batch_size: int,
        device: torch.device,
        world: World,
    ) -> None:
        self.train, self.heldout = split_heldout(len(rows), heldout, seed)
        self.n_train = len(self.train)
        self.batch_size = min(batch_size, self.n_train)
        self._rows, self._seed, self._device, self._world = rows, seed, device, world

    @property
    def heldout_rows(self) -> NDArray[Any]:
        """Picked out of the array each time."""
        return self._rows[self.heldout]

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[Tensor]:
        """Index the array."""
        order = self._order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size][self._world.share(self.rows_in(step))]
            yield self._taken(chosen)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(self.train)

    def _taken(self, chosen: NDArray[np.int64]) -> Tensor:
        rows = torch.from_numpy(self._rows[chosen])
        if self._device.type == "cpu":
            return rows
        # Pinned memory is copied while the device computes.
        return rows.pin_memory().to(self._device, non_blocking=True)


class DeviceFeed(ArrayFeed):
    """Rows that are kept on a GPU in the form they came; of an epoch only its order crosses the bus.

    The order is that of :class:`ArrayFeed`: a run that goes on where more or less memory is free, or on another device,
    must neither see a row twice nor miss one.
    """

    def __init__(self, rows: NDArray[Any], **settings: Any) -> None:
        super().__init__(rows, **settings)
        self._resident = torch.from_numpy(np.ascontiguousarray(rows)).to(self._device)

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[Tensor]:
        """Index on the device."""
        order = torch.from_numpy(self._order(epoch)).to(self._device)
        for step in range(first_step, self.steps_per_epoch):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size][self._world.share(self.rows_in(step))]
            yield self._resident[chosen]


class StreamFeed(Feed):
    """Rows that are read as they are needed, block by block."""

    order_of_workers = True

    def __init__(self, stream: RowStream, *, batch_size: int, device: torch.device, world: World) -> None:
        self._stream, self._device, self._world = stream, device, world
        self.batch_size = min(batch_size, stream.n_train)
        # Several workers leave out what does not fill a minibatch.
        self.n_train = min(stream.n_train, stream.steps_per_epoch(self.batch_size, world.size) * self.batch_size)
        self.heldout = stream.heldout

    @property
    def heldout_rows(self) -> NDArray[Any]:
        """Kept by the stream."""
        return self._stream.heldout_rows

    @property
    def steps_per_epoch(self) -> int:
        """As many as all workers can take together."""
        return self._stream.steps_per_epoch(self.batch_size, self._world.size)

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[Tensor]:
        """Read ahead while the device computes."""
        minibatches = self._stream.epoch(
            epoch,
            batch_size=self.batch_size,
            first_step=first_step,
            rank=self._world.rank,
            world_size=self._world.size,
        )
        with closing(minibatches):
            for rows in minibatches:
                yield torch.from_numpy(rows).to(self._device, non_blocking=True)


def make_feed(
    rows: NDArray[Any] | RowStream, *, heldout: float, seed: int, batch_size: int, device: torch.device, world: World
) -> Feed:
    """Choose the feed: a GPU that can hold the rows keeps them."""
    if isinstance(rows, RowStream):
        return StreamFeed(rows, batch_size=batch_size, device=device, world=world)
    fits = device.type == "cuda" and rows.nbytes < _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
    feed = DeviceFeed if fits else ArrayFeed
    return feed(rows, heldout=heldout, seed=seed, batch_size=batch_size, device=device, world=world)


def split_heldout(n_rows: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the rows that are trained on and those that measure: at least one of each, at most 10,000 that measure.

    A share of 0 trains on all, be it one row.

    Returns
    -------
    train, heldout : ndarray of int64, sorted
    """
    if share == 0:
        return np.arange(n_rows), np.arange(0)
    if n_rows < 2:
        raise InputError(f"got {n_rows} row to train on, wanted at least 2: one to train on and one to measure")
    n_heldout = min(max(1, round(share * n_rows)), n_rows - 1, _MAX_HELDOUT_ROWS)
    order = np.random.default_rng(seed).permutation(n_rows)
    return np.sort(order[n_heldout:]), np.sort(order[:n_heldout])
