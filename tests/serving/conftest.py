"""What tests of the service share: models, two that compute what is not finite, and conversations in process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from serving.app import Application
from serving.models import Models
from serving.served_model import Place
from serving.service import Service
from serving.settings import Limits
from vaefeat.bundle import Bundle, Manifest
from vaefeat.input_spec import InputSpec

CPU = Place(device="cpu", threads=1)


@contextlib.asynccontextmanager
async def started(*folders: Path, limits: Limits | None = None, **options: Any) -> AsyncIterator[Any]:
    """Start the application in process; gives an HTTP client whose ``app`` it is."""
    limits = limits or Limits()
    models = Models.from_bundles(folders, place=Place(device="cpu", max_batch_rows=limits.max_batch_rows))
    service = Service(models, limits, lanes=2)
    app = Application(service, **options)
    await service.start()
    while not (service.ready or service.failure):
        await asyncio.sleep(0.005)
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            client.app = app  # type: ignore[attr-defined]  # for tests that look inside
            yield client
    finally:
        await service.stop()


@pytest.fixture(scope="session")
def talk() -> Callable[..., Any]:
    """Run a conversation with an application that serves some folders; gives what the conversation gives."""

    def run(conversation: Callable[[Any], Awaitable[Any]], *folders: Path, **options: Any) -> Any:
        async def main() -> Any:
            async with started(*folders, **options) as client:
                return await conversation(client)

        return asyncio.run(main())

    return run


def save_logarithm(folder: Path, *, of_rest: bool, high: float = 9.0) -> Path:
    """Save an encoder of vectors whose mean is log(x), or log(1 - x), which is finite for rows of zeros."""
    rows = helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["batch", 2])
    mean = helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, ["batch", 2])
    one = helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
    nodes = [helper.make_node("Sub", ["one", "rows"], ["rest"])] if of_rest else []
    nodes.append(helper.make_node("Log", ["rest" if of_rest else "rows"], ["mean"]))
    graph = helper.make_graph(nodes, "encoder", [rows], [mean], initializer=[one] if of_rest else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    spec = InputSpec(kind="vector", shape=(2,), dtype="float32", low=0.0, high=high)
    Bundle.of(_manifest(folder.name, spec, 2), {"encoder.onnx": model.SerializeToString()}).save(folder)
    return folder


def save_slow(folder: Path, *, n_layers: int) -> Path:
    """Save an encoder whose every layer takes a batch of 256 rows some tenths of a second on one processor."""
    width = 2048
    weight = numpy_helper.from_array(np.eye(width, dtype=np.float32), "weight")
    rows = helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["batch", 1])
    mean = helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, ["batch", width])
    names = ["wide", *(f"layer{n}" for n in range(1, n_layers)), "mean"]
    widen = numpy_helper.from_array(np.ones((1, width), np.float32), "widen")
    nodes = [helper.make_node("MatMul", ["rows", "widen"], ["wide"])]
    nodes += [helper.make_node("MatMul", [one, "weight"], [next_]) for one, next_ in itertools.pairwise(names)]
    graph = helper.make_graph(nodes, "encoder", [rows], [mean], initializer=[widen, weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    spec = InputSpec(kind="vector", shape=(1,), dtype="float32", low=0.0, high=1.0)
    Bundle.of(_manifest(folder.name, spec, width), {"encoder.onnx": model.SerializeToString()}).save(folder)
    return folder


def _manifest(name: str, spec: InputSpec, width: int) -> Manifest:
    return Manifest(
        name=name,
        input=spec,
        outputs={"mean": width},
        latent_dim=width,
        active_units=tuple(range(width)),
        objective="elbo",
        model={},
        train={},
        data={},
        metrics={},
        parity={},
        versions={},
    )


@pytest.fixture(scope="session")
def digits_models(digits_bundle: Path) -> Models:
    return Models.from_bundles([digits_bundle], place=CPU)


@pytest.fixture(scope="session")
def both_models(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Give the digits, and ``rest``, which is log(1 - x)."""
    rest = save_logarithm(tmp_path_factory.mktemp("bundles") / "rest", of_rest=True)
    return Models.from_bundles([digits_bundle, rest], place=CPU)


@pytest.fixture(scope="session")
def unready_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Give log(x): not finite for rows of zeros, so that no service of it becomes ready."""
    folder = save_logarithm(tmp_path_factory.mktemp("bundles") / "logarithm", of_rest=False)
    return Models.from_bundles([folder], place=CPU)
