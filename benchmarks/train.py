"""How fast training is, against others and against the machine: ``python -m benchmarks.train --data FOLDER``.

Contenders run in processes of their own, one after another and in rounds (A B C, A B C, ...), with the same network,
minibatches, threads and rows: pythae's trainer, the loop of PyTorch's example, and ours (see
:mod:`benchmarks.train_contenders`). Rates are of training alone, after a warm-up; the time to a held-out bound is of
everything. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.surroundings import surroundings
from benchmarks.train_contenders import Task
from vaefeat.processors import available_cpus, available_memory

__all__ = ["main"]

_ROOT = Path(__file__).parents[1]
_GIB = 2**30
#: What 10 million rows of 784 bytes take, and what must be free for it.
_SCALES = (10_000, 1_000_000, 10_000_000)
_ROW_BYTES = 784
#: Our own settings for the way to a held-out bound: another learning rate and schedule, same minibatches and network.
_OURS = {"learning_rate": 4e-3, "kl_warmup": 0.1, "precision": "bfloat16", "compile": False}


class _UnusableError(Exception):
    """What cannot be measured here, for people."""


class _Runner:
    """Runs tasks in processes, and keeps what they say."""

    def __init__(self, data: Path, threads: int, console: Console) -> None:
        self._data, self._threads, self._console = data, threads, console

    def __call__(self, contender: str, **settings: Any) -> dict[str, Any]:
        task = Task(contender=contender, data=str(self._data), **{"threads": self._threads, **settings})
        with self._console.status(f"{contender} {task.network}, minibatches of {task.batch_size}"):
            done = subprocess.run(  # noqa: S603 - our own module
                [sys.executable, "-m", "benchmarks.train_contenders", json.dumps(asdict(task))],
                cwd=_ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(task.threads), "MKL_NUM_THREADS": str(task.threads)},
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            raise _UnusableError(f"{contender} failed: {done.stderr.strip().splitlines()[-1:]}")
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def rates(run: _Runner, *, quick: bool, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Measure rows/s of every contender, in rounds."""
    rounds, seconds = (2, 3.0) if quick else (5, 6.0)
    cases: list[tuple[str, int, tuple[str, ...]]] = [
        ("mlp", 128, ("pythae", "dataloader", "vaefeat")),
        ("mlp", 512, ("pythae", "dataloader", "vaefeat")),
        ("mlp", 1024, ("vaefeat",)),
        ("conv28", 128, ("pythae", "vaefeat")),
        ("conv32", 128, ("pythae", "vaefeat")),
    ]
    if device == "cuda":
        both = ("pythae", "vaefeat")
        cases = [*(("mlp", size, both) for size in (128, 512, 4096)), ("conv28", 512, both)]
    for network, batch_size, contenders in cases:
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name in contenders:
                n_rows = 20_000 if network == "mlp" else 4000
                # The compiler's kernels for convolutions are slower on processors: `auto` tries them and drops them,
                # which takes it longer than a quick run lasts.
                ours = {"compile": False} if quick and network != "mlp" and device == "cpu" else {}
                measured[name].append(
                    run(
                        name,
                        network=network,
                        batch_size=batch_size,
                        seconds=seconds,
                        n_rows=n_rows,
                        device=device,
                        train=ours if name == "vaefeat" else {},
                    )
                )
        for name, all_of_it in measured.items():
            yield {
                "contender": name,
                "network": network,
                "batch_size": batch_size,
                "device": device,
                "rows_per_s": statistics.median(one["rows_per_s"] for one in all_of_it),
                "rounds": [round(one["rows_per_s"]) for one in all_of_it],
                "peak_mib": max(one["peak_mib"] for one in all_of_it),
                **{key: all_of_it[-1][key] for key in ("precision", "compiled", "notes") if key in all_of_it[-1]},
            }


def time_to_bound(run: _Runner, *, quick: bool) -> dict[str, Any]:
    """Measure the seconds to the held-out bound that pythae has after some epochs."""
    epochs, ours_epochs, rounds = (4, 3, 1) if quick else (10, 5, 3)
    ratios, last = [], {}
    for _ in range(rounds):
        theirs = run("pythae", n_rows=55_000, epochs=epochs)["history"]
        seconds, level = max(theirs, key=lambda point: point[1])
        ours = run("vaefeat", n_rows=55_000, epochs=ours_epochs, level=level, train=_OURS)["history"]
        reached = next((point for point in ours if point[1] >= level), None)
        ratios.append(seconds / reached[0] if reached else 0.0)
        last = {"level": level, "pythae": theirs, "vaefeat": ours}
    return {"ratio": statistics.median(ratios), "ratios": ratios, "epochs": epochs, "settings": _OURS, **last}


def scaling(run: _Runner, *, quick: bool) -> list[dict[str, Any]]:
    """Measure the cost of a row in sets of very different sizes."""
    found: list[dict[str, Any]] = []
    for n_rows in _SCALES:
        free = available_memory()
        if free is not None and free < 2 * n_rows * _ROW_BYTES + _GIB:
            found.append({"n_rows": n_rows, "not_measured": f"{free / _GIB:.1f} GiB of memory are free"})
            continue
        # Compiling would be the same for all, and takes longer than the measurement.
        settings = {"precision": "bfloat16", "compile": False}
        done = [run("vaefeat", n_rows=n_rows, seconds=3.0, train=settings) for _ in range(1 if quick else 3)]
        rate = statistics.median(one["rows_per_s"] for one in done)
        peak = max(one["peak_mib"] for one in done)
        found.append({"n_rows": n_rows, "us_per_row": 1e6 / rate, "peak_mib": peak})
    return found


