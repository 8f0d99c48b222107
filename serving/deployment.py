"""The application as a Ray Serve deployment."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from starlette.applications import Starlette

from serving.app import build_app
from serving.catalogue import load_encoders
from serving.settings import ServiceSettings

__all__ = ["EmbeddingReplica", "application"]


class EmbeddingReplica:
    """One process that is ingress and model at once, so that rows are not copied to a second one.

    Parameters
    ----------
    settings : ServiceSettings
        The bundles are loaded here, in the replica.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        _keep_on_loopback()
        self._settings = settings
        self._encoders = load_encoders(settings.bundles, device=settings.device, threads=settings.threads)

    def __serve_build_asgi_app__(self) -> Starlette:
        """Build the application; Ray Serve calls this after the constructor."""
        return build_app(self._encoders, limits=self._settings.limits)


def application(settings: ServiceSettings, *, num_gpus: int) -> Application:
    """Describe the deployment.

    Parameters
    ----------
    settings : ServiceSettings
    num_gpus : int
        GPUs that the replica gets; Ray hides the others from it.
    """
    limits = settings.limits
    configure = serve.deployment(
        name="embedding",
        # The application itself refuses what is over max_in_flight; probes must get through even then.
        max_ongoing_requests=limits.max_in_flight * 2,
        max_queued_requests=limits.max_in_flight,
        ray_actor_options={"num_cpus": 1, "num_gpus": num_gpus},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=limits.compute_timeout_s,
        # Every ten seconds by default: for so long nobody would notice that the replica is gone.
        health_check_period_s=2.0,
        # The bundle was checked before; what fails here fails again.
        max_constructor_retry_count=1,
    )
    return configure(serve.ingress()(EmbeddingReplica)).bind(settings)


def _keep_on_loopback() -> None:
    """Bind the replica's internal gRPC server, which unpickles what it is sent, to loopback.

    Ray 2.60 binds it to every interface, whatever the node's address. It asks for Ray's token, and it is not used
    where the only caller is Serve's proxy; but there is no reason for it to be reachable.
    """
    from ray.serve._private import replica

    module: Any = replica
    bind = getattr(module, "add_port_to_grpc_server", None)
    if bind is not None:
        module.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))
