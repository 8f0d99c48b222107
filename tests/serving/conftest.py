"""What tests of the service share: versions of a real bundle, and conversations with the application in process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import numpy_helper

from serving.app import Application
from serving.models import Models, Place
from serving.service import Service
from serving.settings import Limits
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.reference import REFERENCE_FILE

Variant = Callable[..., Bundle]


@pytest.fixture(scope="session")
def variant(digits_bundle: Path) -> Variant:
    """Make another version of the digits' bundle: its mean is multiplied, and its reference too if it is honest."""

    def make(*, factor: float = 2.0, honest: bool = True, name: str = "digits", reference: bool = True) -> Bundle:
        bundle = load_bundle(digits_bundle)
        contents = {file: bundle.read(file) for file in bundle.files}
        graph = onnx.load_model_from_string(contents["encoder.onnx"])
        (producer,) = [node for node in graph.graph.node if "mean" in node.output]
        producer.output[:] = ["unscaled" if output == "mean" else output for output in producer.output]
        graph.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        graph.graph.node.append(onnx.helper.make_node("Mul", ["unscaled", "factor"], ["mean"]))
        contents["encoder.onnx"] = graph.SerializeToString()
        figures = safetensors.numpy.load(contents.pop(REFERENCE_FILE))
        if honest:
            figures["features"] = figures["features"] * np.float32(factor)
        if reference:
            contents[REFERENCE_FILE] = safetensors.numpy.save(figures)
        return Bundle.of(replace(bundle.manifest, name=name), contents)

    return make


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
