"""The service in this process, without Ray."""

from __future__ import annotations

import asyncio
import socket

from serving.address import base_url
from serving.announcement import announce
from serving.app import Application
from serving.asked import Asked
from serving.errors import EngineError
from serving.http_server import HttpServer, lanes_for, loop_factory, make_application, make_server, serving_grpc
from serving.models import Models
from serving.service import Service
from serving.settings import ServiceSettings
from serving.watching.logs import start_logging

__all__ = ["run"]

#: How often a stop that was asked for, or readiness, is noticed.
_TICK_S = 0.05


def run(settings: ServiceSettings, listener: socket.socket, asked: Asked) -> None:
    """Serve until a stop is asked for.

    Parameters
    ----------
    settings : ServiceSettings
    listener : socket
        From :func:`serving.address.claim`.
    asked : Asked
        By signals. Requests in flight are answered before this returns.

    Raises
    ------
    SetupError, BundleError, DeviceError
        Before anything is served.
    EngineError
        A model computes something else than its bundle says, or the device failed later.
    """
    models = Models.from_bundles(settings.bundles, place=settings.place)
    lanes = lanes_for(models.current[0].device, settings.threads)
    service = Service(models, settings.limits, lanes=lanes, watches=settings.watch)
    start_logging(settings.log_level)
    app = make_application(service, settings)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(app, settings, listener, asked))


async def _serve(app: Application, settings: ServiceSettings, listener: socket.socket, asked: Asked) -> None:
    server = make_server(app, settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    async with serving_grpc(app, settings):
        await _until_stopped(server, serving, app.service, base_url(listener), asked)
    await serving
    if app.service.failure:
        raise EngineError(app.service.failure)


async def _until_stopped(
    server: HttpServer, serving: asyncio.Task[None], service: Service, url: str, asked: Asked
) -> None:
    announced = False
    while not serving.done():
        server.should_exit = server.should_exit or asked.stop.is_set() or bool(service.failure)
        if asked.reload.is_set():
            asked.reload.clear()
            await service.changes.reload()
        if server.started and service.ready and not announced and not server.should_exit:
            announced = True
            providers = [model.provider for model in service.models.current]
            announce(url, engine="local", models=service.models.names, providers=providers)
        await asyncio.wait([serving], timeout=_TICK_S)
