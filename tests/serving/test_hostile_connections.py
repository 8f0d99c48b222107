"""HTTP itself abused, over bare sockets: bodies that lie or never come, heads without end, clients that go away."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from serving.codec import encode_npy
from serving.connection import Connection
from serving.media import NPY
from serving.models import Models
from serving.settings import Limits
from tests.serving.hostile import ROWS, assert_sound
from tests.serving.running import Running, running
from vaefeat.encoder import OnnxEncoder

BODY_TIMEOUT_S = 0.6
LIMITS = Limits(max_body_bytes=2**20, max_in_flight_bytes=4 * 2**20, body_timeout_s=BODY_TIMEOUT_S)


@pytest.fixture(scope="module")
def service(digits_models: Models) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "head_timeout_s", 0.5)
        patch.setattr(Connection, "write_timeout_s", 0.5)
        with running(digits_models, limits=LIMITS) as service:
            yield service


@pytest.fixture(scope="module")
def wanted(digits_bundle: Path) -> NDArray[np.float32]:
    return OnnxEncoder(digits_bundle, device="cpu").embed(ROWS)


def post(*headers: str, body: bytes = b"", path: str = "/v1/embed") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", f"Content-Type: {NPY}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_all(connection: socket.socket) -> bytes:
    """Read until the service ends the connection; a reset ends it too."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65_536):
            received += part
    return received


