"""A folder that is one job's at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vaefeat.errors import InputError

__all__ = ["at_work_in", "working_in"]


def at_work_in(folder: Path, *, lock: str) -> bool:
    """Tell whether a job works in a folder; nothing is made or changed."""
    path = folder / lock
    if os.name != "posix" or not path.is_file():
        return False
    import fcntl

    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def working_in(folder: Path, *, lock: str) -> Iterator[None]:
    """Keep a folder to one job at a time, for the time of a ``with`` block; on Windows nothing is kept.

    Parameters
    ----------
    folder : Path
    lock : str
        A file below it, made where it is missing; what is in it stays.

    Raises
    ------
    InputError
        Another process works in it.
    """
    path = folder / lock
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield
        return
    import fcntl

    # Of the process, so that one which was killed leaves no lock behind.
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"got {folder}, in which another job is at work; wait for it, or give this one a folder of its own"
            ) from None
        yield
