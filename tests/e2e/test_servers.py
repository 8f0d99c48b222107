"""``python -m serving`` as people run it: a process of its own, talked to over HTTP, stopped with Ctrl-C."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from vaefeat import OnnxEncoder, RemoteEncoder
from vaefeat.bundle import load_bundle

CHECKOUT = Path(__file__).parents[2]
NPY = {"content-type": "application/x-npy"}
RAY = pytest.param("ray", marks=pytest.mark.serve)


@dataclass
class Service:
    """A server process and everything that it started."""

    process: subprocess.Popen[str]
    mark: str
    errors: Path
    ready: str = ""

    @property
    def url(self) -> str:
        return self.ready.split()[1]

    def family(self) -> list[psutil.Process]:
        """Find all processes that inherited this one's environment, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("VAEFEAT_TEST_MARK") == self.mark and process.status() != "zombie":
                    found.append(process)
        return found

    def log(self) -> list[dict[str, Any]]:
        """Read what it logged; fails for anything on standard error that is no line of the log, or an error."""
        lines: list[dict[str, Any]] = [json.loads(line) for line in self.errors.read_text().splitlines()]
        assert [line for line in lines if line["level"] == "error"] == []
        return lines

    def press_ctrl_c(self) -> int:
        """Send SIGINT to the foreground process group, as a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(60)


@contextlib.contextmanager
def launched(*arguments: object, tmp_path: Path, cwd: Path = CHECKOUT, **environment: str) -> Iterator[Service]:
    """Start ``python -m serving`` and kill whatever is left of it in the end."""
    mark, errors = uuid.uuid4().hex, tmp_path / f"stderr-{uuid.uuid4().hex}"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "VAEFEAT_TEST_MARK": mark, **environment},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    service = Service(process, mark, errors)
    try:
        yield service
    finally:
        for left in service.family():
            with contextlib.suppress(psutil.Error):
                left.kill()
        process.communicate()


def wait_until_ready(service: Service) -> Service:
    assert service.process.stdout is not None
    service.ready = service.process.stdout.readline()  # ends, if with nothing, when the process does
    assert service.ready.startswith("ready http://"), service.errors.read_text()
    return service


@pytest.fixture(scope="module", params=["local", RAY])
def service(
    request: pytest.FixtureRequest, digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """One server per engine for the whole module, started from a folder that is not the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    relative = os.path.relpath(digits_bundle, folder)
    arguments = [relative, "--engine", request.param, "--port", 0, "--device", "cpu"]
    # No such cluster: a service must not look for one.
    surroundings = {"PYTHONPATH": str(CHECKOUT), "RAY_ADDRESS": "127.0.0.1:9"}
    with launched(*arguments, tmp_path=folder, cwd=folder, **surroundings) as started:
        yield wait_until_ready(started)
        # Last of all, for whatever the tests did to it:
        assert started.press_ctrl_c() == 0
        assert started.family() == []
        assert {line["status"] // 100 for line in started.log()} <= {4}
        assert started.process.stdout is not None
        assert started.process.stdout.read() == "", "more than the one line on stdout"


@pytest.fixture(scope="module")
def local(digits_bundle: Path) -> OnnxEncoder:
    return OnnxEncoder(digits_bundle, device="cpu")


@pytest.fixture
def npy(tmp_path: Path, digits_rows: NDArray[np.uint8]) -> Path:
    np.save(tmp_path / "x.npy", digits_rows[:1000])
    return tmp_path / "x.npy"


def test_ready_line_tells_address_engine_models_and_provider(service: Service) -> None:
    word, url, engine, models, provider = service.ready.split()
    assert word == "ready"
    assert url.startswith("http://127.0.0.1:")
    assert engine in {"engine=ray", "engine=local"}
    assert (models, provider) == ("models=digits", "provider=CPUExecutionProvider")
    assert httpx.get(f"{url}/readyz").json()["ready"]
    assert httpx.get(f"{url}/livez").status_code == 200


@pytest.mark.parametrize("output", ["mean", "logvar", "hidden"])
def test_remote_encoder_gives_the_bits_of_the_local_one(
    service: Service, local: OnnxEncoder, digits_rows: NDArray[np.uint8], output: str
) -> None:
    wanted = local.embed(digits_rows[:1000], output=output)
    for batch_size in (1024, 33):
        with RemoteEncoder(service.url, batch_size=batch_size) as remote:
            assert remote.embed(digits_rows[:1000], output=output).tobytes() == wanted.tobytes()


def test_curl_posts_npy_and_gets_npy(service: Service, local: OnnxEncoder, npy: Path, tmp_path: Path) -> None:
    answer = tmp_path / "features.npy"
    command = ["curl", "-sS", "--fail-with-body", "--data-binary", f"@{npy}", "-H", "Content-Type: application/x-npy"]
    subprocess.run([*command, "-o", str(answer), f"{service.url}/v1/embed"], check=True)
    np.testing.assert_array_equal(np.load(answer), local.embed(np.load(npy)))


def test_curl_posts_json_and_gets_json(service: Service, local: OnnxEncoder, digits_rows: NDArray[np.uint8]) -> None:
    rows = httpx.Response(200, json={"rows": digits_rows[:2].tolist()}).text
    command = ["curl", "-sS", "-d", rows, "-H", "Content-Type: application/json", f"{service.url}/v1/embed"]
    told = httpx.Response(200, content=subprocess.run(command, check=True, capture_output=True).stdout).json()
    wanted = local.embed(digits_rows[:2])
    np.testing.assert_array_equal(np.asarray(told["embeddings"], dtype=np.float32), wanted)


def test_bad_requests_are_answered_in_the_envelope_and_the_next_one_works(service: Service, npy: Path) -> None:
    for content, headers, status in [
        (b"nonsense", NPY, 400),
        (b"nonsense", {}, 415),
        (npy.read_bytes()[:-1], NPY, 400),
        (npy.read_bytes(), {**NPY, "accept": "text/plain"}, 406),
    ]:
        answer = httpx.post(f"{service.url}/v1/embed", content=content, headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
    assert httpx.post(f"{service.url}/v1/embed", content=npy.read_bytes(), headers=NPY).status_code == 200


def test_a_body_over_the_limit_is_answered_413(service: Service) -> None:
    answer = httpx.post(f"{service.url}/v1/embed", content=bytes(64 * 2**20 + 1), headers=NPY, timeout=30)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "too_large")


def test_a_body_of_unknown_length_is_answered_411(service: Service) -> None:
    answer = httpx.post(f"{service.url}/v1/embed", content=iter([bytes(100)]), headers=NPY, timeout=30)
    assert (answer.status_code, answer.json()["error"]["type"]) == (411, "length_required")


def test_a_body_just_within_the_limit_arrives(service: Service) -> None:
    answer = httpx.post(f"{service.url}/v1/embed", content=bytes(64 * 2**20), headers=NPY, timeout=30)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "malformed_body")


