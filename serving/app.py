"""The application: admission, routes, errors in each protocol's form. It knows nothing of Ray.

It takes exchanges from our own connections, or over ASGI from another server. It is written close to both, because a
request of one row is worth some ten microseconds of computing: layers of middleware and objects for requests and
responses would cost several times that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import Receive, Scope, Send

from serving import inference
from serving.asgi import AsgiWire
from serving.embeddings import Embeddings
from serving.errors import RequestError, as_request_error, envelope
from serving.exchange import Answer, ClientGoneError, Exchange
from serving.guard.admission import Admission
from serving.guard.keys import KeyRing
from serving.inference import Inference
from serving.media import JSON
from serving.meta import Meta
from serving.native import Native
from serving.protocols import openai
from serving.protocols.oip_call import INFER_ROUTE
from serving.service import Service
from serving.watching.recorder import Recorder

if TYPE_CHECKING:
    from serving.watching.spans import Tracer

__all__ = ["Application", "Route"]

_JSON = (b"content-type", JSON.encode())
_KEYS_EVERY_S = 1.0
#: In logs and figures alone: there is nobody to be told.
_CLIENT_GONE = 499

Handler = Callable[[Exchange], Awaitable[Answer]]


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
    form: Callable[[RequestError, bytes], bytes] = envelope


class Application:
    """The service over HTTP; also an ASGI application.

    Parameters
    ----------
    service : Service
        Started and stopped with it.
    keys : KeyRing, optional
        Without it nobody is asked for a key.
    replica : str
        Marks the figures as this process's, where one address leads to several.
    access_log : bool
        A line for every request, not only for those that fail.
    tracer : Tracer, optional
    """

    def __init__(
        self,
        service: Service,
        *,
        keys: KeyRing | None = None,
        replica: str = "",
        access_log: bool = False,
        tracer: Tracer | None = None,
    ) -> None:
        self.service = service
        self.admission = Admission(service.limits, room=service.room, keys=keys)
        names = {*_names(_EXACT), *_names(_OF_MODELS), *_names(_OF_REPOSITORY), _CARD[1], INFER_ROUTE}
        self.recorder = Recorder(service.models, routes=names, replica=replica, access_log=access_log, tracer=tracer)
        service.batcher.tracer = tracer
        service.told = self.recorder.batch
        self.recorder.metrics.watch(
            queue_rows=lambda: service.batcher.queued_rows,
            queue_bytes=lambda: service.batcher.queued_bytes,
            in_flight=lambda: self.admission.in_flight,
            in_flight_bytes=lambda: service.room.used,
            lanes_busy=lambda: service.batcher.busy,
        )
        self._meta = Meta(service, self.recorder, routes=self.routes)
        self._native, self._embeddings, self._inference = Native(service), Embeddings(service), Inference(service)
        self._exact = self._bound(_EXACT)
        self._of_models = self._bound(_OF_MODELS)
        self._of_repository = self._bound(_OF_REPOSITORY)
        self._card = self._bound({"": _CARD})[""]
        #: What has to end before the service does, because it asks the service.
        self.before_stop: list[Callable[[], Awaitable[object]]] = []
        self._reading_keys: asyncio.Task[None] | None = None

    def routes(self) -> list[str]:
        """List what is served, method and address."""
        rows = [*_EXACT.values(), _CARD, *_OF_MODELS.values(), *_OF_REPOSITORY.values()]
        named = [f"{method} {name}" for method, name, *_ in rows]
        versioned = [f"{method} {name.replace(_NAME, _NAME + _OF_VERSION)}" for method, name, *_ in _OF_MODELS.values()]
        return list(dict.fromkeys([*named, *versioned]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one exchange over ASGI, or the lifespan."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        await self.handle(Exchange(scope, AsgiWire(receive, send)))

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request, whatever becomes of it."""
        exchange.admission = self.admission
        self.recorder.begin(exchange)
        route, failure, cause = None, None, None
        try:
            route = self._route(exchange)
            if route.scope == "admin" and b"origin" in exchange.headers:
                # Any page that is open in a browser on this machine can post to a loopback address.
                raise RequestError(
                    403, "forbidden", "got a request from a web page, wanted one from an operator's tool"
                )
            exchange.key = self.admission.identify(exchange, scope=route.scope)
            answer = await (self._with_body(exchange, route) if route.takes_body else route.handler(exchange))
        except ClientGoneError:
            self.recorder.end(exchange, _CLIENT_GONE)
            return
        except asyncio.CancelledError:
            if exchange.gone:  # by the watcher, whose client is not there any more
                self.recorder.end(exchange, _CLIENT_GONE)
                return
            if not exchange.is_late or exchange.task is None:
                raise
            exchange.task.uncancel()
            failure = exchange.lateness()
            answer = _failed(exchange, route, failure)
        except Exception as error:
            failure = as_request_error(error)
            cause = error if failure.kind == "internal_error" else None
            answer = _failed(exchange, route, failure)
        timing = self.recorder.end(exchange, answer.status, failure=failure, cause=cause)
        if failure is not None:
            # The frames in it hold this one and the request's body, which would wait for the garbage collector.
            failure.__traceback__ = None
            failure = cause = None
        await exchange.answer(answer, timing)

    def _route(self, exchange: Exchange) -> Route:
        methods = self._exact.get(exchange.path) or self._by_pattern(exchange.path)
        if methods is None:
            raise RequestError(404, "not_found", "got an address that is not served; GET / lists those that are")
        method = exchange.scope["method"]
        route = methods.get(method) or (methods.get("GET") if method == "HEAD" else None)
        if route is None:
            raise RequestError(
                405,
                "method_not_allowed",
                "got a method that is not served here; see the Allow header",
                headers={"allow": ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])},
            )
        exchange.route = route.name
        return route

    def _by_pattern(self, path: str) -> dict[str, Route] | None:
        if path.startswith("/v2/models/"):
            found = inference.split_model_path(path)
            return self._of_models.get(found[2]) if found else None
        if path.startswith("/v2/repository/models/"):
            parts = path.split("/")
            return self._of_repository.get(parts[5]) if len(parts) == 6 and parts[4] else None
        if path.startswith("/v1/models/") and path.count("/") == 3:
            return self._card
        return None

    async def _with_body(self, exchange: Exchange, route: Route) -> Answer:
        self.service.require_ready()
        self.admission.enter(exchange)
        try:
            return await route.handler(exchange)
        finally:
            self.admission.leave(exchange)

    async def start(self) -> None:
        """Start the service; requests may come from now on, and are refused until it is ready."""
        await self.service.start()
        self._reading_keys = asyncio.create_task(self._read_keys_again())

    async def stop(self) -> None:
        """End the service; requests in flight were answered before."""
        if self._reading_keys is not None:
            self._reading_keys.cancel()
        for end in self.before_stop:
            await end()
        await self.service.stop()
        if self.recorder.tracer is not None:
            await asyncio.to_thread(self.recorder.tracer.close)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _read_keys_again(self) -> None:
        while self.admission.keys is not None:
            await asyncio.sleep(_KEYS_EVERY_S)
            await asyncio.to_thread(self.admission.keys.reload_if_changed)

    def _bound(self, table: dict[str, _Row]) -> dict[str, dict[str, Route]]:
        """Bind a table's handlers, named by attribute, to this application's."""
        return {
            place: {method: Route(name, _attribute(self, handler), scope, takes_body, form)}
            for place, (method, name, handler, scope, takes_body, form) in table.items()
        }


