"""``serve deploy`` of the config, on a Ray of one node: through Serve's proxies, and through HAProxy.

Threads send rows all the while that replicas are replaced, and no answer may be anything but the right one.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
import yaml
from numpy.typing import NDArray

import serving.protocols.oip_messages as messages
from tests.e2e.test_clients import run, write_samples
from vaefeat import ModelConfig, OnnxEncoder, TrainConfig, pretrain

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]
CHECKOUT = Path(__file__).parents[2]
NPY = {"content-type": "application/x-npy"}
START_S = 120.0
#: A node that stays while the standard input is open.
NODE = """
import sys, ray
ray.init(address="local", num_cpus=4, num_gpus=1, object_store_memory=2**28, _temp_dir=sys.argv[2], log_to_driver=False,
         include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=int(sys.argv[1]))
print("up", flush=True)
sys.stdin.read()
"""
INGRESS = {
    "proxies": {},
    "haproxy": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"},
}


@dataclass
class Cluster:
    """A running node, and the config that it was given last."""

    dashboard: str
    token: str
    key: str
    folder: Path
    environment: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config['http_options']['port']}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.config['grpc_options']['port']}"

    @property
    def headers(self) -> dict[str, str]:
        return {**NPY, "authorization": f"Bearer {self.key}"}

    def deploy(self, config: dict[str, Any]) -> None:
        """Run ``serve deploy`` and wait until the application runs with it."""
        self.config = config
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", "--address", self.dashboard, str(file)]
        subprocess.run(command, check=True, env=self.environment, cwd=CHECKOUT, capture_output=True, timeout=60)
        # The status of the application that was there before is not the answer.
        time.sleep(2.0)
        self.wait(lambda told: told["status"] == "RUNNING")

    def application(self) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.token}"}
        told = httpx.get(f"{self.dashboard}/api/serve/applications/", headers=headers, timeout=10).json()
        found: dict[str, Any] = told["applications"]["vaefeat"]
        return found

    def wait(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not holds(told := self.application()):
            assert told["status"] != "DEPLOY_FAILED", [one["message"] for one in told["deployments"].values()]
            assert time.monotonic() < deadline, told
            time.sleep(0.2)

    def replicas(self) -> set[str]:
        deployment = self.application()["deployments"]["embedding"]
        return {replica["replica_id"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"}


@contextlib.contextmanager
def node(*, folder: Path, dashboard_port: int, **environment: str) -> Iterator[dict[str, str]]:
    """Start Ray, and kill whatever is left of it in the end; gives its environment."""
    mark = uuid.uuid4().hex
    scratch = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))  # Ray's sockets need a short path
    whole = {**os.environ, **environment, "VAEFEAT_TEST_MARK": mark, "PYTHONPATH": str(CHECKOUT)}
    with (folder / "ray.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", NODE, str(dashboard_port), str(scratch)],
            cwd=folder,
            env=whole,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n", (folder / "ray.log").read_text()
        yield whole
    finally:
        for left in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if left.environ().get("VAEFEAT_TEST_MARK") == mark:
                    left.kill()
        process.communicate()
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="module", params=list(INGRESS))
def cluster(
    request: pytest.FixtureRequest, digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    shutil.copytree(digits_bundle, folder / "bundles" / "digits")
    token, key = secrets.token_hex(16), new_key(folder, "--scope", "embed")
    dashboard_port, http_port, grpc_port, stats_port, metrics_port = free_ports(5)
    environment = {
        **INGRESS[request.param],
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.guard.middleware.guards",
        "VAEFEAT_KEYS": str(folder / "keys.toml"),
        "VAEFEAT_MAX_BODY_BYTES": str(2**20),
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(2**20),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        # Half a minute by default, for every replica that goes.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "AUTOSCALER_METRIC_PORT": "0",
        "DASHBOARD_METRIC_PORT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "",
        "OMP_NUM_THREADS": "1",
    }
    with node(folder=folder, dashboard_port=dashboard_port, **environment) as whole:
        started = Cluster(f"http://127.0.0.1:{dashboard_port}", token, key, folder, whole)
        started.deploy(for_this_machine(folder, http_port=http_port, grpc_port=grpc_port))
        yield started


def new_key(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "serving.keys", "new", "--file", str(folder / "keys.toml")]
    command += ["--id", uuid.uuid4().hex, *arguments]
    return subprocess.run(command, check=True, cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()


def for_this_machine(folder: Path, *, http_port: int, grpc_port: int) -> dict[str, Any]:
    """Read the config that is shipped, and put in what is different here: places, ports and processors."""
    config: dict[str, Any] = yaml.safe_load((CHECKOUT / "serving" / "deploy" / "serve.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": http_port}
    config["grpc_options"]["port"] = grpc_port
    (application,) = config["applications"]
    application["args"] |= {
        "bundles": [str(folder / "bundles")],
        "keys": str(folder / "keys.toml"),
        "limits": {"max_body_bytes": 2**20, "max_rows": 1000},
    }
    (deployment,) = application["deployments"]
    # Ray is told that there is a GPU; the service is told not to look for it.
    application["args"]["device"] = "cpu"
    deployment["ray_actor_options"] = {"num_cpus": 0.5, "num_gpus": 0.5}
    # One replica, which nobody stands in for: what must not happen to it shows.
    deployment["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 2}
    return config


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def wanted(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    return OnnxEncoder(digits_bundle, device="cpu").embed(digits_rows[:64])


def npy(rows: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, rows)
    return file.getvalue()


class Load:
    """Threads that send rows until told to stop.

    What was not answered rightly is in `wrong`; `fewest` is how few replicas there were to answer.
    """

    def __init__(self, cluster: Cluster, rows: NDArray[np.uint8], wanted: list[NDArray[np.float32]]) -> None:
        self.cluster, self.rows, self.wanted = cluster, rows, wanted
        self.n_right = 0
        self.wrong: list[str] = []
        self.fewest = len(cluster.replicas())
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=[start]) for start in (0, 20, 40)]
        self._threads.append(threading.Thread(target=self._count))

    def _send(self, start: int) -> None:
        body, part = npy(self.rows[start : start + 7]), slice(start, start + 7)
        with httpx.Client(headers=self.cluster.headers, timeout=60) as client:
            while not self._stop.wait(0.02):
                try:
                    answer = client.post(f"{self.cluster.url}/v1/embed", content=body)
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                    continue
                if answer.status_code != 200:
                    self.wrong.append(f"{answer.status_code} {answer.text}")
                elif not any(answer.content.endswith(features[part].tobytes()) for features in self.wanted):
                    self.wrong.append("other features")
                else:
                    self.n_right += 1

    def _count(self) -> None:
        while not self._stop.wait(0.1):
            with contextlib.suppress(httpx.HTTPError, KeyError):  # the dashboard is busy deploying
                self.fewest = min(self.fewest, len(self.cluster.replicas()))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_tritonclient_through_serve_s_grpc_gets_the_bits_of_the_local_encoder(
    cluster: Cluster, digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    samples = write_samples(tmp_path, digits_bundle, digits_rows[:64])
    run("tritonclient_grpc.py", cluster.grpc_address, samples, cluster.key)


def test_rows_over_http_get_the_bits_of_the_local_encoder(
    cluster: Cluster, digits_rows: NDArray[np.uint8], wanted: NDArray[np.float32]
) -> None:
    answer = httpx.post(f"{cluster.url}/v1/embed", content=npy(digits_rows[:64]), headers=cluster.headers)
    assert answer.status_code == 200, answer.text
    assert answer.content.endswith(wanted.tobytes())
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_settings_of_the_config_have_arrived(cluster: Cluster) -> None:
    told = cluster.application()["deployments"]["embedding"]["deployment_config"]
    asked = cluster.config["applications"][0]["deployments"][0]
    for name in ("max_surge_percent", "rolling_update_percentage", "graceful_shutdown_timeout_s", "user_config"):
        assert told[name] == asked[name]
    assert asked["autoscaling_config"].items() <= told["autoscaling_config"].items()
    assert asked["ray_actor_options"].items() <= told["ray_actor_options"].items()


def test_probes_are_answered_without_a_key(cluster: Cluster) -> None:
    for path in ("/readyz", "/livez", "/v2/health/ready", "/v2/models/digits/ready", "/-/healthz"):
        assert httpx.get(cluster.url + path).status_code == 200, path


def test_health_over_grpc_is_told_once_and_watched(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        check, watch = health_calls(channel)
        asked = messages.HealthCheckRequest(service="inference.GRPCInferenceService")
        assert check(asked, timeout=10).status == messages.SERVING
        assert next(watch(asked, timeout=10)).status == messages.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(messages.HealthCheckRequest(service="other"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "wanted" in caught.value.details()


def health_calls(channel: grpc.Channel) -> tuple[Any, Any]:
    how = {
        "request_serializer": messages.HealthCheckRequest.SerializeToString,
        "response_deserializer": messages.HealthCheckResponse.FromString,
    }
    service = "/grpc.health.v1.Health"
    return channel.unary_unary(f"{service}/Check", **how), channel.unary_stream(f"{service}/Watch", **how)


def infer_call(channel: grpc.Channel) -> Any:
    return channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=messages.ModelInferRequest.SerializeToString,
        response_deserializer=messages.ModelInferResponse.FromString,
    )


def test_a_grpc_call_without_a_key_is_unauthenticated(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel, pytest.raises(grpc.RpcError) as caught:
        infer_call(channel)(messages.ModelInferRequest(model_name="digits"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_grpc_call_over_the_key_s_rate_is_told_when_to_try_again(
    cluster: Cluster, digits_rows: NDArray[np.uint8]
) -> None:
    key = new_key(cluster.folder, "--scope", "embed", "--rows-per-s", "1")
    time.sleep(2.5)  # every replica has read the file again
    request = messages.ModelInferRequest(model_name="digits", raw_input_contents=[digits_rows[:8].tobytes()])
    request.inputs.add(name="rows", datatype="UINT8", shape=[8, 1, 8, 8])
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        call = infer_call(channel)
        call(request, timeout=10, metadata=[("x-api-key", key)])
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=10, metadata=[("x-api-key", key)])
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 1 <= int(dict(caught.value.trailing_metadata())["retry-after"]) <= 10


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-length": str(2**20 + 1)}, 413),
        ({"transfer-encoding": "chunked"}, 411),
        ({"content-length": "1000000", "authorization": "Bearer nonsense"}, 401),
    ],
)
def test_a_body_is_refused_before_any_of_it_is_sent(cluster: Cluster, headers: dict[str, str], status: int) -> None:
    given = {"host": "h", "content-type": "application/x-npy", "authorization": f"Bearer {cluster.key}", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    with socket.create_connection(("127.0.0.1", cluster.config["http_options"]["port"]), timeout=10) as connection:
        connection.sendall(f"POST /v1/embed HTTP/1.1\r\n{head}\r\n".encode())
        assert connection.recv(65536).split()[1] == str(status).encode()


def test_an_address_that_is_not_served_is_answered_in_the_envelope(cluster: Cluster) -> None:
    answer = httpx.get(f"{cluster.url}/nowhere")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found")
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]


def test_a_client_s_own_time_limit_is_not_obeyed(cluster: Cluster, digits_rows: NDArray[np.uint8]) -> None:
    headers = {**cluster.headers, "x-request-timeout-seconds": "0.000001", "serve-multiplexed-model-id": "none"}
    answer = httpx.post(f"{cluster.url}/v1/embed", content=npy(digits_rows[:1]), headers=headers)
    assert answer.status_code == 200, answer.text


def test_loading_by_a_client_is_refused_where_it_would_reach_one_replica_only(cluster: Cluster) -> None:
    headers = {"authorization": f"Bearer {new_key(cluster.folder, '--scope', 'admin')}"}
    time.sleep(2.5)  # the guard and every replica have read the file again
    answer = httpx.post(f"{cluster.url}/v2/repository/models/digits/load", json={}, headers=headers)
    assert (answer.status_code, list(answer.json())) == (409, ["error"])


def test_a_rolling_update_under_load_fails_no_request(
    cluster: Cluster, digits_rows: NDArray[np.uint8], wanted: NDArray[np.float32]
) -> None:
    before = cluster.replicas()
    config = copy.deepcopy(cluster.config)
    config["applications"][0]["args"]["limits"]["max_rows"] = 999
    with Load(cluster, digits_rows, [wanted]) as load:
        cluster.deploy(config)
        cluster.wait(lambda _: not before & cluster.replicas() and cluster.replicas() != set())
        time.sleep(5.0)  # the old ones are gone
    assert load.wrong == []
    assert load.n_right > 20
    assert load.fewest >= 1, "requests had to wait until a new replica had started"
    card = httpx.get(f"{cluster.url}/v1/models", headers=cluster.headers).json()["data"][0]
    assert card["limits"]["max_rows"] == 999


def test_another_generation_under_load_serves_the_new_bundle_and_fails_no_request(
    cluster: Cluster, digits_rows: NDArray[np.uint8], wanted: NDArray[np.float32], tmp_path: Path
) -> None:
    pretrain(
        digits_rows[:512],
        model=ModelConfig(latent_dim=8, channels=(16, 32), hidden_dims=(64,)),
        train=TrainConfig(max_epochs=1, batch_size=64, seed=1),
        out=tmp_path / "digits",
        progress=False,
    )
    digest, new = OnnxEncoder(tmp_path / "digits").digest, OnnxEncoder(tmp_path / "digits").embed(digits_rows[:64])
    before, place = cluster.replicas(), cluster.folder / "bundles" / "digits"
    config = copy.deepcopy(cluster.config)
    config["applications"][0]["deployments"][0]["user_config"]["generation"] += 1
    with Load(cluster, digits_rows, [wanted, new]) as load:
        place.rename(tmp_path / "old")
        shutil.move(tmp_path / "digits", place)
        cluster.deploy(config)
        deadline = time.monotonic() + 60
        # Each answer is of one replica, whichever; so many of them are of all.
        while {answer_digest(cluster) for _ in range(12)} != {digest}:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert load.wrong == []
    assert cluster.replicas() == before


def answer_digest(cluster: Cluster) -> str:
    digest: str = httpx.get(f"{cluster.url}/v1/models", headers=cluster.headers).json()["data"][0]["digest"]
    return digest


def test_a_config_that_cannot_work_leaves_the_old_one_serving(cluster: Cluster, digits_rows: NDArray[np.uint8]) -> None:
    good, bad = cluster.config, copy.deepcopy(cluster.config)
    bad["applications"][0]["args"]["bundles"] = [str(cluster.folder / "nowhere")]
    wanted = OnnxEncoder(cluster.folder / "bundles" / "digits", device="cpu").embed(digits_rows[:64])
    with Load(cluster, digits_rows, [wanted]) as load:
        with pytest.raises(AssertionError, match="nowhere"):
            cluster.deploy(bad)
        time.sleep(2.0)
    assert load.wrong == []
    assert load.fewest >= 1
    cluster.deploy(good)
    assert httpx.get(f"{cluster.url}/readyz").status_code == 200


def test_a_killed_replica_is_replaced(cluster: Cluster) -> None:
    replica = cluster.application()["deployments"]["embedding"]["replicas"][0]
    psutil.Process(replica["pid"]).kill()
    cluster.wait(lambda _: cluster.replicas() not in (set(), {replica["replica_id"]}))
    cluster.wait(lambda told: told["status"] == "RUNNING")
    assert httpx.get(f"{cluster.url}/readyz").status_code == 200
