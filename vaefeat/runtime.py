"""One ONNX graph, checked and opened on a device by ONNX Runtime."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from vaefeat.errors import BundleError, DeviceError
from vaefeat.processors import allowed_threads
from vaefeat.tensorrt import engine_options, why_no_tensorrt

# Its official builds tell their maker of every session otherwise; nobody asked the people whose rows these are.
ort.disable_telemetry_events()

__all__ = ["Interruption", "OpenedGraph", "choose_device", "open_graph"]

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
#: What ONNX Runtime's CUDA provider is linked to, and cuDNN, which it loads when it starts.
_LIBRARIES = ("libcudart.so.{cuda}", "libcublas.so.{cuda}", "libcurand.so.10", "libcudnn.so.9")
#: Operators of other domains run code that is not ONNX Runtime's own.
_DOMAINS = {"", "ai.onnx"}
#: Trees and support vectors; ONNX Runtime brings them, too.
_ML_DOMAIN = "ai.onnx.ml"
#: The mean must be a function of the row alone. Dropout is random in training mode, and left out by an export for use.
_RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


class Interruption:
    """Ends computations that were given it, from another thread, and lets no other begin."""

    def __init__(self) -> None:
        self.options = ort.RunOptions()

    def interrupt(self) -> None:
        """End them before their next node, with a DeviceError."""
        self.options.terminate = True


@dataclass(frozen=True)
class OpenedGraph:
    """An ONNX Runtime session and where it runs.

    Attributes
    ----------
    session : onnxruntime.InferenceSession
    device : {"cpu", "cuda", "tensorrt"}
    reason : str
        Why this device was chosen, for people.
    """

    session: ort.InferenceSession
    device: str
    reason: str

    def run(
        self, outputs: Sequence[str], inputs: dict[str, NDArray[Any]], *, interruption: Interruption | None = None
    ) -> list[NDArray[np.float32]]:
        """Compute some of the outputs, in the order that they are named in; may be called by several threads.

        Raises
        ------
        DeviceError
            ONNX Runtime failed, for instance because the device's memory is full; or it was interrupted.
        """
        try:
            computed: list[NDArray[np.float32]] = self.session.run(
                list(outputs), inputs, None if interruption is None else interruption.options
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            n_rows = len(next(iter(inputs.values())))
            raise DeviceError(
                f"ONNX Runtime failed on {n_rows} rows on {self.device}: {error}; "
                "with a smaller batch_size it needs less memory"
            ) from error
        return computed

    @property
    def provider(self) -> str:
        """ONNX Runtime's execution provider, for instance ``CPUExecutionProvider``."""
        return str(self.session.get_providers()[0])


