"""The application under uvicorn, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn

from serving.address import base_url
from serving.announcement import announce
from serving.app import EmbeddingService, build_app
from serving.catalogue import load_encoders
from serving.errors import EngineError
from serving.settings import ServiceSettings

__all__ = ["run"]

#: How often a stop that was asked for, or readiness, is noticed.
_TICK_S = 0.05


def run(settings: ServiceSettings, listener: socket.socket, stop: threading.Event) -> None:
    """Serve until `stop` is set.

    Parameters
    ----------
    settings : ServiceSettings
    listener : socket
        From :func:`serving.address.claim`.
    stop : threading.Event
        Set by the signal handlers. Requests in flight are answered before this returns.

    Raises
    ------
    SetupError, BundleError, DeviceError
        Before anything is served.
    EngineError
        An encoder failed on its first row.
    """
    encoders = load_encoders(settings.bundles, device=settings.device, threads=settings.threads)
    app = build_app(encoders, limits=settings.limits)
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=round(settings.limits.compute_timeout_s),
    )
    asyncio.run(_serve(_Server(config), app.state.service, listener, stop))


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Signals are the command line's business: uvicorn would raise them again after a clean stop.
        yield


async def _serve(server: _Server, service: EmbeddingService, listener: socket.socket, stop: threading.Event) -> None:
    url = base_url(listener)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    announced = False
    while not serving.done():
        server.should_exit = server.should_exit or stop.is_set() or bool(service.failure)
        if server.started and service.ready and not announced and not server.should_exit:
            announced = True
            providers = [encoder.provider for encoder in service.encoders.values()]
            announce(url, engine="local", models=service.encoders, providers=providers)
        await asyncio.wait([serving], timeout=_TICK_S)
    await serving
    if service.failure:
        raise EngineError(service.failure)
