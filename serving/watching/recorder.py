"""Puts what happens where it can be seen: figures, logs and traces of each exchange, figures of each batch."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol

from serving.models import Models
from serving.served_model import ServedModel
from serving.watching.logs import RequestLog, RequestRecord
from serving.watching.metrics import Metrics, ModelMetrics
from serving.watching.timing import server_timing

if TYPE_CHECKING:
    from serving.batch import Batch
    from serving.errors import RequestError
    from serving.guard.keys import Key
    from serving.service import Embedded
    from serving.watching.spans import Tracer

__all__ = ["Recorded", "Recorder"]


class Recorded(Protocol):
    """An exchange over HTTP or a call over gRPC; :class:`serving.exchange.Exchange` says what all this is."""

    began: float
    scope: Any
    path: str
    route: str
    request_id: bytes
    announced_bytes: int
    key: Key | None
    model: str
    version: str
    served: ServedModel | None
    embedded: Embedded | None
    span: Any


class Recorder:
    """What is told of one process.

    Parameters
    ----------
    models : Models
        Those that figures are kept of.
    routes : collection of str
        The application's, as labels show them.
    replica : str
        Marks the figures as this process's, where one address leads to several.
    access_log : bool
        A line for every request, not only for those that fail.
    tracer : Tracer, optional
    """

    def __init__(
        self,
        models: Models,
        *,
        routes: Collection[str],
        replica: str = "",
        access_log: bool = False,
        tracer: Tracer | None = None,
    ) -> None:
        self.metrics = Metrics(routes=routes, replica=replica)
        self.tracer = tracer
        self._log = RequestLog(access=access_log)
        self._models = models
        self._known: dict[ServedModel, ModelMetrics] = {}
        self._generation = -1

    def begin(self, exchange: Recorded) -> None:
        """Begin the span of an exchange."""
        if self.tracer is not None:
            scope = exchange.scope
            exchange.span = self.tracer.start_request(scope["headers"], method=scope["method"], path=exchange.path)

    def batch(self, batch: Batch) -> None:
        """Take note of a batch."""
        if isinstance(batch.model, ServedModel) and batch.error is None:
            padded_rows = batch.model.padding(batch.n_rows)
            self._of(batch.model).computed(rows=batch.n_rows, padded_rows=padded_rows, device_s=batch.device_s)

    def end(
        self, exchange: Recorded, status: int, *, failure: RequestError | None = None, cause: Exception | None = None
    ) -> bytes | None:
        """Take note of how an exchange ends.

        Parameters
        ----------
        exchange : Recorded
        status : int
        failure : RequestError, optional
            What its client is told.
        cause : Exception, optional
            What is behind it, where that is a defect.

        Returns
        -------
        bytes or None
            The Server-Timing header of an answer that rows were computed for.
        """
        if failure is not None:
            self.metrics.refused(failure.kind)
        timing = None
        if exchange.embedded is None or exchange.served is None:
            self.metrics.answered(exchange.route, status)
        else:
            total_s = time.perf_counter() - exchange.began
            queue_s, decode_s, device_s = exchange.embedded.seconds
            self._of(exchange.served).answered(
                exchange.route, status, total_s=total_s, queue_s=queue_s, decode_s=decode_s
            )
            timing = server_timing(queue=queue_s, decode=decode_s, device=device_s, total=total_s)
        if self._log.wants(status):
            self._log.write(_record(exchange, status, failure), cause=cause)
        if exchange.span is not None and self.tracer is not None:
            embedded = exchange.embedded
            self.tracer.end_request(
                exchange.span,
                method=exchange.scope["method"],
                route=exchange.route,
                status=status,
                model=exchange.model or None,
                rows=embedded.n_rows if embedded is not None else 0,
                error=failure.kind if failure is not None else None,
            )
        return timing

    def refused(self, error: RequestError) -> None:
        """Take note of what was refused before it became an exchange."""
        self.metrics.refused(error.kind)
        self.metrics.answered("other", error.status)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Write the figures down, of all models that are held; see :meth:`serving.watching.metrics.Metrics.render`."""
        for model in self._models.held:
            self._of(model)
        return self.metrics.render(accept)

    def _of(self, model: ServedModel) -> ModelMetrics:
        if self._generation != self._models.generation:
            self._renew()
        found = self._known.get(model)
        if found is None:
            found = self.metrics.model(model.name, digest=model.digest, drift=model.drift)
            self._known[model] = found
        return found

    def _renew(self) -> None:
        """Forget versions that are served no more, so that they do not pile up."""
        self._generation = self._models.generation
        held = set(self._models.held)
        for model in [model for model in self._known if model not in held]:
            self.metrics.forget(self._known.pop(model))


def _record(exchange: Recorded, status: int, failure: RequestError | None) -> RequestRecord:
    trace = None
    if exchange.span is not None:
        from serving.watching.spans import trace_id

        trace = trace_id(exchange.span)
    embedded = exchange.embedded
    queue_s, decode_s, device_s = embedded.seconds if embedded is not None else (None, None, None)
    return RequestRecord(
        request_id=exchange.request_id.decode("latin-1"),
        route=exchange.route,
        status=status,
        error=failure.kind if failure is not None else None,
        detail=failure.message if failure is not None else None,
        model=exchange.model or None,
        version=exchange.version or None,
        key=exchange.key.id if exchange.key is not None else None,
        rows=embedded.n_rows if embedded is not None else None,
        bytes=exchange.announced_bytes or None,
        queue_s=queue_s,
        decode_s=decode_s,
        device_s=device_s,
        total_s=time.perf_counter() - exchange.began,
        trace_id=trace,
    )
