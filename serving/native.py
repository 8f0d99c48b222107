"""``POST /v1/embed`` and ``/v1/predict``: rows or images in, features or labels out, in the plainest form there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl
from weakref import WeakKeyDictionary

import numpy as np
import orjson
from numpy.typing import NDArray

from serving.codec import (
    INLINE_VALUES,
    EmbedBody,
    decode_json,
    decode_raw,
    encode_json,
    encode_npy,
    is_plain,
    plain,
    view_npy,
)
from serving.errors import RequestError, shown
from serving.exchange import Answer, Exchange, Headers
from serving.media import IMAGES, JSON, MULTIPART, NPY, RAW, answer_type, body_type
from serving.multipart import split_parts
from serving.served_model import ServedModel
from serving.service import Embedded, Service
from vaefeat.input_spec import InputSpec
from vaefeat.predictor import LABEL, PROBABILITIES

__all__ = ["Native"]

_PARAMETERS = {"model", "version", "output", "priority", "timeout_ms"}
#: What addresses and headers say is the same for most requests of a client.
_MOST_REMEMBERED = 512
_LONGEST_REMEMBERED = 512


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the address and the headers of a request say."""

    model: str | None
    version: str | None
    output: str | None
    priority: int
    timeout_s: float | None
    body_type: str
    answer_type: str

    @classmethod
    def of(cls, query_string: bytes, headers: Mapping[bytes, bytes], *, preferred: str | None) -> _Asked:
        pairs = parse_qsl(query_string.decode("latin-1"), keep_blank_values=True)
        query = dict(pairs)
        if unknown := sorted(query.keys() - _PARAMETERS):
            raise _invalid(f"got the unknown query parameters {shown(unknown)}, wanted only {sorted(_PARAMETERS)}")
        if len(pairs) > len(query):
            raise _invalid(f"got a query parameter twice, wanted each of {sorted(_PARAMETERS)} at most once")
        received = body_type(headers)
        default = preferred or (JSON if received in (MULTIPART, *IMAGES) else received)
        wanted = answer_type(_text(headers.get(b"accept")), default=default)
        return cls(
            query.get("model"),
            query.get("version"),
            query.get("output"),
            _number("priority", query.get("priority"), 0, 255) or 0,
            None if (ms := _number("timeout_ms", query.get("timeout_ms"), 1, 2**31)) is None else ms / 1000,
            received,
            wanted,
        )


