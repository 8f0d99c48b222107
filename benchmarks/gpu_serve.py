"""How fast an encoder is on a GPU, way by way, and whether it computes the same.

``python -m benchmarks.gpu_serve`` calls one encoder in this process with batches of each bucket's size: plainly, with
memory that is bound to the session, with CUDA graphs, in float16, and with TensorRT where it is installed; in rounds
(A B C, A B C, ...), medians. Beside each rate stands the share of a call in which the GPU had nothing to do, by what
CUDA's profiler saw of it: the host's share. Features are compared with the CPU's, and those of one bucket with those of
the next. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.serve_payloads import bundle_and_rows
from benchmarks.surroundings import surroundings
from vaefeat.atomic import replace_file
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.cli import run_command_line
from vaefeat.encoder import OnnxEncoder
from vaefeat.plan import ExecutionPlan, buckets_up_to
from vaefeat.quantization import quantize
from vaefeat.runtime import OpenedGraph, choose_device, open_graph
from vaefeat.tensorrt import why_no_tensorrt

__all__ = ["main", "measure"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_LARGEST = 512
_PROFILED_CALLS = 50

Compute = Callable[[NDArray[Any]], NDArray[np.float32]]


@app.command()
def main(
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each figure.")] = 0.5,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are taken over these.")] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="On the CPU, for moments: whether it works.")] = False,
    out: Annotated[Path | None, typer.Option("--results", help="A JSON file for everything that was measured.")] = None,
) -> None:
    """Measure, print a table and one line of JSON."""
    device, reason = choose_device("cpu" if dry_run else "cuda")
    where = surroundings()
    with tempfile.TemporaryDirectory(prefix="v-") as place:
        rows = bundle_and_rows(Path(place) / "bundle")
        bundle = load_bundle(Path(place) / "bundle")
        half = quantize(bundle, rows, to="float16")
        ways, notes = make_ways(bundle, half, device=device)
        expected = OnnxEncoder(bundle, device="cpu").embed(rows)
        found = measure(
            {name: compute for name, (compute, _) in ways.items()},
            rows,
            seconds=0.02 if dry_run else seconds,
            rounds=1 if dry_run else rounds,
        )
        agreement = {name: compared(compute, rows, expected) for name, (compute, _) in ways.items()}
        plans = {name: plan for name, (_, plan) in ways.items() if plan is not None}
    results = {
        **where,
        "device": device,
        "device_reason": reason,
        "dry_run": dry_run,
        "notes": notes,
        "ways": found,
        "agreement": agreement,
        "graphs": {name: plan.graphs for name, plan in plans.items()},
        "pinned": {name: plan.pinned for name, plan in plans.items()},
    }
    Console(width=120).print(shown(found, agreement), highlight=False)
    if out is not None:
        replace_file(out, (json.dumps(results, indent=1) + "\n").encode())
    print(json.dumps({name: results[name] for name in ("gpu", "commit", "dry_run", "graphs", "pinned", "notes")}))


def make_ways(
    bundle: Bundle, half: Bundle, *, device: str
) -> tuple[dict[str, tuple[Compute, ExecutionPlan | None]], list[str]]:
    """Open the encoder in every way that there is here.

    Returns
    -------
    dict of str to (callable, ExecutionPlan or None)
        From rows to means.
    list of str
        What is missing, and why.
    """
    plain = OnnxEncoder(bundle, device=device)
    ways: dict[str, tuple[Compute, ExecutionPlan | None]] = {"plain": (_means(plain.compute), None)}
    for name, made, captures in (
        ("bound", bundle, False),
        ("graphs", bundle, device == "cuda"),
        ("float16 graphs", half, device == "cuda"),
    ):
        plan = _plan(made, device=device, captures=captures)
        ways[name] = (_means(plan.compute), plan)
    missing = why_no_tensorrt() if device == "cuda" else "TensorRT: not on a CPU"
    if not missing:
        plan = _plan(bundle, device="tensorrt", captures=False)
        ways["TensorRT"] = (_means(plan.compute), plan)
    return ways, [missing] if missing else []


def _plan(bundle: Bundle, *, device: str, captures: bool) -> ExecutionPlan:
    content, buckets = bundle.read("encoder.onnx"), buckets_up_to(_LARGEST)

    def opening(*, captures: bool) -> OpenedGraph:
        return open_graph(content, what=bundle.name, device=device, buckets=buckets, captures=captures)

    manifest = bundle.manifest
    return ExecutionPlan(opening, captures=captures, buckets=buckets, rows=manifest.input, outputs=manifest.outputs)


def _means(compute: Callable[[NDArray[Any], Sequence[str]], list[NDArray[np.float32]]]) -> Compute:
    return lambda rows: compute(rows, ["mean"])[0]


def measure(
    ways: Mapping[str, Compute], rows: NDArray[Any], *, seconds: float, rounds: int
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Call each way in turn with batches of each size, and then again.

    Returns
    -------
    dict
        By way and number of rows: ``rows_per_s`` and ``call_us``, medians; ``device_us`` that the GPU was busy in a
        call, and ``host_share``, the rest of it; None where there is no GPU.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in ways}
    for size in buckets_up_to(_LARGEST):
        batch = rows[:size]
        calls: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, compute in ways.items():
                calls[name].append(_call_s(compute, batch, seconds))
        for name, compute in ways.items():
            call_s = statistics.median(calls[name])
            device_s = _device_s(compute, batch)
            found[name][str(size)] = {
                "rows_per_s": size / call_s,
                "call_us": 1e6 * call_s,
                "device_us": None if device_s is None else 1e6 * device_s,
                "host_share": None if device_s is None else max(0.0, 1 - device_s / call_s),
            }
    return found


def _call_s(compute: Compute, batch: NDArray[Any], seconds: float) -> float:
    """Give the median of a call's times."""
    for _ in range(3):
        compute(batch)
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends:
        compute(batch)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _device_s(compute: Compute, batch: NDArray[Any]) -> float | None:
    """Give the seconds of a call that kernels and copies take, which CUDA's profiler sees whoever launches them."""
    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED_CALLS):
            compute(batch)
    total_us = sum(event.self_device_time_total for event in profile.key_averages())
    return total_us * 1e-6 / _PROFILED_CALLS if total_us else None


