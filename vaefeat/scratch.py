"""A private folder for the sockets and logs of a Ray of our own."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["scratch_folder"]

_PREFIX = "vaefeat-"
_LOCK_FILE = "lock"
# A Unix socket's path holds 107 bytes, and our folder's and Ray's own names take 82 of them.
_MAX_PARENT_BYTES = 25
#: Younger ones may be about to be locked.
_LEAST_AGE_S = 60.0


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder for the time of a ``with`` block, and remove those that killed processes left behind.

    Ray itself would leave its folder readable for everyone.

    Yields
    ------
    Path
        Short enough for Ray's Unix sockets.
    """
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > _MAX_PARENT_BYTES:
        parent = "/tmp"  # noqa: S108  # the folder in it is private
    _remove_deserted(Path(parent))
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        with _locked(folder / _LOCK_FILE):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_deserted(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.stat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < _LEAST_AGE_S:
                continue
            # Where there is no such file, the folder is somebody else's.
            with _locked(folder / _LOCK_FILE, mode="r"):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, *, mode: str = "w") -> Iterator[None]:
    """Hold a file as long as this process lives, and no longer; raises BlockingIOError where another one does."""
    import fcntl

    with path.open(mode) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
