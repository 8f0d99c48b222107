"""Who may come in: decided from a request's headers, before any of its body is read."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from serving.errors import RequestError, overloaded, too_large
from serving.guard.keys import Key, KeyRing, require_scope
from serving.guard.rates import RateLimiter, rate_limited
from serving.room import Room
from serving.settings import Limits

if TYPE_CHECKING:
    from serving.exchange import Exchange

__all__ = ["Admission"]

#: How often requests that wait are asked whether their client is still there, in seconds.
_LOOK_FOR_CLIENTS_S = 0.1


class Admission:
    """Keys, rates and room, for one process.

    Parameters
    ----------
    limits : Limits
    room : Room
        For bodies, and what becomes of them.
    keys : KeyRing, optional
        Without it nobody is asked for a key.

    Attributes
    ----------
    rates : RateLimiter
    """

    def __init__(self, limits: Limits, *, room: Room, keys: KeyRing | None = None) -> None:
        self.keys, self.room = keys, room
        self._limits = limits
        self.rates = RateLimiter()
        self._present: dict[Exchange, None] = {}
        self._looking: asyncio.TimerHandle | None = None

    @property
    def in_flight(self) -> int:
        """Requests with a body that are being answered."""
        return len(self._present)

    def identify(self, exchange: Exchange, *, scope: str) -> Key | None:
        """Find out who asks, and whether that key may; None where no key is needed.

        Raises
        ------
        RequestError
            401, 403.
        """
        if self.keys is None or not scope:
            return None
        return require_scope(self.keys.find(exchange.key_digest), scope)

    def admit_rows(self, exchange: Exchange, n_rows: int, *, n_bytes: int) -> None:
        """Keep room for the features of rows, and take the rows off a key's rate.

        Raises
        ------
        RequestError
            429, 503.
        """
        self.room.take(n_bytes, beside=exchange.kept_bytes)
        exchange.kept_bytes += n_bytes
        key = exchange.key
        if key is not None and (wait_s := self.rates.take(key, rows=n_rows)):
            raise rate_limited(wait_s)

    def enter(self, exchange: Exchange) -> None:
        """Keep room for a body of the announced length; whoever calls this calls :meth:`leave` in the end.

        Raises
        ------
        RequestError
            411, 413, 429, 503.
        """
        headers = exchange.headers
        # With neither of the two there is no body (RFC 9112, section 6.3), as in curl -X POST.
        announced = headers.get(b"content-length", b"" if b"transfer-encoding" in headers else b"0")
        if not announced.isdigit():
            raise RequestError(
                411,
                "length_required",
                "got a body without Content-Length, wanted it announced; send it in one piece, not chunked",
                headers={"connection": "close"},
            )
        # int() takes quadratic time, and a longer number is too large in any case.
        n_bytes = int(announced) if len(announced) < 19 else 10**19
        limits = self._limits
        if n_bytes > limits.max_body_bytes:
            raise too_large(
                f"got a body of {n_bytes} bytes, wanted at most {limits.max_body_bytes}; send fewer rows at a time"
            )
        if len(self._present) >= limits.max_in_flight:
            raise overloaded(f"{len(self._present)} requests are being answered, which is the most at a time")
        self.room.take(n_bytes)
        # Last, because whoever is refused comes again, and would pay twice.
        key = exchange.key
        if key is not None and (wait_s := self.rates.take(key, bytes=n_bytes)):
            self.room.give_back(n_bytes)
            raise rate_limited(wait_s)
        exchange.announced_bytes = exchange.kept_bytes = n_bytes
        if exchange.task is None:
            exchange.task = asyncio.current_task()
        self._present[exchange] = None
        if self._looking is None:
            loop = asyncio.get_running_loop()
            self._looking = loop.call_later(_LOOK_FOR_CLIENTS_S, self._look_for_clients)

    def grow(self, exchange: Exchange, n_bytes: int) -> None:
        """Keep room for a body that has become larger: inflated, a thousand times what was announced.

        Raises
        ------
        RequestError
            503.
        """
        more = max(0, n_bytes - exchange.announced_bytes)
        self.room.take(more, beside=exchange.kept_bytes)
        exchange.announced_bytes += more
        exchange.kept_bytes += more

    def leave(self, exchange: Exchange) -> None:
        """Give the room back."""
        if exchange in self._present:
            del self._present[exchange]
            self.room.give_back(exchange.kept_bytes)
            exchange.kept_bytes = 0
            if exchange.key is not None and not exchange.body_is_read:
                self.rates.give_back(exchange.key, bytes=exchange.announced_bytes - exchange.received_bytes)
            exchange.unwatch()

    def _look_for_clients(self) -> None:
        """Give up bodies that are late, and watch whether the clients of requests that wait for long are still there.

        A timer or a watcher for each request would cost more than most requests do.
        """
        # First, or one exchange's failure would end the looking for good.
        self._looking = None
        if self._present:
            self._looking = asyncio.get_running_loop().call_later(_LOOK_FOR_CLIENTS_S, self._look_for_clients)
        now = time.perf_counter()
        for exchange in self._present:
            if exchange.body_is_read:
                exchange.watch()
            elif now > exchange.due(self._limits) and not exchange.is_late:
                exchange.give_up()
