"""A call to infer over gRPC, as logs, figures, traces and rates see it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from serving.exchange import new_request_id
from serving.guard.rates import rate_limited

if TYPE_CHECKING:
    from serving.guard.keys import Key
    from serving.guard.rates import RateLimiter
    from serving.models import ServedModel
    from serving.service import Embedded

__all__ = ["INFER_ROUTE", "InferCall"]

#: What these calls are counted as.
INFER_ROUTE = "/inference.GRPCInferenceService/ModelInfer"


class InferCall:
    """A call to infer, as :class:`serving.watching.recorder.Recorder` and the service see it."""

    route = INFER_ROUTE

    def __init__(self, context: Any, *, n_bytes: int, rates: RateLimiter | None) -> None:
        self._rates = rates
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

    def admit_rows(self, n_rows: int) -> None:
        """Take rows, and the bytes that they came in, off the rate of the key that asks."""
        if self.key is None or self._rates is None:
            return
        if wait_s := self._rates.take(self.key, rows=n_rows, bytes=self.announced_bytes):
            raise rate_limited(wait_s)
