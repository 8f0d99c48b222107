"""What stands between the network and an ASGI application: request ids, bounds on bodies, one form for all errors.

It wraps our own application, and under Ray it also wraps Serve's proxy. That proxy reads a whole body into memory
before anyone can refuse it, obeys headers with which a client lifts the operator's time limits, and answers its own
failures in plain text; behind this middleware it does none of that.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import RequestError, as_request_error, error_response, overloaded, too_large
from serving.settings import Limits

__all__ = ["Edge"]

_log = logging.getLogger("serving")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
#: Ray Serve lets clients switch off timeouts and choose replicas with these.
_OPERATOR_HEADERS = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve_multiplexed_model_id",
    b"serve-multiplexed-model-id",
    b"x-session-id",
    b"x_session_id",
}


class Edge:
    """ASGI middleware that bounds and labels every HTTP exchange.

    Parameters
    ----------
    app : ASGI application
        What it stands in front of.
    limits : Limits
        ``max_body_bytes`` and ``body_timeout_s`` are enforced here, while the body arrives.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one exchange; see the class."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self.limits)
        try:
            exchange.check_announced_length()
            await self.app(exchange.scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            pass  # nobody is left to answer, or the reason is in exchange.failure
        except Exception as error:
            exchange.fail(error)
        await exchange.finish()


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        sent = dict(scope["headers"])
        given = sent.get(b"x-request-id", b"")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        dropped = _OPERATOR_HEADERS | {b"x-request-id"}
        headers = [(name, value) for name, value in scope["headers"] if name not in dropped]
        self.scope = {**scope, "headers": [*headers, (b"x-request-id", self.request_id)]}
        self.failure: RequestError | None = None
        self._announced = sent.get(b"content-length", b"0")
        self._receive, self._send = receive, send
        self._limits = limits
        self._deadline = asyncio.get_running_loop().time() + limits.body_timeout_s
        self._received_bytes = 0
        self._body_is_complete = False
        self._started = False
        self._plain_error: tuple[Message, bytearray] | None = None

    def check_announced_length(self) -> None:
        if self._announced.isdigit() and int(self._announced) > self._limits.max_body_bytes:
            raise self._too_large(f"{int(self._announced)}")

    def fail(self, error: Exception) -> None:
        """Note why there will be no answer from the application; an earlier reason stands."""
        failure = as_request_error(error)
        if failure.kind == "internal_error":
            _log.error("request %s failed", self.request_id.decode(), exc_info=error)
        self.failure = self.failure or failure

    async def receive(self) -> Message:
        """Pass the body on, up to the limits; past them the application is told that the client has gone."""
        if self._body_is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.failure = RequestError(
                408,
                "body_timeout",
                f"got {self._received_bytes} bytes of a body in {self._limits.body_timeout_s:g} s, wanted all of it; "
                "send fewer rows at a time",
                headers={"connection": "close"},
            )
            return {"type": "http.disconnect"}
        if message["type"] == "http.request":
            self._received_bytes += len(message.get("body", b""))
            self._body_is_complete = not message.get("more_body", False)
            if self._received_bytes > self._limits.max_body_bytes:
                self.failure = self._too_large(f"more than {self._limits.max_body_bytes}")
                return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        """Pass the response on, unless the exchange has failed or the response is an error in plain text."""
        if self.failure and not self._started:
            return
        if message["type"] == "http.response.start":
            if message["status"] >= 400 and _content_type(message).startswith(b"text/plain"):
                self._plain_error = (message, bytearray())
                return
            await self._start(message)
        elif self._plain_error:
            self._plain_error[1].extend(message.get("body", b""))
        else:
            await self._send(message)

    async def finish(self) -> None:
        """Answer in place of an application that could not, if it has not begun to."""
        if self._plain_error:
            start, text = self._plain_error
            self.failure = self.failure or _told_plainly(start["status"], text.decode("utf-8", "replace"))
        if self.failure and not self._started:
            response = error_response(self.failure, self.request_id.decode())
            self._plain_error = None
            self._started = True
            await response(self.scope, self._receive, self._send_labelled)

    async def _send_labelled(self, message: Message) -> None:
        await (self._start(message) if message["type"] == "http.response.start" else self._send(message))

    async def _start(self, message: Message) -> None:
        self._started = True
        headers = [(name, value) for name, value in message.get("headers", []) if name.lower() != b"x-request-id"]
        await self._send({**message, "headers": [*headers, (b"x-request-id", self.request_id)]})

    def _too_large(self, got: str) -> RequestError:
        return too_large(
            f"got a body of {got} bytes, wanted at most {self._limits.max_body_bytes}; send fewer rows at a time"
        )


def _content_type(message: Message) -> bytes:
    return next((value for name, value in message.get("headers", []) if name.lower() == b"content-type"), b"")


def _told_plainly(status: int, text: str) -> RequestError:
    """Put into our terms what Ray's proxy answers by itself."""
    if status in {429, 503}:
        return overloaded(text[:300] or "no replica can take the request now")
    if status == 408:
        return overloaded("the request took longer than the server allows; send fewer rows at a time")
    if status == 404:
        return RequestError(404, "not_found", "got an address that is not served; GET / lists those that are")
    return RequestError(status, "internal_error", "the server failed on this request; its log has the details")
