"""Whether to trace, by OpenTelemetry's standard variables; without them nothing of it is even imported.

=======================================  ============================================================================
``OTEL_EXPORTER_OTLP_ENDPOINT``          the collector, such as ``http://127.0.0.1:4318``; setting it turns tracing on
``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``   the same, with its path
``OTEL_TRACES_EXPORTER``                 ``otlp``, or ``none`` to turn tracing off
``OTEL_SDK_DISABLED``                    ``true`` turns it off
``OTEL_TRACES_SAMPLER``, ``..._ARG``     how many requests; all, or as their client's ``traceparent`` says, by default
``OTEL_SERVICE_NAME``                    ``vaefeat`` by default
=======================================  ============================================================================

The exporter and the SDK obey the others of the specification by themselves (headers, certificates, timeouts, batches).

References
----------
OpenTelemetry specification, "Environment Variable Specification" and "OpenTelemetry Protocol Exporter".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from serving.errors import SetupError
from vaefeat import __version__
from vaefeat.errors import requiring

if TYPE_CHECKING:
    from serving.watching.spans import Tracer

__all__ = ["open_tracer"]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")


def open_tracer(environ: Mapping[str, str], *, endpoint: str | None = None) -> Tracer | None:
    """Start exporting spans, if somebody has said where to.

    Parameters
    ----------
    environ : mapping of str to str
        The environment of the process.
    endpoint : str, optional
        The collector, in place of ``OTEL_EXPORTER_OTLP_ENDPOINT``.

    Returns
    -------
    Tracer or None
        None where nobody asked for traces.

    Raises
    ------
    SetupError
        An exporter or a protocol that is not here.
    MissingExtraError
        The exporter is not installed.
    """
    asked = endpoint or any(environ.get(name) for name in _ENDPOINTS)
    if not asked or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    exporter = environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if exporter == "none":
        return None
    if exporter != "otlp":
        raise SetupError(f"got OTEL_TRACES_EXPORTER={exporter}, wanted otlp, or none to trace nothing")
    for name in _PROTOCOLS:
        if (protocol := environ.get(name) or "http/protobuf") != "http/protobuf":
            raise SetupError(f"got {name}={protocol}, wanted http/protobuf, which collectors take on port 4318")
    with requiring("serve", what="Tracing"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from serving.watching.spans import Tracer
    ours = Resource.create({"service.name": "vaefeat", "service.version": __version__})
    # Last, because what the operator says counts.
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    url = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return Tracer(provider)
