"""The routes: a Starlette application around encoders; it knows nothing of Ray.

============================  =========================================================================================
``POST /v1/embed``            rows in, features out; npy or JSON, each way
``GET /v1/models``            what is served, and within which limits
``GET /livez``                200 while the event loop turns
``GET /readyz``               200 once every encoder has embedded a row, 503 before
``GET /``                     how to use all this
============================  =========================================================================================

Whatever takes time (decoding, the encoder, encoding) happens in a bounded pool of threads, so that the event loop is
free to answer ``/livez`` while a big batch is computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.codec import EmbedBody, decode_json, decode_npy, encode_json, encode_npy
from serving.edge import Edge
from serving.errors import CodecError, RequestError, as_request_error, error_response, overloaded, too_large
from serving.media import JSON, NPY, answer_type, body_type
from serving.settings import Limits
from vaefeat import __version__
from vaefeat.errors import InputError

if TYPE_CHECKING:
    from vaefeat.encoder import OnnxEncoder
    from vaefeat.input_spec import InputSpec

__all__ = ["EmbeddingService", "build_app"]


def build_app(encoders: Mapping[str, OnnxEncoder], *, limits: Limits | None = None) -> Starlette:
    """Put encoders behind HTTP.

    Parameters
    ----------
    encoders : mapping of str to OnnxEncoder
        By the name under which each is served.
    limits : Limits, optional

    Returns
    -------
    Starlette
        Its ``state.service`` is the :class:`EmbeddingService`. The lifespan must run for ``/readyz`` to become 200.
    """
    limits = limits or Limits()
    service = EmbeddingService(encoders, limits)
    app = Starlette(
        routes=[
            Route("/", service.index),
            Route("/v1/embed", service.embed, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/livez", service.livez),
            Route("/readyz", service.readyz),
        ],
        lifespan=service.lifespan,
        middleware=[Middleware(Edge, limits=limits)],
        exception_handlers={kind: _answer_error for kind in (RequestError, CodecError, InputError, HTTPException)},
    )
    app.state.service = service
    return app


@dataclass(frozen=True)
class _Asked:
    """What the address and the headers of a request to embed say."""

    model: str | None
    output: str | None
    body_type: str
    answer_type: str

    @classmethod
    def of(cls, request: Request) -> _Asked:
        query = request.query_params
        if unknown := sorted(query.keys() - {"model", "output"}):
            raise _invalid(f"got the unknown query parameters {unknown}, wanted only 'model' and 'output'")
        received = body_type(request.headers)
        wanted = answer_type(request.headers.get("accept"), default=received)
        return cls(query.get("model"), query.get("output"), received, wanted)


class EmbeddingService:
    """Encoders, the threads they run in, and whether they are ready.

    Parameters
    ----------
    encoders : mapping of str to OnnxEncoder
    limits : Limits

    Attributes
    ----------
    ready : bool
        Every encoder has embedded a row.
    failure : str
        Why that did not work, empty otherwise.
    """

    def __init__(self, encoders: Mapping[str, OnnxEncoder], limits: Limits) -> None:
        self.encoders = dict(encoders)
        self.limits = limits
        self.ready = False
        self.failure = ""
        self._in_flight = 0
        self._pool = ThreadPoolExecutor(limits.worker_threads, thread_name_prefix="embed")
        self._max_lists = 1 + limits.max_rows * max(_lists_in_a_row(encoder.input) for encoder in encoders.values())
        cards = [_card(name, encoder, limits) for name, encoder in self.encoders.items()]
        self._models = orjson.dumps({"object": "list", "data": cards})

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Warm up in the background, so that ``/livez`` and ``/readyz`` answer meanwhile."""
        warming = asyncio.create_task(self._warm_up())
        yield
        warming.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _warm_up(self) -> None:
        loop = asyncio.get_running_loop()
        for name, encoder in self.encoders.items():
            try:
                await loop.run_in_executor(self._pool, _embed_one_row, encoder)
            except Exception as error:
                self.failure = f"model {name!r} failed on its first row: {error}"
                return
        self.ready = True

    async def index(self, request: Request) -> Response:
        """Tell a person who opens the address what is here."""
        example = "curl --data-binary @rows.npy -H 'Content-Type: application/x-npy' {}v1/embed > features.npy"
        about = {
            "service": "vaefeat",
            "version": __version__,
            "models": list(self.encoders),
            "routes": ["POST /v1/embed", "GET /v1/models", "GET /livez", "GET /readyz"],
            "example": example.format(request.base_url),
        }
        return _json(about)

    async def models(self, request: Request) -> Response:
        """List the models."""
        return Response(self._models, media_type=JSON)

    async def livez(self, request: Request) -> Response:
        """Answer, which is the news."""
        return _json({"live": True})

    async def readyz(self, request: Request) -> Response:
        """Tell whether requests are going to be answered well."""
        if self.ready:
            return _json({"ready": True})
        state = {"ready": False, "failed": bool(self.failure), "reason": self.failure or "warming up"}
        return _json(state, status=503)

    async def embed(self, request: Request) -> Response:
        """Embed the rows of one request."""
        asked = _Asked.of(request)
        with self._slot():
            body = await request.body()
            return await self._compute(self._answer, asked, body)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self._in_flight >= self.limits.max_in_flight:
            raise overloaded(f"{self._in_flight} requests are being answered, which is the most at a time; try again")
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    async def _compute(self, function: Callable[..., Response], *arguments: Any) -> Response:
        running = asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        try:
            # Cancels the work if it is still waiting for a thread; a thread that has begun cannot be stopped.
            return await asyncio.wait_for(running, self.limits.compute_timeout_s)
        except TimeoutError:
            limit = self.limits.compute_timeout_s
            raise overloaded(f"got no answer from the encoder within {limit:g} s; send fewer rows at a time") from None

    def _answer(self, asked: _Asked, content: bytes) -> Response:
        """Decode, embed, encode; runs in the pool."""
        body = (
            EmbedBody(decode_npy(content))
            if asked.body_type == NPY
            else decode_json(content, max_lists=self._max_lists)
        )
        name, encoder = self._encoder(_agreed("model", asked.model, body.model))
        output = _agreed("output", asked.output, body.output) or "mean"
        if output not in encoder.outputs:
            raise _invalid(f"got output={output!r}, wanted one of {sorted(encoder.outputs)}")
        n_rows = body.rows.shape[0] if body.rows.ndim else 0
        if n_rows > self.limits.max_rows:
            raise too_large(f"got {n_rows} rows, wanted at most {self.limits.max_rows} at a time; send them in parts")
        features = encoder.embed(body.rows, output=output)
        if not (finite := np.isfinite(features).all(axis=1)).all():
            row = int(np.flatnonzero(~finite)[0])
            message = f"model {name!r} computed NaN or infinity for row {row}; leave such rows out, or check the bundle"
            raise RequestError(500, "non_finite_output", message)
        headers = {"x-vaefeat-model": name, "x-vaefeat-digest": encoder.digest}
        if asked.answer_type == NPY:
            return Response(encode_npy(features), headers=headers, media_type=NPY)
        answer = encode_json(features, model=name, digest=encoder.digest, output=output)
        return Response(answer, headers=headers, media_type=JSON)

    def _encoder(self, name: str | None) -> tuple[str, OnnxEncoder]:
        served = ", ".join(map(repr, self.encoders))
        if name is None:
            if len(self.encoders) > 1:
                raise _invalid(f"got no model, wanted one of {served}; name it with ?model=")
            name = next(iter(self.encoders))
        if name not in self.encoders:
            raise RequestError(404, "unknown_model", f"got model={name[:100]!r}, wanted one of {served}")
        return name, self.encoders[name]


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(as_request_error(error), request.headers["x-request-id"])


