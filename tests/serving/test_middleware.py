"""The guard before Serve's ingress, around applications that behave as Serve's does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from typer.testing import CliRunner

from serving.errors import SetupError
from serving.guard.keys import KeyRing
from serving.guard.middleware import Guard, guards
from serving.keys import app as keys_command


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the size of the body and the headers that arrived."""
    request = Request(scope, receive)
    body = await request.body()
    await JSONResponse({"bytes": len(body), "headers": dict(request.headers)})(scope, receive, send)


async def unreachable(scope: Scope, receive: Receive, send: Send) -> None:
    pytest.fail("the request was let through")


def guarded(app: ASGIApp, *, keys: KeyRing | None = None, in_flight: int = 1000) -> Guard:
    return Guard(app, keys=keys, max_body_bytes=100, max_in_flight_bytes=in_flight)


def ask(app: ASGIApp, method: str = "POST", path: str = "/v1/embed", **arguments: Any) -> httpx.Response:
    async def exchange() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://guard") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(exchange())


async def in_parts(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def new_key(file: Path, scope: str) -> str:
    made = CliRunner().invoke(keys_command, ["new", "--file", str(file), "--id", scope, "--scope", scope])
    return made.stdout.strip()


def test_guard_with_a_body_at_the_limit_passes_it_on() -> None:
    assert ask(guarded(echo), content=b"a" * 100).json()["bytes"] == 100


def test_guard_with_an_announced_oversize_answers_413_in_the_envelope_and_closes() -> None:
    answer = ask(guarded(unreachable), content=b"a" * 101)
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")
    error = answer.json()["error"]
    assert error["type"] == "too_large"
    assert "at most 100" in error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("announced", ["1" * 5000, "-1", "+1", "1_0", "٣", ""])
def test_guard_with_an_odd_length_answers_411_or_413(announced: str) -> None:
    answer = ask(guarded(unreachable), headers={"content-length": announced.encode()}, content=in_parts(b"a"))
    assert answer.status_code == (413 if announced.startswith("11") else 411)


def test_guard_with_a_body_of_unknown_length_answers_411() -> None:
    answer = ask(guarded(unreachable), content=in_parts(b"a" * 60, b"b" * 41))
    assert (answer.status_code, answer.json()["error"]["type"]) == (411, "length_required")


def test_guard_with_a_request_without_a_body_passes_it_on() -> None:
    assert ask(guarded(echo), "GET", "/readyz").status_code == 200


def test_guard_with_more_bodies_than_memory_refuses_the_last_and_takes_the_next() -> None:
    async def exchange() -> list[int]:
        entered, let_go = asyncio.Event(), asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            entered.set()
            await let_go.wait()
            await echo(scope, receive, send)

        app = guarded(slow, in_flight=150)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://guard") as client:
            first = asyncio.create_task(client.post("/v1/embed", content=b"a" * 100))
            await entered.wait()
            second = await client.post("/v1/embed", content=b"a" * 100)
            assert second.headers["retry-after"] == "1"
            let_go.set()
            statuses = [(await first).status_code, second.status_code]
            return [*statuses, (await client.post("/v1/embed", content=b"a" * 100)).status_code]

    assert asyncio.run(exchange()) == [200, 503, 200]


def test_guard_with_keys_lets_bodies_with_the_scope_through(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    embed, admin = new_key(file, "embed"), new_key(file, "admin")
    app = guarded(echo, keys=KeyRing.from_file(file))
    load = "/v2/repository/models/digits/load"
    for path, key, status in [
        ("/v1/embed", "", 401),
        ("/v1/embed", "nonsense", 401),
        ("/v1/embed", embed, 200),
        ("/v1/embed", admin, 403),
        (load, embed, 403),
        (load, admin, 200),
    ]:
        answer = ask(app, path=path, content=b"a", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == status, (path, answer.text)
    assert ask(app, "GET", "/v1/models").status_code == 200, "the application's to decide"


def test_guard_with_a_key_that_was_revoked_refuses_it_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.toml"
    key = new_key(file, "embed")
    app = guarded(echo, keys=KeyRing.from_file(file))
    assert ask(app, content=b"a", headers={"x-api-key": key}).status_code == 200
    file.unlink()
    new_key(file, "embed")
    monkeypatch.setattr("serving.guard.middleware._KEYS_EVERY_S", 0.0)
    assert ask(app, content=b"a", headers={"x-api-key": key}).status_code == 401


def test_guard_drops_headers_with_which_clients_command_ray() -> None:
    commands = {
        "x-request-timeout-seconds": "0",
        "x-request-disconnect-disabled": "?1",
        "serve_multiplexed_model_id": "a",
        "Serve-Multiplexed-Model-Id": "a",
        "X-Session-Id": "a",
        "x_session_id": "a",
    }
    seen = ask(guarded(echo), headers={**commands, "x-other": "kept"}).json()["headers"]
    assert seen["x-other"] == "kept"
    assert not {name.lower() for name in commands} & seen.keys()


@pytest.mark.parametrize(("given", "kept"), [("run-7:row.3_a", True), ("a b", False), ("a" * 129, False)])
def test_guard_labels_request_and_answer_once_whoever_labels_them_behind_it(given: str, kept: bool) -> None:
    async def labelling(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        seen = request.headers.getlist("x-request-id")
        await JSONResponse(seen, headers={"X-Request-ID": "mine"})(scope, receive, send)

    answer = ask(guarded(labelling), "GET", "/", headers={"x-request-id": given})
    assert answer.headers.get_list("x-request-id") == answer.json()
    assert len(answer.json()) == 1
    assert (answer.json()[0] == given) is kept


@pytest.mark.parametrize(
    ("status", "told", "kind"),
    [
        (503, 503, "overloaded"),
        (429, 503, "overloaded"),
        (408, 504, "deadline_exceeded"),
        (404, 404, "not_found"),
        (500, 500, "internal_error"),
    ],
)
def test_guard_with_an_error_in_plain_text_puts_it_into_the_envelope(status: int, told: int, kind: str) -> None:
    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("a trace of the server's", status, {"retry-after": "7"})(scope, receive, send)

    answer = ask(guarded(plain))
    assert (answer.status_code, answer.headers["content-type"]) == (told, "application/json")
    assert answer.json()["error"]["type"] == kind
    assert answer.headers.get("retry-after") == ("7" if told == 503 else None)
    assert "trace" not in answer.text
    assert isinstance(ask(guarded(plain), path="/v2/models/a/infer").json()["error"], str)


def test_guard_with_text_that_is_no_error_and_errors_that_are_no_text_passes_them_on() -> None:
    async def mixed(scope: Scope, receive: Receive, send: Send) -> None:
        fine = scope["path"] == "/metrics"
        answer = PlainTextResponse("figures") if fine else JSONResponse({"error": "ours"}, 503)
        await answer(scope, receive, send)

    assert ask(guarded(mixed), "GET", "/metrics").text == "figures"
    assert ask(guarded(mixed)).json() == {"error": "ours"}


def test_guard_leaves_what_serve_says_to_probes_alone() -> None:
    async def draining(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("draining", 503)(scope, receive, send)

    assert ask(guarded(draining), "GET", "/-/healthz").text == "draining"


def test_guards_are_made_as_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key(tmp_path / "keys.toml", "embed")
    monkeypatch.setenv("VAEFEAT_KEYS", str(tmp_path / "keys.toml"))
    monkeypatch.setenv("VAEFEAT_MAX_BODY_BYTES", "10")
    monkeypatch.setenv("VAEFEAT_MAX_IN_FLIGHT_BYTES", "15")
    (made,) = guards()
    assert isinstance(made, Middleware)
    app = made.cls(echo, *made.args, **made.kwargs)
    assert ask(app, content=b"a" * 10).status_code == 401
    assert ask(app, content=b"a" * 10, headers={"x-api-key": key}).status_code == 200
    assert ask(app, content=b"a" * 11, headers={"x-api-key": key}).status_code == 413


@pytest.mark.parametrize("given", ["0", "-1", "1e6", "64 MiB"])
def test_guards_with_an_odd_number_explain_themselves(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAEFEAT_MAX_BODY_BYTES", given)
    with pytest.raises(SetupError, match="VAEFEAT_MAX_BODY_BYTES"):
        guards()


def test_guards_with_a_key_file_that_is_not_there_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAEFEAT_KEYS", "/nowhere/keys.toml")
    with pytest.raises(SetupError, match=r"keys\.toml"):
        guards()
