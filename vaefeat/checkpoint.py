"""Checkpoints: the whole state of a training run in one file, without pickle.

A checkpoint is a safetensors file: tensors by name, and one JSON text in its header for everything else. It is written
whole or not at all (:mod:`vaefeat.atomic`), so the last good one survives a full disk, a crash and a kill.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vaefeat.atomic import replace_file
from vaefeat.errors import CheckpointError
from vaefeat.world import World

__all__ = [
    "SCHEMA_VERSION",
    "memory_tensors",
    "noise_tensors",
    "optimizer_tensors",
    "read_checkpoint",
    "refuse_other_run",
    "restore_memory",
    "restore_noise",
    "restore_optimizers",
    "under",
    "write_checkpoint",
]

SCHEMA_VERSION = 2


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


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pick the tensors whose names begin with `prefix`, and drop it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Give the state of optimizers as named tensors."""
    return {
        f"optimizer.{number}.{index}.{name}": value
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave."""
    for number, optimizer in enumerate(optimizers):
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in under(f"optimizer.{number}.", tensors).items():
            index, _, key = name.partition(".")
            states.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def noise_tensors(device: torch.device, world: World) -> dict[str, Tensor]:
    """Give the states of every worker's random generators; all workers call this together."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {
        f"random.{kind}.{rank}": of_rank.cpu()
        for kind, state in states.items()
        for rank, of_rank in enumerate(world.collect(state.to(device)))
    }


def restore_noise(
    tensors: Mapping[str, Tensor], device: torch.device, world: World, *, n_workers: int, place: Sequence[int]
) -> None:
    """Put back this worker's random generators, or seed them by the `place` where others than before go on."""
    if n_workers != world.size:
        # No state is theirs, but they must not repeat the noise of the beginning.
        seed = np.random.SeedSequence([*place, world.rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        return
    torch.set_rng_state(tensors[f"random.cpu.{world.rank}"])
    if device.type == "cuda" and f"random.cuda.{world.rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"random.cuda.{world.rank}"], device)


def memory_tensors(memory: nn.Module, world: World) -> dict[str, Tensor]:
    """Give what every worker's objective keeps between minibatches; all workers call this together."""
    return {
        f"memory.{rank}.{name}": of_rank
        for name, buffer in memory.named_buffers()
        for rank, of_rank in enumerate(world.collect(buffer))
    }


def restore_memory(memory: nn.Module, tensors: Mapping[str, Tensor], world: World) -> None:
    """Put back what this worker's objective kept, or where there was no such worker, what the first one's did."""
    own = under(f"memory.{world.rank}.", tensors) or under("memory.0.", tensors)
    memory.load_state_dict(own)


def refuse_other_run(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was made with other settings or rows, and name them.

    Raises
    ------
    CheckpointError
    """
    differing = [
        f"{group}.{key}: {_nested(theirs, group, key)!r} there, {_nested(ours, group, key)!r} here"
        for group in sorted(theirs.keys() | ours.keys())
        for key in sorted({*theirs.get(group, {}), *ours.get(group, {})})
        if _nested(theirs, group, key) != _nested(ours, group, key)
    ]
    if differing:
        raise CheckpointError(
            f"got the checkpoint {path} of another run ({'; '.join(differing)}); continue with the settings and rows "
            "it was made with, or start over with resume=False"
        )


def _nested(values: Mapping[str, Any], group: str, key: str) -> Any:
    return values.get(group, {}).get(key)
