"""Exchanges over another server's ASGI: Ray Serve's ingress on a cluster, and tests."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Send

from serving.errors import too_large
from serving.exchange import ClientGoneError, Exchange, Headers

__all__ = ["AsgiWire"]


class AsgiWire:
    """Carries one exchange; see :class:`serving.exchange.Wire`.

    Parameters
    ----------
    receive, send : callable
        ASGI's.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._watcher: asyncio.Task[None] | None = None

    async def body(self, exchange: Exchange, max_bytes: int) -> bytes:
        """Read the whole body."""
        message = await self._next()
        content: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            return content
        whole, more = bytearray(content), True
        while more:
            exchange.received_bytes = len(whole)
            message = await self._next()
            whole += message.get("body", b"")
            more = message.get("more_body", False)
            if len(whole) > max_bytes:
                raise too_large(
                    f"got a body of more than {max_bytes} bytes, wanted at most that; send fewer rows at a time"
                )
        return bytes(whole)

    async def _next(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        return message

    def watch(self, exchange: Exchange) -> None:
        """Wait for the end; with the body read, it is the only message that can come."""
        self._watcher = asyncio.get_running_loop().create_task(self._wait_for_end(exchange))

    def unwatch(self) -> None:
        """Stop that."""
        if self._watcher is not None:
            self._watcher.cancel()

    async def _wait_for_end(self, exchange: Exchange) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        exchange.hang_up()

    async def answer(self, exchange: Exchange, status: int, headers: Headers, body: bytes | memoryview) -> None:
        """Send a whole answer."""
        room = exchange.admission.room if exchange.admission is not None else None
        if room is not None:
            room.count(len(body))
        try:
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
            await self._send({"type": "http.response.body", "body": bytes(body)})
        finally:
            if room is not None:
                room.give_back(len(body))
