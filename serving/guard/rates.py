"""How much a key may ask for in a second: token buckets over rows and bytes.

A bucket fills at its key's rate up to what the key may send at once, two seconds' worth. Whoever finds enough in it is
admitted. A request larger than the whole bucket is admitted when the bucket is full and leaves a debt, so that large
requests are slowed to the rate, not shut out for ever.

Bytes are traffic: those that a client has sent count, whatever becomes of its request, and those of a body that was
refused unread do not. Rows count where they are going to be computed.

Rates hold for one process: with several replicas, each has its own buckets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from serving.errors import RequestError
from serving.guard.keys import Key

__all__ = ["RateLimiter", "rate_limited"]

#: Seconds of its rate that a key may use at once.
_BURST_S = 2.0
#: Keys whose buckets are kept. A key file of the allowed size holds fewer in force at a time, so only buckets of
#: revoked keys go, or those idle for longest, which are full again.
_MAX_KEYS = 16_384


class RateLimiter:
    """The buckets of all keys; one thread owns it.

    Parameters
    ----------
    clock : callable
        Seconds that never run backwards.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # In the order of last use.
        self._buckets: dict[str, _Buckets] = {}

    def take(self, key: Key, *, rows: int = 0, bytes: int = 0) -> float:
        """Ask for rows and bytes; either both are taken or neither.

        Parameters
        ----------
        key : Key
            Its ``rows_per_s`` and ``bytes_per_s`` are the rates, as they are now.
        rows, bytes : int
            What the request is going to use. Bytes are known before its body is read, rows only afterwards, so they
            may be asked for one after the other.

        Returns
        -------
        float
            Seconds after which the same request would be admitted; 0 when it is.
        """
        if key.rows_per_s is None and key.bytes_per_s is None:
            return 0.0
        now = self._clock()
        buckets = self._buckets.pop(key.id, None) or _Buckets(now)
        self._buckets[key.id] = buckets
        if len(self._buckets) > _MAX_KEYS:
            del self._buckets[next(iter(self._buckets))]
        return buckets.take(now, (rows, key.rows_per_s), (bytes, key.bytes_per_s))

    def give_back(self, key: Key, *, bytes: int) -> None:
        """Give back bytes that were taken, and did not come."""
        if (buckets := self._buckets.get(key.id)) is not None:
            buckets.give_back(bytes)


class _Buckets:
    """What one key has used beyond what has flowed back: rows and bytes; 0 is a full bucket."""

    __slots__ = ("_at", "_used")

    def __init__(self, now: float) -> None:
        self._at = now
        self._used = [0.0, 0.0]

    def take(self, now: float, *wanted: tuple[int, float | None]) -> float:
        elapsed, self._at = now - self._at, now
        wait_s = 0.0
        for place, (amount, rate) in enumerate(wanted):
            if rate is None:
                self._used[place] = 0.0
                continue
            self._used[place] = max(0.0, self._used[place] - elapsed * rate)
            burst = rate * _BURST_S
            missing = self._used[place] + min(amount, burst) - burst
            if amount and missing > 0.0:
                wait_s = max(wait_s, missing / rate)
        if wait_s == 0.0:
            for place, (amount, rate) in enumerate(wanted):
                if rate is not None:
                    self._used[place] += amount
        return wait_s

    def give_back(self, n_bytes: int) -> None:
        self._used[1] = max(0.0, self._used[1] - n_bytes)


def rate_limited(wait_s: float) -> RequestError:
    """Answer 429 with the time after which the request would be admitted, in whole seconds."""
    return RequestError(
        429,
        "rate_limited",
        f"got more than this API key's rate allows; send the request again in {wait_s:.3g} s",
        headers={"retry-after": str(max(1, math.ceil(wait_s)))},
    )