_Row = tuple[str, str, str, str, bool, Callable[[RequestError, bytes], bytes]]
_OIP = inference.error_form
#: By address: method, name, handler, scope, whether there is a body, form of errors.
_EXACT: dict[str, _Row] = {
    "/": ("GET", "/", "_meta.index", "", False, envelope),
    "/openapi.json": ("GET", "/openapi.json", "_meta.openapi", "", False, envelope),
    "/livez": ("GET", "/livez", "_meta.livez", "", False, envelope),
    "/readyz": ("GET", "/readyz", "_meta.readyz", "", False, envelope),
    "/metrics": ("GET", "/metrics", "_meta.metrics", "metrics", False, envelope),
    "/v1/models": ("GET", "/v1/models", "_meta.models", "embed", False, openai.error_form),
    "/v1/embed": ("POST", "/v1/embed", "_native.embed", "embed", True, envelope),
    "/v1/predict": ("POST", "/v1/predict", "_native.predict", "embed", True, envelope),
    "/v1/embeddings": ("POST", "/v1/embeddings", "_embeddings.create", "embed", True, openai.error_form),
    "/v2": ("GET", "/v2", "_inference.server", "", False, _OIP),
    "/v2/": ("GET", "/v2", "_inference.server", "", False, _OIP),
    "/v2/health/live": ("GET", "/v2/health/live", "_inference.live", "", False, _OIP),
    "/v2/health/ready": ("GET", "/v2/health/ready", "_inference.ready", "", False, _OIP),
    "/v2/repository/index": ("POST", "/v2/repository/index", "_inference.index", "admin", True, _OIP),
}
_CARD: _Row = ("GET", "/v1/models/{model}", "_meta.model", "embed", False, openai.error_form)
_NAME, _OF_VERSION = "{model}", "/versions/{version}"
#: By what follows /v2/models/{model}[/versions/{version}].
_OF_MODELS: dict[str, _Row] = {
    "": ("GET", "/v2/models/{model}", "_inference.model", "embed", False, _OIP),
    "ready": ("GET", "/v2/models/{model}/ready", "_inference.model_ready", "", False, _OIP),
    "infer": ("POST", "/v2/models/{model}/infer", "_inference.infer", "embed", True, _OIP),
}
#: By what follows /v2/repository/models/{model}.
_OF_REPOSITORY: dict[str, _Row] = {
    verb: ("POST", f"/v2/repository/models/{{model}}/{verb}", f"_inference.{verb}", "admin", True, _OIP)
    for verb in ("load", "unload")
}


def _names(table: dict[str, _Row]) -> list[str]:
    return [row[1] for row in table.values()]


def _attribute(owner: object, path: str) -> Handler:
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner  # type: ignore[return-value]  # what the tables name are handlers


def _failed(exchange: Exchange, route: Route | None, failure: RequestError) -> Answer:
    headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in failure.headers.items()]
    form = route.form if route is not None else _form_of(exchange.path)
    return Answer(failure.status, [_JSON, *headers], form(failure, exchange.request_id))


def _form_of(path: str) -> Callable[[RequestError, bytes], bytes]:
    """Tell in which form an error is written where no route was found, or not with this method."""
    if (row := _EXACT.get(path)) is not None:
        return row[-1]
    if path.startswith("/v1/models/"):
        return openai.error_form
    return _OIP if path.startswith("/v2/") else envelope
