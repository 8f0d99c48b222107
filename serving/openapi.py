"""The service's description of itself in OpenAPI 3.1, at ``GET /openapi.json``.

One table, by method and address as :meth:`serving.app.Application.routes` lists them. A test compares the two, another
one lets schemathesis send what the table allows and what it does not, and checks each answer against it.

Source: OpenAPI Specification 3.1, https://spec.openapis.org/oas/v3.1.0; a body of bytes has an empty schema there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.media import IMAGES, JSON, MULTIPART, NPY, RAW
from vaefeat import __version__

__all__ = ["describe_api"]

_Schema = dict[str, Any]
_TEXT: _Schema = {"type": "string"}
_NUMBER: _Schema = {"type": "number"}
_COUNT: _Schema = {"type": "integer", "minimum": 0}
_BOOLEAN: _Schema = {"type": "boolean"}
_BYTES: _Schema = {}


def _of(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Mapping[str, _Schema], *, optional: Mapping[str, _Schema] | None = None) -> _Schema:
    properties = {**required, **(optional or {})}
    closed = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**closed, "required": list(required)} if required else closed


def _list(items: _Schema, *, at_least: int = 0) -> _Schema:
    return {"type": "array", "items": items, "minItems": at_least} if at_least else {"type": "array", "items": items}


def _one_of(*schemas: _Schema) -> _Schema:
    return {"anyOf": list(schemas)}


_DIGEST: _Schema = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
_VERSION: _Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_CLASS: _Schema = {"type": ["string", "number", "boolean"]}
_SHAPE = _list(_COUNT)
_MODE = _object(
    {"device": _TEXT, "provider": _TEXT, "precision": _TEXT, "buckets": _list(_COUNT), "io_binding": _BOOLEAN}
    | {"graphs": _TEXT, "pinned": _TEXT}
)
_READY = _object({"ready": _BOOLEAN}, optional={"failed": _BOOLEAN, "reason": _TEXT, "providers": _list(_TEXT)})
_OUTPUTS: _Schema = {"type": "object", "additionalProperties": _COUNT}
_INPUT = _object(
    {"kind": {"enum": ["image", "vector"]}, "shape": _SHAPE, "dtype": {"enum": ["uint8", "float32"]}}
    | {"low": _NUMBER, "high": _NUMBER}
)
#: The protocol leaves all parameters open; a name that is not known has no effect.
_PARAMETERS: _Schema = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
_IMAGE_URL = _one_of(_TEXT, _object({"url": _TEXT}, optional={"detail": _TEXT}))
_MESSAGE = _object(
    {"content": _list(_object({"type": {"const": "image_url"}, "image_url": _IMAGE_URL}), at_least=1)},
    optional={"role": _TEXT},
)
_TENSOR = _object({"name": _TEXT, "datatype": _TEXT, "shape": _list({"type": "integer"})})

_SCHEMAS: dict[str, _Schema] = {
    "Nested": _one_of(_NUMBER, _list(_of("Nested"))),
    "NativeError": _object({"error": _object({"type": _TEXT, "message": _TEXT, "request_id": _TEXT})}),
    "OpenAIError": _object(
        {
            "error": _object(
                {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": _TEXT}
                | {"request_id": _TEXT}
            )
        }
    ),
    "OIPError": _object({"error": _TEXT}),
    "EmbedRequest": _object(
        {"rows": _list(_list(_of("Nested"), at_least=1), at_least=1)}, optional={"model": _TEXT, "output": _TEXT}
    ),
    "EmbedAnswer": _object(
        {"model": _TEXT, "version": _VERSION, "digest": _DIGEST, "output": _TEXT, "shape": _SHAPE}
        | {"embeddings": _list(_list(_NUMBER))},
        optional={"errors": _list(_object({"index": _COUNT, "message": _TEXT}), at_least=1)},
    ),
    "PredictAnswer": _object(
        {"model": _TEXT, "version": _VERSION, "digest": _DIGEST, "classes": _list(_CLASS, at_least=2)},
        optional={
            "labels": _list(_one_of(_CLASS, {"type": "null"})),
            "shape": _SHAPE,
            "probabilities": _list(_list(_NUMBER)),
            "errors": _list(_object({"index": _COUNT, "message": _TEXT}), at_least=1),
        },
    ),
    "Card": _object(
        {"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT, "digest": _DIGEST}
        | {"versions": _list(_VERSION, at_least=1), "input": _INPUT, "outputs": _OUTPUTS}
        | {"classes": _list(_CLASS), "latent_dim": _COUNT, "active_units": _COUNT}
        | {"provider": _TEXT, "precision": _TEXT, "proved": _BOOLEAN, "mode": _MODE}
        | {"limits": _object({"max_rows": _COUNT, "max_body_bytes": _COUNT})}
    ),
    "EmbeddingsRequest": {
        **_object(
            {},
            optional={
                "model": {"type": ["string", "null"]},
                "input": _one_of(_of("Item"), _list(_of("Item"), at_least=1)),
                "messages": _one_of(_list(_MESSAGE, at_least=1), _list(_list(_MESSAGE, at_least=1), at_least=1)),
                "encoding_format": {"enum": ["float", "base64"]},
                "dimensions": {"type": ["integer", "null"]},
                "modality": {"const": "image"},
                "user": {},
            },
        ),
        "oneOf": [{"required": ["input"]}, {"required": ["messages"]}],
    },
    "Item": _one_of(
        {"type": "string", "pattern": "^data:"}, _object({"image": _TEXT}), _NUMBER, _list(_NUMBER, at_least=1)
    ),
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "data": _list(
                _object(
                    {"object": {"const": "embedding"}, "index": _COUNT, "embedding": _one_of(_TEXT, _list(_NUMBER))}
                )
            ),
            "model": _TEXT,
            "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
            "digest": _DIGEST,
        }
    ),
    "InferRequest": _object(
        {"inputs": {**_list(_of("InferInput"), at_least=1), "maxItems": 1}},
        optional={
            "id": {"type": ["string", "null"], "maxLength": 1024},
            "parameters": _PARAMETERS,
            "outputs": _list(_object({"name": _TEXT}, optional={"parameters": _PARAMETERS})),
            "model_name": {},
            "model_version": {},
        },
    ),
    "InferInput": _object(
        {"name": {"enum": ["rows", "images"]}, "shape": _list({"type": "integer", "minimum": 1}, at_least=1)}
        | {"datatype": _TEXT},
        optional={"parameters": _PARAMETERS, "data": {"type": "array"}},
    ),
    "InferAnswer": _object(
        {
            "model_name": _TEXT,
            "model_version": _VERSION,
            "parameters": _PARAMETERS,
            "outputs": _list(
                _object(
                    {"name": _TEXT, "datatype": {"enum": ["FP32", "INT64", "BYTES", "FP64", "BOOL"]}, "shape": _SHAPE},
                    optional={"parameters": _PARAMETERS, "data": _list(_one_of(_CLASS, {"type": "null"}))},
                ),
                at_least=1,
            ),
        },
        optional={"id": _TEXT},
    ),
    "OIPModel": _object(
        {"name": _TEXT, "versions": _list(_VERSION, at_least=1), "platform": _TEXT}
        | {"inputs": _list(_TENSOR), "outputs": _list(_TENSOR), "parameters": _PARAMETERS}
    ),
    "Indexed": _object({"name": _TEXT, "state": _TEXT, "reason": _TEXT}, optional={"version": _VERSION}),
    "LoadRequest": _object(
        {}, optional={"parameters": _object({}, optional={"version": {"type": ["string", "null"]}})}
    ),
}

_MEANINGS = {
    400: "The body or a parameter is not what is described here",
    401: "No API key, or one that is not known, where the service asks for keys",
    403: "An API key without the scope that this needs",
    404: "No such model or version",
    406: "Accept allows none of the forms",
    408: "The body did not arrive in time",
    409: "The models cannot be changed in this way; what was served still is",
    411: "A body without Content-Length",
    413: "More bytes or rows than the limits allow",
    415: "A body of another type or coding",
    422: "Rows or images that the model does not take",
    429: "More than the API key's rate allows",
    500: "A defect, or features that are not finite",
    503: "Too much to do, or not ready",
    504: "Not computed in time",
}
_TRY_AGAIN = (429, 503, 504)
#: What every route with a body refuses before it looks at what the body says.
_OF_BODIES = (408, 411, 413, 429, 503)
_OF_ROWS = (400, 404, *_OF_BODIES, 500, 504)
_LABELS = {
    "x-vaefeat-digest": {"description": "The bundle that computed it", "schema": _DIGEST},
    "server-timing": {"schema": _TEXT},
}


@dataclass(frozen=True, kw_only=True)
class _Operation:
    """What is said of one route.

    Attributes
    ----------
    answers : mapping of str to schema
        By media type, of status 200.
    refusals : sequence of int
        Statuses besides 200 and those that an asked-for scope brings.
    door : str
        Which of the three forms errors have.
    unready : schema, optional
        Of an answer 503 that is news and no error.
    """

    summary: str
    answers: Mapping[str, _Schema]
    door: str = "NativeError"
    scope: str = ""
    body: Mapping[str, _Schema] = field(default_factory=dict)
    body_is_required: bool = True
    parameters: Sequence[dict[str, Any]] = ()
    refusals: Sequence[int] = ()
    unready: _Schema | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self, *, place: str) -> dict[str, Any]:
        """Write it in OpenAPI's words."""
        of_place = [_parameter(name, "path", _TEXT) for name in ("model", "version") if f"{{{name}}}" in place]
        label = {"x-request-id": {"required": True, "schema": _TEXT}}
        answers: dict[str, Any] = {"200": _answer("What was asked for", self.answers, {**label, **self.headers})}
        if self.unready is not None:
            answers["503"] = _answer("Not ready", {JSON: self.unready}, label)
        for status in sorted({*self.refusals, *((401, 403) if self.scope else ())}):
            later = {"retry-after": {"required": True, "schema": _COUNT}} if status in _TRY_AGAIN else {}
            answers[str(status)] = _answer(_MEANINGS[status], {JSON: _of(self.door)}, {**label, **later})
        told: dict[str, Any] = {"summary": self.summary, "responses": answers}
        if parameters := [*of_place, *self.parameters]:
            told["parameters"] = parameters
        if self.body:
            told["requestBody"] = {"required": self.body_is_required, "content": _content(self.body)}
        if self.scope:
            # Or no key at all: whether one is asked for is the operator's choice.
            told["security"] = [{}, {"bearer": []}, {"header": []}]
            told["x-scope"] = self.scope
        return told


