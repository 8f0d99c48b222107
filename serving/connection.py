"""One TCP connection: HTTP/1.1, one exchange at a time, everything bounded in bytes and in time.

General servers put queues, copies and events between a socket and an application that may stream both ways. Here a
body has a length that is known before it is read and an answer is whole before it is written, so a body goes from the
socket straight into the memory that the rows are read from, and an answer is one write. That is what makes a small
request cheap. What arrives while an exchange is under way waits, in the socket where it is much.

Requests in chunks are refused (411) by the application and end the connection, so that nobody ever has to tell where
such a body ends; with both a length and chunks, or two lengths, it is no HTTP (RFC 9112, section 6.3).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from enum import Enum, auto
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from serving.answer_head import CLOSE, write_head, write_refusal
from serving.errors import RequestError, overloaded
from serving.exchange import ClientGoneError, Exchange, Headers
from serving.head import Head, HeadParser, head_too_large, no_http
from serving.room import Holding

if TYPE_CHECKING:
    from serving.http_server import HttpServer

__all__ = ["Connection"]

_END = b"\r\n\r\n"
#: Of what may be read ahead of an exchange that is under way.
_MOST_PENDING = 2**16
#: Answers up to this size are one piece with their head; copying more costs more than a second piece.
_ONE_PIECE = 2**16
#: Of a body that nobody wants: less is read and dropped, and the connection goes on.
_MOST_DROPPED = 2**20
#: Of an answer, what a client has to take within :attr:`Connection.write_timeout_s` to be waited for any longer.
_LEAST_TAKEN = 2**20
#: The same where memory is short: whoever takes answers slowly must not take the service away from the others.
_HURRIED_S = 5.0
#: For a client to read a last answer while its own bytes are dropped; to close at once would reset the connection, and
#: the answer with it.
_LINGER_S = 2.0


class _State(Enum):
    IDLE = auto()
    HEAD = auto()
    BUSY = auto()
    DROPPING = auto()
    LINGERING = auto()


class Connection(asyncio.BufferedProtocol):
    """A connection; :class:`serving.http_server.HttpServer` makes and keeps it.

    Parameters
    ----------
    server : HttpServer

    Attributes
    ----------
    deadline : float
        On the event loop's clock: when :meth:`expire` is due.
    """

    #: Of request line and headers together; more is answered with 431.
    max_head_bytes: ClassVar[int] = 65_536
    #: From a head's first byte to its last; 408 after that.
    head_timeout_s: ClassVar[float] = 20.0
    #: In which a client that leaves an answer standing has to take some more of it.
    write_timeout_s: ClassVar[float] = 60.0
    #: Between two requests. Longer than clients keep connections: one that the server closes in the moment of the next
    #: request costs a retry.
    idle_timeout_s: ClassVar[float] = 75.0

    def __init__(self, server: HttpServer) -> None:
        self._server, self._room = server, server.app.service.room
        #: Reads go here, and are copied at once; those of a body that is awaited do not.
        self._scratch = server.scratch
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._state = _State.IDLE
        self._pending = bytearray()
        self._early = Holding(server.early)
        self._parser: HeadParser | None = None
        self._head: Head | None = None
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        #: What has come of the body before it was asked for; then where it goes, and how far it is.
        self._first = b""
        self._target: memoryview | None = None
        self._filled = 0
        self._whole: asyncio.Future[None] | None = None
        #: Bytes of the body that are still to come.
        self._left = 0
        self._is_stopping = self._is_paused = False
        #: Since when answers stand, as far as they are not taken bit by bit, and how many bytes did then.
        self._stuck_since = math.inf
        self._standing = 0
        #: Of an answer that is not wholly taken, all is counted: it lies in one piece.
        self._untaken = Holding(self._room)
        self.deadline = math.inf

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a first request."""
        self._transport = cast(asyncio.Transport, transport)
        # Whatever the kernel does not take counts, and nothing more is done for a client before it has its answer.
        self._transport.set_write_buffer_limits(high=0)
        self._rest()
        if not self._server.enter(self):
            error = overloaded("as many connections are open as the service allows")
            self._refuse(error, wait=self._server.turn_away(self))

    def connection_lost(self, exc: Exception | None) -> None:
        """Let whoever handles a request know that there is nobody to answer."""
        self._server.leave(self)
        self._transport = None
        self._forget_pending()
        self._untaken.become(0)
        self.deadline = self._stuck_since = math.inf
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(ClientGoneError())
        elif self._task is not None:
            exchange.gone = True
            self._task.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Give the place for what comes next."""
        if self._target is not None:
            return self._target[self._filled :]
        return self._scratch if self._state is not _State.BUSY else self._scratch[:_MOST_PENDING]

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has come."""
        if self._target is not None:
            self._filled += nbytes
            self._left -= nbytes
            if self._exchange is not None:
                self._exchange.received_bytes = self._filled
            if not self._left:
                self._target = None
                if self._whole is not None and not self._whole.done():
                    self._whole.set_result(None)
            return
        if self._state is _State.LINGERING:
            return
        if self._state is _State.DROPPING:
            self._drop(nbytes)
            return
        if self._state is _State.BUSY:
            self._keep(nbytes)
            return
        if not self._pending:
            self._read_head(bytes(self._scratch[:nbytes]), nbytes)
            return
        self._pending += self._scratch[:nbytes]
        self._read_head(bytes(self._pending), nbytes)

    def eof_received(self) -> bool:
        """Take the end of what the client sends for its end: it may not be there to read an answer either."""
        return False

    def pause_writing(self) -> None:
        """Note that the client does not take its answer."""
        if self._transport is None:
            return
        self._stuck_since, self._standing = self._loop.time(), self._transport.get_write_buffer_size()
        if self._state is _State.IDLE:
            self._pause()

    def resume_writing(self) -> None:
        """Go on."""
        self._stuck_since = math.inf
        self._untaken.become(0)
        if self._state is _State.IDLE:
            self._rest()
            self._next()
        elif self._state is _State.LINGERING:
            self.deadline = self._loop.time() + self.write_timeout_s

    # What the server calls.

    def expire(self, now: float) -> None:
        """End what has taken too long, if anything has."""
        transport = self._transport
        if transport is None:
            return
        if self._stuck_since != math.inf:
            patience_s = min(_HURRIED_S, self.write_timeout_s) if self._room.is_short else self.write_timeout_s
            if now > self._stuck_since + patience_s:
                standing = transport.get_write_buffer_size()
                if self._standing - standing < _LEAST_TAKEN:
                    transport.abort()
                self._stuck_since, self._standing = now, standing
        elif now > self.deadline:
            if self._state is _State.HEAD:
                self._refuse(
                    RequestError(
                        408,
                        "body_timeout",
                        f"got a request whose headers were not complete after {self.head_timeout_s:g} s; "
                        "send them at once",
                    )
                )
            elif self._state is _State.IDLE:
                self._linger(wait=False)
            else:
                transport.abort()

    def stop(self) -> None:
        """Close, after the answer to the request that is under way."""
        self._is_stopping = True
        if self._exchange is None and self._transport is not None and self._state is not _State.LINGERING:
            self._linger(wait=self._state is _State.DROPPING)

    def abort(self) -> None:
        """Close at once."""
        if self._task is not None and self._exchange is not None:
            self._exchange.gone = True
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()

    # What the exchange calls: serving.exchange.Wire.

    async def body(self, exchange: Exchange, max_bytes: int) -> bytes | memoryview:
        """Give the whole body: bytes where it came with the head, else the memory that it was received into.

        Raises
        ------
        ClientGoneError
        """
        assert self._head is not None
        if not self._left:
            return self._first
        if self._transport is None:
            raise ClientGoneError
        if self._head.expects and not self._first:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # Of what is announced, memory is taken only for what comes.
        target = self._target = np.empty(self._head.n_bytes, np.uint8).data
        self._filled = len(self._first)
        target[: self._filled] = self._first
        self._first = b""
        self._whole = self._loop.create_future()
        self._read_on()
        try:
            await self._whole
            return target
        finally:
            self._target = self._whole = None

    def watch(self, exchange: Exchange) -> None:
        """Do nothing: this connection hears of its own end."""

    def unwatch(self) -> None:
        """Do nothing."""

    async def answer(self, exchange: Exchange, status: int, headers: Headers, body: bytes | memoryview) -> None:
        """Write an answer, and turn to the next request or to the end."""
        if self._exchange is not exchange or self._transport is None or self._head is None:
            return  # the client has gone
        head = self._head
        # Who waits to be told to send its body may send it all the same, or not: nobody can tell what comes next.
        is_unclear = self._left > 0 and (head.expects or self._left > _MOST_DROPPED)
        closes = self._is_stopping or is_unclear or not head.keeps_alive or CLOSE in headers
        date, version = self._server.date(), head.scope["http_version"]
        parts = write_head(status, headers, date=date, closes=closes, version=version)
        if len(body) > _ONE_PIECE:
            self._transport.writelines([b"".join(parts), body])
        else:
            self._transport.write(b"".join([*parts, body]))
        if self._stuck_since != math.inf:
            self._untaken.become(len(body))
        self._exchange = self._task = self._head = None
        self._first = b""
        if closes:
            # To close with bytes unread would reset the connection.
            self._linger(wait=self._left > 0 or not head.is_measured or self._is_paused or bool(self._pending))
        elif self._left:
            self._state = _State.DROPPING
            self.deadline = self._loop.time() + self.head_timeout_s
            self._read_on()
        else:
            self._rest()
            self._next()

    # The rest is between these.

    def _read_head(self, data: bytes, n_new: int) -> None:
        """Begin an exchange if the head is complete; `n_new` bytes at the end of `data` are new."""
        if self._state is _State.IDLE and data[:1] in (b"\r", b"\n"):
            # Some clients send an empty line behind a body (RFC 9112, section 2.2).
            data = data.lstrip(b"\r\n")
            n_new = len(data)
            if not data:
                self._forget_pending()
                return
        end = data.find(_END) + len(_END)
        if end >= len(_END) and end <= self.max_head_bytes:
            try:
                head = self._parsed(data[:end], n_new - (len(data) - end))
            except RequestError as error:
                self._refuse(error)
                return
            self._forget_pending()
            self._begin(head, data, end)
        elif max(len(data), end) > self.max_head_bytes:
            self._refuse(head_too_large(f"at least {self.max_head_bytes} bytes"))
        else:
            self._wait_for_head(data, n_new)

    def _parsed(self, data: bytes, n_new: int) -> Head:
        parser, self._parser = self._parser, None
        if parser is None:
            return self._server.heads.parse(data)
        parser.feed(data[len(data) - n_new :])
        if parser.head is None:
            raise no_http()
        return parser.head

    def _wait_for_head(self, data: bytes, n_new: int) -> None:
        if self._state is _State.IDLE:
            self._state = _State.HEAD
            self.deadline = self._loop.time() + self.head_timeout_s
            self._parser = HeadParser()
            n_new = len(data)
        assert self._parser is not None
        try:
            # What can be no HTTP is answered now, and not when the time is over.
            self._parser.feed(data[len(data) - n_new :])
        except RequestError as error:
            self._refuse(error)
            return
        if self._parser.head is not None:  # without the empty line that we look for
            self._refuse(no_http())
            return
        self._pending[:] = data
        if self._server.early.has(len(data) - self._early.n_bytes):
            self._early.become(len(data))
        else:
            self._refuse(overloaded("requests that are not complete take all the memory that there is for them"))

    def _begin(self, head: Head, data: bytes, end: int) -> None:
        self._state, self.deadline = _State.BUSY, math.inf
        self._head = head
        stop = end + head.n_bytes
        self._first = data[end:stop]
        self._left = max(0, stop - len(data))
        if stop < len(data) and head.is_measured:
            self._pending += data[stop:]
            self._early.become(len(self._pending))
        exchange = self._exchange = Exchange(head.scope, self, head=head)
        exchange.received_bytes = len(self._first)
        self._task = exchange.task = self._loop.create_task(self._run(exchange))

    async def _run(self, exchange: Exchange) -> None:
        try:
            await self._server.app.handle(exchange)
        finally:
            if self._exchange is exchange and self._transport is not None:
                self._transport.abort()  # there is no answer, and the client must not wait for one

    def _keep(self, n_bytes: int) -> None:
        """Keep what comes while a request is under way: the rest of its body, or the next one."""
        if self._left:
            taken = min(n_bytes, self._left)
            self._first += self._scratch[:taken]
            self._left -= taken
            self._pending += self._scratch[taken:n_bytes]
        else:
            self._pending += self._scratch[:n_bytes]
        self._early.become(len(self._pending))
        if len(self._first) + len(self._pending) >= _MOST_PENDING:
            self._pause()

    def _forget_pending(self) -> None:
        if self._pending:
            self._pending.clear()
            self._early.become(0)

    def _pause(self) -> None:
        if self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def _read_on(self) -> None:
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    def _drop(self, n_bytes: int) -> None:
        taken = min(n_bytes, self._left)
        self._left -= taken
        if not self._left:
            self._rest()
            self._pending += self._scratch[taken:n_bytes]
            self._early.become(len(self._pending))
            self._next()

    def _rest(self) -> None:
        """Wait for the next request."""
        self._state = _State.IDLE
        self.deadline = self._loop.time() + self.idle_timeout_s

    def _next(self) -> None:
        """Begin with what has come already, once the last answer is on its way.

        While answers stand nothing more is read: of who takes no answers, they would heap up here.
        """
        if self._stuck_since != math.inf:
            self._pause()
            return
        self._read_on()
        if self._pending:
            data = bytes(self._pending)
            self._read_head(data, len(data))

    def _refuse(self, error: RequestError, *, wait: bool = True) -> None:
        """Answer what never became an exchange, and close: nobody knows where the next request would begin."""
        assert self._transport is not None
        self._server.app.recorder.refused(error)
        self._transport.write(write_refusal(error, date=self._server.date()))
        self._linger(wait=wait)

    def _linger(self, *, wait: bool) -> None:
        """Close; with `wait`, when the client has closed or has had time to read."""
        assert self._transport is not None
        self._forget_pending()
        self._parser = None
        self._state = _State.LINGERING
        if not wait:
            # What the client has not taken keeps the connection open after this, too.
            self.deadline = self._loop.time() + self.write_timeout_s
            self._transport.close()
            return
        self.deadline = self._loop.time() + _LINGER_S
        self._read_on()
        with contextlib.suppress(OSError):  # the client was quicker
            self._transport.write_eof()
