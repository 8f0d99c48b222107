from __future__ import annotations

import asyncio
import io
import pickle
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from onnx import helper
from starlette.applications import Starlette

from serving.app import build_app
from serving.codec import decode_npy, encode_npy
from serving.media import JSON, NPY
from serving.settings import Limits
from vaefeat.bundle import Bundle, Manifest
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError
from vaefeat.input_spec import InputSpec


@pytest.fixture(scope="module")
def encoder(digits_bundle: Path) -> OnnxEncoder:
    return OnnxEncoder(digits_bundle)


@pytest.fixture(scope="module")
def logarithm() -> OnnxEncoder:
    """Encode vectors by their logarithm, which zeros and negatives do not have."""
    rows = helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["batch", 2])
    mean = helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph([helper.make_node("Log", ["rows"], ["mean"])], "encoder", [rows], [mean])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    manifest = Manifest(
        name="logarithm",
        input=InputSpec(kind="vector", shape=(2,), dtype="float32", low=0.0, high=9.0),
        outputs={"mean": 2},
        latent_dim=2,
        active_units=(0, 1),
        objective="elbo",
        model={},
        train={},
        data={},
        metrics={},
        parity={},
        versions={},
    )
    return OnnxEncoder(Bundle.of(manifest, {"encoder.onnx": model.SerializeToString()}), device="cpu")


@pytest.fixture(scope="module")
def app(encoder: OnnxEncoder) -> Starlette:
    return build_app({"digits": encoder}, limits=Limits(max_rows=500, max_body_bytes=100_000))


@pytest.fixture(scope="module")
def both(encoder: OnnxEncoder, logarithm: OnnxEncoder) -> Starlette:
    return build_app({"digits": encoder, "logarithm": logarithm})


