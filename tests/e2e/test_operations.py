"""The service in operation: bundles that change, replicas that die, keys, requests under way when it stops."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from tests.e2e.test_servers import CHECKOUT, NPY, RAY, Service, launched, local, npy, wait_until_ready
from vaefeat import OnnxEncoder, RemoteEncoder
from vaefeat.bundle import Bundle, load_bundle

__all__ = ["local", "npy"]  # fixtures


def post_npy(url: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/embed", content=body, headers={**NPY, **headers}, timeout=20)


@pytest.mark.parametrize("how", ["signal", "watch", "client"])
@pytest.mark.parametrize("engine", ["local", RAY])
def test_a_new_bundle_takes_over_without_a_failed_request(
    engine: str, how: str, digits_bundle: Path, variant: Callable[..., Bundle], tmp_path: Path, npy: Path
) -> None:
    load_bundle(digits_bundle).save(tmp_path / "digits")
    new, body = variant(), npy.read_bytes()
    arguments = [tmp_path / "digits", "--engine", engine, "--port", 0, *(["--watch"] if how == "watch" else [])]
    if engine == "ray":
        arguments += ["--replicas", 2]
    with launched(*arguments, tmp_path=tmp_path) as started:
        url = wait_until_ready(started).url
        new.save(tmp_path / "digits")
        if how == "signal":
            started.process.send_signal(signal.SIGHUP)
        elif how == "client":
            assert httpx.post(f"{url}/v2/repository/models/digits/load", content=b"", timeout=20).status_code == 200
        deadline, last = time.monotonic() + 90, [""]
        while last[-30:] != [new.digest] * 30 and time.monotonic() < deadline:
            answer = post_npy(url, body)  # a connection each time: to any of the replicas
            assert answer.status_code == 200
            last.append(answer.headers["x-vaefeat-digest"])
        assert last[-30:] == [new.digest] * 30
        old = load_bundle(digits_bundle).digest
        pinned = httpx.post(f"{url}/v1/embed?version={old[7:]}", content=body, headers=NPY)
        assert pinned.headers["x-vaefeat-digest"] == old
        assert started.press_ctrl_c() == 0
        assert started.family() == []


@pytest.mark.parametrize("engine", ["local", RAY])
def test_a_chosen_version_and_an_unloaded_model_are_so_in_every_process(
    engine: str, digits_bundle: Path, variant: Callable[..., Bundle], tmp_path: Path, npy: Path
) -> None:
    load_bundle(digits_bundle).save(tmp_path / "all" / "digits")
    variant(name="other").save(tmp_path / "all" / "other")
    old, new = load_bundle(digits_bundle).digest, variant()
    arguments = [tmp_path / "all", "--engine", engine, "--port", 0, *(["--replicas", 2] if engine == "ray" else [])]
    with launched(*arguments, tmp_path=tmp_path) as started:
        url = wait_until_ready(started).url

        def served() -> set[tuple[str, ...]]:
            """Ask over thirty connections: each may lead to another process."""
            answers = [httpx.get(f"{url}/v1/models").json()["data"] for _ in range(30)]
            return {tuple(card["digest"] for card in cards) for cards in answers}

        def change(path: str, **parameters: str) -> int:
            body = {"parameters": parameters} if parameters else None
            return httpx.post(f"{url}/v2/repository/models/{path}", json=body, timeout=30).status_code

        assert change("other/unload") == 200
        new.save(tmp_path / "all" / "digits")
        assert change("digits/load") == 200
        assert served() == {(new.digest,)}
        assert change("digits/load", version=old) == 200
        assert served() == {(old,)}
        assert change("digits/load") == 200
        assert served() == {(new.digest,)}
        if engine == "ray":
            replicas_of(started)[0].kill()
            deadline = time.monotonic() + 30
            while len(replicas_of(started)) < 2 and time.monotonic() < deadline:
                time.sleep(0.2)
            time.sleep(5)  # until the new one takes connections
            assert served() == {(new.digest,)}, "the new one was told"
        assert started.press_ctrl_c() == 0


def replicas_of(started: Service) -> list[psutil.Process]:
    return [process for process in started.family() if "ServeReplica" in process.name()]


@pytest.mark.parametrize("engine", ["local", RAY])
def test_a_bad_bundle_at_reload_is_logged_and_the_old_one_serves(
    engine: str, digits_bundle: Path, tmp_path: Path, npy: Path
) -> None:
    load_bundle(digits_bundle).save(tmp_path / "digits")
    with launched(tmp_path / "digits", "--engine", engine, "--port", 0, tmp_path=tmp_path) as started:
        url = wait_until_ready(started).url
        (tmp_path / "digits" / "encoder.onnx").write_bytes(b"something else")
        started.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 60
        while "hashes" not in started.errors.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "hashes" in started.errors.read_text()
        assert post_npy(url, npy.read_bytes()).headers["x-vaefeat-digest"] == load_bundle(digits_bundle).digest


@pytest.mark.serve
def test_with_two_replicas_one_may_be_killed_and_clients_see_only_closed_connections(
    digits_bundle: Path, tmp_path: Path, digits_rows: NDArray[np.uint8], local: OnnxEncoder
) -> None:
    wanted = local.embed(digits_rows[:200])
    with launched(digits_bundle, "--replicas", 2, "--port", 0, tmp_path=tmp_path) as started:
        url = wait_until_ready(started).url
        replicas = replicas_of(started)
        assert len(replicas) == 2
        with RemoteEncoder(url, batch_size=20) as remote:
            remote.embed(digits_rows[:200])
            replicas[0].kill()
            begun = time.monotonic()
            while time.monotonic() - begun < 15:
                assert remote.embed(digits_rows[:200]).tobytes() == wanted.tobytes()
        replicas = replicas_of(started)
        assert len(replicas) == 2
        assert started.press_ctrl_c() == 0
        assert started.family() == []


@pytest.mark.parametrize("engine", ["local", RAY])
def test_a_public_host_with_keys_asks_for_them(engine: str, digits_bundle: Path, tmp_path: Path, npy: Path) -> None:
    keys = tmp_path / "keys.toml"
    command = [sys.executable, "-m", "serving.keys", "new", "--id", "me", "--scope", "embed", "--file", str(keys)]
    secret = subprocess.run(command, check=True, capture_output=True, text=True, cwd=CHECKOUT).stdout.strip()
    arguments = [digits_bundle, "--engine", engine, "--host", "0.0.0.0", "--port", 0, "--keys", keys]
    with launched(*arguments, tmp_path=tmp_path) as started:
        url = wait_until_ready(started).url
        assert post_npy(url, npy.read_bytes()).status_code == 401
        assert post_npy(url, npy.read_bytes(), authorization=f"Bearer {secret}").status_code == 200
        with RemoteEncoder(url, api_key=secret) as remote:
            assert remote.embed(np.load(npy)[:3]).shape[0] == 3
        keys.write_text(keys.read_text().replace("[keys.me]", "[keys.you]"))
        assert started.press_ctrl_c() == 0
        assert secret not in started.errors.read_text()


def refuses(url: httpx.URL) -> bool:
    try:
        socket.create_connection((url.host, url.port), timeout=20).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("engine", ["local", RAY])
def test_a_request_under_way_is_answered_although_the_service_stops(
    engine: str, digits_bundle: Path, tmp_path: Path, npy: Path
) -> None:
    body = npy.read_bytes()
    head = (
        f"POST /v1/embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with launched(digits_bundle, "--engine", engine, "--port", 0, tmp_path=tmp_path) as started:
        url = httpx.URL(wait_until_ready(started).url)
        with socket.create_connection((url.host, url.port), timeout=20) as connection:
            connection.sendall(head.encode() + body[:1000])
            while "vaefeat_in_flight 1" not in httpx.get(f"{url}/metrics").text:
                time.sleep(0.02)
            started.process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 60
            while not refuses(url):
                assert time.monotonic() < deadline, "it still takes connections"
                time.sleep(0.05)
            connection.sendall(body[1000:])
            assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
        assert started.process.wait(60) == 0
