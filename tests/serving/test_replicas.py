"""Replicas and the process that started them, without Ray's own processes: the desk between them, and health."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.address import base_url
from serving.asked import Asked
from serving.changes import RELOAD, Change
from serving.desk import Desk, fetch, orders, turn
from serving.errors import EngineError, ModelError
from serving.settings import ServiceSettings
from vaefeat.bundle import Bundle, load_bundle

pytest.importorskip("ray")

from serving import deployment, ray_engine


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with socket.create_server(("127.0.0.1", 0)) as listener, Desk(tmp_path / "desk", listener) as one:
        yield one


def do_nothing() -> None:
    pass


def test_desk_counts_the_replicas_that_are_there(desk: Desk, tmp_path: Path) -> None:
    async def come_and_go() -> list[int]:
        found = [desk.count_replicas()]
        many = [orders(tmp_path / "desk", refuse=do_nothing) for _ in range(2)]
        for replica in many:
            await anext(replica)
            found.append(desk.count_replicas())
        for replica in many:
            there = desk.count_replicas()
            await replica.aclose()  # type: ignore[attr-defined]  # it is a generator
            async with asyncio.timeout(60):
                while desk.count_replicas() == there:
                    await asyncio.sleep(0.01)
            found.append(desk.count_replicas())
        return found

    assert asyncio.run(come_and_go()) == [0, 1, 2, 1, 0]


LOAD = Change("load", "digits")


def asked_while(path: Path, *replicas: Callable[[Any], Awaitable[None]]) -> float:
    """Have all replicas load, each of which answers as it is told to; gives the seconds that it took."""

    async def ask() -> float:
        listening = [orders(path, refuse=do_nothing) for _ in replicas]
        for told in listening:
            changes, answer = await anext(told)
            assert changes == [RELOAD]
            answer([])

        async def serve(told: Any, answering: Callable[[Any], Awaitable[None]]) -> None:
            changes, answer = await anext(told)
            assert changes == [LOAD]
            await answering(answer)

        serving = [asyncio.create_task(serve(*pair)) for pair in zip(listening, replicas, strict=True)]
        begun = time.monotonic()
        try:
            async with turn(path) as tell:
                await tell(LOAD)
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)
            for told in listening:
                await told.aclose()  # type: ignore[attr-defined]  # it is a generator
        return time.monotonic() - begun

    return asyncio.run(ask())


async def at_once(answer: Callable[[list[str]], None]) -> None:
    answer([])


async def after_a_while(answer: Callable[[list[str]], None]) -> None:
    await asyncio.sleep(0.4)
    answer([])


async def badly(answer: Callable[[list[str]], None]) -> None:
    answer(["model 'digits' was not loaded:\nno memory"])


async def never(answer: Callable[[list[str]], None]) -> None:
    await asyncio.sleep(300)


def test_reload_of_all_replicas_is_over_when_the_last_has_loaded(desk: Desk, tmp_path: Path) -> None:
    assert asked_while(tmp_path / "desk") < 30, "nobody is there, and nobody is waited for"
    assert 0.4 <= asked_while(tmp_path / "desk", at_once, after_a_while, at_once) < 30


def test_reload_that_a_replica_cannot_do_tells_whoever_asked_why(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not everywhere: model 'digits' was not loaded: no memory"):
        asked_while(tmp_path / "desk", at_once, badly)
    assert asked_while(tmp_path / "desk", at_once) < 30, "an answer belongs to one reload"


def test_reload_that_a_replica_never_answers_ends_and_says_so(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Desk(tmp_path / "desk", listener, reload_s=1.5),
        pytest.raises(ModelError, match=r"1 of 2 processes did not answer within 1\.5 s"),
    ):
        asked_while(tmp_path / "desk", at_once, never)


def test_reload_with_a_replica_that_dies_meanwhile_waits_for_the_others_only(desk: Desk, tmp_path: Path) -> None:
    dying = socket.socket(socket.AF_UNIX)
    dying.connect(str(tmp_path / "desk"))
    dying.sendall(b"L")
    assert dying.recv(100).startswith(b"0 ")
    threading.Timer(0.3, dying.close).start()
    assert 0.2 <= asked_while(tmp_path / "desk", at_once) < 30, "the clock starts a little after the timer"


def test_turn_to_change_what_is_served_is_one_caller_s_until_it_hangs_up(desk: Desk, tmp_path: Path) -> None:
    async def both() -> list[str]:
        done: list[str] = []

        async def change(name: str, pause_s: float) -> None:
            async with turn(tmp_path / "desk") as tell:
                done.append(f"{name} begins")
                await tell(Change("load", name))
                await asyncio.sleep(pause_s)
                done.append(f"{name} ends")

        first = asyncio.create_task(change("a", 0.3))
        await asyncio.sleep(0.1)
        await asyncio.gather(first, change("b", 0.0))
        return done

    assert asyncio.run(both()) == ["a begins", "a ends", "b begins", "b ends"]


def test_replica_that_comes_later_is_told_what_was_decided_before(desk: Desk, tmp_path: Path) -> None:
    unloaded, chosen, chosen_then = (Change("unload", "a"), Change("choose", "b", "2"), Change("choose", "c", "1"))

    async def told_later() -> list[Change]:
        async with turn(tmp_path / "desk") as tell:
            for change in (Change("choose", "b", "1"), unloaded, chosen, chosen_then, Change("load", "c")):
                await tell(change)
        late = orders(tmp_path / "desk", refuse=do_nothing)
        changes, _ = await anext(late)
        await late.aclose()  # type: ignore[attr-defined]  # it is a generator
        return changes

    assert asyncio.run(told_later()) == [RELOAD, chosen, unloaded]


def test_desk_answers_while_another_caller_says_nothing(desk: Desk, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(tmp_path / "desk"))
        begun = time.monotonic()
        listener, share, errors = fetch(tmp_path / "desk")
        assert time.monotonic() - begun < 30
        for one in (listener, share, errors):
            one.close()


def test_desk_answers_again_after_files_were_short(tmp_path: Path) -> None:
    """In a process of its own, which is left without a file descriptor for a while."""
    program = f"""