def test_a_request_id_is_echoed_once_and_ray_s_commands_are_ignored(service: Service, npy: Path) -> None:
    headers = {**NPY, "x-request-id": "run-1", "x-request-timeout-seconds": "0.000001"}
    answer = httpx.post(f"{service.url}/v1/embed", content=npy.read_bytes(), headers=headers)
    assert answer.status_code == 200
    assert answer.headers.get_list("x-request-id") == ["run-1"]


def test_nothing_listens_on_an_address_that_other_machines_reach(service: Service) -> None:
    listening = [
        (process.name(), address)
        for process in service.family()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
        for address in [ipaddress.ip_address(connection.laddr.ip)]
    ]
    assert listening
    public = [
        (name, str(address))
        for name, address in listening
        if not (getattr(address, "ipv4_mapped", None) or address).is_loopback
    ]
    assert public == []


@pytest.mark.parametrize("engine", ["local", RAY])
def test_sigterm_stops_with_exit_code_0_and_leaves_nothing(engine: str, digits_bundle: Path, tmp_path: Path) -> None:
    folders = set(Path("/tmp").glob("vaefeat-*"))
    with launched(digits_bundle, "--engine", engine, "--port", 0, tmp_path=tmp_path) as started:
        wait_until_ready(started)
        started.process.terminate()
        assert started.process.wait(60) == 0
        assert started.family() == []
        assert started.errors.read_text() == ""
    assert set(Path("/tmp").glob("vaefeat-*")) <= folders


@pytest.mark.parametrize(
    ("engine", "after_s"),
    [("local", 0.0), ("local", 0.3), *(pytest.param("ray", t, marks=pytest.mark.serve) for t in (2, 5, 8))],
)
def test_ctrl_c_while_starting_stops_with_exit_code_0_and_leaves_nothing(
    engine: str, after_s: float, digits_bundle: Path, tmp_path: Path
) -> None:
    with launched(digits_bundle, "--engine", engine, "--port", 0, tmp_path=tmp_path) as started:
        wait_until_listening_to_signals(started)
        time.sleep(after_s)
        assert started.press_ctrl_c() == 0
        assert started.family() == []
        assert started.errors.read_text() == ""


def wait_until_listening_to_signals(service: Service) -> None:
    """Wait for what the command line does before it imports anything: it takes SIGHUP, after SIGINT."""
    caught = Path(f"/proc/{service.process.pid}/status")
    while not int(caught.read_text().partition("SigCgt:")[2].split()[0], 16) & 1 << signal.SIGHUP - 1:
        assert service.process.poll() is None, service.errors.read_text()
        time.sleep(0.005)


