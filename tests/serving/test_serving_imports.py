from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "serving.app",
        "serving.codec",
        "serving.command_line",
        "serving.guard.rates",
        "serving.keys",
        "serving.local_engine",
        "serving.watching.logs",
        "serving.watching.metrics",
        "serving.watching.spans",
        "vaefeat.encoder",
        "vaefeat.remote",
    ],
)
def test_importing_the_serving_side_loads_neither_torch_nor_sklearn_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'sklearn', 'ray', 'scipy'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_client_loads_no_onnxruntime() -> None:
    code = "import sys, vaefeat.remote; print(sorted({'onnxruntime', 'onnx'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
