"""A private folder for the sockets and logs of a Ray of our own, on systems that are like Unix."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["scratch_folder"]

_PREFIX = "vaefeat-"
#: What :func:`tempfile.mkdtemp` makes of it.
_NAME = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")
_LOCK_FILE = ".vaefeat-lock"
# A Unix socket's path holds 107 bytes, and the names of our folder, of one for Ray in it, and of Ray's own take 84.
_MAX_PARENT_BYTES = 23
#: Younger ones may be about to be locked.
_LEAST_AGE_S = 60.0


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder for the time of a ``with`` block, and remove those that killed processes left behind.

    Yields
    ------
    Path
        Which nobody else can enter. For Ray, name a folder of one letter in it: Ray opens its own to everybody, and its
        sockets' paths must be short.
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
            found = folder.lstat()
            ours = _NAME.fullmatch(folder.name) and stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
            if ours and time.time() - found.st_mtime > _LEAST_AGE_S:
                # Without such a file, the folder is somebody else's after all.
                with _locked(folder / _LOCK_FILE, make=False):
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, *, make: bool = True) -> Iterator[None]:
    """Hold a file as long as this process lives, and no longer; raises BlockingIOError where another one does."""
    import fcntl  # not there on Windows, where nobody comes this far

    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if make else 0), 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
