"""Clients that take their answers slowly, or not at all."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest

from serving.app import Route
from serving.connection import Connection
from serving.exchange import Answer, Exchange
from serving.models import Models
from serving.settings import Limits
from tests.serving.running import Running, running

#: More than both sides' kernels hold.
LARGE = 24 * 2**20
GET = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
def service(digits_models: Models) -> Iterator[Running]:
    with running(digits_models) as service:
        yield service


def answer_with(service: Running, n_bytes: int) -> None:
    """Have an address of the service answer with so many bytes."""

    async def large(exchange: Exchange) -> Answer:
        return Answer(200, [], bytes(n_bytes))

    service.application._exact["/livez"]["GET"] = Route("/livez", large)


def slow_client(service: Running) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    client.settimeout(20)
    client.connect(("127.0.0.1", service.port))
    return client


def standing(service: Running) -> int:
    """Count the bytes of answers that this process holds for its clients."""
    transports = [connection._transport for connection in list(service.server._connections)]
    return sum(transport.get_write_buffer_size() for transport in transports if transport is not None)


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_requests_of_a_client_that_takes_no_answers_are_not_answered_until_it_does(service: Running) -> None:
    n_bytes, n_requests = 2**20, 60
    answer_with(service, n_bytes)
    with slow_client(service) as client:
        for _ in range(n_requests):
            client.sendall(GET)
            time.sleep(0.005)
        assert standing(service) < 2 * n_bytes
        received = b""
        with client.makefile("rb") as reader:
            for _ in range(n_requests):
                assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
                while reader.readline() != b"\r\n":
                    pass
                received = reader.read(n_bytes)
        assert received == bytes(n_bytes)


def test_connection_whose_client_takes_its_answer_slowly_stays(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "write_timeout_s", 0.7)
    answer_with(service, LARGE)
    with slow_client(service) as client:
        client.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        received, begun = 0, time.monotonic()
        while data := client.recv(2**18):
            received += len(data)
            time.sleep(0.01)
    assert received > LARGE
    assert time.monotonic() - begun > Connection.write_timeout_s, "so short a while shows nothing"


@pytest.mark.parametrize("n_bytes", [30_000, LARGE])
@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
def test_connection_whose_client_takes_nothing_ends(
    service: Running, monkeypatch: pytest.MonkeyPatch, n_bytes: int, more: bytes
) -> None:
    answer_with(service, n_bytes)
    monkeypatch.setattr(Connection, "write_timeout_s", 0.3)
    monkeypatch.setattr(Connection, "idle_timeout_s", 0.3)
    with slow_client(service) as client:
        while not standing(service):  # few bytes or many: those that the kernel's buffer has no room for
            client.sendall(GET)
            time.sleep(0.001)
        client.sendall(GET.replace(b"\r\n\r\n", b"\r\n" + more + b"\r\n"))
        assert wait_until(lambda: not service.server.n_connections, timeout_s=60)


def test_stop_waits_for_clients_to_take_their_answers(service: Running) -> None:
    answer_with(service, LARGE)
    with slow_client(service) as client:
        client.sendall(GET)
        assert wait_until(lambda: standing(service) > 0, timeout_s=60)
        service.server.should_exit = True
        time.sleep(0.3)
        received = 0
        while data := client.recv(2**20):
            received += len(data)
    assert received > LARGE


def embed(service: Running, *, n_rows: int = 1) -> httpx.Response:
    headers = {"content-type": "application/octet-stream"}
    return httpx.post(f"{service.url}/v1/embed?output=hidden", content=bytes(64 * n_rows), headers=headers)


def test_answers_that_stand_take_room_from_new_work_until_they_are_taken(digits_models: Models) -> None:
    with (
        running(digits_models, limits=Limits(max_body_bytes=2**20, max_in_flight_bytes=40 * 2**20)) as service,
        contextlib.ExitStack() as stack,
    ):
        answer_with(service, LARGE)
        clients = [stack.enter_context(slow_client(service)) for _ in range(2)]
        for client in clients:
            client.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert wait_until(lambda: service.service.room.used == 2 * LARGE, timeout_s=5)
        refused = embed(service)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "overloaded"
        assert httpx.get(f"{service.url}/readyz").status_code == 200, "what takes nothing goes on"
        while clients[0].recv(2**20):
            pass
        assert wait_until(lambda: service.service.room.used == LARGE, timeout_s=5)
        assert embed(service).status_code == 200
        clients[1].close()
        assert wait_until(lambda: service.service.room.used == 0, timeout_s=5)


def test_small_answers_that_stand_take_room_too(service: Running) -> None:
    n_bytes = 30_000
    answer_with(service, n_bytes)
    with slow_client(service) as client:
        for _ in range(500):
            client.sendall(GET)
            time.sleep(0.001)
            if standing(service):
                break
        assert wait_until(lambda: service.service.room.used == n_bytes, timeout_s=5)
    assert wait_until(lambda: service.service.room.used == 0, timeout_s=5)


def test_clients_that_take_nothing_are_let_go_early_where_memory_is_short(
    digits_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.connection._HURRIED_S", 0.2)
    with (
        running(digits_models, limits=Limits(max_body_bytes=2**20, max_in_flight_bytes=40 * 2**20)) as service,
        slow_client(service) as first,
        slow_client(service) as second,
    ):
        answer_with(service, LARGE)
        first.sendall(GET)
        assert wait_until(lambda: service.service.room.used == LARGE, timeout_s=5)
        time.sleep(0.5)
        assert service.service.room.used == LARGE, "there is room for others"
        second.sendall(GET)
        assert wait_until(lambda: service.server.n_connections == 1, timeout_s=5)
        assert service.service.room.used == LARGE, "with one of them gone there is room again"


def test_features_take_room_from_when_they_are_to_be_computed(
    digits_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, model = threading.Event(), digits_models.current[0]
    compute = model.compute
    n_rows = 1000
    n_bytes = n_rows * (64 + 4 * model.outputs["hidden"])
    limits = Limits(max_body_bytes=2**20, max_in_flight_bytes=2 * n_bytes - 1)
    with running(digits_models, limits=limits) as service:
        # Not before: the service computes something itself before it is ready.
        monkeypatch.setattr(model, "compute", lambda *arguments: (gate.wait(20), compute(*arguments))[1])
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(embed(service, n_rows=n_rows)))
        asking.start()
        try:
            assert wait_until(lambda: service.service.room.used == n_bytes, timeout_s=5)
            assert embed(service, n_rows=n_rows).status_code == 503
        finally:
            gate.set()
            asking.join()
        assert [len(answer.content) for answer in answers] == [n_bytes - 64 * n_rows]
        assert np.isfinite(np.frombuffer(answers[0].content, np.float32)).all()
        assert wait_until(lambda: service.service.room.used == 0, timeout_s=5)
