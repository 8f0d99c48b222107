"""What embedding costs without a job: loops of a few lines over ONNX Runtime, in one process.

``python -m benchmarks.jobs_loops memory|rows|images MODEL DATA`` prints one line of JSON: rows that are in memory, or
rows or images that are read from Parquet, as the job reads them. ONNX Runtime has all processors, as it has by default,
and nothing is written.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnxruntime as ort
import pyarrow.parquet as pq
import typer
from numpy.typing import NDArray
from PIL import Image

__all__ = ["embed_images", "embed_memory", "embed_rows"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_WARM_UP_CALLS = 5


def embed_memory(session: ort.InferenceSession, rows: NDArray[Any], *, batch_size: int, n_rows: int) -> float:
    """Embed rows that are in memory, again and again until there are so many; gives rows per second."""
    _warm_up(session, rows[:batch_size])
    began, done = time.perf_counter(), 0
    while done < n_rows:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            session.run(["mean"], {"rows": batch})
            done += len(batch)
    return done / (time.perf_counter() - began)


def embed_rows(session: ort.InferenceSession, folder: Path, *, batch_size: int, n_rows: int) -> float:
    """Read and embed the rows of bytes in a folder of Parquet files; gives rows per second."""
    shape = session.get_inputs()[0].shape[1:]
    n_bytes = math.prod(shape)
    _warm_up(session, np.zeros((batch_size, *shape), np.uint8))
    began, done = time.perf_counter(), 0
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=batch_size):
                cells = batch.column(0)
                values = np.frombuffer(cells.buffers()[1], np.uint8, len(cells) * n_bytes, cells.offset * n_bytes)
                session.run(["mean"], {"rows": values.reshape(-1, *shape)})
                done += len(cells)
                if done >= n_rows:
                    return done / (time.perf_counter() - began)
    return done / (time.perf_counter() - began)


def embed_images(session: ort.InferenceSession, path: Path, *, batch_size: int, n_rows: int) -> float:
    """Read, decode with Pillow, and embed the images of a Parquet file; gives rows per second."""
    shape = session.get_inputs()[0].shape[1:]
    _warm_up(session, np.zeros((batch_size, *shape), np.uint8))
    began, done = time.perf_counter(), 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=batch_size, columns=["image"]):
            cells = batch.column(0).to_pylist()[: n_rows - done]
            pixels = [np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in cells]
            session.run(["mean"], {"rows": np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))})
            done += len(cells)
            if done >= n_rows:
                break
    return done / (time.perf_counter() - began)


def _warm_up(session: ort.InferenceSession, rows: NDArray[Any]) -> None:
    for _ in range(_WARM_UP_CALLS):
        session.run(["mean"], {"rows": rows})


@app.command()
def main(
    what: Annotated[Literal["memory", "rows", "images"], typer.Argument()],
    model: Annotated[Path, typer.Argument(help="encoder.onnx")],
    data: Annotated[
        Path,
        typer.Argument(help="A .npy file, a folder of Parquet files of rows, or one of images."),
    ],
    n_rows: Annotated[int, typer.Option(min=1)],
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Measure, and print one line of JSON."""
    session = ort.InferenceSession(model.read_bytes(), providers=["CPUExecutionProvider"])
    if what == "memory":
        rate = embed_memory(session, np.load(data), batch_size=batch_size, n_rows=n_rows)
    elif what == "rows":
        rate = embed_rows(session, data, batch_size=batch_size, n_rows=n_rows)
    else:
        rate = embed_images(session, data, batch_size=batch_size, n_rows=n_rows)
    cpu_s = sum(os.times()[:2])
    print(json.dumps({"rows_per_s": rate, "batch_size": batch_size, "cpu_s": cpu_s}))


if __name__ == "__main__":
    app()
