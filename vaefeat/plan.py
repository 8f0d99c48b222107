"""How an encoder is run on a GPU: few batch sizes, memory that stays, and one launch for a whole network.

A GPU computes a small network faster than its kernels are launched one by one. A CUDA graph launches them all at once,
but only at the shapes and addresses that it was captured with. So batches are padded to the next of a few *buckets*,
each with memory of its own that is bound to the session once ("IO binding"), and captured when it is first used.

Row by row the network computes the same whatever stands in the other rows, so padding changes no result; where a GPU's
libraries choose another kernel for another bucket, the last bits may differ between buckets.

ONNX Runtime keeps captured graphs by thread: another thread that ran a bucket would capture it again, and nothing
guards the memory. Everything is therefore run by one thread of the plan's own, whoever calls.

References
----------
https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, "Using CUDA Graphs"
https://github.com/microsoft/onnxruntime/issues/18806 (capturing in several threads), 29782 (inputs on the host)
"""

from __future__ import annotations

import logging
import threading
import weakref
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from vaefeat.errors import DeviceError
from vaefeat.input_spec import InputSpec
from vaefeat.pinned import pinned_array
from vaefeat.runtime import Interruption, OpenedGraph

__all__ = ["ExecutionPlan", "buckets_up_to"]

_log = logging.getLogger("vaefeat")
#: The steps are wide: each bucket holds memory and takes time to capture, and a GPU pays little for a row more.
_BUCKETS = (1, 8, 32, 64, 128, 256, 512, 1024)

_NO_GPU = "off: not on a GPU"

Features = list[NDArray[np.float32]]


class Opening(Protocol):
    """Opens a graph anew; the plan's thread holds on to it."""

    def __call__(self, *, captures: bool) -> OpenedGraph:
        """Open it; `captures` says whether runs are captured as CUDA graphs."""


def buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """Choose the numbers of rows that batches of at most `max_rows` are padded to.

    Examples
    --------
    >>> buckets_up_to(100)
    (1, 8, 32, 64, 100)
    """
    return (*(size for size in _BUCKETS if size < max_rows), max_rows)


class ExecutionPlan:
    """A graph that is called with any number of rows, and computes buckets.

    Parameters
    ----------
    opening : Opening
    captures : bool
        Whether to capture them. Where that fails, the plan goes on without, says so in its log, and in ``graphs``.
    buckets : sequence of int
        Rising.
    rows : InputSpec
        What it takes.
    outputs : mapping of str to int
        Width of each output.

    Attributes
    ----------
    opened : OpenedGraph
        What is run.
    buckets : tuple of int
    graphs, pinned : str
        ``on``, or ``off:`` and why: CUDA graphs, and pinned memory on the host.

    Raises
    ------
    DeviceError
        The graph does not open on its device.
    """

    def __init__(
        self,
        opening: Opening,
        *,
        captures: bool,
        buckets: Sequence[int],
        rows: InputSpec,
        outputs: Mapping[str, int],
    ) -> None:
        self._runner = _Runner(opening, captures=captures, rows=rows, outputs=outputs)
        self.buckets = tuple(buckets)
        self._inbox: SimpleQueue[_Call | None] = SimpleQueue()
        # A device that hangs must not keep the process from ending.
        threading.Thread(target=_answer, args=(self._runner, self._inbox), name="plan", daemon=True).start()
        # Not at the end of the process, which is no time to take CUDA apart in another thread.
        weakref.finalize(self, self._inbox.put, None).atexit = False

    @property
    def opened(self) -> OpenedGraph:
        """The graph that is run."""
        return self._runner.opened

    @property
    def graphs(self) -> str:
        """Whether CUDA graphs are used, or why not; a bucket that is used for the first time may change it."""
        return self._runner.graphs

    @property
    def pinned(self) -> str:
        """Whether memory on the host is pinned, or why not."""
        return self._runner.pinned

    def padding(self, n_rows: int) -> int:
        """Give the rows that are computed beside so many."""
        whole, rest = divmod(n_rows, self.buckets[-1])
        return self._bucket(rest) - rest if rest or not whole else 0

    def compute(
        self, rows: NDArray[Any], outputs: Sequence[str], *, interruption: Interruption | None = None
    ) -> Features:
        """Compute some outputs of any number of rows; may be called by several threads.

        Parameters
        ----------
        rows : ndarray of shape (n, ...)
        outputs : sequence of str
        interruption : Interruption, optional
            Ends this before the next bucket: a captured graph is one launch, and cannot be ended on the way.

        Returns
        -------
        list of ndarray of shape (n, width), float32
            In the order that they are named in.

        Raises
        ------
        DeviceError
            ONNX Runtime failed, for instance because the device's memory is full; or it was interrupted.
        """
        largest = self.buckets[-1]
        starts = range(0, max(1, len(rows)), largest)
        parts = [self._compute(rows[start : start + largest], outputs, interruption) for start in starts]
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]

    def _compute(self, rows: NDArray[Any], outputs: Sequence[str], interruption: Interruption | None) -> Features:
        if interruption is not None and interruption.options.terminate:
            raise DeviceError(f"{len(rows)} rows were not computed on {self.opened.device}: interrupted")
        call = _Call(rows, outputs, self._bucket(len(rows)))
        self._inbox.put(call)
        return call.answer.result()

    def _bucket(self, n_rows: int) -> int:
        return self.buckets[bisect_left(self.buckets, n_rows)]


