"""Running out of memory: recognising it, and finding out what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vaefeat.errors import OutOfMemoryError

__all__ = ["explaining_memory", "largest_that_fits", "ran_out_of_memory"]


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory, of the processor or of a GPU, has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's allocator for processors raises nothing more specific.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def largest_that_fits(attempt: Callable[[int], object], below: int) -> int:
    """Find the largest half, quarter, ... of `below` for which `attempt` has memory enough; 0 where none does."""
    size = below // 2
    while size:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            attempt(size)
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            size //= 2
        else:
            return size
    return 0


@contextmanager
def explaining_memory(
    attempt: Callable[[int], object], *, n_rows: int, n_workers: int, device: torch.device, kept: str
) -> Iterator[None]:
    """Say which minibatch would fit where one did not.

    Parameters
    ----------
    attempt : callable
        Computes with so many of the rows, to try.
    n_rows : int
        This worker's rows in the minibatch.
    n_workers : int
        All of which have as many.
    device : torch.device
    kept : str
        What to say about the checkpoint.

    Raises
    ------
    OutOfMemoryError
    """
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        problem = str(error).splitlines()[0]
    # Out of the handler: the error holds on to the tensors of the failed attempt.
    fitting = largest_that_fits(attempt, n_rows)
    hint = (
        f"set batch_size={fitting * n_workers}, which fits"
        if fitting
        else "a single row does not fit either: make the network smaller"
    )
    raise OutOfMemoryError(
        f"a minibatch of batch_size={n_rows * n_workers} does not fit into the memory of {device} ({problem}); "
        f"{hint}.{kept}"
    )