class Native:
    """Both routes, over a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._remembered: dict[tuple[bytes | None, ...], _Asked] = {}
        # Versions come and go; what belongs to those that have gone goes with them, and holds no session.
        self._labels: WeakKeyDictionary[ServedModel, dict[str, Headers]] = WeakKeyDictionary()

    async def embed(self, exchange: Exchange) -> Answer:
        """Give features of the rows of one request."""
        asked = self._asked(exchange)
        self._require_room(asked)
        model, batch, output = await self._read(exchange, asked)
        output = output or "mean"
        if output not in model.outputs:
            hint = "; what it predicts is at /v1/predict" if model.classes else ""
            raise _invalid(f"got output={output[:80]!r} of {model.name!r}, wanted one of {sorted(model.outputs)}{hint}")
        embedded = await self._computed(exchange, asked, model, batch, (output,))
        features = embedded.features[output]
        if asked.answer_type != JSON:
            return self._array(asked, model, embedded, features)
        return await self._json(
            model,
            features.size,
            lambda: encode_json(features, **_told(model, embedded, output=output)),
        )

    async def predict(self, exchange: Exchange) -> Answer:
        """Give labels and probabilities of the rows of one request."""
        asked = self._asked(exchange, preferred=JSON)
        self._require_room(asked)
        model, batch, output = await self._read(exchange, asked)
        if not model.classes:
            raise _invalid(
                f"got model {model.name!r}, an encoder without classes, wanted a classifier; its features are at "
                "/v1/embed, and vaefeat.export_pipeline makes a classifier of them"
            )
        if output not in (None, LABEL, PROBABILITIES):
            raise _invalid(f"got output={output[:80]!r}, wanted {LABEL!r}, {PROBABILITIES!r} or none for both")
        if output == LABEL and asked.answer_type == RAW and isinstance(model.classes[0], str):
            raise _invalid(
                "got output='label' and Accept for raw bytes, in which texts have no form; accept npy or JSON"
            )
        embedded = await self._computed(exchange, asked, model, batch, (LABEL, PROBABILITIES))
        labels, probabilities = embedded.features[LABEL], embedded.features[PROBABILITIES]
        if asked.answer_type != JSON:
            values = np.array(model.classes)[labels] if output == LABEL else probabilities
            return self._array(asked, model, embedded, values)
        names = [None if row in embedded.errors else model.classes[place] for row, place in enumerate(labels.tolist())]
        told = _told(model, embedded, classes=model.classes, **({} if output == PROBABILITIES else {"labels": names}))
        if output == LABEL:
            return await self._json(model, len(names), lambda: orjson.dumps(told))
        return await self._json(
            model, probabilities.size, lambda: encode_json(probabilities, name=PROBABILITIES, **told)
        )

    async def _read(
        self, exchange: Exchange, asked: _Asked
    ) -> tuple[ServedModel, NDArray[np.generic] | list[bytes], str | None]:
        """Read the body: which model is meant, its rows or images, and which output is named."""
        content = await exchange.body(self._service.limits)
        if asked.body_type == NPY:
            rows = view_npy(content)
            # Put in order value by value, many would hold up everybody else.
            slow = rows.nbytes > self._service.limits.inline_bytes and not is_plain(rows)
            body = EmbedBody(await self._service.off_loop(plain, rows) if slow else plain(rows))
        elif asked.body_type == JSON:
            lists, values = self._most(asked.model)
            body = (
                decode_json(bytes(content), max_lists=lists, max_values=values)
                if len(content) <= self._service.limits.inline_bytes
                else await self._service.off_loop(
                    lambda: decode_json(bytes(content), max_lists=lists, max_values=values)
                )
            )
        else:
            body = EmbedBody(np.empty(0))
        model = self._service.find(_agreed("model", asked.model, body.model), asked.version)
        exchange.model, exchange.version = model.name, model.version
        batch = await self._batch(asked.body_type, content, body, model.input, exchange)
        return model, batch, _agreed("output", asked.output, body.output)

    async def _computed(
        self,
        exchange: Exchange,
        asked: _Asked,
        model: ServedModel,
        batch: NDArray[np.generic] | list[bytes],
        outputs: tuple[str, ...],
    ) -> Embedded:
        embedded = await self._service.embed(
            model, batch, outputs=outputs, priority=asked.priority, timeout_s=asked.timeout_s, caller=exchange
        )
        exchange.note(model, embedded)
        return embedded

    def _asked(self, exchange: Exchange, *, preferred: str | None = None) -> _Asked:
        """Read address and headers; the answer's form is that of the request where none is preferred or asked for."""
        headers = exchange.headers
        said = (
            None if preferred is None else preferred.encode(),
            exchange.scope["query_string"],
            headers.get(b"content-type", b""),
            headers.get(b"accept", b""),
            headers.get(b"content-encoding", b""),
        )
        asked = self._remembered.get(said)
        if asked is None:
            asked = _Asked.of(exchange.scope["query_string"], headers, preferred=preferred)
            if sum(len(part or b"") for part in said) <= _LONGEST_REMEMBERED:
                if len(self._remembered) >= _MOST_REMEMBERED:
                    self._remembered.clear()
                self._remembered[said] = asked
        return asked

    def _require_room(self, asked: _Asked) -> None:
        service = self._service
        if service.batcher.queued_rows:
            # With several models, JSON may say in the body which is meant.
            is_known = asked.model is not None or len(service.models.names) == 1
            model = service.find(asked.model, asked.version) if is_known else None
            service.require_room(model, priority=asked.priority, timeout_s=asked.timeout_s)

    async def _batch(
        self, form: str, content: bytes | memoryview, body: EmbedBody, spec: InputSpec, exchange: Exchange
    ) -> NDArray[np.generic] | list[bytes]:
        if form == RAW:
            return decode_raw(content, spec)
        if form in IMAGES:
            return [bytes(content)]
        if form == MULTIPART:
            most = self._service.limits.max_rows
            kind = exchange.headers[b"content-type"]
            return await self._service.off_loop(lambda: split_parts(bytes(content), kind, max_parts=most))
        if form == JSON and spec.dtype != "uint8":
            # Numbers in JSON are of no type; that all of these are small and whole makes them no pixels.
            return body.rows.astype(np.float64, copy=False)
        return body.rows

    def _array(self, asked: _Asked, model: ServedModel, embedded: Embedded, values: NDArray[np.generic]) -> Answer:
        if embedded.errors:
            position, message = next(iter(sorted(embedded.errors.items())))
            raise RequestError(
                422,
                "invalid_rows",
                f"{len(embedded.errors)} of {len(values)} items cannot be read, the first is item {position}: "
                f"{message}; with Accept: application/json the others are answered",
            )
        headers = self._headers(model, asked.answer_type)
        if asked.answer_type == NPY:
            return Answer(200, headers, encode_npy(values))
        shape = ",".join(map(str, values.shape)).encode()
        return Answer(200, [*headers, (b"x-vaefeat-shape", shape)], values.data.cast("B"))

    async def _json(self, model: ServedModel, n_values: int, encode: Callable[[], bytes]) -> Answer:
        body = encode() if n_values <= INLINE_VALUES else await self._service.off_loop(encode)
        return Answer(200, self._headers(model, JSON), body)

    def _headers(self, model: ServedModel, kind: str) -> Headers:
        by_kind = self._labels.get(model)
        if by_kind is None:
            by_kind = self._labels[model] = {}
        headers = by_kind.get(kind)
        if headers is None:
            headers = by_kind[kind] = [
                (b"content-type", kind.encode()),
                (b"x-vaefeat-model", model.name.encode()),
                (b"x-vaefeat-digest", model.digest.encode()),
            ]
        return headers

    def _most(self, name: str | None) -> tuple[int, int]:
        """Bound the lists and numbers of a JSON body before it is parsed: by the rows that are allowed of any model."""
        specs = [model.input for model in self._service.models.current if name in (None, model.name)]
        most = self._service.limits.max_rows
        lists = 1 + most * max((_lists_in_a_row(spec) for spec in specs), default=1)
        return lists, most * max((spec.n_features for spec in specs), default=1)


def _told(model: ServedModel, embedded: Embedded, **more: Any) -> dict[str, Any]:
    """Give what a JSON answer says besides its numbers."""
    told = {"model": model.name, "version": model.version, "digest": model.digest, **more}
    errors = [{"index": position, "message": text} for position, text in sorted(embedded.errors.items())]
    return {**told, "errors": errors} if errors else told


def _lists_in_a_row(spec: InputSpec) -> int:
    """Nested lists that hold one row: 1 + C + C * H for an image (C, H, W)."""
    return 1 + int(np.cumprod(spec.shape[:-1], dtype=np.int64).sum())


def _agreed(what: str, in_query: str | None, in_body: str | None) -> str | None:
    if in_query is not None and in_body is not None and in_query != in_body:
        raise _invalid(
            f"got {what}={in_query[:100]!r} in the address and {in_body[:100]!r} in the body; send one of them"
        )
    return in_body if in_query is None else in_query


def _number(name: str, text: str | None, low: int, high: int) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) <= high):
        raise _invalid(f"got {name}={text[:40]!r}, wanted a whole number from {low} to {high}")
    return int(text)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def _invalid(message: str) -> RequestError:
    return RequestError(400, "invalid_parameter", message)
