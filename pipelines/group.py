"""The group of processes that torchrun starts: each is told its place by environment variables."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from vaefeat.errors import DeviceError, WorkerLostError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["in_group", "leads_group", "meet", "process_group"]

#: Also what other starters of torch's processes set, such as those of batch systems.
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: For all processes to come together once one of them is there.
_MEETING = timedelta(minutes=10)
_POLL_S = 0.05


def in_group() -> bool:
    """Whether this process is one of a group."""
    return all(name in os.environ for name in _VARIABLES)


def leads_group() -> bool:
    """Whether this process is the first of its group, or in none."""
    return not in_group() or os.environ["RANK"] == "0"


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the group for the time of a ``with`` block.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        On CUDA each process takes the GPU of its place on the machine.

    Raises
    ------
    DeviceError
        CUDA was asked for and there is none, or there are fewer GPUs than processes on this machine.
    """
    import torch
    import torch.distributed as dist

    # Its functions have the group, as it is when they are defined, for a default argument. Whatever imported it later
    # would keep the group's threads alive beyond the group, and now and then abort the process at its end.
    import torch.distributed.nn.functional
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from vaefeat.placement import resolve_device

    backend = "gloo"
    if resolve_device(device).type == "cuda":
        place, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= found:
            raise DeviceError(
                f"got process {place + 1} on this machine, which has {found} GPUs; start as many processes as there "
                "are GPUs, or train with train.device=cpu"
            )
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    shared, rank, size = next(rendezvous("env://", timeout=_MEETING))
    store = PrefixStore(meet(shared, rank, size), shared)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def meet(store: Store, rank: int, size: int) -> str:
    """Agree on a name that no earlier group has used.

    torchrun keeps one store for all the groups that it starts, and there a process may find the address of its
    neighbour's predecessor, and wait for the dead. How often it has started processes is no name: machines count for
    themselves.

    Parameters
    ----------
    store : Store
        In which earlier groups may have left anything.
    rank, size : int

    Returns
    -------
    str
        The same for all processes that are here now.

    Raises
    ------
    WorkerLostError
        Somebody did not come within ten minutes.
    """
    mark = uuid.uuid4().hex
    if rank > 0:
        # Under our own mark only the present first process can have answered.
        store.set(f"mark of {rank}", mark)
        try:
            store.wait([f"name for {mark}"], _MEETING)
        except RuntimeError as error:
            raise WorkerLostError(f"process {rank} of {size} did not hear of the first one: {error}") from error
        name = store.get(f"name for {mark}").decode()
        store.set(f"{name} heard by {rank}", "")
        return name
    absent, deadline = set(range(1, size)), time.monotonic() + _MEETING.total_seconds()
    while absent:
        for other in absent:
            if store.check([f"mark of {other}"]):  # of a predecessor, perhaps, who will not hear
                store.set(f"name for {store.get(f'mark of {other}').decode()}", mark)
        absent = {other for other in absent if not store.check([f"{mark} heard by {other}"])}
        if time.monotonic() > deadline:
            raise WorkerLostError(
                f"got {size - len(absent)} of {size} processes within {_MEETING.total_seconds() / 60:.0f} minutes; "
                f"missing: {sorted(absent)}. Look for their errors, and start all of them anew"
            )
        time.sleep(_POLL_S)
    return mark
