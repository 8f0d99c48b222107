"""What the machine does without a service: ONNX Runtime and the image decoder, called from threads in a loop.

``python -m benchmarks.in_process MODEL`` prints one line of JSON. With several threads the encoder is measured both
ways, operators cut into threads and one session for each thread; the better one counts.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import typer
from numpy.typing import NDArray

from vaefeat.image_decoding import decode_image
from vaefeat.runtime import open_graph

__all__ = ["decoder_rate", "encoder_rates"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_WARM_UP_CALLS = 3
_GPU_SESSIONS = 2


def encoder_rates(
    model: bytes, rows: NDArray[Any], *, threads: int, seconds: float, device: str = "cpu"
) -> dict[str, float]:
    """Measure calls with these rows.

    Parameters
    ----------
    model : bytes
        An ONNX graph.
    rows : ndarray of shape (n, ...)
    threads : int
    seconds : float
        For each way.
    device : {"cpu", "cuda"}

    Returns
    -------
    dict of str to float
        Rows per second: ``operators`` are cut into threads, or ``sessions`` run side by side.
    """
    (whole,) = _sessions(model, 1, threads=threads, device=device)
    # A GPU computes for few callers at a time, and each session takes some of its memory.
    side_by_side = _sessions(model, threads if device == "cpu" else _GPU_SESSIONS, threads=1, device=device)
    return {
        "operators": len(rows) * _calls_per_s([_call(whole, rows)], seconds=seconds),
        "sessions": len(rows) * _calls_per_s([_call(one, rows) for one in side_by_side], seconds=seconds),
    }


def decoder_rate(images: Sequence[bytes], *, shape: tuple[int, int, int], threads: int, seconds: float) -> float:
    """Measure :func:`vaefeat.images.decode_image`; images per second of all threads."""

    def decode() -> None:
        for image in images:
            decode_image(image, name="image", shape=shape)

    return len(images) * _calls_per_s([decode] * threads, seconds=seconds)


def _sessions(model: bytes, n: int, *, threads: int, device: str) -> list[ort.InferenceSession]:
    if device != "cpu":
        return [open_graph(model, what="encoder", device=device, threads=threads).session for _ in range(n)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return [ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for _ in range(n)]


def _call(session: ort.InferenceSession, rows: NDArray[Any]) -> Callable[[], object]:
    feed = {session.get_inputs()[0].name: rows}
    return lambda: session.run(["mean"], feed)


def _calls_per_s(calls: Sequence[Callable[[], object]], *, seconds: float) -> float:
    """Call each in a thread of its own, again and again."""
    rates = [0.0] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(number: int, call: Callable[[], object]) -> None:
        for _ in range(_WARM_UP_CALLS):
            call()
        barrier.wait()
        began, n = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            call()
            n += 1
        rates[number] = n / (time.perf_counter() - began)

    threads = [threading.Thread(target=run, args=one) for one in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


@app.command()
def main(
    model: Annotated[Path, typer.Argument(help="encoder.onnx")],
    rows: Annotated[Path, typer.Argument(help="npy file; as many as the largest batch.")],
    batch: Annotated[list[int], typer.Option(help="Rows in a call; may be repeated.")],
    threads: Annotated[int, typer.Option(min=1)],
    seconds: Annotated[float, typer.Option(help="For each figure.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    images: Annotated[list[Path] | None, typer.Option(help="Folders of images to decode; may be repeated.")] = None,
) -> None:
    """Measure, and print one line of JSON."""
    content, all_rows = model.read_bytes(), np.load(rows)
    found: dict[str, Any] = {
        "encoder": {
            n: encoder_rates(content, all_rows[:n], threads=threads, seconds=seconds, device=device) for n in batch
        },
        "decoder": {
            folder.name: decoder_rate(
                [path.read_bytes() for path in sorted(folder.iterdir())],
                shape=all_rows.shape[1:],
                threads=threads,
                seconds=seconds,
            )
            for folder in images or []
        },
    }
    print(json.dumps(found))


if __name__ == "__main__":
    app()
