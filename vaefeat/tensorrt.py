"""TensorRT, where somebody has installed it: whether it is there, and what ONNX Runtime tells it.

It compiles a graph for one GPU and a range of batch sizes, which takes seconds to minutes, and keeps the engine in a
file. An engine is code that is run: its folder is closed to everybody but the user of the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime as ort

from vaefeat.errors import DeviceError

__all__ = ["engine_folder", "engine_options", "why_no_tensorrt"]

#: What ONNX Runtime's provider is linked to; it is in no wheel of ONNX Runtime.
_LIBRARY = "nvinfer_10.dll" if os.name == "nt" else "libnvinfer.so.10"
_CLOSED = 0o700


def why_no_tensorrt() -> str:
    """Say what is missing for TensorRT beside CUDA, or nothing. ONNX Runtime lists the provider without the library."""
    if "TensorrtExecutionProvider" not in ort.get_available_providers():
        return "this ONNX Runtime was built without TensorRT (install onnxruntime-gpu)"
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError as error:
        return f"TensorRT's library does not load ({error}): put TensorRT 10 where the loader looks"
    return ""


def engine_options(model: onnx.ModelProto, content: bytes, *, buckets: Sequence[int]) -> dict[str, str]:
    """Options of the provider for an encoder.

    Parameters
    ----------
    model : ModelProto
    content : bytes
        The same, serialised: engines are kept by it.
    buckets : sequence of int
        Numbers of rows that it is called with, rising; one engine is built for all.

    Raises
    ------
    DeviceError
        No buckets, or engines have no safe place.
    """
    if not buckets:
        raise DeviceError("got device='tensorrt' without buckets, wanted the numbers of rows to build an engine for")
    rows = model.graph.input[0]
    row_shape = "x".join(str(axis.dim_value) for axis in rows.type.tensor_type.shape.dim[1:])
    folder = str(engine_folder(Path.home() / ".cache" / "vaefeat", content))
    sizes = {"min": buckets[0], "opt": buckets[-1], "max": buckets[-1]}
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
        **{f"trt_profile_{name}_shapes": f"{rows.name}:{n_rows}x{row_shape}" for name, n_rows in sizes.items()},
    }


def engine_folder(parent: Path, content: bytes) -> Path:
    """Make the folder for the engines of a graph.

    Raises
    ------
    DeviceError
        It cannot be made, or is not a folder of this user alone.
    """
    name = f"tensorrt-{ort.__version__}-{hashlib.sha256(content).hexdigest()[:32]}"
    folder = parent / name
    try:
        for place in (parent, folder):
            place.mkdir(mode=_CLOSED, parents=True, exist_ok=True)
            # Not what a link leads to: others may have put it there.
            found = place.lstat()
            if not stat.S_ISDIR(found.st_mode):
                raise DeviceError(f"got {place}, which is no folder, for TensorRT's engines; remove it")
            # Windows gives a home to its user alone, and has no such bits.
            if os.name != "nt" and (found.st_uid != os.getuid() or found.st_mode & 0o022):
                raise DeviceError(
                    f"got {place} for TensorRT's engines, which other users can write to; engines are code that is "
                    "run, so remove it, or close it with chmod 700"
                )
    except OSError as error:
        raise DeviceError(f"could not make {folder} for TensorRT's engines: {error.strerror or error}") from error
    return folder
