"""Puts what happens into the figures: each exchange when it is answered, each batch when it is computed."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from serving.errors import RequestError
from serving.models import Models, ServedModel
from serving.watching.metrics import Metrics, ModelMetrics
from serving.watching.timing import server_timing

if TYPE_CHECKING:
    from serving.batcher import Batch
    from serving.exchange import Exchange

__all__ = ["Recorder"]


class Recorder:
    """The figures of one process.

    Parameters
    ----------
    models : Models
        Those that figures are kept of.
    routes : collection of str
        The application's, as labels show them.
    replica : str
        Marks the figures as this process's, where one address leads to several.
    """

    def __init__(self, models: Models, *, routes: Collection[str], replica: str = "") -> None:
        self.metrics = Metrics(routes=routes, replica=replica)
        self._models = models
        self._known: dict[ServedModel, ModelMetrics] = {}
        self._generation = -1

    def batch(self, batch: Batch) -> None:
        """Take note of a batch."""
        if isinstance(batch.model, ServedModel) and batch.error is None:
            self._of(batch.model).computed(rows=batch.n_rows, padded_rows=0, device_s=batch.device_s)

    def refused(self, route: str, error: RequestError) -> None:
        """Take note of a request that was turned away."""
        self.metrics.refused(error.kind)

    def answered(self, exchange: Exchange, status: int) -> bytes | None:
        """Take note of an answer; give the Server-Timing header of one that rows were computed for."""
        embedded = exchange.embedded
        if embedded is None or exchange.served is None:
            self.metrics.answered(exchange.route, status)
            return None
        total_s = time.perf_counter() - exchange.began
        job = embedded.job
        queue_s, device_s = (job.cut - job.queued, job.device_s) if job is not None else (0.0, 0.0)
        decode_s = embedded.decode_s
        self._of(exchange.served).answered(exchange.route, status, total_s=total_s, queue_s=queue_s, decode_s=decode_s)
        return server_timing(queue=queue_s, decode=decode_s, device=device_s, total=total_s)

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
