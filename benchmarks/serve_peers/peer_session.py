"""The encoder as every peer computes it: ONNX Runtime's session, rows as bytes in, means as float32 out.

Peers run in environments of their own, so nothing here imports this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

__all__ = ["Encoder"]


class Encoder:
    """A session on the CPU.

    Parameters
    ----------
    path : path-like
        The bundle's ``encoder.onnx``.
    threads : int
        Within an operator. 1 where requests or workers run side by side, as ONNX Runtime's page on threads has it
        (https://onnxruntime.ai/docs/performance/tune-performance/threading.html): otherwise each of them would start
        as many threads as there are processors.
    """

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # The same page: threads that spin take processors away from whoever reads requests.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(Path(path).read_bytes(), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0]
        self.shape = tuple(self._input.shape[1:])

    def rows(self, body: bytes) -> NDArray[np.uint8]:
        """Read rows of shape (n, ...) from their bytes."""
        return np.frombuffer(body, np.uint8).reshape(-1, *self.shape)

    def means(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Embed rows; shape (n, d)."""
        means: NDArray[np.float32] = self._session.run(["mean"], {self._input.name: rows})[0]
        return means

    def split(self, bodies: list[bytes]) -> list[bytes]:
        """Embed the rows of several requests as one batch, and give each its own."""
        parts = [self.rows(body) for body in bodies]
        means = self.means(parts[0] if len(parts) == 1 else np.concatenate(parts))
        ends = np.cumsum([len(part) for part in parts])
        return [part.tobytes() for part in np.split(means, ends[:-1])]