def within(app: Starlette, talk: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def exchange() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            return await talk(client)

    return asyncio.run(exchange())


def ask(app: Starlette, method: str, path: str, **arguments: Any) -> httpx.Response:
    answer = within(app, lambda client: client.request(method, path, **arguments))
    assert isinstance(answer, httpx.Response)
    return answer


def embed(app: Starlette, body: bytes, *, kind: str = NPY, path: str = "", **headers: str) -> httpx.Response:
    sent = {"content-type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
    return ask(app, "POST", f"/v1/embed{path}", content=body, headers=sent)


def as_json(rows: ArrayLike, **fields: Any) -> bytes:
    return orjson.dumps({"rows": np.asarray(rows).tolist(), **fields})


@pytest.mark.parametrize("output", ["mean", "logvar", "hidden"])
def test_embed_of_npy_gives_the_encoder_s_bits(
    app: Starlette, encoder: OnnxEncoder, digits_rows: NDArray[np.uint8], output: str
) -> None:
    answer = embed(app, encode_npy(digits_rows[:300]), path=f"?output={output}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == NPY
    assert answer.headers["x-vaefeat-model"] == "digits"
    assert answer.headers["x-vaefeat-digest"] == encoder.digest
    np.testing.assert_array_equal(decode_npy(answer.content), encoder.embed(digits_rows[:300], output=output))


def test_embed_of_json_gives_the_encoder_s_bits(
    app: Starlette, encoder: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    answer = embed(app, as_json(digits_rows[:3], model="digits", output="logvar"), kind=JSON)
    told = answer.json()
    assert (told["model"], told["digest"], told["output"]) == ("digits", encoder.digest, "logvar")
    wanted = encoder.embed(digits_rows[:3], output="logvar")
    assert told["shape"] == list(wanted.shape)
    np.testing.assert_array_equal(np.asarray(told["embeddings"], dtype=np.float32), wanted)


def test_embed_with_accept_answers_in_the_other_form(app: Starlette, digits_rows: NDArray[np.uint8]) -> None:
    from_npy = embed(app, encode_npy(digits_rows[:2]), accept=JSON)
    from_json = embed(app, as_json(digits_rows[:2]), kind=JSON, accept=NPY)
    told = np.asarray(from_npy.json()["embeddings"], dtype=np.float32)
    np.testing.assert_array_equal(told, decode_npy(from_json.content))


def test_embed_of_flat_float_rows_gives_what_shaped_uint8_rows_give(
    app: Starlette, digits_rows: NDArray[np.uint8]
) -> None:
    flat = digits_rows[:5].reshape(5, -1).astype(np.float64)
    assert embed(app, encode_npy(flat)).content == embed(app, encode_npy(digits_rows[:5])).content


ROW = np.zeros((1, 1, 8, 8), dtype=np.uint8)
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "empty": ({"body": b""}, 400, "malformed_body"),
    "cut off": ({"body": encode_npy(ROW)[:-1]}, 400, "malformed_body"),
    "pickled": ({"body": pickle.dumps([1])}, 400, "malformed_body"),
    "complex": ({"body": encode_npy(ROW.astype(complex))}, 400, "malformed_body"),
    "no rows": ({"body": encode_npy(ROW[:0])}, 422, "invalid_rows"),
    "one row bare": ({"body": encode_npy(ROW[0])}, 422, "invalid_rows"),
    "a number": ({"body": encode_npy(np.array(1.0))}, 422, "invalid_rows"),
    "wrong shape": ({"body": encode_npy(ROW[..., :7])}, 422, "invalid_rows"),
    "over 255": ({"body": encode_npy(ROW.astype(np.int16) + 256)}, 422, "invalid_rows"),
    "fractions": ({"body": encode_npy(ROW + 0.5)}, 422, "invalid_rows"),
    "NaN": ({"body": encode_npy(ROW + np.nan)}, 422, "invalid_rows"),
    "JSON NaN": ({"body": b'{"rows": [[NaN]]}', "kind": JSON}, 400, "malformed_body"),
    "JSON 1e999": ({"body": b'{"rows": [[1e999]]}', "kind": JSON}, 400, "malformed_body"),
    "JSON ragged": ({"body": b'{"rows": [[1], [1, 2]]}', "kind": JSON}, 400, "malformed_body"),
    "JSON text": ({"body": b'{"rows": [["1"]]}', "kind": JSON}, 400, "malformed_body"),
    "JSON nested": ({"body": b'{"rows": ' + b"[" * 5000 + b"]" * 5000 + b"}", "kind": JSON}, 400, "malformed_body"),
    "JSON empty": ({"body": b'{"rows": []}', "kind": JSON}, 422, "invalid_rows"),
    "JSON empty row": ({"body": b'{"rows": [[]]}', "kind": JSON}, 422, "invalid_rows"),
    "JSON lone surrogate": ({"body": b'{"rows": [[1]], "model": "\\ud800"}', "kind": JSON}, 400, "malformed_body"),
    "npy as JSON": ({"body": encode_npy(ROW), "kind": JSON}, 400, "malformed_body"),
    "JSON as npy": ({"body": as_json(ROW)}, 400, "malformed_body"),
    "no type": ({"body": encode_npy(ROW), "kind": ""}, 415, "unsupported_media_type"),
    "compressed": ({"body": encode_npy(ROW), "content_encoding": "gzip"}, 415, "unsupported_media_type"),
    "Accept": ({"body": encode_npy(ROW), "accept": "text/html"}, 406, "not_acceptable"),
    "model": ({"body": encode_npy(ROW), "path": "?model=other"}, 404, "unknown_model"),
    "output": ({"body": encode_npy(ROW), "path": "?output=median"}, 400, "invalid_parameter"),
    "parameter": ({"body": encode_npy(ROW), "path": "?modle=digits"}, 400, "invalid_parameter"),
    "two models": (
        {"body": as_json(ROW, model="digits"), "kind": JSON, "path": "?model=other"},
        400,
        "invalid_parameter",
    ),
    "too many rows": ({"body": encode_npy(np.repeat(ROW, 501, axis=0))}, 413, "too_large"),
    "too many bytes": ({"body": b"x" * 100_001}, 413, "too_large"),
}


@pytest.mark.parametrize("case", BAD)
def test_embed_of_a_bad_request_says_why_and_the_next_one_works(app: Starlette, case: str) -> None:
    request, status, kind = BAD[case]
    answer = embed(app, **request)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, kind), error
    assert set(error) == {"type", "message", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    assert "got" in error["message"]
    assert embed(app, encode_npy(ROW)).status_code == 200


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200), kind=st.sampled_from([NPY, JSON]), path=st.text("?&=%modeloutput ", max_size=12))
def test_embed_of_anything_answers_200_or_4xx(app: Starlette, body: bytes, kind: str, path: str) -> None:
    query = "?" + path.replace("?", "")
    assert embed(app, body, kind=kind, path=query).status_code in {200, 400, 404, 413, 415, 422}


def test_embed_with_a_hostile_model_name_quotes_it_safely(app: Starlette) -> None:
    answer = embed(app, encode_npy(ROW), path="?model=%00%0d%0aSet-Cookie:%20a%ff")
    assert answer.status_code == 404
    assert "set-cookie" not in answer.headers


def test_embed_where_two_models_are_served_needs_the_name(both: Starlette) -> None:
    rows = np.ones((1, 2), dtype=np.float32)
    assert "'digits', 'logarithm'" in embed(both, encode_npy(rows)).json()["error"]["message"]
    assert decode_npy(embed(both, encode_npy(rows), path="?model=logarithm").content).tolist() == [[0.0, 0.0]]


def test_embed_with_nan_among_the_features_fails_and_names_the_row(both: Starlette) -> None:
    rows = np.array([[1, 1], [1, -1]], dtype=np.float32)
    for accept in (NPY, JSON):
        answer = embed(both, encode_npy(rows), path="?model=logarithm", accept=accept)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "non_finite_output")
        assert "row 1" in answer.json()["error"]["message"]


