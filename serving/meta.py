"""What the service says of itself: index, health, models, figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qsl

import orjson

from serving.exchange import Answer, Exchange, json_answer
from serving.media import JSON
from serving.openapi import describe_api
from serving.served_model import ServedModel
from serving.service import Service
from serving.watching.recorder import Recorder
from vaefeat import __version__

__all__ = ["Meta"]

_JSON = [(b"content-type", JSON.encode())]


class Meta:
    """The routes, over a service.

    Parameters
    ----------
    service : Service
    recorder : Recorder
    routes : callable
        Gives the routes that there are, for the index.
    """

    def __init__(self, service: Service, recorder: Recorder, *, routes: Callable[[], Sequence[str]]) -> None:
        self._service, self._recorder, self._routes = service, recorder, routes
        self._cards: tuple[int, bytes] = (-1, b"")
        self._description = orjson.dumps(describe_api())

    async def index(self, exchange: Exchange) -> Answer:
        """Tell a person who opens the address what is here."""
        host = exchange.headers.get(b"host", b"").decode("latin-1")
        # A classifier that is a whole pipeline has no features to embed with.
        models = self._service.models.current
        embeds = not models or any("mean" in model.names for model in models)
        to = "embed > out.npy" if embeds else "predict"
        example = f"curl --data-binary @rows.npy -H 'Content-Type: application/x-npy' http://{host}/v1/{to}"
        about = {
            "service": "vaefeat",
            "version": __version__,
            "routes": self._routes(),
            "example": example,
        }
        return json_answer(about)

    async def openapi(self, exchange: Exchange) -> Answer:
        """Describe all routes to programs."""
        return Answer(200, _JSON, self._description)

    async def livez(self, exchange: Exchange) -> Answer:
        """Answer, which is the news."""
        return json_answer({"live": True})

    async def readyz(self, exchange: Exchange) -> Answer:
        """Tell whether requests are going to be answered well."""
        service = self._service
        if service.ready:
            providers = dict.fromkeys(model.provider for model in service.models.current)
            return json_answer({"ready": True, "providers": list(providers)})
        state = {"ready": False, "failed": bool(service.failure), "reason": service.failure or service.state}
        return json_answer(state, status=503)

    async def models(self, exchange: Exchange) -> Answer:
        """List the models."""
        models = self._service.models
        # Read first: models change in another thread, and cards of before must not pass for those of after.
        if self._cards[0] != (generation := models.generation):
            cards = [self._card(model) for model in models.current]
            self._cards = (generation, orjson.dumps({"object": "list", "data": cards}))
        return Answer(200, _JSON, self._cards[1])

    async def model(self, exchange: Exchange) -> Answer:
        """Describe one model, as OpenAI's clients ask for it; ``?version=`` names one that is not the newest."""
        query = dict(parse_qsl(exchange.scope["query_string"].decode("latin-1")))
        name = exchange.path.removeprefix("/v1/models/")
        return json_answer(self._card(self._service.find(name, query.get("version"))))

    async def metrics(self, exchange: Exchange) -> Answer:
        """Give the figures to Prometheus."""
        accept = exchange.headers.get(b"accept", b"").decode("latin-1")
        body, content_type = self._recorder.render(accept)
        return Answer(200, [(b"content-type", content_type.encode())], body)

    def _card(self, model: ServedModel) -> dict[str, Any]:
        limits = self._service.limits
        return {
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "vaefeat",
            "digest": model.digest,
            "versions": list(self._service.versions(model.name)),
            "input": model.input.to_dict(),
            "outputs": dict(model.outputs),
            "classes": list(model.classes),
            "latent_dim": model.latent_dim,
            "active_units": model.active_units,
            "provider": model.provider,
            "precision": model.mode.precision,
            "mode": model.mode.to_dict(),
            "proved": model.proved,
            "limits": {"max_rows": limits.max_rows, "max_body_bytes": limits.max_body_bytes},
        }