def ratios_of(rows: Sequence[dict[str, Any]], bound: dict[str, Any] | None, limit: dict[str, Any]) -> dict[str, Any]:
    """Compute what the last line says; None where something was not measured."""
    rate = {(row["contender"], row["network"], row["batch_size"]): row for row in rows if row["device"] == "cpu"}

    def ratio(network: str, batch_size: int, other: str) -> float | None:
        ours, theirs = rate.get(("vaefeat", network, batch_size)), rate.get((other, network, batch_size))
        return ours["rows_per_s"] / theirs["rows_per_s"] if ours and theirs else None

    ours = rate.get(("vaefeat", "mlp", 512))
    return {
        "mlp_b128_vs_dataloader": ratio("mlp", 128, "dataloader"),
        "mlp_b512_vs_dataloader": ratio("mlp", 512, "dataloader"),
        "mlp_b128_vs_pythae": ratio("mlp", 128, "pythae"),
        "conv_vs_pythae": ratio("conv28", 128, "pythae"),
        "conv32_vs_pythae": ratio("conv32", 128, "pythae"),
        "time_to_elbo_vs_pythae": bound["ratio"] if bound else None,
        "mfu": limit["seconds"][ours["precision"]] * ours["rows_per_s"] / 512 if ours else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST/ and CIFAR10/")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: at most five minutes")
    parser.add_argument("--gpu", action="store_true", help="also on a CUDA device, where there is one")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="of every contender")
    parser.add_argument("--out", type=Path, help="a JSON file for everything that was measured")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        results = _measure(options, console)
    except _UnusableError as error:
        raise SystemExit(f"error: {error}") from None
    _print(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({"ratios": results["ratios"], **{k: results[k] for k in ("commit", "date", "processor")}}))


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    for name in ("MNIST", "CIFAR10"):
        if not (options.data / name).is_dir():
            raise _UnusableError(f"got --data {options.data}, in which there is no folder {name}")
    if importlib.util.find_spec("pythae") is None:
        raise _UnusableError("pythae is not installed; `make lint` or any other target of make installs it")
    if options.threads < 1:
        raise _UnusableError(f"got --threads {options.threads}, wanted at least 1")
    run = _Runner(options.data.resolve(), options.threads, console)
    started = time.perf_counter()
    found = list(rates(run, quick=options.quick))
    limit = run("matmul", batch_size=512, seconds=2.0)
    bound = time_to_bound(run, quick=options.quick)
    grid = run("grid", threads=1)
    sizes = scaling(run, quick=options.quick)
    gpu = "not asked for (--gpu)"
    if options.gpu:
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device found: not measured"
        if torch.cuda.is_available():
            found += rates(run, quick=options.quick, device="cuda")
    return {
        **surroundings(),
        "threads": options.threads,
        "quick": options.quick,
        "seconds": round(time.perf_counter() - started),
        "rates": found,
        "matmul": limit,
        "time_to_elbo": bound,
        "grid": {**grid, "speed_up": grid["alone_s"] / grid["together_s"]},
        "scaling": sizes,
        "gpu": gpu,
        "ratios": ratios_of(found, bound, limit),
    }


def _print(results: dict[str, Any]) -> None:
    console = Console(width=110)
    table = Table("network", "batch", "contender", "rows/s", "against ours", "peak MiB", "how", box=None)
    for row in results["rates"]:
        same = ("network", "batch_size", "device")
        ours = next(
            one for one in results["rates"] if one["contender"] == "vaefeat" and all(one[k] == row[k] for k in same)
        )
        how = f"{row['precision']}, {'compiled' if row['compiled'] else 'kernels'}" if "precision" in row else ""
        table.add_row(
            f"{row['network']} {row['device']}",
            str(row["batch_size"]),
            row["contender"],
            f"{row['rows_per_s']:,.0f}",
            f"{row['rows_per_s'] / ours['rows_per_s']:.2f}",
            f"{row['peak_mib']:,.0f}",
            how,
        )
    console.print(table)
    bound, grid = results["time_to_elbo"], results["grid"]
    console.print(
        f"time to {bound['level']:.2f} nats held out, where pythae is after {bound['epochs']} epochs: "
        f"{bound['ratio']:.1f} times sooner\n"
        f"{grid['models']} small models as one batch: {grid['speed_up']:.1f} times as fast as one after another\n"
        f"share of the limit that matrix products set (MLP, 512): {results['ratios']['mfu']:.2f}\n"
        f"GPU: {results['gpu']}",
        highlight=False,
    )
    for size in results["scaling"]:
        cost = f"{size['us_per_row']:.1f} µs" if "us_per_row" in size else f"not measured: {size['not_measured']}"
        console.print(f"cost of a row among {size['n_rows']:>10,}: {cost}", highlight=False)


if __name__ == "__main__":
    main()
