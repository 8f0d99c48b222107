"""What goes wrong while the service runs: devices that hang, clients that hang up, bundles nobody could foresee."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.asgi import AsgiWire
from serving.changes import Change
from serving.codec import encode_npy
from serving.errors import RequestError, overloaded
from serving.exchange import Exchange
from serving.guard.admission import Admission
from serving.guard.keys import Key, KeyRing
from serving.guard.rates import RateLimiter
from serving.models import Models
from serving.room import Room
from serving.served_model import Place
from serving.service import Service
from serving.settings import Limits
from tests.serving.conftest import save_slow
from tests.serving.running import running
from vaefeat.bundle import Bundle, load_bundle

NPY = {"content-type": "application/x-npy"}
Talk = Callable[..., Any]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def hold(model: Any, gate: threading.Event) -> None:
    """Have a model's device wait."""
    compute = model.compute

    def waiting(*arguments: Any) -> Any:
        gate.wait(60)
        return compute(*arguments)

    model.compute = waiting


async def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_device_that_hangs_takes_the_service_out(
    talk: Talk, digits_bundle: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a request: the comparison with the reference hangs as well, and must not wait for ever."""
    monkeypatch.setattr("serving.service._PROVE_EVERY_S", 0.05)

    async def conversation(client: Any) -> Any:
        (model,) = client.app.service.models.current
        hold(model, gate)
        await until(lambda: not client.app.service.ready)
        return await client.get("/readyz")

    ready = talk(conversation, digits_bundle, limits=Limits(compute_timeout_s=0.3))
    assert ready.status_code == 503
    assert "has not computed the reference" in ready.json()["reason"]


@pytest.mark.parametrize("path", ["/v1/embed", "/v1/embeddings", "/v2/models/digits/infer"])
def test_a_request_that_finds_the_queue_full_is_refused_before_its_body_is_read(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], gate: threading.Event, path: str
) -> None:
    models = Models.from_bundles([digits_bundle], place=Place(device="cpu", threads=1))
    with running(models, limits=Limits(max_queued_rows=10)) as served:
        hold(models.find("digits"), gate)

        def ask(head: str, body: bytes) -> socket.socket:
            connection = served.connect()
            kind = "json" if head.endswith("embeddings") else "octet-stream"
            lines = f"POST {head} HTTP/1.1\r\nHost: x\r\nContent-Type: application/{kind}\r\n"
            connection.sendall(f"{lines}Content-Length: 640\r\n\r\n".encode() + body)
            return connection

        body = digits_rows[:10].tobytes()
        with ask("/v1/embed", body), ask("/v1/embed", body):
            batcher = served.service.batcher
            deadline = time.monotonic() + 60
            while batcher.queued_rows < 10 and time.monotonic() < deadline:
                time.sleep(0.01)
            with ask(path, b"") as third:
                assert third.recv(20).startswith(b"HTTP/1.1 503")
            gate.set()


def test_bytes_that_were_sent_count_and_those_that_were_not_read_do_not(
    talk: Talk, digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    secret = hashlib.sha256(b"ci").hexdigest()
    file.write_text(f'[keys.ci]\nsha256 = "{secret}"\nscopes = ["embed"]\nrows_per_s = 5\nbytes_per_s = 1000\n')
    file.chmod(0o600)
    headers = {"content-type": "application/octet-stream", "x-api-key": "ci"}

    async def conversation(client: Any) -> None:
        rates = client.app.admission.rates = RateLimiter(clock=lambda: 0.0)
        key = client.app.admission.keys.identify(None, b"ci")

        async def post() -> int:
            answer = await client.post("/v1/embed", content=digits_rows[:10].tobytes(), headers=headers)
            return int(answer.status_code)

        # Of 10 rows and 2,000 bytes at once, the first takes all the rows and 640 bytes, the others bytes alone.
        assert [await post() for _ in range(3)] == [200, 429, 429]
        assert rates.take(key, bytes=81) > 0.0
        rates.give_back(key, bytes=1000)

        def full(_: Any) -> None:
            raise overloaded("full")

        client.app._native._require_room = full
        assert [await post() for _ in range(5)] == [503] * 5
        assert rates.take(key, bytes=1080) == 0.0

    talk(conversation, digits_bundle, keys=KeyRing.from_file(file))


def test_what_a_device_computed_after_it_was_found_to_be_wrong_is_no_answer(
    talk: Talk, digits_bundle: Path, digits_rows: NDArray[np.uint8], gate: threading.Event
) -> None:
    async def conversation(client: Any) -> Any:
        service = client.app.service
        hold(service.find(None), gate)
        asking = asyncio.create_task(client.post("/v1/embed", content=encode_npy(digits_rows[:3]), headers=NPY))
        await until(lambda: service.batcher.busy > 0)
        service.fail("its canary died")
        gate.set()
        return await asking

    answer = talk(conversation, digits_bundle)
    assert answer.status_code == 503
    assert "its canary died" in answer.json()["error"]["message"]


def test_a_stop_during_the_warm_up_does_not_wait_for_it(tmp_path: Path) -> None:
    models = Models.from_bundles([save_slow(tmp_path / "slow", n_layers=10)], place=Place(device="cpu", threads=1))
    (model,) = models.current
    compute, begun, over = model._opened.compute, threading.Event(), threading.Event()

    def compute_for_ever(*arguments: Any, **options: Any) -> Any:
        while not over.is_set():
            compute(*arguments, **options)
            begun.set()

    model._opened.compute = compute_for_ever  # type: ignore[method-assign]

    def loading() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("loader")}

    others = loading()

    async def stop_early() -> None:
        service = Service(models, Limits(), lanes=1)
        await service.start()
        await until(begun.is_set)
        assert not service.ready
        await service.stop()
        await until(lambda: loading() <= others)
        assert not service.failure

    try:
        asyncio.run(stop_early())
    finally:
        over.set()


def test_a_service_that_has_stopped_is_not_ready(talk: Talk, digits_bundle: Path) -> None:
    async def conversation(client: Any) -> Any:
        await client.app.service.stop()
        return await client.get("/readyz")

    ready = talk(conversation, digits_bundle)
    assert (ready.status_code, ready.json()["reason"]) == (503, "stopping")


def test_bodies_of_refused_requests_are_let_go_at_once(
    talk: Talk, digits_bundle: Path, digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under overload nothing can be left to the garbage collector, which counts objects and not megabytes."""
    body = encode_npy(digits_rows[:100])
    headers = [(b"content-type", b"application/x-npy"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "path": "/v1/embed", "query_string": b"", "method": "POST", "headers": headers}
    answered: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answered.append(message["status"])

    async def conversation(client: Any) -> list[Any]:
        def refuse(*_: Any, **__: Any) -> None:
            raise overloaded("it is too much")

        monkeypatch.setattr(client.app.service.batcher, "submit", refuse)
        gc.collect()
        before = [thing for thing in gc.get_objects() if type(thing) is Exchange]
        gc.disable()
        try:
            for _ in range(5):
                await client.app(dict(scope), receive, send)
            after = [thing for thing in gc.get_objects() if type(thing) is Exchange]
            return [thing for thing in after if not any(thing is other for other in before)]
        finally:
            gc.enable()

    assert talk(conversation, digits_bundle) == []
    assert answered == [503] * 5


def test_a_load_whose_client_hangs_up_is_told_to_the_other_processes_all_the_same(
    talk: Talk, digits_bundle: Path
) -> None:
    told: list[str] = []
    gone = threading.Event()
    url = "/v2/repository/models/digits/load"
    scope = {"type": "http", "path": url, "query_string": b"", "method": "POST", "headers": [(b"content-length", b"0")]}
    messages: Iterator[dict[str, Any]] = iter([{"type": "http.request", "body": b""}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        message = next(messages)
        if message["type"] == "http.disconnect":
            gone.set()
        return message

    async def send(message: dict[str, Any]) -> None:
        told.append("the client")

    async def conversation(client: Any) -> None:
        service = client.app.service
        load = service.models.load

        def slow(name: str) -> Any:
            assert gone.wait(60)
            time.sleep(0.3)  # longer than until what has been told is taken in
            return load(name)

        service.models.load, service.alone = slow, False

        async def tell(_: Change) -> None:
            told.append("the others")

        service.changes.turn = lambda: contextlib.nullcontext(tell)
        await client.app(scope, receive, send)
        await until(lambda: bool(told))

    talk(conversation, digits_bundle)
    assert told == ["the others"]


@pytest.mark.parametrize("error", [OSError("too many open files"), KeyError("BF16")])
def test_a_reload_that_fails_in_any_way_leaves_what_was_served(
    talk: Talk, digits_bundle: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def conversation(client: Any) -> int:
        def fail(name: str) -> None:
            raise error

        client.app.service.models.reload = fail
        assert "digits" in (await client.app.service.changes.reload())[0]
        return int((await client.get("/readyz")).status_code)

    assert talk(conversation, digits_bundle) == 200
    assert "was not changed" in caplog.text


def test_sessions_of_versions_that_are_served_no_more_are_let_go(
    talk: Talk, digits_bundle: Path, variant: Callable[..., Bundle], digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    load_bundle(digits_bundle).save(tmp_path / "digits")
    tensor = {"name": "rows", "datatype": "UINT8", "shape": [1, 1, 8, 8], "data": digits_rows[0].ravel().tolist()}

    async def conversation(client: Any) -> int:
        known = []
        for power in range(1, 6):
            known.append(weakref.ref(client.app.service.find(None)))
            asked = await client.post("/v1/embed", content=encode_npy(digits_rows[:1]), headers=NPY)
            inferred = await client.post("/v2/models/digits/infer", json={"inputs": [tensor]})
            assert (asked.status_code, inferred.status_code) == (200, 200)
            variant(factor=2.0**power).save(tmp_path / "digits")
            loaded = await client.post("/v2/repository/models/digits/load", content=b"")
            assert loaded.status_code == 200
        await client.post("/v1/embed", content=encode_npy(digits_rows[:1]), headers=NPY)
        # Threads that computed with them are on their way back.
        await until(lambda: gc.collect() >= 0 and sum(model() is not None for model in known) <= 1)
        return sum(model() is not None for model in known)

    # Of the five before the one that is served now, the last is held, to go back to.
    assert talk(conversation, tmp_path / "digits") == 1


def test_models_that_change_while_they_are_listed_are_listed_anew(
    talk: Talk, digits_bundle: Path, variant: Callable[..., Bundle], tmp_path: Path
) -> None:
    load_bundle(digits_bundle).save(tmp_path / "digits")
    new = variant()

    async def conversation(client: Any) -> str:
        meta, models = client.app._meta, client.app.service.models
        describe = meta._card

        def interrupted(model: Any) -> Any:
            card = describe(model)
            meta._card = describe
            new.save(tmp_path / "digits")
            models.load("digits")  # as the loader's thread may, between any two lines
            return card

        meta._card = interrupted
        await client.get("/v1/models")
        return str((await client.get("/v1/models")).json()["data"][0]["digest"])

    assert talk(conversation, tmp_path / "digits") == new.digest


def test_probes_without_a_key_are_not_told_what_is_served(talk: Talk, digits_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.a]\nsha256 = "{hashlib.sha256(b"a").hexdigest()}"\nscopes = ["embed"]\n')
    path.chmod(0o600)
    digest = load_bundle(digits_bundle).digest

    async def conversation(client: Any) -> list[Any]:
        paths = ("other/ready", "digits/versions/1/ready")
        return [await client.get(f"/v2/models/{path}") for path in paths]

    for answer in talk(conversation, digits_bundle, keys=KeyRing.from_file(path)):
        assert answer.status_code == 404
        assert "digits" not in answer.text
        assert digest[7:] not in answer.text


def arriving(key: Key, n_bytes: int) -> Exchange:
    async def nothing(*_: Any) -> Any:
        raise AssertionError("the body is not looked at")

    exchange = Exchange({"path": "/", "headers": [(b"content-length", b"%d" % n_bytes)]}, AsgiWire(nothing, nothing))
    exchange.key = key
    return exchange


def test_bytes_that_are_refused_for_want_of_room_are_not_taken_off_a_key_s_rate() -> None:
    key = Key(id="a", scopes=frozenset({"embed"}), bytes_per_s=100.0)

    async def conversation() -> list[int]:
        admission = Admission(Limits(max_in_flight=1), room=Room(1000))
        first = arriving(key, 100)
        admission.enter(first)
        refused = []
        for _ in range(3):
            with pytest.raises(RequestError) as caught:
                admission.enter(arriving(key, 100))
            refused.append(caught.value.status)
        admission.leave(first)
        admission.enter(arriving(key, 100))
        return refused

    assert asyncio.run(conversation()) == [503] * 3


def test_rows_that_are_refused_for_want_of_room_are_not_taken_off_a_key_s_rate(
    talk: Talk, digits_bundle: Path, digits_rows: NDArray[np.uint8], gate: threading.Event
) -> None:
    admitted: list[int] = []

    class Caller:
        span = None

        def admit_rows(self, n_rows: int, *, n_bytes: int) -> None:
            admitted.append(n_rows)

    async def conversation(client: Any) -> None:
        service = client.app.service
        model = service.find(None)
        hold(model, gate)
        asking = [asyncio.create_task(service.embed(model, digits_rows[:n], caller=Caller())) for n in (1, 1, 2)]
        await until(lambda: service.batcher.queued_rows == 2)
        with pytest.raises(RequestError, match="rows wait"):
            await service.embed(model, digits_rows[:3], caller=Caller())
        gate.set()
        await asyncio.gather(*asking)

    talk(conversation, digits_bundle, limits=Limits(max_queued_rows=4, max_batch_rows=1))
    assert admitted == [1, 1, 2]
