"""Offline embedding against a bare loop: rates, memory, and what it costs to go on after a kill.

``python -m benchmarks.jobs --data PATH`` embeds MNIST repeated to a million rows, from Parquet, and CIFAR-10's JPEGs,
from Parquet, with ``python -m pipelines embed``, in turns with the loops of :mod:`benchmarks.jobs_loops` over the same
encoders. Rates of the job count from the first encoder's start to the last part's receipt, writing included; how long
Ray takes to start is told beside them. Then the job is killed in the middle and goes on. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.jobs_report import billion, ratios, shown
from benchmarks.surroundings import surroundings
from vaefeat import ModelConfig, TrainConfig, pretrain
from vaefeat.atomic import replace_file
from vaefeat.cli import run_command_line
from vaefeat.data import load_rows
from vaefeat.errors import JobError
from vaefeat.processors import available_cpus

__all__ = ["Sizes", "main", "measure"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_ROOT = Path(__file__).parents[1]
_GROUP_ROWS, _FILE_ROWS = 16_384, 131_072
_BATCH_SIZES = (256, 1024)
_LONGEST_S = 1800.0
_SAMPLE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is embedded.

    Attributes
    ----------
    rows, fewer_rows : int
        Of the tensors; memory is compared between the two.
    images : int
    part_rows : int
        Of a part, in all runs: a quick run, too, has parts enough to share out.
    rounds : int
    """

    rows: int
    fewer_rows: int
    images: int
    part_rows: int
    rounds: int


_WHOLE = Sizes(rows=1_000_000, fewer_rows=100_000, images=50_000, part_rows=16_384, rounds=3)
_QUICK = Sizes(rows=100_000, fewer_rows=20_000, images=5_000, part_rows=2_048, rounds=1)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with MNIST's IDX files in MNIST/ and CIFAR-10 in CIFAR10/.")],
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the rows, one round.")] = False,
    out: Annotated[Path | None, typer.Option(help="A JSON file for everything that was measured.")] = None,
) -> None:
    """Measure, print a table and one line of JSON."""
    where = {**surroundings(), "load_average": os.getloadavg()[0], "cpus": available_cpus(), "quick": quick}
    with tempfile.TemporaryDirectory() as folder:
        results = {**where, **measure(data, Path(folder), _QUICK if quick else _WHOLE)}
    Console(width=120).print(shown(results), highlight=False)
    if out is not None:
        replace_file(out, (json.dumps(results, indent=1) + "\n").encode())
    print(json.dumps({name: value for name, value in results.items() if name != "found"}))


