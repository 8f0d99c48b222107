"""What tests of the service share: versions of a real bundle, and conversations with the application in process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.versions import scaled
from serving.app import Application
from serving.models import Models, Place
from serving.service import Service
from serving.settings import Limits
from vaefeat.bundle import Bundle, load_bundle

Variant = Callable[..., Bundle]


@pytest.fixture(scope="session")
def variant(digits_bundle: Path) -> Variant:
    """Make another version of the digits' bundle: its mean is multiplied, and its reference too if it is honest."""

    def make(*, name: str = "digits", **options: Any) -> Bundle:
        return scaled(load_bundle(digits_bundle), name=name, **options)

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
