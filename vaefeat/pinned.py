"""Host memory that a GPU reads without a copy in between.

What is copied to a GPU from ordinary memory goes through a buffer of the driver's first, because pages may move while
the GPU reads. Pinned pages do not. ONNX Runtime hands such memory out to its plug-in providers only, so it comes from
CUDA's runtime library, which the CUDA provider has loaded.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from vaefeat.errors import DeviceError

__all__ = ["pinned_array"]


def pinned_array(shape: tuple[int, ...], *, dtype: DTypeLike) -> NDArray[Any]:
    """Allocate an array in pinned memory, of zeros; its memory is given back when nothing refers to it any more.

    Raises
    ------
    DeviceError
        CUDA's runtime library is not there, or has no such memory left.
    """
    name = f"libcudart.so.{str(ort.cuda_version).partition('.')[0]}"
    try:
        runtime = ctypes.CDLL(name)
    except OSError as error:
        raise DeviceError(f"CUDA's runtime library does not load ({error})") from error
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    address = ctypes.c_void_p()
    if status := runtime.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(n_bytes), ctypes.c_uint(0)):
        raise DeviceError(f"cudaHostAlloc of {n_bytes} bytes failed with status {status}")
    assert address.value is not None
    memory = (ctypes.c_char * n_bytes).from_address(address.value)
    # Arrays hold on to the memory, and views to their arrays.
    weakref.finalize(memory, runtime.cudaFreeHost, address).atexit = False  # the process's end gives it back, too
    array: NDArray[Any] = np.ndarray(shape, dtype, buffer=memoryview(memory))
    array[...] = 0
    return array