def compared(compute: Compute, rows: NDArray[Any], expected: NDArray[np.float32]) -> dict[str, Any]:
    """Compare features with the CPU's, and those of each bucket with those of the largest.

    Returns
    -------
    dict
        ``from_cpu``: the largest difference, in standard deviations of its latent; ``between_buckets`` the same;
        ``same_bits``: whether the latter is nothing at all; ``beside_others``: whether rows have the same bits
        whatever shares their batch.
    """
    scale = expected.std(axis=0)
    largest = compute(rows[:_LARGEST])
    parts = {
        size: np.concatenate([compute(rows[start : start + size]) for start in range(0, _LARGEST, size)])
        for size in buckets_up_to(_LARGEST)
    }
    shuffled = np.random.default_rng(0).permutation(_LARGEST)
    return {
        "from_cpu": float(np.abs((largest - expected[:_LARGEST]) / scale).max()),
        "between_buckets": max(float(np.abs((part - largest) / scale).max()) for part in parts.values()),
        "same_bits": all(part.tobytes() == largest.tobytes() for part in parts.values()),
        "beside_others": compute(rows[shuffled]).tobytes() == largest[shuffled].tobytes(),
    }


def shown(
    found: Mapping[str, Mapping[str, Mapping[str, float | None]]], agreement: Mapping[str, Mapping[str, Any]]
) -> Table:
    """Draw up the table."""
    sizes = list(next(iter(found.values())))
    table = Table("rows/s, and the host's share", *sizes, "from the CPU", "same bits", box=None, pad_edge=False)
    for name, by_size in found.items():
        cells = []
        for size in sizes:
            share = by_size[size]["host_share"]
            cells.append(f"{by_size[size]['rows_per_s']:,.0f}" + ("" if share is None else f" {share:.0%}"))
        one = agreement[name]
        table.add_row(name, *cells, f"{one['from_cpu']:.1e}", "yes" if one["same_bits"] else "no")
    return table


if __name__ == "__main__":
    run_command_line(app)
