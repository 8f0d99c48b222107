"""The Open Inference Protocol over a service: :mod:`serving.protocols.oip` with what waits, and the repository."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import orjson

from serving.codec import INLINE_VALUES
from serving.errors import CodecError, RequestError, too_large
from serving.exchange import Answer, Exchange, json_answer
from serving.media import JSON
from serving.protocols.content_coding import asked_coding, compress, inflate
from serving.protocols.oip import (
    EXTENSIONS,
    decode_infer,
    describe_server,
    encode_error,
    parse_json_length,
)
from serving.protocols.oip_outputs import InferEncoder, describe_model
from serving.served_model import ServedModel
from serving.service import Service
from vaefeat.errors import InputError

__all__ = ["Inference", "error_form", "split_model_path"]

_JSON = [(b"content-type", JSON.encode())]
_PREFIX = "/v2/models/"
#: The body of a load.
_LOAD_FORM = 'no body, or {"parameters": {"version": "..."}}'
#: Parameters with which Triton's clients replace what the repository holds.
_TRITON_ONLY = ("config", "file:")


def split_model_path(path: str) -> tuple[str, str | None, str] | None:
    """Take ``/v2/models/{name}[/versions/{version}][/{verb}]`` apart; None for another path.

    Returns
    -------
    (str, str or None, str)
        Name, version and verb; the verb is empty for metadata.
    """
    name, *rest = path[len(_PREFIX) :].split("/")
    version = None
    if len(rest) >= 2 and rest[0] == "versions":
        version, rest = rest[1], rest[2:]
    if not name or version == "" or len(rest) > 1:
        return None
    return name, version, rest[0] if rest else ""


def error_form(error: RequestError, request_id: bytes) -> bytes:
    """Write an error as the protocol's clients read it; the id is in a header."""
    return encode_error(error.message)


