"""Who is measured: how each server is started here, and where its tuning is recommended.

Peers live in environments of their own, made by ``make .venv-peers/.ready`` from the locks beside their servers,
because their pins clash with ours and with each other's. What a peer's documentation recommends, with its address,
stands in the docstring of its server, or here where it is a setting.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.processes import free_port

__all__ = ["CONTENDERS", "TRITON", "Contender", "Start"]

_ROOT = Path(__file__).parents[1]
_PEERS = _ROOT / "benchmarks" / "serve_peers"
_PYTHON = _ROOT / ".venv-peers" / "peers" / "bin" / "python"
_MLSERVER_PYTHON = _ROOT / ".venv-peers" / "mlserver" / "bin" / "python"
#: A Python that has Triton's client.
TRITON = _PYTHON


@dataclass(frozen=True)
class Start:
    """What is run: words, environment beside ours, folder."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: Path = _ROOT


@dataclass(frozen=True)
class Contender:
    """A server; ours is told the device by whoever starts it, and the others know only the CPU.

    Attributes
    ----------
    title : str
        For people.
    start : callable
        From bundle, port, processors and a folder of its own to what is run.
    speaks : {"ours", "ours_int8", "raw", "json"}
        Which requests it takes, and of which bundle.
    python : Path, optional
        Must be there for it to run.
    """

    title: str
    start: Callable[[Path, int, int, Path], Start]
    speaks: Literal["ours", "ours_int8", "raw", "json"] = "raw"
    python: Path | None = _PYTHON

    @property
    def missing(self) -> str:
        """Why it cannot be started here; empty where it can."""
        if self.python is None or self.python.exists():
            return ""
        return "not installed: make .venv-peers/.ready"


def _ours(engine: str, *, replicas: bool = False) -> Callable[[Path, int, int, Path], Start]:
    """With `replicas`, a process for each processor in place of a thread."""

    def start(bundle: Path, port: int, threads: int, folder: Path) -> Start:
        words = ("-m", "serving", str(bundle), "--engine", engine, "--port", str(port))
        spread = ("--replicas", str(threads), "--threads", "1") if replicas else ("--threads", str(threads))
        return Start((sys.executable, *words, *spread))

    return start


def _peer_environment(bundle: Path, workers: int) -> dict[str, str]:
    return {
        "PEER_MODEL": str(bundle / "encoder.onnx"),
        "PEER_WORKERS": str(workers),
        "PYTHONPATH": str(_PEERS),
        # Nobody is to be told of these runs.
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _script(name: str, bundle: Path, port: int, workers: int) -> Start:
    words = (str(_PYTHON), str(_PEERS / name), str(bundle / "encoder.onnx"), str(port), str(workers))
    return Start(words, _peer_environment(bundle, workers), _PEERS)


def _bentoml(bundle: Path, port: int, threads: int, folder: Path) -> Start:
    words = ("-m", "bentoml", "serve", "bentoml_server:EmbeddingService", "--host", "127.0.0.1", "--port", str(port))
    return Start((str(_PYTHON), *words), _peer_environment(bundle, threads), _PEERS)


def _ray_batch(bundle: Path, port: int, threads: int, folder: Path) -> Start:
    plain = _script("ray_server.py", bundle, port, threads)
    flags = {
        # https://docs.ray.io/en/master/kuberay/user-guides/serve-high-throughput.html
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # The proxy's files and ports are the same for all users of a machine otherwise.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
        # Removed with everything else, also where Ray does not come to its own end.
        "PEER_FOLDER": str(folder),
    }
    return Start(plain.command, {**plain.environment, **flags}, plain.cwd)


def _mlserver(bundle: Path, port: int, workers: int, folder: Path) -> Start:
    name = json.loads((bundle / "bundle.json").read_text())["name"]
    settings = {
        "debug": False,
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        # A pool of processes (https://docs.seldon.ai/mlserver/user-guide/parallel-inference), or none: measured both
        # ways, because ONNX Runtime computes without Python's lock, which is what the pool is for.
        "parallel_workers": workers,
        "environments_dir": str(folder / "environments"),
        "metrics_dir": str(folder / "metrics"),
    }
    # Adaptive batching stays off, as it is by default: its page leaves both bounds to experiments with each model
    # (https://docs.seldon.ai/mlserver/user-guide/adaptive-batching).
    model = {"name": name, "implementation": "embedding.EmbeddingModel"}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    environment = _peer_environment(bundle, workers)
    environment["PYTHONPATH"] = f"{_PEERS}:{_PEERS / 'mlserver_runtime'}"
    words = ("-c", "from mlserver.cli import main; main()", "start", str(folder))
    return Start((str(_MLSERVER_PYTHON), *words), environment, folder)


CONTENDERS: dict[str, Contender] = {
    "local": Contender("vaefeat --engine local", _ours("local"), "ours", None),
    "ray": Contender("vaefeat --engine ray", _ours("ray"), "ours", None),
    "ray_replicas": Contender(
        "vaefeat --engine ray, a replica for each processor", _ours("ray", replicas=True), "ours", None
    ),
    "local_int8": Contender("vaefeat --engine local, int8", _ours("local"), "ours_int8", None),
    "fastapi": Contender("FastAPI", lambda b, p, n, f: _script("fastapi_server.py", b, p, 1)),
    "fastapi_workers": Contender(
        "FastAPI, a worker for each processor", lambda b, p, n, f: _script("fastapi_server.py", b, p, n)
    ),
    "litserve": Contender("LitServe", lambda b, p, n, f: _script("litserve_server.py", b, p, n)),
    "mlserver": Contender("MLServer", lambda b, p, n, f: _mlserver(b, p, 0, f), "json", _MLSERVER_PYTHON),
    "mlserver_workers": Contender(
        "MLServer, a worker for each processor", lambda b, p, n, f: _mlserver(b, p, n, f), "json", _MLSERVER_PYTHON
    ),
    "bentoml": Contender("BentoML", _bentoml),
    "ray_batch": Contender("Ray Serve, @serve.batch", _ray_batch),
}
