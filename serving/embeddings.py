"""``POST /v1/embeddings`` over a service: :mod:`serving.protocols.openai` with what waits."""

from __future__ import annotations

from functools import partial

from serving.codec import INLINE_VALUES
from serving.errors import RequestError
from serving.exchange import Answer, Exchange
from serving.media import JSON, require_plain
from serving.protocols.openai import decode_embeddings, encode_embeddings
from serving.service import Service

__all__ = ["Embeddings"]


class Embeddings:
    """The route, over a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, exchange: Exchange) -> Answer:
        """Embed the items of one request."""
        service = self._service
        require_plain(exchange.headers)
        # Which model is meant, and nothing else of this, stands in the body.
        service.require_room(None)
        content = bytes(await exchange.body(service.limits))
        most = service.limits.max_rows
        values = most * max(model.input.n_features for model in service.models.current)
        if len(content) <= service.limits.inline_bytes:
            asked = decode_embeddings(content, max_items=most, max_values=values)
        else:
            asked = await service.off_loop(lambda: decode_embeddings(content, max_items=most, max_values=values))
        # Clients insist on naming a model; where one is served, they may write what they like only by leaving it out.
        model = service.find(asked.model or None)
        exchange.model, exchange.version = model.name, model.version
        if asked.dimensions not in (None, model.latent_dim):
            raise RequestError(
                400,
                "invalid_parameter",
                f"got dimensions={asked.dimensions}, wanted {model.latent_dim} or none: a part of this model's vector "
                "is no embedding",
                param="dimensions",
            )
        embedded = await service.embed(model, asked.batch, caller=exchange)
        exchange.note(model, embedded)
        features = embedded.features["mean"]
        if embedded.errors:
            position, message = next(iter(sorted(embedded.errors.items())))
            raise RequestError(422, "invalid_rows", f"item {position} cannot be read: {message}", param="input")
        written = partial(encode_embeddings, features, model=model.name, digest=model.digest, as_base64=asked.as_base64)
        answer = written() if features.size <= INLINE_VALUES else await service.off_loop(written)
        headers = [
            (b"content-type", JSON.encode()),
            (b"x-vaefeat-model", model.name.encode()),
            (b"x-vaefeat-digest", model.digest.encode()),
        ]
        return Answer(200, headers, answer)