def test_models_lists_what_a_client_needs(both: Starlette, encoder: OnnxEncoder) -> None:
    listed = ask(both, "GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["digits", "logarithm"]
    assert listed["data"][0] == {
        "id": "digits",
        "object": "model",
        "digest": encoder.digest,
        "input": encoder.input.to_dict(),
        "outputs": encoder.outputs,
        "classes": [],
        "latent_dim": encoder.latent_dim,
        "active_units": encoder.active_units,
        "provider": encoder.provider,
        "limits": {"max_rows": 16_384, "max_body_bytes": 64 * 2**20},
    }


def test_index_names_models_and_routes(app: Starlette) -> None:
    told = ask(app, "GET", "/").json()
    assert told["models"] == ["digits"]
    assert "POST /v1/embed" in told["routes"]
    assert "http://app/v1/embed" in told["example"]


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [("GET", "/v2", 404, "not_found"), ("GET", "/v1/embed", 405, "method_not_allowed")],
)
def test_unknown_address_or_method_is_answered_in_the_envelope(
    app: Starlette, method: str, path: str, status: int, kind: str
) -> None:
    answer = ask(app, method, path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)


def test_readyz_is_503_before_and_200_after_the_first_inference(encoder: OnnxEncoder) -> None:
    app = build_app({"digits": encoder})

    async def talk(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        before = await client.get("/readyz")
        async with app.router.lifespan_context(app):
            while not app.state.service.ready:
                await asyncio.sleep(0.005)
            return before, await client.get("/readyz")

    before, after = within(app, talk)
    assert (before.status_code, before.json()) == (503, {"ready": False, "failed": False, "reason": "warming up"})
    assert (after.status_code, after.json()) == (200, {"ready": True})


def test_readyz_of_an_encoder_that_fails_its_first_row_stays_503_and_says_why(logarithm: OnnxEncoder) -> None:
    app = build_app({"logarithm": logarithm})  # the logarithm of a row of zeros is not finite

    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        async with app.router.lifespan_context(app):
            while not app.state.service.failure:
                await asyncio.sleep(0.005)
            return await client.get("/readyz")

    answer: httpx.Response = within(app, talk)
    assert answer.status_code == 503
    assert answer.json()["failed"]
    assert "NaN or infinity" in answer.json()["reason"]


class Gated(OnnxEncoder):
    """The real encoder, but it waits for a gate: a batch that takes as long as a test wants."""

    def __init__(self, bundle: Path) -> None:
        super().__init__(bundle)
        self.begun, self.gate = threading.Event(), threading.Event()

    def embed(self, X: ArrayLike, *, output: str = "mean") -> NDArray[np.float32]:
        self.begun.set()
        if not self.gate.wait(30):
            raise InputError("nobody opened the gate")
        return super().embed(X, output=output)


def test_livez_while_a_batch_is_computed_answers_and_the_batch_too(digits_bundle: Path) -> None:
    gated = Gated(digits_bundle)
    app = build_app({"digits": gated})

    async def talk(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        batch = asyncio.create_task(client.post("/v1/embed", content=encode_npy(ROW), headers={"content-type": NPY}))
        await asyncio.to_thread(gated.begun.wait)
        alive = await client.get("/livez")
        gated.gate.set()
        return alive, await batch

    alive, batch = within(app, talk)
    assert (alive.status_code, batch.status_code) == (200, 200)


def test_embed_over_the_most_requests_at_a_time_answers_503_and_recovers(digits_bundle: Path) -> None:
    gated = Gated(digits_bundle)
    app = build_app({"digits": gated}, limits=Limits(max_in_flight=1))
    headers: Mapping[str, str] = {"content-type": NPY}

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        first = asyncio.create_task(client.post("/v1/embed", content=encode_npy(ROW), headers=headers))
        await asyncio.to_thread(gated.begun.wait)
        second = await client.post("/v1/embed", content=encode_npy(ROW), headers=headers)
        gated.gate.set()
        return [await first, second, await client.post("/v1/embed", content=encode_npy(ROW), headers=headers)]

    first, second, third = within(app, talk)
    assert (first.status_code, second.status_code, third.status_code) == (200, 503, 200)
    assert second.json()["error"]["type"] == "overloaded"
    assert second.headers["retry-after"] == "1"


def test_embed_that_takes_too_long_answers_503(digits_bundle: Path) -> None:
    gated = Gated(digits_bundle)
    answer = embed(build_app({"digits": gated}, limits=Limits(compute_timeout_s=0.05)), encode_npy(ROW))
    gated.gate.set()
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "overloaded")


def test_embed_of_fortran_ordered_big_endian_rows_gives_the_same(
    app: Starlette, digits_rows: NDArray[np.uint8]
) -> None:
    file = io.BytesIO()
    np.save(file, np.asfortranarray(digits_rows[:4].astype(">i4")))
    assert embed(app, file.getvalue()).content == embed(app, encode_npy(digits_rows[:4])).content