class Inference:
    """The routes below ``/v2``, over a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # Versions come and go; what belongs to those that have gone goes with them, and holds no session.
        self._encoders: WeakKeyDictionary[ServedModel, InferEncoder] = WeakKeyDictionary()
        self._server = orjson.dumps(describe_server(extensions=(*EXTENSIONS, "model_repository")))

    async def server(self, exchange: Exchange) -> Answer:
        """Describe the server."""
        return Answer(200, _JSON, self._server)

    async def live(self, exchange: Exchange) -> Answer:
        """Tell that the server lives."""
        return json_answer({"live": True})

    async def ready(self, exchange: Exchange) -> Answer:
        """Tell whether all models answer."""
        ready = self._service.ready
        return json_answer({"ready": ready}, status=200 if ready else 503)

    async def model(self, exchange: Exchange) -> Answer:
        """Describe a model."""
        model = self._model(exchange)
        described = describe_model(model, versions=self._service.versions(model.name))
        # The protocol has no word for how a model is computed; over gRPC there is no field for it at all.
        parameters = {**model.mode.to_dict(), "buckets": ",".join(map(str, model.mode.buckets))}
        return json_answer({**described, "parameters": parameters})

    async def model_ready(self, exchange: Exchange) -> Answer:
        """Tell whether a model answers."""
        try:
            model, ready = self._model(exchange), self._service.ready
        except RequestError as error:
            # Probes have no key, and are not told what else there is.
            raise RequestError(error.status, error.kind, "got a model or version that is not served here") from None
        return json_answer({"name": model.name, "ready": ready}, status=200 if ready else 503)

    async def infer(self, exchange: Exchange) -> Answer:
        """Embed what one request brings."""
        service = self._service
        model = self._model(exchange)
        service.require_room(model)
        content = bytes(await exchange.body(service.limits))
        coding = exchange.headers.get(b"content-encoding")
        if coding is not None:
            limit = service.limits.max_body_bytes
            content = await service.off_loop(lambda: inflate(content, encoding=coding.decode("latin-1"), limit=limit))
            exchange.grow(len(content))
        length = parse_json_length(exchange.headers.get(b"inference-header-content-length"), body_length=len(content))
        most = service.limits.max_rows
        if (len(content) if length is None else length) <= service.limits.inline_bytes:
            asked = decode_infer(content, json_length=length, spec=model.input, outputs=model.names, max_rows=most)
        else:
            asked = await service.off_loop(
                lambda: decode_infer(content, json_length=length, spec=model.input, outputs=model.names, max_rows=most)
            )
        batch = asked.rows if asked.rows is not None else asked.images
        assert batch is not None  # one of both is there
        try:
            embedded = await service.embed(
                model,
                batch,
                outputs=tuple(name for name, _ in asked.outputs),
                priority=asked.priority,
                timeout_s=asked.timeout_s,
                caller=exchange,
            )
        except InputError as error:
            raise RequestError(400, "invalid_rows", str(error)) from error
        except RequestError as error:
            if error.status != 422:
                raise
            # The protocol knows no 422.
            raise RequestError(400, error.kind, error.message) from error
        exchange.note(model, embedded)
        encoder = self._encoder(model)
        n_values = sum(embedded.features[name].size for name, binary in asked.outputs if not binary)
        if n_values <= INLINE_VALUES:
            body, headers = encoder.encode(asked, embedded)
        else:
            body, headers = await service.off_loop(encoder.encode, asked, embedded)
        wanted = exchange.headers.get(b"accept-encoding")
        if wanted is not None and (answer_coding := asked_coding(wanted.decode("latin-1"))) is not None:
            body = await service.off_loop(lambda: compress(body, coding=answer_coding))
            headers = [*headers, (b"content-encoding", answer_coding.encode())]
        return Answer(200, [*headers, (b"x-vaefeat-digest", model.digest.encode())], body)

    async def index(self, exchange: Exchange) -> Answer:
        """List what can be loaded and what is."""
        await exchange.body(self._service.limits)
        models = self._service.models
        served = {model.name: model for model in models.current}
        listed: list[dict[str, Any]] = []
        for name in models.available():
            if name not in served:
                listed.append({"name": name, "state": "UNAVAILABLE", "reason": "unloaded"})
                continue
            listed += [
                {"name": name, "version": model.version, "state": "READY", "reason": "" if model.proved else "unproved"}
                for model in models.held
                if model.name == name
            ]
        return json_answer(listed)

    async def load(self, exchange: Exchange) -> Answer:
        """Load a model's folder again, or go back to a version that is still held."""
        name, version = self._named(exchange), await self._asked_version(exchange)
        service = self._service
        self._refuse_unless_all_change()
        model = await (service.changes.load(name) if version is None else service.changes.choose(name, version))
        return json_answer({"name": model.name, "version": model.version, "state": "READY"})

    async def unload(self, exchange: Exchange) -> Answer:
        """Serve a model no more."""
        await exchange.body(self._service.limits)
        self._refuse_unless_all_change()
        await self._service.changes.unload(self._named(exchange))
        return json_answer({})

    async def _asked_version(self, exchange: Exchange) -> str | None:
        content = bytes(await exchange.body(self._service.limits))
        if not content:
            return None
        if len(content) > self._service.limits.inline_bytes:
            raise too_large(f"got a body of {len(content)} bytes, wanted a version")
        try:
            values = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise CodecError(f"got a body that is not JSON: {error}") from error
        parameters = values.get("parameters", {}) if isinstance(values, dict) else None
        if not isinstance(parameters, dict):
            raise CodecError(f"got a body of another form, wanted {_LOAD_FORM}")
        # Whoever misspelt the version would get what the folder holds, and not hear of it.
        if unknown := [key for key in values if key != "parameters"] + [key for key in parameters if key != "version"]:
            triton = "; what is loaded is always the model's folder" if unknown[0].startswith(_TRITON_ONLY) else ""
            raise CodecError(f"got the unknown key {unknown[0][:80]!r}, wanted {_LOAD_FORM}{triton}")
        version = parameters.get("version")
        if not isinstance(version, str | None):
            raise CodecError(f"got a version that is no text, wanted {_LOAD_FORM}")
        return version or None

    def _refuse_unless_all_change(self) -> None:
        if not self._service.alone and self._service.changes.turn is None:
            raise RequestError(
                409,
                "conflict",
                "several processes answer here, and this one alone would do so; put the bundle that you want into the "
                "model's folder, and have the operator tell them all",
            )

    def _named(self, exchange: Exchange) -> str:
        return exchange.path.split("/")[4]

    def _model(self, exchange: Exchange) -> ServedModel:
        found = split_model_path(exchange.path)
        assert found is not None  # the router has looked
        name, version, _ = found
        model = self._service.find(name, version)
        exchange.model, exchange.version = model.name, model.version
        return model

    def _encoder(self, model: ServedModel) -> InferEncoder:
        encoder = self._encoders.get(model)
        if encoder is None:
            encoder = self._encoders[model] = InferEncoder(model)
        return encoder
