"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["exchange_files", "replace_file", "sync_folder"]


def replace_file(path: Path, content: bytes | memoryview, *, private: bool = False) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and take the name by a rename.

    Parameters
    ----------
    path : Path
        Its folder must exist.
    content : bytes or memoryview
    private : bool
        Only the user may read or write the file, from its first byte on, whatever their umask.

    Raises
    ------
    OSError
        The disk is full or the folder cannot be written; it names the file. `path` is as it was and no temporary file
        is left.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not private:
            # mkstemp makes files private; what a person's own umask allows is what they expect of a result.
            Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk is told of the bytes alone
        raise
    sync_folder(path.parent)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def exchange_files(staging: Path, folder: Path, names: list[str]) -> None:
    """Move files from one folder into another; if one cannot be moved, put back what was there.

    Parameters
    ----------
    staging : Path
        Holds the files, on the same disk; to be deleted after this.
    folder : Path
    names : list of str

    Raises
    ------
    OSError
        The folder is as it was.
    """
    before = staging / "before"
    before.mkdir()
    done: list[str] = []
    try:
        for name in names:
            if (folder / name).is_file():
                # A copy, so that the old file stays readable under its name until the new one takes that over.
                shutil.copyfile(folder / name, before / name)
            (staging / name).replace(folder / name)
            done.append(name)
    except OSError:
        for name in done:
            if (before / name).exists():
                (before / name).replace(folder / name)
            else:
                (folder / name).unlink()
        raise
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk: a rename in it is durable only then."""
    # Windows cannot open folders.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
