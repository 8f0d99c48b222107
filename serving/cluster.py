"""The service as an application of Ray Serve on a cluster: ``import_path: serving.cluster:build`` in a Serve config.

On one machine replicas accept connections themselves (:mod:`serving.deployment`). On a cluster requests come in on
many nodes, so here Serve's ingress brings them: its proxies, or HAProxy and a server of Serve's in each replica. Behind
it is the same application. ``serving/deploy/serve.yaml`` is a config to start from.
"""

# No `from __future__ import annotations`: Serve reads what build() takes from its annotation, which must be a class.

import asyncio
import logging
import math
import os
from pathlib import Path
from typing import Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from ray import serve
from ray.serve import Application as ServeApplication

from serving.app import Application
from serving.errors import ModelError
from serving.guard.keys import KeyRing
from serving.http_server import lanes_for
from serving.models import Models
from serving.protocols.oip_grpc import HealthServicer, InferenceServicer
from serving.protocols.serve_grpc import GrpcCalls
from serving.served_model import Place
from serving.service import Service
from serving.settings import Limits
from serving.watching.logs import start_logging
from serving.watching.tracing import open_tracer

__all__ = ["ClusterArgs", "ClusterReplica", "build"]

_log = logging.getLogger("serving")
_TICK_S = 0.05
_GUARD = "serving.guard.middleware.guards"
_GUARD_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


class ClusterArgs(BaseModel):
    """What stands under ``args`` in a Serve config; how many replicas there are stands under ``deployments``.

    Parameters
    ----------
    bundles : list of Path
        Bundles, or folders whose sub-folders are bundles, at the same place on every node.
    device : {"auto", "cpu", "cuda", "tensorrt"}
        Where the encoders run. A replica sees the GPUs that its ``ray_actor_options`` ask for, and no others.
    threads : int, optional
        Processors that a replica computes on; as many as its ``ray_actor_options`` reserve when None.
    keys : Path, optional
        File of API keys, at the same place on every node.
    insecure : bool
        Nobody is asked for a key. One of the two must be said: a cluster's ingress is open to other machines.
    watch : bool
        Whether replicas load a bundle again by themselves when its folder changes.
    access_log : bool
    log_level : {"debug", "info", "warning", "error"}
    limits : Limits
        For each replica.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: list[Path] = Field(min_length=1)
    device: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    threads: PositiveInt | None = None
    keys: Path | None = None
    insecure: bool = False
    watch: bool = False
    access_log: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    limits: Limits = Field(default_factory=Limits)

    @model_validator(mode="after")
    def _say_who_may_ask(self) -> "ClusterArgs":
        if (self.keys is None) != self.insecure:
            raise ValueError(
                "got neither or both of keys and insecure: true, wanted one of them; make a file of keys with "
                "python -m serving.keys new"
            )
        return self


class ClusterReplica(GrpcCalls):
    """One process that is ingress and model at once, so that no rows travel from one replica to another.

    Parameters
    ----------
    args : ClusterArgs
    """

    def __init__(self, args: ClusterArgs) -> None:
        self._args = args
        self._service: Service | None = None
        self._config: dict[str, Any] | None = None
        self._reloading: asyncio.Task[list[str]] | None = None

    async def __serve_build_asgi_app__(self) -> Application:
        """Load, warm up and prove the models; no request comes before Serve has the application.

        Raises
        ------
        SetupError, BundleError, DeviceError, ModelError
            The replica does not start, and Serve says so.
        """
        args = self._args
        start_logging("info" if args.access_log and args.log_level in ("warning", "error") else args.log_level)
        if os.environ.get(_GUARD_VARIABLE) != _GUARD:
            _log.warning("bodies are read before anybody may refuse them; set %s=%s", _GUARD_VARIABLE, _GUARD)
        keys = None if args.keys is None else KeyRing.from_file(args.keys)
        threads = args.threads or _reserved_cpus()
        place = Place(device=args.device, threads=threads, max_batch_rows=args.limits.max_batch_rows)
        models = await asyncio.to_thread(Models.from_bundles, args.bundles, place=place)
        lanes = lanes_for(models.current[0].device, threads)
        service = Service(models, args.limits, lanes=lanes, watches=args.watch, alone=False)
        app = Application(
            service,
            keys=keys,
            replica=serve.get_replica_context().replica_id.unique_id,
            access_log=args.access_log,
            tracer=open_tracer(os.environ),
        )
        await service.start()
        while not (service.ready or service.failure):
            await asyncio.sleep(_TICK_S)
        if service.failure:
            await service.stop()
            raise ModelError(service.failure)
        inference = InferenceServicer(service, keys=keys, rates=app.admission.rates, recorder=app.recorder)
        self.take_servicers(inference, HealthServicer(service))
        self._service = service
        return app

    def check_health(self) -> None:
        """Raise what is wrong; Serve calls this again and again, and replaces the replica."""
        if self._service is not None and self._service.failure:
            raise ModelError(self._service.failure)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Load the models again where ``user_config`` has changed, whatever is in it.

        Serve keeps requests from a replica until this returns, so loading goes on afterwards: the version that is
        served goes on being served until the new one is proved, or for good if it is not.
        """
        before, self._config = self._config, config
        if self._service is not None and before not in (None, config):
            self._reloading = asyncio.create_task(self._service.changes.reload())


def build(args: ClusterArgs) -> ServeApplication:
    """Describe the application; Serve calls this with what stands under ``args``.

    Whatever a config says of the deployment ``embedding`` comes before what is said here.

    Parameters
    ----------
    args : ClusterArgs

    Returns
    -------
    ray.serve.Application
    """
    limits = args.limits
    configure = serve.deployment(
        name="embedding",
        # From the first config on, so that the first call of reconfigure is not taken for a change.
        user_config={"generation": 0},
        # The application itself refuses what is over max_in_flight; probes must get through even then.
        max_ongoing_requests=limits.max_in_flight * 2,
        max_queued_requests=limits.max_in_flight,
        # A new replica takes over before an old one goes; by default it is the other way round.
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.5,
        # Direct ingress alone keeps a replica for 30 s, until every load balancer has heard of its end.
        graceful_shutdown_timeout_s=30.0 + limits.compute_timeout_s,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        # Enough for a volume that is late; a bad bundle is as bad the tenth time.
        max_constructor_retry_count=3,
    )
    return configure(serve.ingress()(ClusterReplica)).bind(args)


def _reserved_cpus() -> int:
    reserved: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    return max(1, math.ceil(reserved.get("CPU", 1.0)))