def measure(data: Path, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Make inputs and encoders, run everything in turns, and give what was found as plain values.

    Raises
    ------
    JobError
        A run failed.
    """
    rows = load_rows(data / "MNIST").array
    images = _first_images(data / "CIFAR10" / "train.parquet", folder / "images.parquet", sizes.images)
    np.save(folder / "rows.npy", rows[: min(len(rows), sizes.rows)])
    for name, count in (("many", sizes.rows), ("fewer", sizes.fewer_rows)):
        _write_rows(rows, folder / name, count)
    _train(rows[:2048], folder / "mnist", hidden=512)
    _train(load_rows(images, max_rows=2048).array, folder / "cifar10", hidden=256)
    found: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("loop_rows", "loop_memory", "job_rows", "loop_images", "job_images", "job_fewer_rows")
    }
    for _ in range(sizes.rounds):
        found["loop_memory"].append(_best_loop("memory", folder / "mnist", folder / "rows.npy", sizes.rows))
        found["loop_rows"].append(_best_loop("rows", folder / "mnist", folder / "many", sizes.rows))
        found["job_rows"].append(_job(folder / "mnist", folder / "many", folder / "out", sizes))
        found["loop_images"].append(_best_loop("images", folder / "cifar10", images, sizes.images))
        found["job_images"].append(_job(folder / "cifar10", images, folder / "pictures", sizes, keep=True))
    found["job_fewer_rows"].append(_job(folder / "mnist", folder / "fewer", folder / "out", sizes))
    written = sum(path.stat().st_size for path in (folder / "pictures").glob("part-*"))
    rate = max(one["rows_per_s"] for one in found["job_images"])
    peaks = [min(one["peak_mb"] for one in found[name]) for name in ("job_rows", "job_fewer_rows")]
    return {
        "ratios": ratios(found),
        "rss_growth_mb": round(peaks[0] - peaks[1], 1),
        "resume_overhead_s": _resume_overhead_s(folder, sizes, found["job_rows"]),
        "start_s": round(min(one["start_s"] for one in found["job_rows"]), 1),
        "billion_images": billion(
            images_per_s=rate,
            cpus=available_cpus(),
            read_bytes=images.stat().st_size / sizes.images,
            written_bytes=written / sizes.images,
        ),
        "found": found,
    }


def _first_images(source: Path, target: Path, count: int) -> Path:
    table = pq.read_table(source, columns=["image"])[:count]
    pq.write_table(table, target, row_group_size=2_500)
    return target


def _write_rows(rows: NDArray[np.uint8], folder: Path, count: int) -> None:
    """Write rows again and again, as bytes, which is the form of tensors that Parquet reads fastest."""
    folder.mkdir()
    width = rows[0].nbytes
    for number, start in enumerate(range(0, count, _FILE_ROWS)):
        chosen = rows[np.arange(start, min(start + _FILE_ROWS, count)) % len(rows)]
        cells = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(chosen), [None, pa.py_buffer(chosen)])
        pq.write_table(
            pa.table({"pixels": cells}),
            folder / f"{number:03}.parquet",
            row_group_size=_GROUP_ROWS,
            use_dictionary=False,
            compression="none",
        )


def _train(rows: NDArray[np.uint8], folder: Path, *, hidden: int) -> None:
    """Make an encoder; what is measured does not depend on what its weights are."""
    model = ModelConfig(latent_dim=64, network="mlp", hidden_dims=(hidden, hidden), normalization=False)
    pretrain(rows, model=model, train=TrainConfig(max_epochs=1), out=folder, progress=False)


def _best_loop(what: str, bundle: Path, data: Path, n_rows: int) -> dict[str, Any]:
    runs = []
    for batch_size in _BATCH_SIZES:
        words = [what, str(bundle / "encoder.onnx"), str(data), "--n-rows", str(n_rows)]
        runs.append(_run(["-m", "benchmarks.jobs_loops", *words, "--batch-size", str(batch_size)])[0])
    return max(runs, key=lambda run: float(run["rows_per_s"]))


def _job(bundle: Path, data: Path, out: Path, sizes: Sizes, *, keep: bool = False) -> dict[str, Any]:
    _remove(out)
    done, peak_mb = _run(_words(bundle, data, out, sizes))
    if not keep:
        _remove(out)
    return {**done, "start_s": done["seconds"] - done["embedding_s"], "peak_mb": peak_mb}


def _words(bundle: Path, data: Path, out: Path, sizes: Sizes) -> list[str]:
    places = ["--bundle", str(bundle), "--data", str(data), "--out", str(out)]
    return ["-m", "pipelines", "embed", *places, "--part-rows", str(sizes.part_rows), "--json"]


def _resume_overhead_s(folder: Path, sizes: Sizes, undisturbed: list[dict[str, Any]]) -> float:
    """Kill the job when half of it is done, go on, and give the seconds beyond those that the rest itself takes."""
    out = folder / "out"
    words = _words(folder / "mnist", folder / "many", out, sizes)
    n_parts = undisturbed[0]["parts"]
    with _started(words) as process:
        while len(list(out.glob("part-*"))) < n_parts // 2:
            if process.poll() is not None:
                raise JobError(f"the job was over before it could be killed: {process.communicate()[1][-500:]!r}")
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    again, _ = _run(words)
    left = sizes.rows * (1 - int(again["parts_done_before"]) / int(n_parts))
    rate = max(float(one["rows_per_s"]) for one in undisturbed)
    return round(float(again["seconds"]) - left / rate, 2)


def _run(words: list[str]) -> tuple[dict[str, Any], float]:
    """Run one of our modules; give its last line, and the most memory of it and its processes, in MB."""
    with _started(words) as process, _watched(process.pid) as peak:
        out, errors = process.communicate(timeout=_LONGEST_S)
    if process.returncode:
        raise JobError(f"{' '.join(words[:3])} failed with status {process.returncode}: {errors.strip()[-500:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    print(f"{' '.join(words[1:3])}: {found['rows_per_s'] or 0:,.0f} rows/s", file=sys.stderr, flush=True)
    return found, peak[0] / 1e6


@contextmanager
def _started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.Popen(  # noqa: S603 - our own modules
        [sys.executable, *words],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def _watched(pid: int) -> Iterator[list[float]]:
    """Keep the most memory that a process and those below it have for themselves, what they share left out."""
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_S):
            peak[0] = max(peak[0], _private_bytes(pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _private_bytes(pid: int) -> float:
    total = 0.0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for process in processes:
        try:
            memory = process.memory_info()
        except psutil.NoSuchProcess:
            continue
        total += memory.rss - memory.shared
    return total


def _remove(out: Path) -> None:
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if out.is_dir():
        out.rmdir()


if __name__ == "__main__":
    run_command_line(app)