class _Call:
    """Rows that wait for the plan's thread."""

    __slots__ = ("answer", "bucket", "outputs", "rows")

    def __init__(self, rows: NDArray[Any], outputs: Sequence[str], bucket: int) -> None:
        self.rows, self.outputs, self.bucket = rows, outputs, bucket
        self.answer: Future[Features] = Future()


def _answer(runner: _Runner, inbox: SimpleQueue[_Call | None]) -> None:
    """Run what is asked for, until the plan is let go."""
    while (call := inbox.get()) is not None:
        try:
            features = runner.run(call.rows, call.outputs, call.bucket)
        except Exception as error:  # raised again by whoever waits
            call.answer.set_exception(error)
        else:
            call.answer.set_result(features)
        del call  # with its rows and its answer, which may be large


class _Runner:
    """What the plan's thread owns: the session, and memory for each bucket."""

    def __init__(self, opening: Opening, *, captures: bool, rows: InputSpec, outputs: Mapping[str, int]) -> None:
        self._opening, self._rows, self._outputs = opening, rows, outputs
        self._bound: dict[int, _Bucket] = {}
        self._captured: set[int] = set()
        self.graphs = self.pinned = _NO_GPU
        try:
            self.opened = opening(captures=captures)
        except DeviceError as error:
            if not captures:
                raise
            self._open_without_graphs(error, why="ONNX Runtime refuses this graph")
            return
        if captures:
            self.graphs = "on"
        elif self.opened.device != "cpu":
            self.graphs = f"off: not with {self.opened.device}"

    def run(self, rows: NDArray[Any], outputs: Sequence[str], bucket: int) -> Features:
        try:
            features = self._of(bucket).run(rows, outputs)
        except DeviceError as error:
            if self.graphs != "on" or bucket in self._captured:
                raise
            self._open_without_graphs(error, why="capturing failed")
            features = self._of(bucket).run(rows, outputs)
        self._captured.add(bucket)
        return features

    def _of(self, bucket: int) -> _Bucket:
        bound = self._bound.get(bucket)
        if bound is None:
            bound = self._bound[bucket] = _Bucket(
                self.opened, bucket, number=len(self._bound) + 1, rows=self._rows, outputs=self._outputs
            )
            self.pinned = bound.pinned
        return bound

    def _open_without_graphs(self, error: DeviceError, *, why: str) -> None:
        """Begin anew: a stream on which capturing failed stays in that state."""
        self._bound.clear()
        self.opened = self._opening(captures=False)
        # Metadata go to clients, and ONNX Runtime's messages name the machine.
        self.graphs = f"off: {why}"
        _log.warning("CUDA graphs are off, kernels are launched one by one: %s: %s", why, error)


class _Bucket:
    """Memory for batches of one size, bound to a session."""

    def __init__(
        self, opened: OpenedGraph, size: int, *, number: int, rows: InputSpec, outputs: Mapping[str, int]
    ) -> None:
        self._opened = opened
        self._is_on_gpu = opened.device != "cpu"
        device = "cuda" if self._is_on_gpu else "cpu"
        shape = (size, *rows.shape)
        self._host, self.pinned = np.zeros(shape, rows.dtype), _NO_GPU
        if self._is_on_gpu:
            self._host, self.pinned = _pinned_if_there(self._host)
        self._binding = opened.session.io_binding()
        if self._is_on_gpu:
            self._rows = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(rows.dtype), device)
        else:
            self._rows = ort.OrtValue.ortvalue_from_numpy(self._host)
        self._binding.bind_ortvalue_input("rows", self._rows)
        # All outputs, whatever is asked for: a captured graph has them or has them not.
        self._outputs = {
            name: ort.OrtValue.ortvalue_from_shape_and_type((size, width), np.float32, device)
            for name, width in outputs.items()
        }
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))

    def run(self, rows: NDArray[Any], outputs: Sequence[str]) -> Features:
        n_rows = len(rows)
        self._host[:n_rows] = rows
        self._host[n_rows:] = 0  # nobody's rows stay
        try:
            if self._is_on_gpu:
                self._rows.update_inplace(self._host)
            self._opened.session.run_with_iobinding(self._binding, self._options)
            # Copies, because the next batch overwrites what is bound.
            return [self._outputs[name].numpy()[:n_rows].copy() for name in outputs]
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise DeviceError(
                f"ONNX Runtime failed on {n_rows} rows, padded to {len(self._host)}, on {self._opened.device}: {error}"
            ) from error


def _pinned_if_there(ordinary: NDArray[Any]) -> tuple[NDArray[Any], str]:
    try:
        return pinned_array(ordinary.shape, dtype=ordinary.dtype), "on"
    except DeviceError as error:
        _log.warning("memory on the host is not pinned: %s", error)
        return ordinary, "off: there is none"
