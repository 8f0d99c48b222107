"""The application under uvicorn, on a socket that is listening already."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn

from serving.app import Application
from serving.connection import Connection
from serving.guard.keys import KeyRing
from serving.service import Service
from serving.settings import ServiceSettings
from serving.watching.tracing import open_tracer
from vaefeat.processors import available_cpus

__all__ = ["HttpServer", "lanes_for", "loop_factory", "make_application", "make_server", "serving_grpc"]

#: Connections that may wait to be accepted.
BACKLOG = 2048


class HttpServer(uvicorn.Server):
    """A server that leaves signals alone: they are the command line's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: uvicorn would raise signals again after a clean stop."""
        yield


def make_application(service: Service, settings: ServiceSettings) -> Application:
    """Put a service behind HTTP, with keys, logs and traces as the settings say.

    Raises
    ------
    SetupError
        Keys or traces that cannot be.
    """
    return Application(
        service,
        keys=None if settings.keys is None else KeyRing.from_file(settings.keys),
        # Where one address leads to several processes, each marks its figures.
        replica="" if settings.replicas == 1 else str(os.getpid()),
        access_log=settings.access_log,
        tracer=open_tracer(os.environ),
    )


def make_server(app: Application, settings: ServiceSettings) -> HttpServer:
    """Make a server, to be run with ``await server.serve(sockets=[listener])``."""
    config = uvicorn.Config(
        app,
        http=Connection,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        # Clients keep connections; one that the server closes in the moment of the next request costs a retry.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=round(settings.limits.compute_timeout_s),
    )
    return HttpServer(config)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Give uvloop's event loop where there is one; asyncio's own serves half as many small requests."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


def lanes_for(device: str, threads: int | None) -> int:
    """Batches that are computed at the same time: one for each processor, or one on a GPU."""
    return 1 if device == "cuda" else threads or available_cpus()


@contextlib.asynccontextmanager
async def serving_grpc(app: Application, settings: ServiceSettings) -> AsyncIterator[None]:
    """Serve gRPC beside HTTP, where the settings ask for it, until the application's lifespan ends.

    Calls are answered before the service stops, which the lifespan's end does.

    Raises
    ------
    SetupError
        The port cannot be had.
    """
    if not settings.grpc_address:
        yield
        return
    from serving.protocols.oip_grpc import start_grpc

    server = await start_grpc(
        app.service,
        settings.grpc_address,
        max_message_bytes=settings.limits.max_body_bytes,
        keys=app.admission.keys,
        rates=app.admission.rates,
        recorder=app.recorder,
        shared=settings.replicas > 1,
    )

    async def stop() -> None:
        app.service.stopping = True
        await server.stop(settings.limits.compute_timeout_s)

    app.before_stop.append(stop)
    try:
        yield
    finally:
        await stop()
