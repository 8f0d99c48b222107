"""The processes that train one model together: who they are, and what they tell each other.

Whoever starts them (torchrun, Ray Train) also starts torch's process group; without one a process is alone, and nothing
here communicates. What communicates is called by all workers, in the same order.
"""

from __future__ import annotations

import platform
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vaefeat.errors import InputError, WorkerLostError
from vaefeat.memory import ran_out_of_memory

__all__ = ["World"]


@dataclass(frozen=True)
class World:
    """The workers of a data-parallel run.

    Attributes
    ----------
    rank : int
        Which of them this process is; 0 writes and shows.
    size : int
        How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """Give the workers of torch's process group, or one where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this is the worker that writes files and shows progress."""
        return self.rank == 0

    def share(self, n_rows: int) -> slice:
        """Cut out this worker's part of a minibatch of `n_rows`: a row more for the first ones where it is uneven."""
        base, extra = divmod(n_rows, self.size)
        start = self.rank * base + min(self.rank, extra)
        return slice(start, start + base + (self.rank < extra))

    def seed(self, seed: int) -> int:
        """Give this worker's seed of noise: `seed` itself where it is alone or the first."""
        return seed if self.rank == 0 else (seed + zlib.crc32(f"rank {self.rank}".encode())) % 2**63

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all workers, in one message; all workers get the same bits."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._together():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(self, values: Tensor) -> Tensor:
        """Give every worker the first one's values."""
        if self.size > 1:
            with self._together():
                dist.broadcast(values, src=0)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Tell whether the flag is raised anywhere."""
        if self.size == 1:
            return flag
        raised = torch.tensor(float(flag), device=device)
        with self._together():
            dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """Give every worker the tensors of all, by rank."""
        if self.size == 1:
            return [tensor]
        every = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._together():
            dist.all_gather(every, tensor)
        return every

    def wait(self, device: torch.device) -> None:
        """Return once all workers have come here."""
        self.any(False, device)

    def refuse_disagreement(self, start: str, device: torch.device) -> None:
        """Find out before workers wait for each other in vain whether all of them start from the same.

        Raises
        ------
        InputError
            `start`, which says what a worker is about to do, differs.
        """
        marks = [int(mark) for mark in self.collect(torch.tensor(zlib.crc32(start.encode()), device=device))]
        for rank, mark in enumerate(marks):
            if mark != marks[0]:
                raise InputError(
                    f"got other rows, settings or another checkpoint on worker {rank} than on worker 0; give all "
                    "workers the same data, configuration and output folder, on storage that they share"
                )

    def neighbours(self, device: torch.device) -> int:
        """Count the workers on this machine, this one included."""
        here = torch.tensor(zlib.crc32(platform.node().encode()), device=device)
        return sum(int(other == here) for other in self.collect(here))

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say what it means when a message cannot be exchanged."""
        try:
            yield
        except RuntimeError as error:
            if ran_out_of_memory(error):
                raise
            raise WorkerLostError(
                f"worker {self.rank} of {self.size} lost contact with another one, which was killed or stopped with an "
                "error of its own; a checkpoint that was written is kept: what starts the workers again goes on from "
                "it, and so does resume=True"
            ) from error