@pytest.mark.serve
def test_a_killed_replica_is_replaced_and_a_killed_ray_ends_the_service(
    digits_bundle: Path, tmp_path: Path, npy: Path
) -> None:
    with launched(digits_bundle, "--port", 0, tmp_path=tmp_path) as started:
        url = wait_until_ready(started).url
        (replica,) = [process for process in started.family() if "ServeReplica" in process.name()]
        replica.kill()
        deadline = time.monotonic() + 60
        answered = 0
        while time.monotonic() < deadline and answered != 200:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.post(f"{url}/v1/embed", content=npy.read_bytes(), headers=NPY, timeout=20)
                answered = answer.status_code
                assert answered == 200 or answer.json()["error"]["type"] in {"overloaded", "internal_error"}
        assert answered == 200
        (raylet,) = [process for process in started.family() if process.name() == "raylet"]
        raylet.kill()
        assert started.process.wait(60) == 1
        assert "error: Ray's raylet ended" in started.errors.read_text()
        assert psutil.wait_procs(started.family(), timeout=10)[1] == []


def refusal(*arguments: object, tmp_path: Path) -> str:
    """Start a server that must refuse to start; return its one line of explanation."""
    with launched(*arguments, tmp_path=tmp_path) as started:
        assert started.process.wait(60) == 2
        told = started.errors.read_text()
        assert started.process.stdout is not None
        assert started.process.stdout.read() == ""
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    return told


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_port_in_use_is_refused_at_once(engine: str, digits_bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refusal(digits_bundle, "--engine", engine, "--port", port, tmp_path=tmp_path)
    assert f"127.0.0.1 port {port}" in told
    assert "choose another port" in told


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_bad_bundle_is_refused_before_anything_is_started(engine: str, digits_bundle: Path, tmp_path: Path) -> None:
    load_bundle(digits_bundle).save(tmp_path / "edited")
    (tmp_path / "edited" / "encoder.onnx").write_bytes(b"something else")
    assert "hashes" in refusal(tmp_path / "edited", "--engine", engine, "--port", 0, tmp_path=tmp_path)
    (tmp_path / "empty").mkdir()
    told = refusal(tmp_path / "empty", "--engine", engine, "--port", 0, tmp_path=tmp_path)
    assert "wanted the folder of a bundle" in told


def test_two_bundles_with_one_name_are_refused(digits_bundle: Path, tmp_path: Path) -> None:
    told = refusal(digits_bundle, digits_bundle, "--port", 0, tmp_path=tmp_path)
    assert "two bundles named 'digits'" in told


def test_a_public_host_is_refused_unless_insecure(digits_bundle: Path, tmp_path: Path) -> None:
    arguments = [digits_bundle, "--host", "0.0.0.0", "--port", 0, "--engine", "local"]
    assert "--insecure" in refusal(*arguments, tmp_path=tmp_path)
    with launched(*arguments, "--insecure", tmp_path=tmp_path) as started:
        assert httpx.get(f"{wait_until_ready(started).url}/readyz").status_code == 200
        assert started.press_ctrl_c() == 0


def test_two_bundles_are_served_by_name(digits_bundle: Path, tmp_path: Path, digits_rows: NDArray[np.uint8]) -> None:
    old = load_bundle(digits_bundle)
    manifest = type(old.manifest).from_dict({**old.manifest.to_dict(), "name": "second"})
    type(old).of(manifest, {name: old.read(name) for name in old.files}).save(tmp_path / "second")
    arguments = [digits_bundle, tmp_path / "second", "--engine", "local", "--port", 0]
    with launched(*arguments, tmp_path=tmp_path) as started:
        assert "models=digits,second" in wait_until_ready(started).ready
        with RemoteEncoder(started.url, model="second") as remote:
            assert remote.embed(digits_rows[:2]).shape[0] == 2
        assert started.press_ctrl_c() == 0


def test_local_engine_is_ready_after_two_seconds_of_processor_and_small(
    digits_bundle: Path, tmp_path: Path, digits_rows: NDArray[np.uint8]
) -> None:
    seconds, megabytes = [], []
    for _ in range(3):  # the best of three: other work on the machine can only make it look worse
        with launched(digits_bundle, "--engine", "local", "--port", 0, tmp_path=tmp_path) as started:
            wait_until_ready(started)
            used = psutil.Process(started.process.pid).cpu_times()
            seconds.append(used.user + used.system)
            with RemoteEncoder(started.url) as remote:
                remote.embed(digits_rows[:1000])
            megabytes.append(psutil.Process(started.process.pid).memory_info().rss / 1e6)
            assert started.press_ctrl_c() == 0
    assert min(seconds) < 2.0
    assert min(megabytes) < 200


def test_command_line_without_a_bundle_explains_itself(tmp_path: Path) -> None:
    with launched(tmp_path=tmp_path) as started:
        assert started.process.wait(60) == 2
        assert "BUNDLE" in started.errors.read_text()
