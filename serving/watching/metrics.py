"""Figures for Prometheus: counted in plain lists, put into its form when it asks.

prometheus_client takes a lock and some microseconds for each observation. Here the event loop alone counts, so an
observation is two additions, and what Prometheus wants is made from the lists by a collector, once for each scrape. A
scrape may run in another thread: it copies before it reads, and may be a request ahead in one figure and behind in
another.

=================================  ==================================================================================
``vaefeat_requests_total``         requests by ``route``, ``status``, ``model``, ``version``
``vaefeat_request_seconds``        from the first byte to the answer, by ``route``, ``model``, ``version``
``vaefeat_queue_seconds``          of it, waiting for the device; this and what follows by ``model``, ``version``
``vaefeat_decode_seconds``         of it, taking the body apart and decoding images
``vaefeat_device_seconds``         of a batch, in the encoder
``vaefeat_batch_rows``             rows in a batch, without padding
``vaefeat_rows_total``             rows embedded
``vaefeat_padded_rows_total``      rows computed only to fill a batch up to its bucket
``vaefeat_models_info``            1 for every model that is served, with its ``digest``
``vaefeat_refused_total``          requests turned away, by ``reason``: the error's kind
``vaefeat_queue_rows``             rows that wait now
``vaefeat_queue_bytes``            bytes that wait now
``vaefeat_in_flight``              requests between their first byte and their answer
``vaefeat_in_flight_bytes``        bytes of bodies, features and answers that are not taken yet
``vaefeat_lanes_busy``             device lanes that compute now
``vaefeat_drift_*``                :mod:`serving.watching.drift`, by ``model``, ``version``
``process_*``                      memory, processor time and files of the process
=================================  ==================================================================================

Labels are bounded: a route is one of those that the application declares or ``other``, a model one that is loaded or
empty, a version the first twelve digits of a digest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from serving.watching.drift import Drift

__all__ = ["Histogram", "Metrics", "ModelMetrics"]

#: Upper ends, seconds.
_DURATIONS_S = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
#: Upper ends, rows.
_ROWS = tuple(float(2**power) for power in range(13))
_VERSION_DIGITS = 12
_MODEL = ("model", "version")


class Histogram:
    """How often a value fell into each interval.

    Parameters
    ----------
    bounds : sequence of float
        Upper ends of the intervals, rising; each belongs to its interval. A last one without an end follows.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Put the counts, summed up as Prometheus wants them, into a family."""
        counts, total = self.counts.copy(), self.total
        reached = 0
        buckets = []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), counts, strict=True):
            reached += count
            buckets.append((bound, float(reached)))
        family.add_metric(labels, buckets, total)


class ModelMetrics:
    """The figures of one version of a model, from :meth:`Metrics.model`.

    Parameters
    ----------
    name : str
        Of the model.
    digest : str
        Of its bundle.
    version : str
        What is shown of the version.
    routes : frozenset of str
        Those that are labels.
    drift : Drift, optional
        Of what it serves.
    """

    def __init__(self, name: str, *, digest: str, version: str, routes: frozenset[str], drift: Drift | None) -> None:
        self.labels = (name, version)
        self.digest = digest
        self.drift = drift
        self.requests: dict[tuple[str, int], int] = {}
        self.request_seconds = {route: Histogram(_DURATIONS_S) for route in (*sorted(routes), "other")}
        self.queue_seconds = Histogram(_DURATIONS_S)
        self.decode_seconds = Histogram(_DURATIONS_S)
        self.device_seconds = Histogram(_DURATIONS_S)
        self.batch_rows = Histogram(_ROWS)
        self.padded_rows = 0

    def answered(self, route: str, status: int, *, total_s: float, queue_s: float, decode_s: float) -> None:
        """Count a request that has reached this model, well or badly answered.

        Parameters
        ----------
        route : str
            As the application declares it, such as ``/v1/embed``.
        status : int
            Of HTTP.
        total_s, queue_s, decode_s : float
            Seconds; see the module.
        """
        seconds = self.request_seconds.get(route)
        if seconds is None:
            route, seconds = "other", self.request_seconds["other"]
        seconds.observe(total_s)
        self.queue_seconds.observe(queue_s)
        self.decode_seconds.observe(decode_s)
        self.requests[route, status] = self.requests.get((route, status), 0) + 1

    def computed(self, *, rows: int, padded_rows: int, device_s: float) -> None:
        """Count a batch: `rows` that were asked for, and `padded_rows` beside them, in `device_s` seconds."""
        self.batch_rows.observe(rows)
        self.padded_rows += padded_rows
        self.device_seconds.observe(device_s)


class Metrics:
    """All figures of one process; its event loop owns them.

    Parameters
    ----------
    routes : collection of str
        The application's routes, as labels show them.
    replica : str
        Marks every figure as this process's own, where one address leads to several processes. Nothing is added when
        empty.
    """

    def __init__(self, *, routes: Collection[str], replica: str = "") -> None:
        self._routes = frozenset(routes)
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        self._requests: dict[tuple[str, int], int] = {}
        self._refused: dict[str, int] = {}
        self._gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        self._source: Collector = _Marked(registry, {"replica": replica}) if replica else registry

    def model(self, name: str, *, digest: str, drift: Drift | None = None) -> ModelMetrics:
        """Figures of a model that has been loaded; those it had, if it was loaded before and not forgotten.

        Parameters
        ----------
        name : str
        digest : str
            Of the bundle, with or without ``sha256:``.
        drift : Drift, optional
            Fed by the device lanes with what the model served.
        """
        version = digest.removeprefix("sha256:")[:_VERSION_DIGITS]
        known = self._models.get((name, version))
        if known is None:
            known = ModelMetrics(name, digest=digest, version=version, routes=self._routes, drift=drift)
            self._models[name, version] = known
        return known

    def forget(self, model: ModelMetrics) -> None:
        """Stop telling of a model that has been unloaded, so that versions do not pile up."""
        self._models.pop(model.labels, None)

    def answered(self, route: str, status: int) -> None:
        """Count a request that has reached no model: metadata, health, refusals before one was known."""
        place = (route if route in self._routes else "other", status)
        self._requests[place] = self._requests.get(place, 0) + 1

    def refused(self, reason: str) -> None:
        """Count, beside its answer, a request that was turned away, by the error's kind, which no client chooses."""
        self._refused[reason] = self._refused.get(reason, 0) + 1

    def watch(
        self,
        *,
        queue_rows: Callable[[], float],
        queue_bytes: Callable[[], float],
        in_flight: Callable[[], float],
        in_flight_bytes: Callable[[], float],
        lanes_busy: Callable[[], float],
    ) -> None:
        """Say how to read what is told as it stands at a scrape; costs nothing in between."""
        self._gauges = {
            "queue_rows": ("Rows that wait.", queue_rows),
            "queue_bytes": ("Bytes that wait.", queue_bytes),
            "in_flight": ("Requests between their first byte and their answer.", in_flight),
            "in_flight_bytes": ("Bytes of bodies, features and answers that are not taken yet.", in_flight_bytes),
            "lanes_busy": ("Device lanes that compute.", lanes_busy),
        }

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Write everything down for a scrape.

        Parameters
        ----------
        accept : str
            The request's header. OpenMetrics where it is mentioned, Prometheus' plain text otherwise.

        Returns
        -------
        body : bytes
        content_type : str
        """
        if "application/openmetrics-text" in accept:
            return openmetrics.generate_latest(self._source), openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self._source), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """Make families for the registry."""
        models = list(self._models.values())
        yield from self._requests_and_refusals(models)
        yield from _stages(models)
        yield from _rows(models)
        yield from _drifts(models)
        for name, (meaning, read) in self._gauges.items():
            yield GaugeMetricFamily(f"vaefeat_{name}", meaning, value=read())

    def _requests_and_refusals(self, models: Sequence[ModelMetrics]) -> Iterator[Metric]:
        requests = _counter("requests", "Requests.", "route", "status", "model", "version")
        for labels, counts in ((("", ""), self._requests), *((model.labels, model.requests) for model in models)):
            for (route, status), count in counts.copy().items():
                requests.add_metric((route, str(status), *labels), count)
        yield requests
        refused = _counter("refused", "Requests turned away.", "reason")
        for reason, count in self._refused.copy().items():
            refused.add_metric((reason,), count)
        yield refused


class _Marked:
    """A collector whose samples all carry some labels more."""

    def __init__(self, source: Collector, labels: Mapping[str, str]) -> None:
        self._source = source
        self._labels = dict(labels)

    def collect(self) -> Iterator[Metric]:
        for family in self._source.collect():
            family.samples = [sample._replace(labels={**sample.labels, **self._labels}) for sample in family.samples]
            yield family


def _stages(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    meaning = "Seconds from a request's first byte to its answer."
    whole = HistogramMetricFamily("vaefeat_request_seconds", meaning, labels=("route", *_MODEL))
    for model in models:
        for route, seconds in model.request_seconds.items():
            # A route that a model has not been asked on is no news, and there are many.
            if any(seconds.counts):
                seconds.add_to(whole, (route, *model.labels))
    yield whole
    for name, meaning in (
        ("queue_seconds", "Seconds that requests waited for the device."),
        ("decode_seconds", "Seconds in which requests were taken apart and their images decoded."),
        ("device_seconds", "Seconds of a batch in the encoder."),
        ("batch_rows", "Rows in a batch, without padding."),
    ):
        family = HistogramMetricFamily(f"vaefeat_{name}", meaning, labels=_MODEL)
        for model in models:
            getattr(model, name).add_to(family, model.labels)
        yield family


def _rows(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    rows = _counter("rows", "Rows embedded.", *_MODEL)
    padded = _counter("padded_rows", "Rows computed only to fill batches up.", *_MODEL)
    served = InfoMetricFamily("vaefeat_models", "What is served.", labels=_MODEL)
    for model in models:
        rows.add_metric(model.labels, model.batch_rows.total)
        padded.add_metric(model.labels, model.padded_rows)
        served.add_metric(model.labels, {"digest": model.digest})
    yield from (rows, padded, served)


def _drifts(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    shift = _gauge("drift_mean_shift", "Root mean square over latents of the mean's shift, in reference deviations.")
    largest = _gauge("drift_largest_shift", "Largest shift of a latent's mean, in reference deviations.")
    ratio = _gauge("drift_variance_ratio", "Geometric mean over latents of the variance over the reference's.")
    rows = _gauge("drift_rows", "Rows that the drift gauges rest on, as many as would weigh the same.")
    for model in models:
        if model.drift is not None and (reading := model.drift.read()) is not None:
            shift.add_metric(model.labels, reading.mean_shift)
            largest.add_metric(model.labels, reading.largest_shift)
            ratio.add_metric(model.labels, reading.variance_ratio)
            rows.add_metric(model.labels, reading.rows)
    yield from (shift, largest, ratio, rows)


def _counter(name: str, meaning: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"vaefeat_{name}", meaning, labels=labels)


def _gauge(name: str, meaning: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"vaefeat_{name}", meaning, labels=_MODEL)
