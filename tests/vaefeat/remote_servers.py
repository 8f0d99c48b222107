"""Real servers for the client's tests: ours, a stranger that answers what it is told, and one that misbehaves."""

from __future__ import annotations

import http.server
import io
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from numpy.typing import NDArray

from serving import local_engine
from serving.address import base_url, claim
from serving.asked import Asked
from serving.settings import Limits, ServiceSettings

DIGEST, OTHER_DIGEST = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
CARD: dict[str, Any] = {
    "id": "digits",
    "digest": DIGEST,
    "input": {"kind": "image", "shape": [1, 8, 8], "dtype": "uint8", "low": 0, "high": 16},
    "outputs": {"mean": 8},
    "latent_dim": 8,
    "active_units": 8,
    "provider": "CPUExecutionProvider",
    "limits": {"max_rows": 1000, "max_body_bytes": 1_000_000},
}


@contextmanager
def served(*bundles: Path, limits: Limits | None = None, port: int = 0, asked: Asked | None = None) -> Iterator[str]:
    """Run the local engine in a thread; requests sent before it is up wait in the listener's queue."""
    listener, asked = claim("127.0.0.1", port), asked or Asked()
    url = base_url(listener)
    settings = ServiceSettings(bundles=bundles, device="cpu", limits=limits or Limits())
    server = threading.Thread(target=local_engine.run, args=(settings, listener, asked))
    server.start()
    try:
        yield url
    finally:
        asked.stop.set()
        server.join()
        listener.close()


@contextmanager
def stranger(answers: dict[str, tuple[int, dict[str, str], bytes]], seen: list[Any]) -> Iterator[str]:
    """Run an HTTP server that is not ours and answers what it was told to."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers)
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, headers, body = answers[self.path.partition("?")[0]]
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with running(Handler) as server:
        yield f"http://127.0.0.1:{server.server_port}"


@contextmanager
def running(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[http.server.ThreadingHTTPServer]:
    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            pass  # clients that go away are part of the tests

    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield server
        finally:
            server.shutdown()


def features_of(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Do what the faulty server takes for embedding: a function of each row alone."""
    return rows.reshape(len(rows), -1)[:, :8].astype(np.float32)


@dataclass
class Faulty:
    """A server that embeds by :func:`features_of`, but for the faults it is given, one for a request to embed."""

    url: str = ""
    card: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(CARD)))
    faults: deque[Fault] = field(default_factory=deque)
    always: Fault | None = None
    #: What something between the client and the limits of the card lets through.
    proxy_bytes: int = 10**9
    digest: str = DIGEST
    older: dict[str, Any] | None = None
    queries: list[dict[str, str]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    n_connections: int = 0
    n_now: int = 0
    n_most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Exchange(http.server.BaseHTTPRequestHandler):
    """One connection to a :class:`Faulty`."""

    protocol_version = "HTTP/1.1"
    faulty: Faulty
    n_here = 0

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.faulty.lock:
            self.faulty.n_connections += 1

    def do_GET(self) -> None:
        self.faulty.keys.append(self.headers["authorization"])
        known = {
            "/v1/models": {"data": [self.faulty.card]},
            f"/v1/models/digits?version={'ab' * 32}": self.faulty.older,
        }
        self.answer(200, json.dumps(known[self.path]).encode())

    def do_POST(self) -> None:
        faulty = self.faulty
        body = self.rfile.read(int(self.headers["content-length"]))
        with faulty.lock:
            self.n_here += 1
            faulty.n_now += 1
            faulty.n_most = max(faulty.n_most, faulty.n_now)
            faulty.queries.append(dict(parse_qsl(urlsplit(self.path).query)))
            faulty.keys.append(self.headers["authorization"])
            fault = faulty.faults.popleft() if faulty.faults else faulty.always
        try:
            if fault is None or not fault(self):
                self.embed(body)
        finally:
            with faulty.lock:
                faulty.n_now -= 1

    def embed(self, body: bytes) -> None:
        limits = self.faulty.card["limits"]
        if len(body) > self.faulty.proxy_bytes:
            return self.answer(413, b"<html>Request Entity Too Large</html>")
        rows = np.load(io.BytesIO(body))
        if len(body) > limits["max_body_bytes"] or len(rows) > limits["max_rows"]:
            return self.answer(413, b'{"error": {"message": "too much"}}')
        with self.faulty.lock:
            self.faulty.sizes.append(len(rows))
        answer = io.BytesIO()
        np.save(answer, features_of(rows))
        self.answer(200, answer.getvalue(), {"x-vaefeat-digest": self.faulty.digest})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in {**(headers or {}), "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


#: Does something to an exchange, and tells whether that was all.
Fault = Callable[[Exchange], bool]


@contextmanager
def faulty() -> Iterator[Faulty]:
    """Run a :class:`Faulty`."""
    state = Faulty()
    with running(type("ExchangeOfOne", (Exchange,), {"faulty": state})) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        yield state


def dropping(exchange: Exchange) -> bool:
    """End the connection instead of answering."""
    exchange.close_connection = True
    exchange.connection.shutdown(socket.SHUT_RDWR)
    return True


def cutting_short(exchange: Exchange) -> bool:
    """Send half of an answer, and end the connection."""
    exchange.send_response(200)
    exchange.send_header("x-vaefeat-digest", exchange.faulty.digest)
    exchange.send_header("content-length", "1000")
    exchange.end_headers()
    exchange.wfile.write(bytes(500))
    return dropping(exchange)


def dropping_what_is_reused(exchange: Exchange) -> bool:
    """End connections that have served before, as a server does that finds them idle for too long."""
    return exchange.n_here > 1 and dropping(exchange)


def answering(status: int, body: bytes = b"", **headers: str) -> Fault:
    """Answer so; `retry_after` is the header Retry-After."""

    def fault(exchange: Exchange) -> bool:
        exchange.answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def waiting(seconds: float) -> Fault:
    """Answer well, but late."""

    def fault(exchange: Exchange) -> bool:
        time.sleep(seconds)
        return False

    return fault


def until(event: threading.Event) -> Fault:
    """Answer well, but only once that has happened."""

    def fault(exchange: Exchange) -> bool:
        event.wait(60)
        return False

    return fault


def of_another_bundle(exchange: Exchange) -> bool:
    """Answer well, from another bundle."""
    answer = io.BytesIO()
    np.save(answer, np.zeros((10, 8), np.float32))
    exchange.answer(200, answer.getvalue(), {"x-vaefeat-digest": OTHER_DIGEST})
    return True
