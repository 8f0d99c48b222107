from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler
from opentelemetry.trace import Span, SpanKind, StatusCode

from serving.errors import SetupError
from serving.watching.spans import Headers, Tracer, trace_id
from serving.watching.tracing import open_tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = (b"traceparent", f"00-{TRACE}-{PARENT}-01".encode())


def recorder(sampler: Sampler = ALWAYS_ON) -> tuple[Tracer, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracer(provider), exporter


def started(tracer: Tracer, headers: Headers = ()) -> Span:
    span = tracer.start_request(headers, method="POST", path="/v1/embed")
    assert span is not None
    return span


def finish(tracer: Tracer, span: Span, status: int = 200) -> None:
    tracer.end_request(span, method="POST", route="/v1/embed", status=status, model="digits", rows=3)


def ids(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def links(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def test_request_span_continues_the_client_s_trace_with_the_conventions_names() -> None:
    tracer, exporter = recorder()
    span = started(tracer, [(b"host", b"a"), TRACEPARENT, (b"tracestate", b"x=1"), (b"user-agent", b"curl\x00/8")])
    assert trace_id(span) == TRACE
    finish(tracer, span)
    (done,) = exporter.get_finished_spans()
    assert done.name == "POST /v1/embed"
    assert done.kind is SpanKind.SERVER
    assert done.parent is not None
    assert (f"{done.parent.trace_id:032x}", f"{done.parent.span_id:016x}") == (TRACE, PARENT)
    assert done.context is not None
    assert done.context.trace_state.get("x") == "1"
    assert done.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/embed",
        "http.response.status_code": 200,
        "url.path": "/v1/embed",
        "url.scheme": "http",
        "user_agent.original": "curl?/8",
        "vaefeat.model": "digits",
        "vaefeat.rows": 3,
    }


@pytest.mark.parametrize("value", [b"", b"00-1-2-3", b"\xff" * 600, b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01"])
def test_request_span_with_a_broken_traceparent_starts_a_trace(value: bytes) -> None:
    tracer, exporter = recorder()
    finish(tracer, started(tracer, [(b"traceparent", value)]))
    (done,) = exporter.get_finished_spans()
    assert done.parent is None


@pytest.mark.parametrize(
    ("status", "code"), [(200, StatusCode.UNSET), (422, StatusCode.UNSET), (503, StatusCode.ERROR)]
)
def test_request_span_of_a_status_is_an_error_from_500_on(status: int, code: StatusCode) -> None:
    tracer, exporter = recorder()
    finish(tracer, started(tracer), status)
    (done,) = exporter.get_finished_spans()
    assert done.status.status_code is code
    assert done.attributes is not None
    assert done.attributes.get("error.type") == ("503" if status == 503 else None)


def test_request_span_of_a_made_up_method_has_a_name_of_the_convention() -> None:
    tracer, exporter = recorder()
    span = tracer.start_request((), method="GRAB" * 100, path="/")
    assert span is not None
    tracer.end_request(span, method="GRAB" * 100, route="other", status=405)
    (done,) = exporter.get_finished_spans()
    assert done.name == "HTTP other"
    assert done.attributes is not None
    assert done.attributes["http.request.method"] == "_OTHER"


def test_batch_span_links_to_all_members_and_they_to_it() -> None:
    tracer, exporter = recorder()
    first, second = started(tracer, [TRACEPARENT]), started(tracer)
    with tracer.batch([first, None, second], model="digits", rows=5):
        pass
    finish(tracer, first)
    finish(tracer, second)
    batch, one, other = exporter.get_finished_spans()
    assert links(batch) == [ids(one), ids(other)]
    assert links(one) == links(other) == [ids(batch)]
    assert batch.parent is not None
    assert (batch.parent.trace_id, batch.parent.span_id) == ids(one)
    assert batch.attributes == {"vaefeat.model": "digits", "vaefeat.rows": 5, "vaefeat.requests": 3}
    assert batch.start_time is not None
    assert one.start_time is not None
    assert batch.start_time >= one.start_time


def test_batch_span_of_a_device_that_fails_tells_the_error_and_lets_it_through() -> None:
    tracer, exporter = recorder()
    request = started(tracer)
    with pytest.raises(ZeroDivisionError), tracer.batch([request], model="digits", rows=1):
        raise ZeroDivisionError
    (batch,) = exporter.get_finished_spans()
    assert batch.status.status_code is StatusCode.ERROR
    assert [event.name for event in batch.events] == ["exception"]


def test_batch_of_requests_that_are_not_sampled_or_have_ended_makes_no_span() -> None:
    tracer, exporter = recorder(ParentBased(ALWAYS_OFF))
    assert tracer.start_request((), method="POST", path="/") is None
    sampled = started(tracer, [TRACEPARENT])
    finish(tracer, sampled)
    with tracer.batch([None, sampled], model="digits", rows=2):
        pass
    assert len(exporter.get_finished_spans()) == 1


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "otlp"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "True"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_tracer_that_nobody_asked_for_is_none(environ: dict[str, str]) -> None:
    assert open_tracer(environ) is None


def test_tracer_that_nobody_asked_for_imports_no_opentelemetry() -> None:
    program = (
        "import sys; from serving.watching.tracing import open_tracer; open_tracer({});"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"},
    ],
)
def test_tracer_of_an_exporter_that_is_not_here_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(SetupError, match=next(iter(environ))):
        open_tracer({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", **environ})


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Stand in for an OpenTelemetry collector, and note what arrives."""
    arrived: list[tuple[str, bytes]] = []

    class Note(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Note) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", arrived
        server.shutdown()
        thread.join()


def test_tracer_with_an_endpoint_sends_spans_under_the_operator_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "embeddings")
    with collector() as (url, arrived):
        tracer = open_tracer({}, endpoint=f"{url}/")
        assert tracer is not None
        finish(tracer, started(tracer, [TRACEPARENT]))
        tracer.close()
    ((path, body),) = arrived
    assert path == "/v1/traces"
    assert b"embeddings" in body
    assert bytes.fromhex(TRACE) in body


def test_tracer_with_a_collector_that_is_down_ends_in_time() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp")
    with collector() as (url, _):
        pass
    tracer = open_tracer({}, endpoint=url)
    assert tracer is not None
    finish(tracer, started(tracer))
    began = time.monotonic()
    tracer.close()
    assert time.monotonic() - began < 4.0
