"""How fast training is, against others and against the machine.

``python -m benchmarks.train --data PATH`` runs pythae's trainer, the loop of PyTorch's example and ours in processes of
their own, one after another and in rounds (A B C, A B C, ...), with the same network, minibatches, threads and rows;
see :mod:`benchmarks.train_contenders` for each and :mod:`benchmarks.train_tasks` for what they are given. Rates are
those of training after its warm-up, the time to a held-out bound is that of everything. The last line is JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.processes import ask_module
from benchmarks.surroundings import surroundings
from benchmarks.train_report import described, shown
from benchmarks.train_tasks import DATA_SETS, Entry, Part, gpu_parts, parts
from vaefeat.atomic import replace_file
from vaefeat.cli import run_command_line
from vaefeat.data import load_rows
from vaefeat.errors import InputError
from vaefeat.processors import available_cpus
from vaefeat.settings import unknown_name

__all__ = ["main", "measure"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_ROUNDS, _QUICK_ROUNDS = 5, 3
#: A quick run begins nothing later, nor measures again what would end later.
_QUICK_S = 240.0
#: A contender that takes longer hangs.
_LONGEST_S = 900.0
_VERSIONS = ("torchvision", "numpy", "pythae")


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with MNIST's IDX files in MNIST/ and CIFAR-10 in CIFAR10/.")],
    quick: Annotated[bool, typer.Option("--quick", help="Short rounds, as many as fit: within five minutes.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Also on a CUDA device, where there is one.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every contender; all processors by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A part; may be repeated. All when not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for everything that was measured.")] = None,
) -> None:
    """Measure, print tables and one line of JSON."""
    began = time.perf_counter()
    n_threads = threads or available_cpus()
    available = list(parts(data.resolve(), threads=n_threads, quick=quick))
    gpu_rows = "not asked for; --gpu measures it"
    if gpu:
        gpu_rows = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device found: not measured"
        if torch.cuda.is_available():
            available += gpu_parts(data.resolve(), threads=n_threads, quick=quick)
    names = [part.name for part in available]
    for name in only or ():
        if name not in names:
            raise unknown_name("part", name, names)
    chosen = [part for part in available if not only or part.name in only]
    _refuse_unusable(data, chosen)
    # Of the code as it was loaded, whatever is written meanwhile; and of the machine before we load it.
    where = {**surroundings(), "load_average": os.getloadavg()[0]}
    where["versions"] |= {name: version(name) for name in _VERSIONS if importlib.util.find_spec(name)}
    found = measure(chosen, rounds=_QUICK_ROUNDS if quick else _ROUNDS, until_s=_QUICK_S if quick else None)
    results = {
        **where,
        "threads": n_threads,
        "quick": quick,
        "seconds": round(time.perf_counter() - began),
        "gpu_rows": gpu_rows,
        **described(found, chosen),
    }
    Console(width=120).print(shown(results), highlight=False)
    if out is not None:
        replace_file(out, (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    said = ("ratios", "commit", "date", "processor", "gpu", "gpu_rows", "versions", "threads", "load_average", "quick")
    print(json.dumps({name: results[name] for name in said}))


def measure(
    chosen: Sequence[Part], *, rounds: int, until_s: float | None = None
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Run all entries of all parts in turns, and then again.

    Parameters
    ----------
    chosen : sequence of Part
    rounds : int
        At most; some parts are measured once.
    until_s : float, optional
        Seconds after which nothing begins, nor may end that was measured before.

    Returns
    -------
    dict
        What the contenders gave: by part, by entry, one for each round; none where there was no time.

    Raises
    ------
    TrainingError
        A contender failed.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        part.name: {entry.key: [] for entry in part.entries} for part in chosen
    }
    costs: dict[str, float] = {}
    began = time.perf_counter()
    # Compiled kernels are kept for the rounds to come, but none are there at first.
    with tempfile.TemporaryDirectory() as kernels:
        for number in range(rounds):
            for part in chosen:
                started = time.perf_counter()
                if number and (part.once or part.name not in costs):
                    continue
                if until_s and started - began + costs.get(part.name, 0.0) > until_s:
                    continue
                for entry in part.entries:
                    print(f"round {number + 1}: {part.name}, {entry.key}", file=sys.stderr, end="", flush=True)
                    one = _run(part.name, entry, Path(kernels))
                    print(f": {_said(one)}", file=sys.stderr, flush=True)
                    found[part.name][entry.key].append(one)
                costs[part.name] = time.perf_counter() - started
    return found


def _run(part: str, entry: Entry, kernels: Path) -> dict[str, Any]:
    return ask_module(
        "benchmarks.train_contenders",
        [entry.contender, json.dumps(asdict(entry.task))],
        name=f"{entry.contender} in {part}",
        threads=entry.task.threads,
        longest_s=_LONGEST_S,
        environment={"TORCHINDUCTOR_CACHE_DIR": str(kernels)},
    )


def _said(one: dict[str, Any]) -> str:
    if "rows_per_s" in one:
        return f"{one['rows_per_s']:,.0f} rows/s"
    if "history" in one:
        seconds, elbo = one["history"][-1]
        return f"{elbo:.2f} nats after {seconds:.1f} s"
    return "done"


def _refuse_unusable(data: Path, chosen: Sequence[Part]) -> None:
    """Refuse what would fail in the middle of it."""
    entries = [entry for part in chosen for entry in part.entries]
    if any(entry.contender == "pythae" for entry in entries) and importlib.util.find_spec("pythae") is None:
        raise InputError(
            "got no package pythae to measure against; `make test` installs it, or `pip install --no-deps pythae "
            "imageio tqdm` (its list of requirements cannot be installed as it is)"
        )
    for folder, shape in {
        DATA_SETS[entry.task.network] for entry in entries if entry.contender not in {"limit", "grid"}
    }:
        rows = load_rows(data / folder, max_rows=2)
        if rows.row_shape != shape:
            raise InputError(f"got rows of shape {rows.row_shape} in {data / folder}, wanted {shape}")


if __name__ == "__main__":
    run_command_line(app)
