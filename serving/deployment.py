"""A replica of the service as a Ray Serve deployment.

Serve starts replicas, watches over them, replaces them and changes them; requests do not go through it. A replica
accepts connections from the socket that all replicas of this machine share (:mod:`serving.desk`) and runs the same
server as the local engine does, in a thread with an event loop of its own: what Serve's proxies and its own loop would
add to each request is several times what embedding a row takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application as ServeApplication

from serving.accepting import Share
from serving.changes import Change
from serving.desk import fetch, orders, turn
from serving.errors import ModelError
from serving.http_server import HttpServer, lanes_for, loop_factory, make_application, make_server, serving_grpc
from serving.models import Models
from serving.service import Service
from serving.settings import ServiceSettings
from serving.watching.logs import start_logging

__all__ = ["EmbeddingReplica", "application"]

_TICK_S = 0.05
#: An event loop that has not moved for so long answers nobody.
_STUCK_S = 30.0


class EmbeddingReplica:
    """One process that is ingress and model at once.

    Parameters
    ----------
    settings : ServiceSettings
        The bundles are loaded here, in the replica, which takes connections once they are warmed up and proved.
    desk : str
        Where the listening socket is to be had.
    """

    def __init__(self, settings: ServiceSettings, desk: str) -> None:
        _keep_on_loopback()
        self._settings = settings
        models = Models.from_bundles(settings.bundles, place=settings.place)
        self._service = Service(
            models,
            settings.limits,
            lanes=lanes_for(models.current[0].device, settings.threads),
            watches=settings.watch,
            alone=settings.replicas == 1,
        )
        self._service.changes.turn = partial(turn, Path(desk))
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._moved: float | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(Path(desk),), name="http", daemon=True)
        self._thread.start()
        self._started.wait()
        self.check_health()

    def check_health(self) -> None:
        """Raise what is wrong; Serve calls this again and again, and replaces the replica."""
        if self._failure is not None:
            raise ModelError(f"the server ended: {self._failure}") from self._failure
        if self._service.failure:
            raise ModelError(self._service.failure)
        if self._moved is not None and (still_s := time.monotonic() - self._moved) > _STUCK_S:
            raise ModelError(f"the server has not moved for {still_s:.0f} s")

    def __del__(self) -> None:
        """Answer what is in flight and end; Serve calls this when the replica is to go."""
        self._stop.set()
        self._thread.join(self._settings.limits.compute_timeout_s)

    def _run(self, desk: Path) -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(self._serve(desk))
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self, desk: Path) -> None:
        listener, share, errors = fetch(desk)
        start_logging(self._settings.log_level, stream=errors)
        with contextlib.closing(share):
            await self._serve_from(listener, share, desk)

    async def _serve_from(self, listener: socket.socket, share: Share, desk: Path) -> None:
        app = make_application(self._service, self._settings)
        server = make_server(app, self._settings, share=share)
        # Before the first connection is accepted: there are others to accept it.
        await self._service.start()
        while not (self._service.ready or self._service.failure):
            await asyncio.sleep(_TICK_S)
        if self._service.failure:
            return
        # A bundle that came since the models were loaded is served everywhere else by now.
        told = orders(desk, refuse=server.refuse)
        changes, answer = await anext(told)
        answer(await self._service.changes.follow(changes))
        async with serving_grpc(app, self._settings):
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            following = asyncio.create_task(self._follow(told))
            await self._until_stopped(server, serving)
            following.cancel()
            await serving

    async def _follow(self, told: AsyncIterator[tuple[list[Change], Callable[[list[str]], None]]]) -> None:
        async for changes, answer in told:
            answer(await self._service.changes.follow(changes))

    async def _until_stopped(self, server: HttpServer, serving: asyncio.Task[None]) -> None:
        while not serving.done():
            self._moved = time.monotonic()
            server.should_exit = server.should_exit or self._stop.is_set() or bool(self._service.failure)
            if server.started:
                self._started.set()
            await asyncio.wait([serving], timeout=_TICK_S)


def application(settings: ServiceSettings, *, num_gpus: float, desk: str) -> ServeApplication:
    """Describe the deployment.

    Parameters
    ----------
    settings : ServiceSettings
    num_gpus : float
        GPUs that a replica gets, or its share of one; Ray hides the others from it.
    desk : str
        As for :class:`EmbeddingReplica`.
    """
    configure = serve.deployment(
        name="embedding",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": num_gpus},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.limits.compute_timeout_s,
        # Every ten seconds by default: for so long nobody would notice that the replica is gone.
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        # A replica that starts while its bundle is being exchanged may find it half there, and is worth another try.
        max_constructor_retry_count=20,
    )
    return configure(EmbeddingReplica).bind(settings, desk)


def _keep_on_loopback() -> None:
    """Bind the replica's internal gRPC server, which unpickles what it is sent, to loopback.

    Ray 2.60 binds it to every interface, whatever the node's address. It asks for Ray's token, and nobody calls it
    here; but there is no reason for it to be reachable.
    """
    from ray.serve._private import replica

    module: Any = replica
    bind = getattr(module, "add_port_to_grpc_server", None)
    if bind is not None:
        module.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))
