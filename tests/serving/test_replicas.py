"""Replicas and the process that started them, without Ray's own processes: the desk between them, and health."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.asked import Asked
from serving.desk import Desk, reloads
from serving.errors import EngineError, ModelError
from serving.settings import ServiceSettings

pytest.importorskip("ray")

from serving import deployment, ray_engine


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with socket.create_server(("127.0.0.1", 0)) as listener, Desk(tmp_path / "desk", listener) as one:
        yield one


def test_desk_counts_the_replicas_that_are_there(desk: Desk, tmp_path: Path) -> None:
    async def come_and_go() -> list[int]:
        found = [desk.count_replicas()]
        many = [reloads(tmp_path / "desk") for _ in range(2)]
        for replica in many:
            await anext(replica)
            found.append(desk.count_replicas())
        for replica in many:
            await replica.aclose()  # type: ignore[attr-defined]  # it is a generator
            await asyncio.sleep(0.05)
            found.append(desk.count_replicas())
        return found

    assert asyncio.run(come_and_go()) == [0, 1, 2, 1, 0]


def test_watch_without_a_replica_for_long_ends_the_service(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listening socket stays open as long as this process lives: clients would wait in it for ever."""
    monkeypatch.setattr(ray_engine, "_dead_daemons", list)
    monkeypatch.setattr(ray_engine, "_WATCH_S", 0.01)
    monkeypatch.setattr(ray_engine, "_START_TIMEOUT_S", 0.1)
    asked = Asked()
    giving_up = threading.Timer(5, asked.stop.set)
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
    monkeypatch.setattr(deployment, "start_logging", lambda *_, **__: None)
    monkeypatch.setattr(deployment, "_keep_on_loopback", lambda: None)
    monkeypatch.setattr(deployment, "_STUCK_S", 0.5)
    replica: Any = deployment.EmbeddingReplica(
        ServiceSettings(bundles=(digits_bundle,), device="cpu", threads=1), str(tmp_path / "desk")
    )
    replica.check_health()
    replica._service.batcher._loop.call_soon_threadsafe(time.sleep, 2.0)
    time.sleep(1.0)
    with pytest.raises(ModelError, match="has not moved"):
        replica.check_health()
    time.sleep(1.5)
    replica.check_health()
