"""The ASGI application: guard, routes, errors in each protocol's form. It knows nothing of Ray.

It is written close to ASGI, because a request of one row is worth some ten microseconds of computing: layers of
middleware and objects for requests and responses would cost several times that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from serving.errors import RequestError, as_request_error, envelope, overloaded, too_large
from serving.exchange import Answer, ClientGoneError, Exchange
from serving.media import JSON
from serving.models import ServedModel
from serving.native import Native
from serving.service import Service
from vaefeat import __version__

__all__ = ["Application", "Route"]

_log = logging.getLogger("serving")
_JSON = [(b"content-type", JSON.encode())]
#: How often requests that wait are asked whether their client is still there, in seconds.
_LOOK_FOR_CLIENTS_S = 0.1

Handler = Callable[[Exchange], Awaitable[Answer]]
Form = Callable[[RequestError, bytes], bytes]


@dataclass(frozen=True, slots=True)
class Route:
    """One address and method.

    Attributes
    ----------
    name : str
        For logs and metrics.
    handler : callable
        From exchange to answer.
    scope : str
        What a key must allow; empty where no key is asked for.
    takes_body : bool
        A length must be announced, and room is kept for it.
    form : callable
        Writes an error in the protocol's form.
    """

    name: str
    handler: Handler
    scope: str = ""
    takes_body: bool = False
    form: Form = envelope


class Application:
    """The service over HTTP, as an ASGI application.

    Parameters
    ----------
    service : Service
        Started and stopped by the lifespan.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._limits = service.limits
        self._in_flight: dict[Exchange, None] = {}
        self._in_flight_bytes = 0
        self._looking: asyncio.TimerHandle | None = None
        self._cards: tuple[int, bytes] = (-1, b"")
        native = Native(service)
        self._routes: dict[str, dict[str, Route]] = {
            "/": {"GET": Route("/", self._index)},
            "/livez": {"GET": Route("/livez", self._livez)},
            "/readyz": {"GET": Route("/readyz", self._readyz)},
            "/v1/models": {"GET": Route("/v1/models", self._models, scope="embed")},
            "/v1/embed": {"POST": Route("/v1/embed", native.embed, scope="embed", takes_body=True)},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one exchange, or the lifespan."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        route = None
        try:
            route = self._route(exchange)
            if route.takes_body:
                answer = await self._with_room(exchange, route)
            else:
                answer = await route.handler(exchange)
        except ClientGoneError:
            return
        except asyncio.CancelledError:
            if exchange.gone:
                return  # by the watcher, whose client is not there any more
            raise
        except Exception as error:
            answer = self._failed(exchange, route, error)
        await exchange.answer(answer)

    def _route(self, exchange: Exchange) -> Route:
        methods = self._routes.get(exchange.path)
        if methods is None:
            raise RequestError(404, "not_found", "got an address that is not served; GET / lists those that are")
        method = exchange.scope["method"]
        route = methods.get(method) or (methods.get("GET") if method == "HEAD" else None)
        if route is None:
            raise RequestError(
                405,
                "method_not_allowed",
                "got a method that is not served here; see the Allow header",
                headers={"allow": ", ".join(methods)},
            )
        exchange.route = route.name
        return route

    async def _with_room(self, exchange: Exchange, route: Route) -> Answer:
        """Keep room for a body of the announced length, refuse what finds none, and answer."""
        if not self.service.ready:
            raise overloaded(f"the service is not ready: {self.service.failure or self.service.state}")
        announced = exchange.headers.get(b"content-length")
        if announced is None or not announced.isdigit():
            raise RequestError(
                411,
                "length_required",
                "got a body without Content-Length, wanted it announced; send it in one piece, not chunked",
                headers={"connection": "close"},
            )
        n_bytes = int(announced)
        limits = self._limits
        if n_bytes > limits.max_body_bytes:
            raise too_large(
                f"got a body of {n_bytes} bytes, wanted at most {limits.max_body_bytes}; send fewer rows at a time"
            )
        if len(self._in_flight) >= limits.max_in_flight or self._in_flight_bytes + n_bytes > limits.max_in_flight_bytes:
            raise overloaded(f"{len(self._in_flight)} requests are being answered, which is the most at a time")
        exchange.announced_bytes = n_bytes
        self._in_flight[exchange] = None
        self._in_flight_bytes += n_bytes
        if self._looking is None:
            loop = asyncio.get_running_loop()
            self._looking = loop.call_later(_LOOK_FOR_CLIENTS_S, self._look_for_clients, loop)
        exchange.task = asyncio.current_task()
        try:
            return await route.handler(exchange)
        finally:
            del self._in_flight[exchange]
            self._in_flight_bytes -= n_bytes
            if exchange.watcher is not None:
                exchange.watcher.cancel()

    def _look_for_clients(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch whether the clients of requests that wait for long are still there.

        A watcher for each request would cost more than most requests do.
        """
        self._looking = None
        for exchange in self._in_flight:
            if exchange.body_is_read and exchange.watcher is None:
                exchange.watcher = loop.create_task(_watch(exchange))
        if self._in_flight:
            self._looking = loop.call_later(_LOOK_FOR_CLIENTS_S, self._look_for_clients, loop)

    def _failed(self, exchange: Exchange, route: Route | None, error: Exception) -> Answer:
        failure = as_request_error(error)
        if failure.kind == "internal_error":
            _log.error("request %s failed", exchange.request_id.decode(), exc_info=error)
        headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in failure.headers.items()]
        form = route.form if route is not None else envelope
        return Answer(failure.status, [*_JSON, *headers], form(failure, exchange.request_id))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.service.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.service.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _index(self, exchange: Exchange) -> Answer:
        """Tell a person who opens the address what is here."""
        host = exchange.headers.get(b"host", b"").decode("latin-1")
        example = f"curl --data-binary @rows.npy -H 'Content-Type: application/x-npy' http://{host}/v1/embed > out.npy"
        routes = [f"{method} {path}" for path, methods in self._routes.items() for method in methods]
        about = {
            "service": "vaefeat",
            "version": __version__,
            "models": self.service.models.names,
            "routes": routes,
            "example": example,
        }
        return json_answer(about)

    async def _livez(self, exchange: Exchange) -> Answer:
        """Answer, which is the news."""
        return json_answer({"live": True})

    async def _readyz(self, exchange: Exchange) -> Answer:
        """Tell whether requests are going to be answered well."""
        service = self.service
        if service.ready:
            return json_answer({"ready": True})
        state = {"ready": False, "failed": bool(service.failure), "reason": service.failure or service.state}
        return json_answer(state, status=503)

    async def _models(self, exchange: Exchange) -> Answer:
        """List the models."""
        models = self.service.models
        if self._cards[0] != models.generation:
            cards = [self._card(model) for model in models.current]
            self._cards = (models.generation, orjson.dumps({"object": "list", "data": cards}))
        return Answer(200, _JSON, self._cards[1])

    def _card(self, model: ServedModel) -> dict[str, Any]:
        limits = self._limits
        return {
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "vaefeat",
            "digest": model.digest,
            "versions": list(self.service.versions(model.name)),
            "input": model.input.to_dict(),
            "outputs": dict(model.outputs),
            "classes": list(model.classes),
            "latent_dim": model.latent_dim,
            "active_units": model.active_units,
            "provider": model.provider,
            "limits": {"max_rows": limits.max_rows, "max_body_bytes": limits.max_body_bytes},
        }


async def _watch(exchange: Exchange) -> None:
    await exchange.wait_for_end()
    if not exchange.started and exchange.task is not None:
        exchange.gone = True
        exchange.task.cancel()


def json_answer(values: Any, *, status: int = 200) -> Answer:
    """Put plain values into an answer."""
    return Answer(status, _JSON, orjson.dumps(values))
