"""The application as a server, on a socket that is listening already."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from email.utils import formatdate

from serving.accepting import Acceptor, Share
from serving.app import Application
from serving.connection import Connection
from serving.guard.keys import KeyRing
from serving.head import Heads
from serving.room import Room
from serving.service import Service
from serving.settings import ServiceSettings
from serving.watching.tracing import open_tracer
from vaefeat.processors import available_cpus

__all__ = ["HttpServer", "lanes_for", "loop_factory", "make_application", "make_server", "serving_grpc"]

_log = logging.getLogger("serving")
#: Connections that may wait to be accepted.
BACKLOG = 2048
#: Connections beyond the limit that may stay until their clients have read why; the rest is told and closed at once.
_MOST_TURNED_AWAY = 128
#: What may lie here of requests whose turn has not come: of heads that are not complete, and of those that clients send
#: behind one that is being answered.
_MOST_EARLY_BYTES = 64 * 2**20
#: Most of what is read at once.
_SCRATCH_BYTES = 2**18
#: Files that a process has open beside its connections; those that are turned away are among them.
_OTHER_FILES = 512
#: How often deadlines of connections are looked at, and a stop that was asked for is noticed.
_TICK_S = 0.05


class HttpServer:
    """Accepts connections until it is told to stop.

    Parameters
    ----------
    app : Application
        Started before the first connection is accepted, stopped after the last answer.
    max_connections : int
        Further ones are told 503.
    grace_s : float
        Seconds that requests in flight have when it stops.
    share : Share, optional
        Of the connections, where other processes accept from the same sockets.

    Attributes
    ----------
    started : bool
        Connections are accepted.
    should_exit : bool
        To be set, by any thread, for it to stop.
    heads : Heads
        That its clients have sent lately.
    early : Room
        For what comes before its turn.
    scratch : memoryview
        Where connections read into: one for all, because event loops ask for it immediately before they read (Windows'
        proactor does not, and is not used), and no other loop's.
    """

    def __init__(self, app: Application, *, max_connections: int, grace_s: float, share: Share | None = None) -> None:
        self.app, self.heads, self.early = app, Heads(), Room(_MOST_EARLY_BYTES)
        self.scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self.started = self.should_exit = False
        self._max_connections, self._grace_s, self._share = max_connections, grace_s, share
        self._connections: set[Connection] = set()
        self._turned_away: set[Connection] = set()
        self._servers: list[asyncio.Server | Acceptor] = []
        self._date = b""
        self._date_of = 0

    @property
    def n_connections(self) -> int:
        """Connections that are open."""
        return len(self._connections) + len(self._turned_away)

    async def serve(self, sockets: Sequence[socket.socket]) -> None:
        """Serve on sockets that are listening, or are to listen; they are closed in the end."""
        await self.app.start()
        try:
            if not self.should_exit:  # or listening would begin again on sockets that others have shut down
                for one in sockets:
                    self._servers.append(await self._accept_from(one))
            self.started = True
            while not self.should_exit:
                await self._tick()
            self.refuse()
            await self._finish()
        finally:
            await self.app.stop()

    async def _accept_from(self, listener: socket.socket) -> asyncio.Server | Acceptor:
        def make() -> Connection:
            return Connection(self)

        if self._share is None:
            return await asyncio.get_running_loop().create_server(make, sock=listener, backlog=BACKLOG)
        listener.listen(BACKLOG)
        return Acceptor(listener, self._share, make)

    def refuse(self) -> None:
        """Accept no further connection from now on, and stop; from its own event loop."""
        self.should_exit = True
        while self._servers:  # once each: the desk asks for this, and then the stop
            self._servers.pop().close()

    async def _finish(self) -> None:
        """Answer what is in flight, and wait until the answers are taken."""
        until = time.monotonic() + self._grace_s
        while self.n_connections and time.monotonic() < until:
            self._have_all(Connection.stop)  # also one that was accepted in the last moment
            await self._tick()
        self._have_all(Connection.abort)

    async def _tick(self) -> None:
        await asyncio.sleep(_TICK_S)
        now = asyncio.get_running_loop().time()
        self._have_all(lambda connection: connection.expire(now))

    def _have_all(self, do: Callable[[Connection], None]) -> None:
        """Have every connection do something; one that fails is closed, and the others go on."""
        for connection in [*self._connections, *self._turned_away]:
            try:
                do(connection)
            except Exception:
                _log.exception("a connection failed, and is closed")
                self._forget(connection)  # or it would fail again at every tick
                with contextlib.suppress(Exception):
                    connection.abort()

    def enter(self, connection: Connection) -> bool:
        """Take a new connection in; False where there are too many."""
        if len(self._connections) >= self._max_connections:
            return False
        self._connections.add(connection)
        return True

    def turn_away(self, connection: Connection) -> bool:
        """Tell whether one that may not enter may stay until its client has read so: few may, and they end soon."""
        if len(self._turned_away) >= _MOST_TURNED_AWAY:
            return False
        self._turned_away.add(connection)
        return True

    def leave(self, connection: Connection) -> None:
        """Forget one that has ended."""
        self._forget(connection)
        if self._share is not None:
            self._share.add(-1)

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._turned_away.discard(connection)

    def date(self) -> bytes:
        """Give the Date header of now, as a line."""
        now = int(time.time())
        if now != self._date_of:
            self._date_of, self._date = now, b"date: %b\r\n" % formatdate(now, usegmt=True).encode()
        return self._date


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


def make_server(app: Application, settings: ServiceSettings, *, share: Share | None = None) -> HttpServer:
    """Make a server, to be run with ``await server.serve(sockets=[listener])``."""
    limits = settings.limits
    allowed = _allow_files(limits.max_connections)
    if allowed < limits.max_connections:
        _log.warning(
            "got a limit of open files that leaves room for %d connections, wanted %d; raise it with ulimit -Hn",
            allowed,
            limits.max_connections,
        )
    return HttpServer(app, max_connections=allowed, grace_s=limits.compute_timeout_s, share=share)


def _allow_files(n_connections: int) -> int:
    """Raise this process's limit of open files, where it is lower than so many connections need and may be raised.

    Returns
    -------
    int
        Connections that there are files for: more would leave none for models and logs.
    """
    if sys.platform == "win32":  # which knows no such limit
        return n_connections
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n_connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return n_connections
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, most - _OTHER_FILES)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Give uvloop's event loop where there is one; asyncio's own serves half as many small requests."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


def lanes_for(device: str, threads: int | None) -> int:
    """Batches that are computed at the same time: one for each processor, or one on a GPU."""
    return threads or available_cpus() if device == "cpu" else 1


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
