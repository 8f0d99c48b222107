"""A call to infer over gRPC, as logs, figures, traces and rates see it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc

from serving.errors import RequestError, as_request_error
from serving.exchange import new_request_id
from serving.guard.rates import rate_limited

if TYPE_CHECKING:
    from serving.guard.keys import Key
    from serving.guard.rates import RateLimiter
    from serving.room import Room
    from serving.served_model import ServedModel
    from serving.service import Embedded
    from serving.watching.recorder import Recorder

__all__ = ["CLIENT_GONE", "INFER_ROUTE", "InferCall", "refuse", "told_to"]

_log = logging.getLogger("serving")
#: What these calls are counted as.
INFER_ROUTE = "/inference.GRPCInferenceService/ModelInfer"
#: In logs and figures alone: there is nobody to be told.
CLIENT_GONE = 499
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
#: A status travels in the trailers, which gRPC bounds at 8 KiB.
_MAX_DETAILS = 2000


class InferCall:
    """A call to infer, as :class:`serving.watching.recorder.Recorder` and the service see it."""

    route = INFER_ROUTE

    def __init__(self, context: Any, *, n_bytes: int, room: Room | None, rates: RateLimiter | None) -> None:
        self._room, self._rates = room, rates
        self._kept_bytes = 0
        self.began = time.perf_counter()
        self.announced_bytes = n_bytes
        texts = [(name, value) for name, value in context.invocation_metadata() if isinstance(value, str)]
        headers = [(name.encode(), value.encode()) for name, value in texts]
        self.scope: dict[str, Any] = {"method": "POST", "headers": headers}
        self.path = INFER_ROUTE
        self.request_id = new_request_id()
        self.model = self.version = ""
        self.key: Key | None = None
        self.served: ServedModel | None = None
        self.embedded: Embedded | None = None
        self.span: Any = None

    def admit_bytes(self) -> None:
        """Take the message off the rate of the key that asks: it has come, whatever becomes of it."""
        self._take(bytes=self.announced_bytes)

    def admit_rows(self, n_rows: int, *, n_bytes: int) -> None:
        """Keep room for the features of rows, and take the rows off the rate of the key that asks."""
        if self._room is not None:
            self._room.take(n_bytes, beside=self.announced_bytes)
            self._kept_bytes += n_bytes
        self._take(rows=n_rows)

    def leave(self) -> None:
        """Give the room for features back."""
        if self._room is not None:
            self._room.give_back(self._kept_bytes)

    def _take(self, **amounts: int) -> None:
        if self.key is None or self._rates is None:
            return
        if wait_s := self._rates.take(self.key, **amounts):
            raise rate_limited(wait_s)


async def refuse(context: Any, refusal: RequestError) -> None:
    """End a call with a status; never returns."""
    await context.abort(
        _CODES.get(refusal.status, grpc.StatusCode.INVALID_ARGUMENT),
        refusal.message[:_MAX_DETAILS],
        tuple((name, value) for name, value in refusal.headers.items() if name == "retry-after"),
    )


@asynccontextmanager
async def told_to(context: Any, recorder: Recorder | None = None, call: InferCall | None = None) -> AsyncIterator[None]:
    """End the call with the status of whatever is raised inside, and take note of it."""
    try:
        yield
    except asyncio.CancelledError:
        if recorder is not None and call is not None:
            recorder.end(call, CLIENT_GONE)
        raise
    except Exception as error:
        refusal = as_request_error(error)
        defect = error if refusal is not error and refusal.status == 500 else None
        if recorder is not None and call is not None:
            recorder.end(call, refusal.status, failure=refusal, cause=defect)
        elif defect is not None:
            _log.exception("a gRPC request failed")
        # The frames in it hold this one and the message, which would wait for the garbage collector.
        error.__traceback__ = None
        await refuse(context, refusal)
    else:
        if recorder is not None and call is not None:
            recorder.end(call, 200)
