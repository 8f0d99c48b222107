"""One span for each request, and one for each batch, linked both ways.

A request's span is the child of what its ``traceparent`` names. A batch belongs to several requests at once: its span
links to all of them and each of them to it, and it is the child of the first, so that a sampler which keeps that
request keeps its batch.

References
----------
W3C, Trace Context; OpenTelemetry, semantic conventions for HTTP spans.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.semconv.attributes import error_attributes, http_attributes, url_attributes, user_agent_attributes
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.watching.text import printable

__all__ = ["Headers", "Tracer", "trace_id"]

#: As ASGI has them: names in small letters.
Headers = Sequence[tuple[bytes, bytes]]

_CLOSE_S = 2.0
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})


class Tracer:
    """Makes the spans; any thread may call it.

    Parameters
    ----------
    provider : TracerProvider
        Samples and exports them.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("vaefeat.serving")
        self._propagator = TraceContextTextMapPropagator()

    def start_request(self, headers: Headers, *, method: str, path: str) -> Span | None:
        """Begin the span of a request.

        Parameters
        ----------
        headers : sequence of (bytes, bytes)
            Those of ASGI; ``traceparent`` and ``tracestate`` are read.
        method, path : str
            Of the request; the path without its query.

        Returns
        -------
        Span or None
            To be handed to :meth:`end_request`; None where the request is not sampled.
        """
        attributes = {
            http_attributes.HTTP_REQUEST_METHOD: method if method in _METHODS else "_OTHER",
            url_attributes.URL_PATH: printable(path),
            # TLS ends in front of the service.
            url_attributes.URL_SCHEME: "http",
        }
        if agent := _HEADERS.get(headers, "user-agent"):
            attributes[user_agent_attributes.USER_AGENT_ORIGINAL] = printable(agent[0])
        span = self._tracer.start_span(
            _named(method),
            context=self._propagator.extract(headers, getter=_HEADERS),
            kind=SpanKind.SERVER,
            attributes=attributes,
        )
        return span if span.is_recording() else None

    def end_request(
        self,
        span: Span,
        *,
        method: str,
        route: str,
        status: int,
        model: str | None = None,
        rows: int = 0,
        error: str | None = None,
    ) -> None:
        """End the span of a request.

        Parameters
        ----------
        span : Span
            From :meth:`start_request`.
        method : str
            As there.
        route : str
            As the application declares it: names of models are not in it.
        status : int
            Of HTTP. From 500 on, the span is an error.
        model : str, optional
            That was asked.
        rows : int
            That were asked for.
        error : str, optional
            The error's kind.
        """
        span.update_name(f"{_named(method)} {route}")
        span.set_attribute(http_attributes.HTTP_ROUTE, route)
        span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, status)
        span.set_attribute("vaefeat.rows", rows)
        if model is not None:
            span.set_attribute("vaefeat.model", model)
        if status >= 500:
            span.set_attribute(error_attributes.ERROR_TYPE, error or str(status))
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    @contextmanager
    def batch(self, members: Sequence[Span | None], *, model: str, rows: int) -> Iterator[None]:
        """Run a batch within its span; without one where no member is sampled.

        Parameters
        ----------
        members : sequence of Span or None
            Of the requests that have rows in the batch.
        model : str
        rows : int
            In the batch, without padding.
        """
        # A member whose client has gone may have ended meanwhile.
        sampled = [span for span in members if span is not None and span.is_recording()]
        if not sampled:
            yield
            return
        with self._tracer.start_as_current_span(
            "embed batch",
            context=set_span_in_context(sampled[0]),
            attributes={"vaefeat.model": model, "vaefeat.rows": rows, "vaefeat.requests": len(members)},
            links=[Link(span.get_span_context()) for span in sampled],
        ) as span:
            for member in sampled:
                member.add_link(span.get_span_context())
            yield

    def close(self) -> None:
        """Export what is left, for two seconds at most: a collector that is down must not hold up the end."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


def trace_id(span: Span) -> str:
    """Tell the 32 hexadecimal digits under which backends find the span, for logs."""
    return format_trace_id(span.get_span_context().trace_id)


def _named(method: str) -> str:
    # Clients may send any word as a method, and names of spans are few.
    return method if method in _METHODS else "HTTP"


class _AsgiHeaders(Getter[Headers]):
    def get(self, carrier: Headers, key: str) -> list[str] | None:
        wanted = key.encode()
        return [value.decode("latin-1") for name, value in carrier if name == wanted] or None

    def keys(self, carrier: Headers) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier]


_HEADERS = _AsgiHeaders()
