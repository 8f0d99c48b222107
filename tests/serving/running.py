"""The whole application over real models: in one event loop with the test, or behind a socket in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from serving.accepting import Share
from serving.app import Application
from serving.http_server import HttpServer, loop_factory, make_server
from serving.models import Models
from serving.service import Service
from serving.settings import Limits, ServiceSettings

Talk = Callable[[httpx.AsyncClient], Awaitable[Any]]


def within(models: Models, talk: Talk, *, limits: Limits | None = None, ready: bool = True) -> Any:
    """Talk to an application in its own event loop, without HTTP's syntax between."""
    service = Service(models, limits or Limits(), lanes=1)

    async def exchange() -> Any:
        transport = httpx.ASGITransport(Application(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            if ready:
                await service.start()
            while ready and not (service.ready or service.failure):
                await asyncio.sleep(0.002)
            try:
                return await talk(client)
            finally:
                await service.stop()

    return asyncio.run(exchange())


@dataclass
class Running:
    """A service that listens."""

    port: int
    service: Service
    application: Application
    server: HttpServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, *, timeout_s: float = 20.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)


@contextlib.contextmanager
def running(models: Models, *, limits: Limits | None = None, share: Share | None = None) -> Iterator[Running]:
    """Run a service under the real HTTP server, on a free port, in a thread."""
    settings = ServiceSettings(bundles=(), limits=limits or Limits())
    service = Service(models, settings.limits, lanes=1)
    application = Application(service)
    server = make_server(application, settings, share=share)
    up = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        async def serve() -> None:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not (server.started and service.ready) and not serving.done():
                await asyncio.sleep(0.005)
            up.set()
            await serving

        def run() -> None:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(serve())

        port = listener.getsockname()[1]
        thread = threading.Thread(target=run, name="service")
        thread.start()
        try:
            assert up.wait(30)
            yield Running(port, service, application, server)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
