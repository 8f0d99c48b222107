"""What stands before Ray Serve's ingress on a cluster, in its proxies or, with direct ingress, in each replica.

Serve reads a body into memory, without a bound, before the application can refuse it; it obeys headers with which a
client lifts the operator's time limits and chooses replicas; and what it answers by itself is plain text. This guard
comes first, and Serve finds it by an environment variable, on every node and before Ray starts::

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serving.guard.middleware.guards

It decides from headers alone whether a body may come in. The application behind it checks everything again, and counts
rates.

===============================  ==================================================================================
``VAEFEAT_KEYS``                 the file of API keys, as in the application's arguments; without it none is asked for
``VAEFEAT_MAX_BODY_BYTES``       largest body; as ``limits.max_body_bytes`` by default
``VAEFEAT_MAX_IN_FLIGHT_BYTES``  of all bodies together in this process; as ``limits.max_in_flight_bytes`` by default
===============================  ==================================================================================

gRPC does not pass here: ``RAY_SERVE_GRPC_MAX_MESSAGE_SIZE`` bounds its messages.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import orjson
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.asgi import AsgiWire
from serving.errors import RequestError, SetupError, envelope, overloaded, too_large
from serving.exchange import Answer, Exchange
from serving.guard.keys import KeyRing, require_scope
from serving.media import JSON
from serving.settings import Limits

__all__ = ["Guard", "guards"]

#: With these, Ray Serve lets clients switch off timeouts and choose replicas; it takes hyphens for underscores.
_OPERATOR_HEADERS = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve-multiplexed-model-id",
    b"x-session-id",
}
#: Serve's own, for probes.
_SERVE_PATHS = "/-/"
_KEYS_EVERY_S = 1.0


def guards() -> list[Middleware]:
    """Make the guard as the environment says; Serve calls this once in each process.

    Raises
    ------
    SetupError
        A variable that is no number, or a key file that cannot be used.
    """
    given, limits = os.environ, Limits()
    return [
        Middleware(
            Guard,
            keys=KeyRing.from_file(Path(given["VAEFEAT_KEYS"])) if given.get("VAEFEAT_KEYS") else None,
            max_body_bytes=_number(given, "VAEFEAT_MAX_BODY_BYTES", limits.max_body_bytes),
            max_in_flight_bytes=_number(given, "VAEFEAT_MAX_IN_FLIGHT_BYTES", limits.max_in_flight_bytes),
        )
    ]


class Guard:
    """ASGI middleware; see the module.

    Parameters
    ----------
    app : ASGI application
        Serve's ingress.
    keys : KeyRing, optional
        Whoever sends a body must present one of them.
    max_body_bytes, max_in_flight_bytes : int
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing | None, max_body_bytes: int, max_in_flight_bytes: int) -> None:
        self._app, self._keys = app, keys
        self._max_body_bytes, self._max_in_flight_bytes = max_body_bytes, max_in_flight_bytes
        self._in_flight_bytes = 0
        self._keys_read = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http" or scope["path"].startswith(_SERVE_PATHS):
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, AsgiWire(receive, send))
        try:
            n_bytes = self._admit(exchange)
        except RequestError as refusal:
            await _answer(exchange, refusal)
            return
        self._in_flight_bytes += n_bytes
        try:
            await self._pass(exchange, receive, send)
        finally:
            self._in_flight_bytes -= n_bytes

    def _admit(self, exchange: Exchange) -> int:
        """Decide whether a body may come in, and tell how large it is announced to be."""
        headers = exchange.headers
        announced = headers.get(b"content-length")
        if announced is None and b"transfer-encoding" not in headers:
            return 0
        if announced is None or not announced.isdigit() or b"transfer-encoding" in headers:
            raise RequestError(
                411,
                "length_required",
                "got a body without Content-Length, wanted it announced; send it in one piece, not chunked",
                headers={"connection": "close"},
            )
        # int() takes quadratic time, and a longer number is too large in any case.
        n_bytes = int(announced) if len(announced) < 19 else 10**19
        if n_bytes > self._max_body_bytes:
            raise too_large(
                f"got a body of {n_bytes} bytes, wanted at most {self._max_body_bytes}; send fewer rows at a time"
            )
        if n_bytes and self._keys is not None:
            self._read_keys_again(self._keys)
            key = self._keys.find(exchange.key_digest)
            require_scope(key, "admin" if exchange.path.startswith("/v2/repository/") else "embed")
        if self._in_flight_bytes + n_bytes > self._max_in_flight_bytes:
            refusal = overloaded("as many bodies are being read as memory is there for")
            refusal.headers["connection"] = "close"
            raise refusal
        return n_bytes

    def _read_keys_again(self, keys: KeyRing) -> None:
        if time.monotonic() - self._keys_read > _KEYS_EVERY_S:
            self._keys_read = time.monotonic()
            keys.reload_if_changed()

    async def _pass(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        dropped = _OPERATOR_HEADERS | {b"x-request-id"}
        headers = [
            (name, value)
            for name, value in exchange.scope["headers"]
            if name.lower().replace(b"_", b"-") not in dropped
        ]
        headers.append((b"x-request-id", exchange.request_id))
        failure: RequestError | None = None

        async def pass_on(message: Message) -> None:
            nonlocal failure
            if message["type"] == "http.response.start":
                failure = _told_in_plain_text(message)
                message = {**message, "headers": _labelled_once(message, exchange.request_id)}
            if failure is None:
                await send(message)

        await self._app({**exchange.scope, "headers": headers}, receive, pass_on)
        if failure is not None:
            await _answer(exchange, failure)


def _labelled_once(message: Message, request_id: bytes) -> list[tuple[bytes, bytes]]:
    # Serve adds the id as well, beside that of the application.
    kept = [(name, value) for name, value in message.get("headers", []) if name.lower() != b"x-request-id"]
    return [*kept, (b"x-request-id", request_id)]


def _told_in_plain_text(start: Message) -> RequestError | None:
    """Put into the service's terms what Serve answers by itself; None for all other answers."""
    headers = {name.lower(): value for name, value in start.get("headers", [])}
    status: int = start["status"]
    if status < 400 or not headers.get(b"content-type", b"").startswith(b"text/plain"):
        return None
    if status in {429, 503}:
        failure = overloaded("no replica can take the request now")
        if (after := headers.get(b"retry-after")) is not None:
            failure.headers["retry-after"] = after.decode("latin-1")
        return failure
    if status == 408:
        return RequestError(504, "deadline_exceeded", "the request took longer than the cluster allows")
    if status == 404:
        return RequestError(404, "not_found", "got an address that is not served; GET / lists those that are")
    return RequestError(status, "internal_error", "the cluster failed on this request; its log has the details")


async def _answer(exchange: Exchange, failure: RequestError) -> None:
    headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in failure.headers.items()]
    body = envelope(failure, exchange.request_id)
    if exchange.path.startswith("/v2"):
        body = orjson.dumps({"error": failure.message})  # all that the Open Inference Protocol's clients read
    await exchange.answer(Answer(failure.status, [(b"content-type", JSON.encode()), *headers], body))


def _number(given: Mapping[str, str], name: str, default: int) -> int:
    text = given.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and 0 < int(text)):
        raise SetupError(f"got {name}={text[:40]!r}, wanted a number of bytes above 0")
    return int(text)