def ask(service: Running, sent: bytes) -> tuple[int, dict[str, Any]]:
    """Send bytes, read until the end, and take one answer apart."""
    with service.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        received = read_all(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower(), received[:300]
    told: dict[str, Any] = json.loads(body)
    return int(head.split()[1]), told


def until(condition: Callable[[], bool], *, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


GOOD = encode_npy(ROWS)
LENGTH = f"Content-Length: {len(GOOD)}"
CLOSE = "Connection: close"
REFUSED: dict[str, tuple[bytes, int, str]] = {
    "chunked": (post("Transfer-Encoding: chunked", CLOSE, body=b"5\r\nhello\r\n0\r\n\r\n"), 411, "length_required"),
    "chunked without end": (post("Transfer-Encoding: chunked", body=b"ffffff\r\nx"), 411, "length_required"),
    "chunked and a length": (post("Transfer-Encoding: chunked", LENGTH), 400, "malformed_request"),
    "another coding": (post("Transfer-Encoding: gzip", CLOSE), 400, "malformed_request"),
    "huge length": (post("Content-Length: 9999999999999"), 413, "too_large"),
    "length over 64 bits": (post("Content-Length: 99999999999999999999999"), 400, "malformed_request"),
    "negative length": (post("Content-Length: -5"), 400, "malformed_request"),
    "length that is none": (post("Content-Length: ten"), 400, "malformed_request"),
    "length with a sign": (post("Content-Length: +5"), 400, "malformed_request"),
    "two lengths": (post(LENGTH, "Content-Length: 5"), 400, "malformed_request"),
    "one length twice": (post(LENGTH, LENGTH, body=GOOD), 400, "malformed_request"),
    "length and nothing": (post(LENGTH), 408, "body_timeout"),
    "length too long": (post("Content-Length: 100000", body=GOOD), 408, "body_timeout"),
    "unknown method": (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "malformed_request"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "malformed_request"),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "malformed_request"),
    "path of raw bytes": (b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n", 400, "malformed_request"),
    "no path": (b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", 400, "malformed_request"),
    "authority": (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "malformed_request"),
    "nul in a header": (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400, "malformed_request"),
    "bare return in a header": (b"GET / HTTP/1.1\r\nX: a\rb\r\n\r\n", 400, "malformed_request"),
    "space before the colon": (b"GET / HTTP/1.1\r\nX : a\r\n\r\n", 400, "malformed_request"),
    "folded header": (post("Transfer-Encoding:", " chunked", LENGTH, body=GOOD), 400, "malformed_request"),
    "head without end": (b"GET / HTTP/1.1\r\nHost: a\r\n", 408, "body_timeout"),
    "request line without end": (b"GET /", 408, "body_timeout"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_http_that_lies_is_refused_in_the_envelope_and_the_next_request_works(
    service: Running, wanted: NDArray[np.float32], case: str
) -> None:
    sent, status, kind = REFUSED[case]
    began = time.monotonic()
    got, told = ask(service, sent)
    assert (got, told["error"]["type"]) == (status, kind)
    assert told["error"]["message"].startswith("got ")
    assert told["error"]["request_id"]
    assert time.monotonic() - began < 15
    assert_sound(service, wanted)


@pytest.mark.parametrize("part", [b"a" * 8192, b"X-A: b\r\n" * 1024], ids=["one long line", "many headers"])
def test_a_head_without_end_is_answered_431_and_not_kept(
    service: Running, wanted: NDArray[np.float32], part: bytes
) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    with service.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(4096):
                connection.sendall(part)
        received = read_all(connection)
    # The client may have been sending still when the connection was reset; then the answer is lost.
    assert received == b"" or received.startswith(b"HTTP/1.1 431 ")
    assert process.memory_info().rss - before < 8 * 2**20
    assert_sound(service, wanted)


def test_a_head_just_over_the_limit_is_told_so(service: Running) -> None:
    with service.connect() as connection:
        connection.sendall(b"GET /" + b"a" * 40_000)
        time.sleep(0.1)
        connection.sendall(b"a" * 30_000)
        received = read_all(connection)
    assert received.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert b'"head_too_large"' in received


def test_a_body_that_trickles_is_answered_408_within_the_time_for_the_whole_of_it(
    service: Running, wanted: NDArray[np.float32]
) -> None:
    with service.connect() as connection:
        connection.sendall(post(LENGTH))
        began = time.monotonic()
        connection.settimeout(0.05)
        received = b""
        while not received and time.monotonic() - began < 10:
            connection.sendall(b"\x93")
            with contextlib.suppress(TimeoutError):
                received = connection.recv(65_536)
        assert time.monotonic() - began < 10, "that is, long before all of it could have come"
    assert received.startswith(b"HTTP/1.1 408 ")
    assert_sound(service, wanted)


def test_expecting_clients_are_refused_before_they_send_and_told_to_go_on_otherwise(service: Running) -> None:
    got, told = ask(service, post("Content-Length: 2000000", "Expect: 100-continue"))
    assert (got, told["error"]["type"]) == (413, "too_large")
    with service.connect() as connection:
        connection.sendall(post(LENGTH, "Expect: 100-continue", CLOSE))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(GOOD)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_requests_one_behind_the_other_on_one_connection_are_answered_in_order(service: Running) -> None:
    first, second = post(LENGTH, "X-Request-Id: one", body=GOOD), post(LENGTH, "X-Request-Id: two", CLOSE, body=GOOD)
    with service.connect() as connection:
        connection.sendall(first + second)
        received = read_all(connection)
    assert received.count(b"HTTP/1.1 200 ") == 2
    assert received.index(b"x-request-id: one") < received.index(b"x-request-id: two")


@pytest.mark.parametrize("path", ["/livez", "/v1/models", "/v2", "/nowhere", "/v1/embed"])
def test_head_has_no_body_and_options_says_what_is_allowed(service: Running, path: str) -> None:
    with httpx.Client(base_url=service.url) as client:
        head, options = client.head(path), client.options(path)
    assert head.content == b""
    assert head.status_code == {"/nowhere": 404, "/v1/embed": 405}.get(path, 200)
    if path != "/nowhere":
        assert options.status_code == 405
        assert options.headers["allow"] == ("POST" if path == "/v1/embed" else "GET, HEAD")


ABSURD = ["//", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/embed/", "/V1/EMBED", "/v1//embed", "/%", "/%zz"]
ABSURD += ["/" + "a" * 30_000, "/" + "a/" * 10_000, "/v2/models/", "/v2/models//infer", "/v2/models/a/b/c/d/e", "/;x"]
ABSURD += ["/v2/models/digits/versions/", "/v2/repository/models//load", "/v1/models/", "/v1/models/a/b", "/%ff%00"]


@pytest.mark.parametrize("path", ABSURD)
def test_an_absurd_path_is_answered_404(service: Running, path: str) -> None:
    sent = f"GET {path} HTTP/1.1\r\nHost: a\r\n{CLOSE}\r\n\r\n".encode()
    got, told = ask(service, sent)
    assert got == 404
    assert len(json.dumps(told)) < 1000


def test_random_bytes_as_tcp_leave_the_service_sound(service: Running, wanted: NDArray[np.float32]) -> None:
    generator = random.Random(0)
    starts = [b"", b"GET ", b"POST /v1/embed HTTP/1.1\r\n", post("Content-Length: 50"), post(LENGTH, body=GOOD)]
    for _ in range(200):
        with service.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(generator.choice(starts) + generator.randbytes(generator.randrange(400)))
            if generator.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    until(lambda: service.application.admission.in_flight == 0)
    assert_sound(service, wanted)


def test_half_open_connections_cost_nothing_and_end(service: Running, wanted: NDArray[np.float32]) -> None:
    halves = [service.connect() for _ in range(200)]
    for number, connection in enumerate(halves):
        connection.sendall([b"", b"P", b"POST /v1/embed HTTP/1.1\r\n", post(LENGTH), b"\r\n"][number % 5])
    assert_sound_meanwhile(service, wanted)
    for number, connection in enumerate(halves):
        if number % 5 in (1, 2, 3):
            assert read_all(connection).startswith(b"HTTP/1.1 408 ")
        connection.close()
    assert_sound(service, wanted)


def assert_sound_meanwhile(service: Running, wanted: NDArray[np.float32]) -> None:
    answer = httpx.post(f"{service.url}/v1/embed", content=GOOD, headers={"content-type": NPY})
    assert answer.content == encode_npy(wanted)


def test_a_client_that_goes_away_in_the_middle_of_its_body_leaves_nothing(
    service: Running, wanted: NDArray[np.float32]
) -> None:
    for _ in range(100):
        with service.connect() as connection:
            connection.sendall(post("Content-Length: 900000", body=GOOD))
    until(lambda: service.application.admission.in_flight == 0)
    assert_sound(service, wanted)


def test_a_client_that_takes_no_answer_is_let_go(service: Running, wanted: NDArray[np.float32]) -> None:
    many = np.zeros((16_000, 64), np.uint8)
    body = encode_npy(many)
    # Some twenty megabytes, which no socket's buffer holds.
    headers = (f"Content-Length: {len(body)}", "Accept: application/json")
    request = post(*headers, body=body, path="/v1/embed?output=hidden")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", service.port))
        connection.settimeout(20)
        connection.sendall(request)
        until(lambda: service.application.admission.in_flight == 1)
        until(lambda: service.application.admission.in_flight == 0)
        until(lambda: not service.server.n_connections)
        received = 0
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65_536):
                received += len(part)
        assert received < 8 * 2**20, "all of it came: nobody had given up"
    assert_sound(service, wanted)


class Held:
    """A model whose batches wait until they are let go."""

    def __init__(self, models: Models, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        (model,) = models.current
        compute = model.compute

        def late(rows: NDArray[Any], outputs: Any) -> list[NDArray[np.float32]]:
            self.begun.set()
            assert self.go.wait(30)
            return compute(rows, outputs)

        patch.setattr(model, "compute", late)


def test_bodies_count_as_what_they_become_when_inflated(
    service: Running, digits_models: Models, wanted: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(digits_models, monkeypatch)
    tensor = {"name": "rows", "datatype": "UINT8", "shape": [1, 64], "data": [0] * 64}
    packed = zlib.compress(json.dumps({"inputs": [tensor]}).encode() + b" " * 900_000, 9)
    assert len(packed) < 2000
    headers = ("Content-Encoding: deflate", f"Content-Length: {len(packed)}", CLOSE)
    request = post(*headers, body=packed, path="/v2/models/digits/infer")
    admission = service.application.admission
    with contextlib.ExitStack() as stack:
        stack.callback(held.go.set)
        clients = [stack.enter_context(service.connect()) for _ in range(12)]
        for client in clients:
            client.sendall(request)
        until(lambda: admission.in_flight == 4 and service.service.room.used > 4 * 900_000)
        assert service.service.room.used <= LIMITS.max_in_flight_bytes
        held.go.set()
        statuses = sorted(read_all(client).split()[1] for client in clients)
    assert statuses == [b"200"] * 4 + [b"503"] * 8
    assert_sound(service, wanted)


def test_rows_of_clients_that_go_away_while_they_wait_leave_the_queue(
    service: Running, digits_models: Models, wanted: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(digits_models, monkeypatch)
    batcher = service.service.batcher
    try:
        with service.connect() as first:
            first.sendall(post(LENGTH, body=GOOD))
            assert held.begun.wait(10)
            waiting = [service.connect() for _ in range(50)]
            for connection in waiting:
                connection.sendall(post(LENGTH, body=GOOD))
            until(lambda: batcher.queued_rows == 50 * len(ROWS))
            for connection in waiting:
                connection.close()
            until(lambda: batcher.queued_rows == batcher.queued_bytes == 0)
            until(lambda: service.application.admission.in_flight == 1)
            held.go.set()
            assert first.recv(15) == b"HTTP/1.1 200 OK"
    finally:
        held.go.set()
    until(lambda: service.application.admission.in_flight == 0)
    assert_sound(service, wanted)


def test_a_body_that_stops_half_way_loses_its_room_long_before_a_whole_one_would_be_late(
    digits_models: Models, wanted: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few clients that announce much and send little would otherwise keep everybody out for a minute."""
    monkeypatch.setattr("serving.exchange._BODY_GRACE_S", 0.3)
    limits = Limits(max_body_bytes=2**20, max_in_flight_bytes=2 * 2**20)
    with running(digits_models, limits=limits) as service, contextlib.ExitStack() as stack:
        lazy = [stack.enter_context(service.connect()) for _ in range(2)]
        for connection in lazy:
            connection.sendall(post(f"Content-Length: {2**20}", body=b"a"))
        until(lambda: service.service.room.used == 2 * 2**20)
        began = time.monotonic()
        assert all(read_all(connection).startswith(b"HTTP/1.1 408") for connection in lazy)
        assert time.monotonic() - began < limits.body_timeout_s / 4
        assert_sound(service, wanted)


def test_a_body_that_comes_slowly_but_in_time_is_read(digits_models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.exchange._BODY_GRACE_S", 1.0)
    with running(digits_models, limits=Limits(body_timeout_s=6.0)) as service, service.connect() as connection:
        request = post(LENGTH, CLOSE, body=GOOD)
        head = len(request) - len(GOOD)
        connection.sendall(request[:head])
        for start in range(head, len(request), 1 + len(GOOD) // 10):
            time.sleep(0.15)
            connection.sendall(request[start : start + 1 + len(GOOD) // 10])
        assert read_all(connection).startswith(b"HTTP/1.1 200")