def _parameter(name: str, place: str, schema: _Schema, meaning: str = "") -> dict[str, Any]:
    told = {"name": name, "in": place, "required": place == "path", "schema": schema}
    return {**told, "description": meaning} if meaning else told


def _content(schemas: Mapping[str, _Schema]) -> dict[str, Any]:
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}


def _answer(meaning: str, schemas: Mapping[str, _Schema], headers: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": meaning, "content": _content(schemas), "headers": dict(headers)}


_NATIVE_BODY: dict[str, _Schema] = {
    NPY: _BYTES,
    JSON: _of("EmbedRequest"),
    RAW: _BYTES,
    MULTIPART: {"type": "object", "properties": {"file": _list({"type": "string", "format": "binary"})}},
    **dict.fromkeys(IMAGES, _BYTES),
}


def _native(summary: str, *, answer: str, outputs: str) -> _Operation:
    return _Operation(
        summary=summary,
        body=_NATIVE_BODY,
        parameters=(
            _parameter("model", "query", _TEXT, "Needed where several are served"),
            _parameter("version", "query", _TEXT, "A digest; the newest without it"),
            _parameter("output", "query", _TEXT, outputs),
            _parameter(
                "priority", "query", {"type": "integer", "minimum": 0, "maximum": 255}, "More gives way to less"
            ),
            _parameter("timeout_ms", "query", {"type": "integer", "minimum": 1, "maximum": 2**31}),
        ),
        answers={JSON: _of(answer), NPY: _BYTES, RAW: _BYTES},
        refusals=(*_OF_ROWS, 406, 415, 422),
        scope="embed",
        headers={**_LABELS, "x-vaefeat-model": {"schema": _TEXT}, "x-vaefeat-shape": {"schema": _TEXT}},
    )


_EMBED = _native(
    "Embed rows or images", answer="EmbedAnswer", outputs="One of the model's outputs of numbers, mean without it"
)
_PREDICT = _native(
    "Predict labels and probabilities of rows or images, by a model with classes; JSON unless Accept says otherwise",
    answer="PredictAnswer",
    outputs="label or probabilities; both without it, and probabilities where the answer is not JSON",
)
_INFER = _Operation(
    summary="Embed rows or images, by the Open Inference Protocol",
    door="OIPError",
    body={JSON: _of("InferRequest"), RAW: _BYTES},
    parameters=(
        _parameter("Inference-Header-Content-Length", "header", _COUNT, "Where the JSON ends and bytes begin"),
        _parameter("Content-Encoding", "header", {"enum": ["identity", "gzip", "deflate"]}),
    ),
    answers={JSON: _of("InferAnswer"), RAW: _BYTES},
    refusals=(*_OF_ROWS, 415),
    scope="embed",
    headers={**_LABELS, "inference-header-content-length": {"schema": _COUNT}},
)
_MODEL = _Operation(
    summary="Metadata of a model",
    door="OIPError",
    answers={JSON: _of("OIPModel")},
    refusals=(404,),
    scope="embed",
)
_MODEL_READY = _Operation(
    summary="Whether a model answers",
    door="OIPError",
    answers={JSON: _object({"name": _TEXT, "ready": _BOOLEAN})},
    refusals=(404,),
    unready=_object({"name": _TEXT, "ready": _BOOLEAN}),
)

_OPERATIONS: dict[str, _Operation] = {
    "GET /": _Operation(summary="What is here", answers={JSON: {"type": "object"}}),
    "GET /openapi.json": _Operation(summary="This description", answers={JSON: {"type": "object"}}),
    "GET /livez": _Operation(summary="Whether the process answers", answers={JSON: _object({"live": _BOOLEAN})}),
    "GET /readyz": _Operation(summary="Whether every model answers", answers={JSON: _READY}, unready=_READY),
    "GET /metrics": _Operation(
        summary="Figures for Prometheus",
        answers={"text/plain": _TEXT, "application/openmetrics-text": _TEXT},
        scope="metrics",
    ),
    "GET /v1/models": _Operation(
        summary="The models, with their limits",
        door="OpenAIError",
        answers={JSON: _object({"object": {"const": "list"}, "data": _list(_of("Card"))})},
        scope="embed",
    ),
    "GET /v1/models/{model}": _Operation(
        summary="One model",
        door="OpenAIError",
        parameters=(_parameter("version", "query", _TEXT, "A digest; the newest without it"),),
        answers={JSON: _of("Card")},
        refusals=(404,),
        scope="embed",
    ),
    "POST /v1/embed": _EMBED,
    "POST /v1/predict": _PREDICT,
    "POST /v1/embeddings": _Operation(
        summary="Embed images or rows, as OpenAI's clients ask for it",
        door="OpenAIError",
        body={JSON: _of("EmbeddingsRequest")},
        answers={JSON: _of("Embeddings")},
        refusals=(*_OF_ROWS, 415, 422),
        scope="embed",
        headers={**_LABELS, "x-vaefeat-model": {"schema": _TEXT}},
    ),
    "GET /v2": _Operation(
        summary="Metadata of the server",
        door="OIPError",
        answers={JSON: _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)})},
    ),
    "GET /v2/health/live": _Operation(summary="As /livez", answers={JSON: _object({"live": _BOOLEAN})}),
    "GET /v2/health/ready": _Operation(summary="As /readyz", answers={JSON: _READY}, unready=_READY),
    "GET /v2/models/{model}": _MODEL,
    "GET /v2/models/{model}/ready": _MODEL_READY,
    "POST /v2/models/{model}/infer": _INFER,
    "GET /v2/models/{model}/versions/{version}": _MODEL,
    "GET /v2/models/{model}/versions/{version}/ready": _MODEL_READY,
    "POST /v2/models/{model}/versions/{version}/infer": _INFER,
    "POST /v2/repository/index": _Operation(
        summary="What can be loaded, and what is",
        door="OIPError",
        body={JSON: _BYTES},  # tritonclient sends an object; nothing in it counts
        body_is_required=False,
        answers={JSON: _list(_of("Indexed"))},
        refusals=_OF_BODIES,
        scope="admin",
    ),
    "POST /v2/repository/models/{model}/load": _Operation(
        summary="Load a model's folder again, or go back to a version that is held",
        door="OIPError",
        body={JSON: _of("LoadRequest")},
        body_is_required=False,
        answers={JSON: _object({"name": _TEXT, "version": _VERSION, "state": _TEXT})},
        refusals=(400, 404, 409, *_OF_BODIES),
        scope="admin",
    ),
    "POST /v2/repository/models/{model}/unload": _Operation(
        summary="Serve a model no more",
        door="OIPError",
        body={JSON: _BYTES},  # tritonclient sends an object; nothing in it counts
        body_is_required=False,
        answers={JSON: _object({})},
        refusals=(404, 409, *_OF_BODIES),
        scope="admin",
    ),
}


def describe_api() -> dict[str, Any]:
    """Write the document: plain values that JSON can hold."""
    paths: dict[str, dict[str, Any]] = {}
    for route, operation in _OPERATIONS.items():
        method, place = route.split(" ")
        paths.setdefault(place, {})[method.lower()] = operation.to_dict(place=place)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vaefeat",
            "version": __version__,
            "description": "Features of rows and images, from variational auto-encoders, and labels made of them.",
        },
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }
