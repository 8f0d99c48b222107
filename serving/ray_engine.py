"""Starts Ray and Serve for one service, and leaves nothing of them behind.

Importing this module imports Ray, which reads its environment then: :mod:`serving.ray_environment` comes first.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from serving.address import base_url
from serving.announcement import announce
from serving.asked import Asked
from serving.deployment import application
from serving.desk import Desk
from serving.errors import EngineError
from serving.models import find_bundles
from serving.settings import ServiceSettings
from vaefeat.errors import DeviceError
from vaefeat.scratch import scratch_folder

__all__ = ["run"]

_OBJECT_STORE_BYTES = 256 * 2**20
# Beside one for each replica, for the controller and one to spare: Ray starts as many worker processes ahead as it is
# told to have processors. It is an account for scheduling only; replicas' threads use every processor there is.
_SPARE_CPUS = 2
_APPLICATION = "vaefeat"
_DESK = "desk.sock"
_START_TIMEOUT_S = 120.0
_TICK_S = 0.05
_WATCH_S = 1.0


class _Stopped(Exception):
    """A stop was asked for while the service was starting."""


def run(settings: ServiceSettings, listener: socket.socket, asked: Asked) -> None:
    """Serve until a stop is asked for, from a thread that is not the main one and lives as long as Ray.

    Parameters
    ----------
    settings : ServiceSettings
    listener : socket
        From :func:`serving.address.claim`; the replicas accept from it.
    asked : Asked
        By signals. A start that is under way is finished first, because Ray's processes are only all
        known to Ray once they are all started.

    Raises
    ------
    DeviceError
        CUDA was asked for and Ray finds no GPU.
    EngineError
        The replica did not start, or Ray died later. Nothing is left running then either.
    """
    stdout = sys.stdout
    # Ray prints what its processes report to standard output, which is for the one line of ours.
    with (
        _ray_errors_told_plainly(),
        scratch_folder() as folder,
        Desk(folder / _DESK, listener) as desk,
        contextlib.redirect_stdout(sys.stderr),
    ):
        # Nobody has been told where to ask, so that nothing is under way.
        drain_s = 0.0
        try:
            with contextlib.suppress(_Stopped):
                providers = _start(settings, listener, folder, asked.stop)
                drain_s = settings.limits.compute_timeout_s
                names = find_bundles(settings.bundles)
                announce(base_url(listener), engine="ray", models=names, providers=providers, stream=stdout)
                _watch(desk, asked)
        finally:
            desk.refuse()
            _shut_down(drain_s=drain_s)


def _start(settings: ServiceSettings, listener: socket.socket, folder: Path, stop: threading.Event) -> list[str]:
    """Start everything and return the execution providers that the service computes with."""
    _go_on_unless(stop)
    _start_ray(folder, n_cpus=settings.replicas + _SPARE_CPUS)
    _go_on_unless(stop)
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    # Requests do not go through Serve: see serving.deployment.
    serve.start(proxy_location="Disabled", logging_config=quiet)
    _go_on_unless(stop)
    described = application(settings, num_gpus=_gpus(settings.device, settings.replicas), desk=str(folder / _DESK))
    target = serve.RunTarget(described, name=_APPLICATION, route_prefix=None, logging_config=quiet)
    serve.run_many([target], wait_for_applications_running=False)
    _wait_for_replica(stop)
    return _wait_for_answers(base_url(listener), stop)


def _start_ray(folder: Path, *, n_cpus: int) -> None:
    ray.init(
        address="local",  # never one that happens to run on this machine
        num_cpus=n_cpus,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        namespace="vaefeat",
        _temp_dir=str(folder / "r"),
    )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _gpus(device: str, n_replicas: int) -> float:
    """Share of a GPU for each replica: Ray hides them all from a process that asked for none."""
    resources: dict[str, float] = ray.cluster_resources()
    found = int(resources.get("GPU", 0))
    if device in {"cuda", "tensorrt"} and not found:
        raise DeviceError(f"got --device {device}, but Ray finds no GPU on this machine; use --device cpu or auto")
    return 0.0 if device == "cpu" or not found else 1.0 / math.ceil(n_replicas / found)


def _wait_for_replica(stop: threading.Event) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while (state := serve.status().applications[_APPLICATION]).status != "RUNNING":
        if state.status in {"DEPLOY_FAILED", "UNHEALTHY"}:
            raise EngineError(f"the replica did not start: {_last_line(state.message)}")
        if time.monotonic() > deadline:
            raise EngineError(f"the replica did not start within {_START_TIMEOUT_S:g} s; it is {state.status.value}")
        _go_on_unless(stop, after_s=_TICK_S)


def _wait_for_answers(url: str, stop: threading.Event) -> list[str]:
    """Ask until the service says that it is ready, and return the execution providers that it tells."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    reason = ""
    with httpx.Client(base_url=url, timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                ready = client.get("/readyz")
                if ready.status_code == 200:
                    providers: list[str] = ready.json()["providers"]
                    return providers
                reason = ready.text
                if ready.headers.get("content-type") == "application/json" and ready.json().get("failed"):
                    raise EngineError(ready.json()["reason"])
            except httpx.TransportError as error:
                reason = str(error)
            _go_on_unless(stop, after_s=_TICK_S)
    raise EngineError(f"the service did not become ready within {_START_TIMEOUT_S:g} s: {reason}")


def _go_on_unless(stop: threading.Event, *, after_s: float = 0.0) -> None:
    if stop.wait(after_s):
        raise _Stopped


@contextlib.contextmanager
def _ray_errors_told_plainly() -> Iterator[None]:
    """Turn what Ray raises, whole tracebacks of other processes among it, into one line."""
    try:
        yield
    except DeviceError:
        raise
    except (RayError, RayServeException, RuntimeError, OSError) as error:
        raise EngineError(f"Ray failed: {_last_line(str(error))}") from error


def _last_line(text: str) -> str:
    """Ray reports a traceback; its last line is the error."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "Ray gave no reason")


def _watch(desk: Desk, asked: Asked) -> None:
    """Return once a stop is asked for; fail if Ray dies, or all replicas for good, which nobody else would notice."""
    seen = time.monotonic()
    while not asked.stop.wait(_WATCH_S):
        if asked.reload.is_set():
            asked.reload.clear()
            desk.tell()
        if dead := _dead_daemons():
            raise EngineError(f"Ray's {' and '.join(dead)} ended; was memory short? Start the service again")
        if desk.count_replicas():
            seen = time.monotonic()
        elif time.monotonic() - seen > _START_TIMEOUT_S:
            # Connections would wait for ever in the socket that this process holds.
            raise EngineError(
                f"no replica has answered for {_START_TIMEOUT_S:g} s, and Ray could not replace it; is the bundle that "
                "lies in the folder a good one? The log says more"
            )


def _dead_daemons() -> list[str]:
    node: Any = ray._private.worker._global_node  # there is no public way to ask that works when they are dead
    return [kind for kind, _ in node.dead_processes() if kind in {"raylet", "gcs_server"}]


def _shut_down(*, drain_s: float) -> None:
    """Let requests in flight finish, then end every process of Ray's."""
    if not ray.is_initialized():
        return
    if drain_s and not _dead_daemons():
        # In a thread, because it waits without a limit of its own.
        draining = threading.Thread(target=_delete_application, daemon=True)
        draining.start()
        draining.join(drain_s)
    ray.shutdown(wait_for_processes=True)


def _delete_application() -> None:
    with contextlib.suppress(Exception):  # whatever state Serve is in, Ray's processes end next
        serve.delete(_APPLICATION)
