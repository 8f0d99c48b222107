"""One TCP connection: uvicorn's HTTP over httptools, with bounds on what comes before the application hears of it.

uvicorn waits for ever for the end of a request's head, whatever its size, and for a client that takes no answer. Here
both have an end, and what is no HTTP is answered in the service's form like any other failure.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.errors import RequestError, envelope
from serving.exchange import new_request_id

__all__ = ["Connection"]

_log = logging.getLogger("serving.connection")
# Of what clients send, uvicorn warns in a line each time; they could fill a disk with it.
_log.setLevel(logging.ERROR)


class Connection(HttpToolsProtocol):
    """A connection, made by the server.

    Attributes
    ----------
    max_head_bytes : int
        Of the request line and headers together; more is answered with 431. What arrives at once may be more.
    head_timeout_s : float
        Time from a head's first byte to its last, in seconds; 408 after that.
    write_timeout_s : float
        Time for which a client may leave an answer standing before the connection ends, in seconds.
    """

    max_head_bytes = 65_536
    head_timeout_s = 20.0
    write_timeout_s = 60.0

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.logger = _log
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Wait for a first byte as long as between two requests."""
        super().connection_made(transport)
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the timers."""
        self._unset_keepalive_if_required()
        self._end_of_head()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and look after a head that is not complete yet."""
        if self.transport.is_closing():
            return  # what comes after the answer to what was no HTTP
        super().data_received(data)
        if self.transport.is_closing():
            return
        if not self._in_head:
            if self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete):
                self._wait_for_request()  # empty lines, or what is left of a body that nobody reads
            return
        self._head_bytes += len(data)
        if self._head_bytes > self.max_head_bytes:
            self._refuse(
                431,
                "head_too_large",
                f"got a request line and headers of {self._head_bytes} bytes that do not end, wanted at most "
                f"{self.max_head_bytes}",
            )
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """End a head."""
        self._end_of_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what httptools cannot read."""
        self._refuse(400, "malformed_request", "got bytes that are no HTTP request, wanted HTTP/1.1")

    def pause_writing(self) -> None:
        """Give the client some time to take what stands in the buffer."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Note that it has taken it."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _wait_for_request(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _head_is_late(self) -> None:
        self._refuse(
            408,
            "body_timeout",
            f"got a request whose headers were not complete after {self.head_timeout_s:g} s; send them at once",
        )

    def _end_of_head(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, kind: str, message: str) -> None:
        """Answer and close: nobody knows where the next request would begin."""
        self._end_of_head()
        request_id = new_request_id()
        body = envelope(RequestError(status, kind, message), request_id)
        head = (
            b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %s\r\nconnection: close\r\n\r\n"
            % (len(body), request_id)
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
