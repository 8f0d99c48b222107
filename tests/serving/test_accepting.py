"""Processes that accept from one queue: shares that are equal, and connections that are never left waiting."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from serving.accepting import Acceptor, Counts, Share
from serving.desk import Desk, fetch
from serving.http_server import loop_factory
from serving.models import Models
from tests.serving.running import running


class Greeting(asyncio.Protocol):
    """Says who has accepted, and counts the connection off when it ends."""

    def __init__(self, name: bytes, share: Share) -> None:
        self._name, self._share = name, share

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._name)  # uvloop's is none by name

    def connection_lost(self, exc: Exception | None) -> None:
        self._share.add(-1)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as one:
        one.setblocking(False)
        yield one


@pytest.fixture
def counts() -> Counts:
    return Counts()


@contextlib.contextmanager
def share_of(counts: Counts) -> Iterator[Share]:
    with socket.socket() as held:
        yield Share(counts, counts.enter(), held)


@contextlib.contextmanager
def accepting(listener: socket.socket, counts: Counts, name: bytes) -> Iterator[Share]:
    """Accept in an event loop in a thread of its own, from the same queue as others."""
    begun, ended = threading.Event(), threading.Event()

    async def accept() -> None:
        acceptor = Acceptor(listener.dup(), share, lambda: Greeting(name, share))
        begun.set()
        while not ended.is_set():
            await asyncio.sleep(0.01)
        acceptor.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(accept())

    with share_of(counts) as share:
        thread = threading.Thread(target=run)
        thread.start()
        begun.wait()
        try:
            yield share
        finally:
            ended.set()
            thread.join()


def connect(listener: socket.socket, n: int) -> list[socket.socket]:
    return [socket.create_connection(listener.getsockname(), timeout=10) for _ in range(n)]


def names(clients: list[socket.socket]) -> list[bytes]:
    return [client.recv(1) for client in clients]


def close(clients: list[socket.socket]) -> None:
    for client in clients:
        client.close()


def until(is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_connections_that_come_together_are_shared_out_in_equal_parts(listener: socket.socket, counts: Counts) -> None:
    with accepting(listener, counts, b"a"), accepting(listener, counts, b"b"), accepting(listener, counts, b"c"):
        clients = connect(listener, 60)
        found = names(clients)
        # Two ms is not for ever on a machine that does other things: one that is late may lose a few.
        assert all(12 <= found.count(name) <= 28 for name in (b"a", b"b", b"c"))
        close(clients)


def test_connections_go_to_whoever_has_lost_some(listener: socket.socket, counts: Counts) -> None:
    with accepting(listener, counts, b"a"):
        early = connect(listener, 20)
        assert names(early) == [b"a"] * 20
        with accepting(listener, counts, b"b"):
            late = connect(listener, 20)
            assert names(late).count(b"b") >= 14
            close(early)
            until(lambda: counts[0] <= 6)
            last = connect(listener, 10)
            assert names(last).count(b"a") >= 7
            close(late + last)
            until(lambda: counts[0] == counts[1] == 0)


def test_connection_is_accepted_although_a_process_with_fewer_never_moves(
    listener: socket.socket, counts: Counts
) -> None:
    with share_of(counts), accepting(listener, counts, b"a"):  # nobody accepts for the first
        clients = connect(listener, 20)
        assert names(clients) == [b"a"] * 20
        close(clients)


def test_connection_waits_while_there_is_no_file_for_it_and_is_accepted_then(
    listener: socket.socket, counts: Counts, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with accepting(listener, counts, b"a"):
        client = socket.socket()
        client.settimeout(10)
        highest = max(int(file.name) for file in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        taken = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            client.connect(listener.getsockname())
            until(lambda: "no connection can be accepted now" in caplog.text)
        finally:
            for file in taken:
                os.close(file)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert client.recv(1) == b"a"
        client.close()


def test_place_of_a_process_that_is_killed_is_free_again(tmp_path: Path) -> None:
    program = "import sys, pathlib, serving.desk as d; s = d.fetch(pathlib.Path(sys.argv[1]))[1]; s.add(-5); input()"
    with socket.create_server(("127.0.0.1", 0)) as listener, Desk(tmp_path / "desk", listener):
        handed, share, errors = fetch(tmp_path / "desk")
        with subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "desk")], stdin=subprocess.PIPE
        ) as process:
            until(lambda: not share.is_least)
            process.kill()
            until(lambda: share.is_least)
        for one in (handed, share, errors):
            one.close()


def test_served_connections_are_counted_and_counted_off(digits_models: Models, counts: Counts) -> None:
    with share_of(counts) as share, running(digits_models, share=share) as service:
        clients = [service.connect() for _ in range(3)]
        until(lambda: counts[0] == 3)
        for client in clients:
            client.sendall(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        clients.pop().close()
        until(lambda: counts[0] == 2)
        close(clients)
        until(lambda: counts[0] == 0)


def test_request_under_way_is_answered_by_a_server_that_was_told_to_refuse_before_it_stopped(
    digits_models: Models, counts: Counts
) -> None:
    with (
        share_of(counts) as share,
        running(digits_models, share=share) as service,
        service.connect() as client,
    ):
        client.sendall(b"POST /v1/embed HTTP/1.1\r\nHost: a\r\nContent-Length: 64\r\nContent-Type: application/")
        client.sendall(b"octet-stream\r\n\r\n" + bytes(32))
        until(lambda: service.application.admission.in_flight == 1)
        service.service.batcher._loop.call_soon_threadsafe(service.server.refuse)
        until(lambda: service.server.should_exit)
        time.sleep(0.2)
        client.sendall(bytes(32))
        assert client.recv(15) == b"HTTP/1.1 200 OK"