import os, resource, socket, time
from pathlib import Path
from serving.desk import Desk, fetch
path = Path({str(tmp_path / "desk")!r})
with socket.create_server(("127.0.0.1", 0)) as listener, Desk(path, listener):
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    caller = socket.socket(socket.AF_UNIX)
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    caller.connect(str(path))  # accept has no file for it
    time.sleep(0.5)
    for file in taken:
        os.close(file)
    fetch(path)
    print("answered")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "answered\n", done.stderr


@contextlib.contextmanager
def two_replicas(
    bundle: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[deployment.EmbeddingReplica, deployment.EmbeddingReplica]]:
    """Start two replicas in this process, without Ray."""
    monkeypatch.setattr(deployment, "start_logging", lambda _, *, stream: stream.close())
    monkeypatch.setattr(deployment, "_keep_on_loopback", lambda: None)
    settings = ServiceSettings(bundles=(bundle,), device="cpu", threads=1, replicas=2)
    pair = deployment.EmbeddingReplica(settings, str(desk)), deployment.EmbeddingReplica(settings, str(desk))
    try:
        yield pair
    finally:
        for replica in pair:
            replica.__del__()


def test_load_answers_when_the_new_version_is_to_be_had_from_every_replica(
    desk: Desk, digits_bundle: Path, variant: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_bundle(digits_bundle).save(tmp_path / "digits")
    url = base_url(desk._listener)
    with two_replicas(tmp_path / "digits", tmp_path / "desk", monkeypatch) as (one, other):
        variant().save(tmp_path / "digits")
        # It accepts no connection for a second, so the other replica gets the request.
        other._service.batcher._loop.call_soon_threadsafe(time.sleep, 1.0)
        time.sleep(0.1)
        loaded = httpx.post(f"{url}/v2/repository/models/digits/load", content=b"", timeout=20)
        assert loaded.status_code == 200
        version = loaded.json()["version"]
        assert [replica._service.versions("digits")[0] for replica in (one, other)] == [version] * 2


def versions(replicas: Sequence[deployment.EmbeddingReplica], name: str) -> list[tuple[str, ...]]:
    return [replica._service.versions(name) for replica in replicas]


def change(url: str, name: str, verb: str, version: str | None = None) -> httpx.Response:
    body = None if version is None else {"parameters": {"version": version}}
    return httpx.post(f"{url}/v2/repository/models/{name}/{verb}", json=body, timeout=20)


def test_versions_are_chosen_and_models_unloaded_by_every_replica_or_by_none(
    desk: Desk, digits_bundle: Path, variant: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_bundle(digits_bundle).save(tmp_path / "all" / "digits")
    variant(name="other").save(tmp_path / "all" / "other")
    url = base_url(desk._listener)
    with two_replicas(tmp_path / "all", tmp_path / "desk", monkeypatch) as pair:
        ((first,), _) = versions(pair, "digits")
        variant().save(tmp_path / "all" / "digits")
        second = change(url, "digits", "load").json()["version"]
        assert versions(pair, "digits") == [(second, first)] * 2

        for wanted in (first, second[:12], first):
            chosen = change(url, "digits", "load", wanted)
            assert chosen.status_code == 200, chosen.text
            assert [held[0] for held in versions(pair, "digits")] == [chosen.json()["version"]] * 2
            assert chosen.json()["version"].startswith(wanted)
        assert change(url, "digits", "load").json()["version"] == second, "what the folder holds"
        assert versions(pair, "digits") == [(second, first)] * 2

        # As in a process that has replaced another, and knows the folder only.
        models = pair[1]._service.models
        models._versions = {**models._versions, "digits": models._versions["digits"][:1]}
        refused = change(url, "digits", "load", first)
        # The replica itself does not know the version, or has found that the other does not.
        assert refused.status_code in (404, 409), refused.text
        assert [held[0] for held in versions(pair, "digits")] == [second] * 2

        assert change(url, "other", "unload").status_code == 200
        assert [replica._service.models.names for replica in pair] == [["digits"]] * 2
        assert change(url, "other", "unload").status_code == 404
        assert change(url, "digits", "unload").status_code == 409
        assert change(url, "other", "load").status_code == 200
        assert [replica._service.models.names for replica in pair] == [["digits", "other"]] * 2


def test_changes_that_are_asked_for_at_once_leave_all_replicas_with_the_same_models(
    desk: Desk, digits_bundle: Path, variant: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two models, one replica is asked to unload the one, and the other the other."""
    load_bundle(digits_bundle).save(tmp_path / "all" / "digits")
    variant(name="other").save(tmp_path / "all" / "other")
    with two_replicas(tmp_path / "all", tmp_path / "desk", monkeypatch) as pair:

        def ask(replica: deployment.EmbeddingReplica, coroutine: Any) -> Future[Any]:
            return asyncio.run_coroutine_threadsafe(coroutine, replica._service.batcher._loop)

        for _ in range(3):
            asked = [
                ask(replica, replica._service.changes.unload(name))
                for replica, name in zip(pair, ("digits", "other"), strict=True)
            ]
            failed = [one.exception(20) for one in asked]
            assert sorted(type(error).__name__ for error in failed) == ["NoneType", "RequestError"]
            left = [replica._service.models.names for replica in pair]
            assert left[0] == left[1]
            assert len(left[0]) == 1
            for name in ("digits", "other"):
                assert ask(pair[0], pair[0]._service.changes.load(name)).exception(20) is None


def test_connections_are_refused_by_all_processes_once_the_desk_says_so(
    desk: Desk, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without an answer from both it would take that long.
    monkeypatch.setattr("serving.desk._REFUSE_S", 60.0)
    url = httpx.URL(base_url(desk._listener))
    with two_replicas(digits_bundle, tmp_path / "desk", monkeypatch), socket.socket() as early:
        early.connect((url.host, url.port))
        begun = time.monotonic()
        desk.refuse()
        assert time.monotonic() - begun < 30, "both replicas have answered"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((url.host, url.port), timeout=5)
        with pytest.raises((OSError, ValueError)):
            fetch(tmp_path / "desk")  # a replica that starts now would listen again


def test_watch_without_a_replica_for_long_ends_the_service(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listening socket stays open as long as this process lives: clients would wait in it for ever."""
    monkeypatch.setattr(ray_engine, "_dead_daemons", list)
    monkeypatch.setattr(ray_engine, "_WATCH_S", 0.01)
    monkeypatch.setattr(ray_engine, "_START_TIMEOUT_S", 0.1)
    asked = Asked()
    giving_up = threading.Timer(60, asked.stop.set)
    giving_up.start()
    with pytest.raises(EngineError, match="no replica has answered"):
        ray_engine._watch(desk, asked)
    giving_up.cancel()


@pytest.mark.parametrize(
    ("device", "found", "n_replicas", "wanted"),
    [("auto", 0, 2, 0.0), ("cpu", 2, 1, 0.0), ("auto", 1, 1, 1.0), ("cuda", 1, 2, 0.5), ("auto", 2, 3, 0.5)],
)
def test_gpus_are_shared_out_so_that_every_replica_finds_a_place(
    device: str, found: int, n_replicas: int, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": float(found)} if found else {})
    assert ray_engine._gpus(device, n_replicas) == wanted


def test_replica_whose_event_loop_is_stuck_is_not_healthy(
    desk: Desk, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "start_logging", lambda _, *, stream: stream.close())
    monkeypatch.setattr(deployment, "_keep_on_loopback", lambda: None)
    monkeypatch.setattr(deployment, "_STUCK_S", 0.5)
    replica: Any = deployment.EmbeddingReplica(
        ServiceSettings(bundles=(digits_bundle,), device="cpu", threads=1), str(tmp_path / "desk")
    )
    replica.check_health()
    go_on = threading.Event()
    replica._service.batcher._loop.call_soon_threadsafe(go_on.wait, 60.0)
    assert wait_for(lambda: "has not moved" in ailment(replica))
    go_on.set()
    assert wait_for(lambda: not ailment(replica))


def ailment(replica: Any) -> str:
    """Say why a replica is not healthy, if it is not."""
    try:
        replica.check_health()
    except ModelError as error:
        return str(error)
    return ""


def wait_for(happened: Callable[[], bool]) -> bool:
    until = time.monotonic() + 30
    while not happened() and time.monotonic() < until:
        time.sleep(0.05)
    return happened()