def open_graph(
    content: bytes,
    *,
    what: str,
    device: str = "auto",
    threads: int | None = None,
    buckets: Sequence[int] = (),
    captures: bool = False,
    pipeline: bool = False,
) -> OpenedGraph:
    """Check an ONNX graph and open it from memory, never from a path.

    Parameters
    ----------
    content : bytes
        A serialised ``ModelProto``.
    what : str
        What it is, for messages.
    device : {"auto", "cpu", "cuda", "tensorrt"}
        ``auto`` takes CUDA where a device is there and says so in ``reason``; ``cuda`` and ``tensorrt`` fail where
        there is none, and nothing but being asked for leads to TensorRT.
    threads : int, optional
        Threads within an operator; see :func:`vaefeat.processors.allowed_threads` when None.
    buckets : sequence of int
        Numbers of rows that it is going to be called with, rising; TensorRT builds its engine for them.
    captures : bool
        Whether runs are captured as CUDA graphs. A graph then belongs to the thread that captured it, and only
        :class:`vaefeat.plan.ExecutionPlan` keeps to that.
    pipeline : bool
        Whether it may have what a classifier needs, and an encoder does not.

    Raises
    ------
    BundleError
        Not an ONNX graph, or one with external data, functions, custom operators or random nodes; without `pipeline`
        also one with subgraphs, or operators of classical machine learning.
    DeviceError
        `device` is unknown, was asked for and is not there, or cannot do what was asked for.
    """
    model = check_graph(content, what=what, pipeline=pipeline)
    if threads is not None and threads < 1:
        raise DeviceError(f"got threads={threads}, wanted at least 1, or None for all processors")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or allowed_threads()
    options.inter_op_num_threads = 1
    # Spinning threads would keep processors busy after every call, away from the rest of the process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    chosen, reason = choose_device(device)
    providers = _providers(chosen, captures=captures)
    if chosen == "tensorrt":
        providers.insert(0, (_PROVIDERS[chosen], engine_options(model, content, buckets=buckets)))
    try:
        # Left to itself, ONNX Runtime prints a failure of CUDA and goes on with the CPU, at any call.
        session = ort.InferenceSession(content, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
        if chosen != "cpu":
            raise DeviceError(f"could not open {what} on {chosen}: {error}; use device='cpu'") from error
        raise BundleError(f"got {what} that ONNX Runtime does not load: {error}") from error
    # ONNX Runtime drops a provider that fails to start and carries on with the next one.
    if (opened := session.get_providers())[0] != _PROVIDERS[chosen]:
        raise DeviceError(f"asked for {chosen}, but ONNX Runtime opened {what} on {opened}; see its log")
    return OpenedGraph(session=session, device=chosen, reason=reason)


def check_graph(content: bytes, *, what: str, pipeline: bool = False) -> onnx.ModelProto:
    """Parse an ONNX graph and refuse whatever an encoder or decoder of ours, or a `pipeline`, never has.

    Raises
    ------
    BundleError
        As for :func:`open_graph`.
    """
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise BundleError(f"got {what} that is not an ONNX graph: {error}") from error
    if not model.graph.node:
        raise BundleError(f"got {what} that is not an ONNX graph: it has no nodes")
    domains = {*_DOMAINS, _ML_DOMAIN} if pipeline else _DOMAINS
    if foreign := sorted({entry.domain for entry in model.opset_import} - domains):
        raise BundleError(f"got {what} with operators of the domains {foreign}, wanted ONNX's own only")
    if model.functions:
        raise BundleError(f"got {what} with local functions, wanted a flat graph")
    for graph in _graphs(model.graph):
        for tensor in _tensors(graph):
            if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
                raise BundleError(f"got {what} with external data ({tensor.name}), wanted every weight inside the file")
        for node in graph.node:
            if node.domain not in domains:
                raise BundleError(f"got {what} with the operator {node.domain}.{node.op_type}, wanted ONNX's own only")
            if node.op_type in _RANDOM:
                raise BundleError(f"got {what} with the random node {node.op_type}; features must not depend on chance")
            if not pipeline and any(_inner(node)):
                raise BundleError(f"got {what} with a subgraph in {node.op_type}, wanted a flat graph")
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Give a graph and all that are nested in it."""
    yield graph
    for node in graph.node:
        for inner in _inner(node):
            yield from _graphs(inner)


def _inner(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    sparse = list(graph.sparse_initializer)
    for node in graph.node:
        for attribute in node.attribute:
            # An attribute that is not set is an empty tensor.
            yield from (attribute.t, *attribute.tensors)
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def choose_device(device: str) -> tuple[str, str]:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``tensorrt`` into the device and the reason for it, without opening anything.

    Raises
    ------
    DeviceError
        `device` is unknown, or was asked for and is not there.
    """
    if device == "cpu":
        return "cpu", "asked for"
    if device not in {"auto", "cuda", "tensorrt"}:
        raise DeviceError(f"got device={device!r}, wanted 'auto', 'cpu', 'cuda' or 'tensorrt'")
    missing = _why_no_cuda()
    if device == "tensorrt":
        missing = missing or why_no_tensorrt()
    if not missing:
        return ("cuda", "a CUDA device is there") if device == "auto" else (device, "asked for")
    if device == "auto":
        return "cpu", missing
    raise DeviceError(f"got device={device!r}, but {missing}; use device='cpu' or 'auto'")


def _why_no_cuda() -> str:
    """Say what is missing for CUDA, or nothing. ONNX Runtime lists the provider even where there is no device."""
    if _PROVIDERS["cuda"] not in ort.get_available_providers():
        return "this ONNX Runtime was built without CUDA (install onnxruntime-gpu)"
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except OSError:
        return "no NVIDIA driver is installed"
    return _why_no_libraries() if found else "the NVIDIA driver sees no device"


def _why_no_libraries() -> str:
    """Say which of CUDA's libraries is missing, or nothing; a provider that lacks one is dropped without a word."""
    # They come in wheels, where the loader would not look. What is not found is printed, which is for nobody's output.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    for name in _LIBRARIES if sys.platform == "linux" else ():
        try:
            ctypes.CDLL(name.format(cuda=ort.cuda_version.partition(".")[0]))
        except OSError as error:
            return f"CUDA's libraries do not load ({error}): install vaefeat[gpu]"
    return ""


def _providers(device: str, *, captures: bool) -> list[str | tuple[str, dict[str, str]]]:
    if device == "cpu":
        return [_PROVIDERS["cpu"]]
    options = {
        # TF32 and a search for the fastest algorithm would let a row's vector depend on its neighbours in the batch.
        "use_tf32": "0",
        "cudnn_conv_algo_search": "DEFAULT",
        "enable_cuda_graph": str(int(captures)),
    }
    return [(_PROVIDERS["cuda"], options), _PROVIDERS["cpu"]]
