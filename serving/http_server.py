"""The application under uvicorn, on a socket that is listening already."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import Callable, Iterator

import uvicorn

from serving.app import Application
from serving.connection import Connection
from serving.settings import ServiceSettings
from vaefeat.processors import available_cpus

__all__ = ["HttpServer", "lanes_for", "loop_factory", "make_server"]

#: Connections that may wait to be accepted.
BACKLOG = 2048


class HttpServer(uvicorn.Server):
    """A server that leaves signals alone: they are the command line's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: uvicorn would raise signals again after a clean stop."""
        yield


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
