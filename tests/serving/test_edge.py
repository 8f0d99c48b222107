from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.edge import Edge
from serving.settings import Limits


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the size of the body and the headers that arrived."""
    request = Request(scope, receive)
    body = await request.body()
    await JSONResponse({"bytes": len(body), "headers": dict(request.headers)})(scope, receive, send)


def post(app: ASGIApp, *, limits: Limits | None = None, **arguments: Any) -> httpx.Response:
    async def exchange() -> httpx.Response:
        transport = httpx.ASGITransport(Edge(app, limits or Limits()))
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            return await client.post("/", **arguments)

    return asyncio.run(exchange())


async def in_parts(*parts: bytes, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(pause_s)
        yield part


@pytest.mark.parametrize("streamed", [False, True])
def test_edge_with_a_body_at_the_limit_passes_it_on(streamed: bool) -> None:
    content = in_parts(b"a" * 60, b"b" * 40) if streamed else b"a" * 100
    answer = post(echo, limits=Limits(max_body_bytes=100), content=content)
    assert answer.json()["bytes"] == 100


@pytest.mark.parametrize("streamed", [False, True])
def test_edge_with_a_body_over_the_limit_answers_413_in_the_envelope(streamed: bool) -> None:
    content = in_parts(b"a" * 60, b"b" * 41) if streamed else b"a" * 101
    answer = post(echo, limits=Limits(max_body_bytes=100), content=content)
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert error["type"] == "too_large"
    assert "at most 100" in error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]


def test_edge_with_an_announced_oversize_does_not_start_the_application() -> None:
    async def unreachable(scope: Scope, receive: Receive, send: Send) -> None:
        pytest.fail("the application was called")

    assert post(unreachable, limits=Limits(max_body_bytes=3), content=b"four").status_code == 413


def test_edge_with_an_application_that_reads_on_after_the_limit_still_answers_413() -> None:
    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        """Read as Ray Serve's proxy does: until told that the client has gone, and then say nothing."""
        while (await receive())["type"] != "http.disconnect":
            pass

    answer = post(stubborn, limits=Limits(max_body_bytes=10), content=in_parts(b"a" * 8, b"b" * 8, b"c" * 8))
    assert answer.status_code == 413


def test_edge_with_a_body_that_does_not_arrive_answers_408() -> None:
    answer = post(echo, limits=Limits(body_timeout_s=0.1), content=in_parts(b"a", b"b", b"c", pause_s=0.06))
    assert answer.status_code == 408
    assert answer.json()["error"]["type"] == "body_timeout"
    assert "of a body in 0.1 s" in answer.json()["error"]["message"]


def test_edge_with_a_sane_request_id_echoes_it_once() -> None:
    answer = post(echo, headers={"x-request-id": "run-7:row.3_a"})
    assert answer.headers.get_list("x-request-id") == ["run-7:row.3_a"]
    assert answer.json()["headers"]["x-request-id"] == "run-7:row.3_a"


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, 'x"}', "é", "a\tb"])
def test_edge_with_an_odd_request_id_makes_another(given: str) -> None:
    answer = post(echo, headers={"x-request-id": given.encode()})
    made = answer.headers["x-request-id"]
    assert made != given
    assert len(made) == 32
    assert answer.json()["headers"]["x-request-id"] == made


def test_edge_with_an_application_that_labels_responses_itself_sends_one_label() -> None:
    async def labelling(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("fine", headers={"X-Request-ID": "mine"})(scope, receive, send)

    answer = post(labelling, headers={"x-request-id": "theirs"})
    assert answer.headers.get_list("x-request-id") == ["theirs"]


def test_edge_drops_headers_with_which_clients_command_ray() -> None:
    commands = {"x-request-timeout-seconds": "0", "x-request-disconnect-disabled": "?1", "X-Session-Id": "a"}
    seen = post(echo, headers={**commands, "x-other": "kept"}).json()["headers"]
    assert seen["x-other"] == "kept"
    assert not {name.lower() for name in commands} & seen.keys()


def test_edge_with_an_application_that_crashes_answers_500_and_logs_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    async def crash(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError("a secret of the server")

    with caplog.at_level(logging.ERROR, logger="serving"):
        answer = post(crash, headers={"x-request-id": "crash-1"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "internal_error"
    assert "secret" not in answer.text
    assert "crash-1" in caplog.text
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [(503, "overloaded", "queue is full"), (408, "overloaded", "took longer"), (500, "internal_error", "log")],
)
def test_edge_with_an_error_in_plain_text_puts_it_into_the_envelope(status: int, kind: str, told: str) -> None:
    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("the queue is full", status)(scope, receive, send)

    answer = post(plain)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["type"] == kind
    assert told in answer.json()["error"]["message"]


def test_edge_with_a_client_that_goes_away_answers_nobody() -> None:
    async def exchange() -> list[Any]:
        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"10")]}
        await Edge(echo, Limits())(scope, receive, send)
        return sent

    assert asyncio.run(exchange()) == []
