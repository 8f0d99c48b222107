"""HTTP/1.1 as our own connections speak it, over bare sockets and with clients that we did not write."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from serving.codec import encode_npy
from serving.connection import Connection
from serving.errors import RequestError
from serving.head import Head, Heads
from serving.media import NPY, RAW
from serving.models import Models
from serving.settings import Limits
from tests.serving.hostile import ROWS, assert_sound
from tests.serving.running import Running, running
from vaefeat.encoder import OnnxEncoder

GOOD = encode_npy(ROWS)
LIMITS = Limits(max_body_bytes=4 * 2**20, max_rows=10_000, max_connections=40)


@pytest.fixture(scope="module")
def service(digits_models: Models) -> Iterator[Running]:
    with running(digits_models, limits=LIMITS) as service:
        yield service


@pytest.fixture(scope="module")
def encoder(digits_bundle: Path) -> OnnxEncoder:
    return OnnxEncoder(digits_bundle, device="cpu")


@pytest.fixture(scope="module")
def wanted(encoder: OnnxEncoder) -> NDArray[np.float32]:
    return encoder.embed(ROWS)


def post(body: bytes, *headers: str, path: str = "/v1/embed") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", f"Content-Type: {NPY}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize("seed", range(4))
def test_requests_cut_anywhere_are_answered_as_whole_ones(
    service: Running, wanted: NDArray[np.float32], seed: int
) -> None:
    generator = random.Random(seed)
    big = encode_npy(np.tile(ROWS, (3000 // len(ROWS), *[1] * (ROWS.ndim - 1))))
    requests = [post(GOOD), b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n", post(big), post(b""), b"\r\n" + post(GOOD)]
    stream = b"".join(requests)
    cuts = sorted({0, len(stream), *(generator.randrange(len(stream)) for _ in range(6)), *range(1, 120, 3)})
    with service.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, stop in itertools.pairwise(cuts):
            connection.sendall(stream[start:stop])
            time.sleep(generator.choice([0, 0.001, 0.005]))
        reader = connection.makefile("rb")
        statuses, bodies = zip(*[read_one(reader) for _ in requests], strict=True)
    assert statuses == (200, 200, 200, 400, 200)
    assert bodies[0] == bodies[4] == encode_npy(wanted)
    assert bodies[2].endswith(bodies[0][-wanted.nbytes :])


def read_one(reader: BinaryIO) -> tuple[int, bytes]:
    """Read one answer of several from one stream, which the standard library's parser would buffer past."""
    status = int(reader.readline().split()[1])
    length = 0
    while (line := reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return status, reader.read(length)


def test_a_body_that_is_refused_from_its_head_is_dropped_and_the_connection_goes_on(
    service: Running, wanted: NDArray[np.float32]
) -> None:
    with service.connect() as connection:
        connection.sendall(post(bytes(900_000), path="/nowhere") + post(GOOD))
        reader = connection.makefile("rb")
        assert read_one(reader)[0] == 404
        assert read_one(reader) == (200, encode_npy(wanted))


def test_a_client_that_expects_to_be_told_and_is_refused_must_begin_anew(service: Running) -> None:
    with service.connect() as connection:
        connection.sendall(post(GOOD, "Expect: 100-continue", path="/nowhere")[: -len(GOOD)])
        received = connection.makefile("rb").read()
    assert received.startswith(b"HTTP/1.1 404 ")
    assert b"connection: close\r\n" in received


def test_a_client_that_is_still_sending_reads_why_it_was_refused(service: Running) -> None:
    body = bytes(16 * 2**20)
    answer = httpx.post(f"{service.url}/v1/embed", content=body, headers={"content-type": NPY})
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"
    assert answer.json()["error"]["type"] == "too_large"


def test_a_body_larger_than_any_buffer_is_embedded_right(service: Running, encoder: OnnxEncoder) -> None:
    rows = np.random.default_rng(0).integers(0, 17, (9_000, 1, 8, 8), dtype=np.uint8)
    for kind, body in ((NPY, encode_npy(rows)), (RAW, rows.tobytes())):
        answer = httpx.post(f"{service.url}/v1/embed", content=body, headers={"content-type": kind})
        assert answer.status_code == 200, answer.text
        features = np.frombuffer(answer.content[-len(rows) * encoder.outputs["mean"] * 4 :], np.float32)
        assert np.array_equal(features.reshape(len(rows), -1), encoder.embed(rows))


def test_too_many_connections_are_told_so_and_those_that_are_open_go_on(
    service: Running, wanted: NDArray[np.float32]
) -> None:
    opened = [service.connect() for _ in range(LIMITS.max_connections)]
    try:
        opened[0].sendall(post(GOOD))
        assert read_one(opened[0].makefile("rb")) == (200, encode_npy(wanted))
        with service.connect() as one_more:
            reader = one_more.makefile("rb")
            assert reader.readline().startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1\r\n" in reader.read()
    finally:
        for connection in opened:
            connection.close()
    deadline = time.monotonic() + 60
    while service.server.n_connections and time.monotonic() < deadline:
        time.sleep(0.01)
    assert_sound(service, wanted)


def test_connections_that_are_turned_away_linger_in_a_bounded_number(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.http_server._MOST_TURNED_AWAY", 3)
    most = LIMITS.max_connections
    with contextlib.ExitStack() as stack:
        for _ in range(most):
            stack.enter_context(service.connect())
        until(lambda: service.server.n_connections == most)
        turned_away = [stack.enter_context(service.connect()) for _ in range(30)]
        for connection in turned_away:
            assert connection.recv(15) == b"HTTP/1.1 503 Se"
        assert service.server.n_connections <= most + 3
    until(lambda: not service.server.n_connections)


def test_a_place_that_is_free_again_is_to_be_had_while_those_that_were_turned_away_linger(service: Running) -> None:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(service.connect()) for _ in range(LIMITS.max_connections)]
        until(lambda: service.server.n_connections == LIMITS.max_connections)
        late = [stack.enter_context(service.connect()) for _ in range(5)]
        assert all(connection.recv(15) == b"HTTP/1.1 503 Se" for connection in late)
        opened[0].close()
        until(lambda: service.server.n_connections == LIMITS.max_connections + 4)
        next_one = stack.enter_context(service.connect())
        next_one.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert next_one.recv(15) == b"HTTP/1.1 200 OK"
    until(lambda: not service.server.n_connections)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def test_a_connection_that_cannot_be_looked_after_is_closed_and_the_others_go_on(
    service: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expire = Connection.expire

    def failing(connection: Connection, now: float) -> None:
        if connection._state.name == "HEAD":
            raise ZeroDivisionError
        expire(connection, now)

    with service.connect() as good, service.connect() as bad:
        monkeypatch.setattr(Connection, "expire", failing)
        bad.sendall(b"GET /livez HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert bad.recv(1) == b""
        good.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert good.recv(15) == b"HTTP/1.1 200 OK"
    assert "ZeroDivisionError" in caplog.text
    until(lambda: not service.server.n_connections)


def test_what_comes_before_its_turn_is_bounded_together(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    early = service.server.early
    until(lambda: not early.used)
    monkeypatch.setattr(early, "most", 100_000)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(service.connect()) for _ in range(3)]
        for connection in connections[:2]:
            connection.sendall(b"GET /" + b"a" * 40_000)
        until(lambda: early.used == 80_010)
        connections[2].sendall(b"GET /" + b"a" * 40_000)
        assert connections[2].recv(15) == b"HTTP/1.1 503 Se"
        until(lambda: early.used == 80_010)
        connections[1].sendall(b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connections[1].recv(15) == b"HTTP/1.1 404 No"
        assert early.used == 40_005
    until(lambda: not early.used)


def test_http_1_0_ends_unless_it_is_asked_to_go_on(service: Running) -> None:
    with service.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"connection: keep-alive\r\n" in connection.recv(65_536)
        connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert b"connection: close\r\n" in connection.recv(65_536)
        assert connection.recv(1) == b""


def test_every_answer_has_a_date_of_now(service: Running) -> None:
    date = parsedate_to_datetime(httpx.get(f"{service.url}/livez").headers["date"])
    assert abs(date.timestamp() - time.time()) < 5


def test_what_never_became_a_request_is_counted(service: Running) -> None:
    def counted() -> float:
        lines = httpx.get(f"{service.url}/metrics").text.splitlines()
        found = [line for line in lines if 'reason="malformed_request"' in line]
        return float(found[0].split()[-1]) if found else 0.0

    before = counted()
    with service.connect() as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 400 ")
    assert counted() == before + 1


def test_curl_and_the_standard_library_keep_their_connection(service: Running, wanted: NDArray[np.float32]) -> None:
    url = f"{service.url}/livez"
    done = subprocess.run(
        ["curl", "-sS", "-v", url, url, "-o", "/dev/null", "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Re-using existing connection" in done.stderr
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    for _ in range(3):
        connection.request("POST", "/v1/embed", GOOD, {"Content-Type": NPY})
        assert connection.getresponse().read() == encode_npy(wanted)
    connection.close()


def test_heads_that_are_remembered_are_told_apart() -> None:
    heads = Heads()
    for number in range(2000):
        data = f"POST /{number % 700} HTTP/1.1\r\nHost: a\r\nContent-Length: {number % 7}\r\n\r\n".encode()
        for _ in range(2):
            head = heads.parse(data)
            assert (head.scope["path"], head.n_bytes) == (f"/{number % 700}", number % 7)
    assert len(heads._remembered) <= 512


SECRETS = [b"Authorization: Bearer vf_s3cret", b"X-API-Key: vf_s3cret", b"Cookie: vf_s3cret"]
SECRETS += [b"Authorization: Basic vf_s3cret", b"Proxy-Authorization: vf_s3cret", b"authorization:vf_s3cret"]


@pytest.mark.parametrize("secret", SECRETS)
def test_heads_are_remembered_without_the_keys_in_them(secret: bytes) -> None:
    heads = Heads()
    head = b"GET /a HTTP/1.1\r\nHost: a\r\nAccept: b\r\n" + secret + b"\r\n\r\n"
    found = heads.parse(head)
    assert heads.parse(head) is found, "it is remembered"
    assert found.scope["headers"] == [(b"host", b"a"), (b"accept", b"b")]
    assert heads.parse(head.replace(b"s3cret", b"0ther!")) is not found
    kept = [*heads._remembered, *(vars_of(one) for one in heads._remembered.values())]
    assert len(kept) == 4
    assert b"s3cret" not in repr(kept).encode()


def vars_of(head: Head) -> dict[str, object]:
    return {name: getattr(head, name) for name in head.__slots__}


def test_head_with_a_key_tells_the_hash_that_key_files_hold() -> None:
    def digest(*lines: str) -> bytes | None:
        head = "\r\n".join(["GET / HTTP/1.1", "Host: a", *lines, "", ""])
        return Heads().parse(head.encode()).key_digest

    wanted = hashlib.sha256(b"vf_a").digest()
    assert digest("Authorization: Bearer vf_a") == digest("X-API-KEY: vf_a ") == wanted
    assert digest("Authorization: Bearer vf_a", "X-API-Key: vf_b") == wanted
    assert digest("Authorization: Basic vf_b", "X-API-Key: vf_a") == wanted
    assert digest() is digest("Authorization: Basic vf_a") is None


def test_heads_of_more_headers_than_anybody_needs_are_refused_before_they_end(service: Running) -> None:
    few, many = (b"GET /livez HTTP/1.1\r\n" + b"".join(b"h%d:a\r\n" % n for n in range(k)) for k in (127, 200))
    assert Heads().parse(few + b"Host: a\r\n\r\n").headers[b"h126"] == b"a"
    with service.connect() as connection:
        connection.sendall(many)
        assert connection.makefile("rb").readline() == b"HTTP/1.1 431 Request Header Fields Too Large\r\n"


@pytest.mark.parametrize(
    "head",
    [
        "GET / HTTP/1.1\nHost: a\n\n",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\n",
        "GET / HTTP/1.1\r\n X: a\r\nHost: a\r\n\r\n",
        "GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/3.0\r\nHost: a\r\n\r\n",
        "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        "GET /\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET / HTTP/1.0\r\nHost: a\r\nhost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
    ],
)
def test_heads_that_servers_read_in_different_ways_are_refused(head: str) -> None:
    with pytest.raises(RequestError, match="no HTTP request"):
        Heads().parse(head.encode())


@pytest.mark.parametrize("value", ["close", "Close", "keep-alive, CLOSE", "close\r\nConnection: keep-alive"])
def test_head_that_says_close_in_any_way_ends_the_connection(value: str) -> None:
    assert not Heads().parse(f"GET / HTTP/1.1\r\nHost: a\r\nConnection: {value}\r\n\r\n".encode()).keeps_alive


def test_head_with_white_space_behind_its_values_says_the_same() -> None:
    head = Heads().parse(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5 \t\r\nExpect: 100-continue \r\n\r\n")
    assert head.headers == {b"host": b"a", b"content-length": b"5", b"expect": b"100-continue"}
    assert head.expects


def test_head_of_http_1_0_expects_nothing() -> None:
    assert not Heads().parse(b"POST / HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n").expects


def test_service_with_few_files_takes_as_many_connections_as_there_are_files_for() -> None:
    """In a process of its own, whose limit of open files nobody may raise."""
    program = """
import resource
from serving.http_server import _allow_files
resource.setrlimit(resource.RLIMIT_NOFILE, (600, 1000))
print(_allow_files(80), resource.getrlimit(resource.RLIMIT_NOFILE)[0], end=" ")
print(_allow_files(8192), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "80 600 488 1000\n", done.stderr
