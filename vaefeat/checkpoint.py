"""Checkpoints: the whole state of a training run in one file, without pickle.

A checkpoint is a safetensors file: tensors by name, and one JSON text in its header for everything else. It is written
whole or not at all (:mod:`vaefeat.atomic`), so the last good one survives a full disk, a crash and a kill.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vaefeat.atomic import replace_file
from vaefeat.errors import CheckpointError

__all__ = ["SCHEMA_VERSION", "read_checkpoint", "write_checkpoint"]

SCHEMA_VERSION = 1


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path`.

    Parameters
    ----------
    path : Path
        Its folder is made when missing.
    tensors : mapping of str to Tensor
    meta : mapping
        Anything that JSON can hold.

    Raises
    ------
    CheckpointError
        It cannot be written, for instance because the disk is full; the one before is intact.
    """
    header = {"vaefeat": json.dumps({"schema_version": SCHEMA_VERSION, **meta})}
    content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        before = "the checkpoint before it is intact" if path.is_file() else "there is none before it"
        raise CheckpointError(
            f"could not write the checkpoint {path} ({len(content)} bytes): {error.strerror or error}; {before}. "
            "Free some space and continue with resume=True"
        ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_checkpoint` wrote: tensors on the CPU, and the rest.

    Raises
    ------
    CheckpointError
        Not a checkpoint, corrupt, or written by a newer version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["vaefeat"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"got {path}, which is not a checkpoint of vaefeat or is corrupt ({error}); "
            "remove it and train again with resume=False"
        ) from error
    if meta.pop("schema_version", None) != SCHEMA_VERSION:
        raise CheckpointError(f"got {path} from another version of vaefeat; continue it with that one")
    return tensors, meta