def _invalid(message: str) -> RequestError:
    return RequestError(400, "invalid_parameter", message)


def _agreed(what: str, in_query: str | None, in_body: str | None) -> str | None:
    if in_query is not None and in_body is not None and in_query != in_body:
        raise _invalid(
            f"got {what}={in_query[:100]!r} in the address and {in_body[:100]!r} in the body; send one of them"
        )
    return in_body if in_query is None else in_query


def _embed_one_row(encoder: OnnxEncoder) -> None:
    features = encoder.embed(np.zeros((1, *encoder.input.shape), dtype=encoder.input.dtype))
    if not np.isfinite(features).all():
        raise ValueError("it computed NaN or infinity for a row of zeros")


def _lists_in_a_row(spec: InputSpec) -> int:
    """Nested lists that hold one row: 1 + C + C * H for an image (C, H, W)."""
    return 1 + int(np.cumprod(spec.shape[:-1], dtype=np.int64).sum())


def _card(name: str, encoder: OnnxEncoder, limits: Limits) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "digest": encoder.digest,
        "input": encoder.input.to_dict(),
        "outputs": encoder.outputs,
        "classes": list(encoder.classes),
        "latent_dim": encoder.latent_dim,
        "active_units": encoder.active_units,
        "provider": encoder.provider,
        "limits": {"max_rows": limits.max_rows, "max_body_bytes": limits.max_body_bytes},
    }


def _json(values: Mapping[str, Any], *, status: int = 200) -> Response:
    return Response(orjson.dumps(values), status, media_type=JSON)
