"""What every verb of the command line reads and writes in the same way."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vaefeat.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BUNDLE", "DATA", "IMAGE_SIZE", "SEED", "SPLIT", "parts", "require_suffix", "write_array", "write_file"]

#: Help for arguments that several verbs take.
DATA = "A .npy or .npz file, Parquet, a folder of images, or of MNIST's IDX files."
BUNDLE = "Folder of a bundle."
SPLIT = "Which, where the data have splits."
IMAGE_SIZE = "Resize images to this height and width."
SEED = "The same seed gives the same result."

_ROWS_A_CALL = 4096


def parts(rows: NDArray[Any], description: str) -> Iterator[NDArray[Any]]:
    """Cut rows into parts, with a bar on a terminal."""
    from rich.progress import track

    console = Console(stderr=True)
    starts = range(0, len(rows), _ROWS_A_CALL)
    for start in track(starts, description, console=console, transient=True, disable=not console.is_terminal):
        yield rows[start : start + _ROWS_A_CALL]


def require_suffix(out: Path, *suffixes: str) -> None:
    """Refuse another kind of file before anything takes long."""
    if out.suffix not in suffixes:
        raise InputError(f"got the output file {out}, wanted a name that ends in {' or '.join(suffixes)}")


def write_array(path: Path, array: object) -> None:
    """Write an array file that appears whole or not at all."""
    import numpy as np

    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=False)
    write_file(path, file.getvalue())


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; one that was there is replaced."""
    from vaefeat.atomic import replace_file

    try:
        replace_file(path, content)
    except OSError as error:
        raise InputError(f"could not write {path}: {error.strerror or error}; choose another place") from error
