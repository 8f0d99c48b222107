"""The group of processes that torchrun starts: each is told its place by environment variables."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["in_group", "launch_of_group", "leads_group", "process_group"]

#: Also what other starters of torch's processes set, such as those of batch systems.
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def in_group() -> bool:
    """Whether this process is one of a group."""
    return all(name in os.environ for name in _VARIABLES)


def leads_group() -> bool:
    """Whether this process is the first of its group, or in none."""
    return not in_group() or os.environ["RANK"] == "0"


def launch_of_group() -> str:
    """Name what somebody started once, however often torchrun starts its processes again."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # Groups of a fixed number of machines have no name of their own, but the first machine's torchrun stays the same.
    return run_id if run_id != "none" else f"{platform.node()} {os.getppid()}"


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

    from vaefeat.errors import DeviceError
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
    dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()
