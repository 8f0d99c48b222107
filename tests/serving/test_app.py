from __future__ import annotations

import asyncio
import base64
import io
import logging
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from serving.app import Application
from serving.codec import decode_npy, encode_npy
from serving.media import JSON, NPY, RAW
from serving.models import Models
from serving.service import Service
from serving.settings import Limits
from tests.serving.conftest import CPU, save_logarithm
from tests.serving.running import within
from vaefeat.encoder import OnnxEncoder

LIMITS = Limits(max_rows=500, max_body_bytes=100_000)


@pytest.fixture(scope="module")
def encoder(digits_bundle: Path) -> OnnxEncoder:
    return OnnxEncoder(digits_bundle, device="cpu")


def ask(models: Models, method: str, path: str, *, limits: Limits = LIMITS, **arguments: Any) -> httpx.Response:
    answer = within(models, lambda client: client.request(method, path, **arguments), limits=limits)
    assert isinstance(answer, httpx.Response)
    return answer


def embed(models: Models, body: bytes, *, kind: str = NPY, path: str = "", **headers: str) -> httpx.Response:
    sent = {"content-type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
    return ask(models, "POST", f"/v1/embed{path}", content=body, headers=sent)


def as_json(rows: ArrayLike, **fields: Any) -> bytes:
    return orjson.dumps({"rows": np.asarray(rows).tolist(), **fields})


def as_png(row: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(row[0]).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("output", ["mean", "logvar", "hidden"])
def test_embed_of_npy_gives_the_encoder_s_bits(
    digits_models: Models, encoder: OnnxEncoder, digits_rows: NDArray[np.uint8], output: str
) -> None:
    answer = embed(digits_models, encode_npy(digits_rows[:300]), path=f"?output={output}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == NPY
    assert answer.headers["x-vaefeat-model"] == "digits"
    assert answer.headers["x-vaefeat-digest"] == encoder.digest
    assert "total;dur=" in answer.headers["server-timing"]
    np.testing.assert_array_equal(decode_npy(answer.content), encoder.embed(digits_rows[:300], output=output))


def test_embed_of_json_gives_the_encoder_s_bits(
    digits_models: Models, encoder: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    answer = embed(digits_models, as_json(digits_rows[:3], model="digits", output="logvar"), kind=JSON)
    told = answer.json()
    assert (told["model"], told["digest"], told["output"]) == ("digits", encoder.digest, "logvar")
    assert told["version"] == encoder.digest.removeprefix("sha256:")
    wanted = encoder.embed(digits_rows[:3], output="logvar")
    assert told["shape"] == list(wanted.shape)
    np.testing.assert_array_equal(np.asarray(told["embeddings"], dtype=np.float32), wanted)


def test_embed_of_whole_numbers_in_json_does_not_take_them_for_pixels(tmp_path: Path) -> None:
    # An array of uint8 would be refused as pixels that nobody has scaled; log(1 - 2) is merely no number.
    folder = save_logarithm(tmp_path / "rest", of_rest=True, high=1.0)
    answer = embed(Models.from_bundles([folder], place=CPU), as_json([[0, 2]]), kind=JSON)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "non_finite_output")


def test_embed_of_raw_bytes_gives_raw_float32_and_their_shape(
    digits_models: Models, encoder: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    answer = embed(digits_models, digits_rows[:7].tobytes(), kind=RAW)
    wanted = encoder.embed(digits_rows[:7])
    assert (answer.headers["content-type"], answer.headers["x-vaefeat-shape"]) == (RAW, "7,8")
    assert answer.content == wanted.tobytes()


def test_embed_of_one_image_and_of_several_parts_gives_the_bits_of_their_pixels(
    digits_models: Models, encoder: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    files = [as_png(row) for row in digits_rows[:3]]
    wanted = encoder.embed(digits_rows[:3])
    single = embed(digits_models, files[1], kind="image/png").json()
    np.testing.assert_array_equal(np.asarray(single["embeddings"], dtype=np.float32), wanted[1:2])
    parts = [("file", (f"{index}.png", content, "image/png")) for index, content in enumerate(files)]
    several = ask(digits_models, "POST", "/v1/embed", files=parts, headers={"accept": NPY})
    np.testing.assert_array_equal(decode_npy(several.content), wanted)


def test_embed_of_parts_of_which_one_is_no_image_answers_the_others_and_names_it(
    digits_models: Models, encoder: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    contents = [as_png(digits_rows[0]), b"no image", as_png(digits_rows[2])]
    parts = [("file", (f"{index}.png", content, "image/png")) for index, content in enumerate(contents)]
    told = ask(digits_models, "POST", "/v1/embed", files=parts).json()
    assert [error["index"] for error in told["errors"]] == [1]
    features = np.asarray(told["embeddings"], dtype=np.float32)
    np.testing.assert_array_equal(features[[0, 2]], encoder.embed(digits_rows[[0, 2]]))
    assert not features[1].any()
    # npy has no place for errors, so that there the whole request fails.
    refused = ask(digits_models, "POST", "/v1/embed", files=parts, headers={"accept": NPY})
    assert (refused.status_code, refused.json()["error"]["type"]) == (422, "invalid_rows")
    assert "item 1" in refused.json()["error"]["message"]


def test_embed_with_accept_answers_in_the_other_form(digits_models: Models, digits_rows: NDArray[np.uint8]) -> None:
    from_npy = embed(digits_models, encode_npy(digits_rows[:2]), accept=JSON)
    from_json = embed(digits_models, as_json(digits_rows[:2]), kind=JSON, accept=NPY)
    told = np.asarray(from_npy.json()["embeddings"], dtype=np.float32)
    np.testing.assert_array_equal(told, decode_npy(from_json.content))


def test_embed_of_flat_float_rows_gives_what_shaped_uint8_rows_give(
    digits_models: Models, digits_rows: NDArray[np.uint8]
) -> None:
    flat = digits_rows[:5].reshape(5, -1).astype(np.float64)
    wanted = embed(digits_models, encode_npy(digits_rows[:5])).content
    assert embed(digits_models, encode_npy(flat)).content == wanted


def test_embed_of_fortran_ordered_big_endian_rows_gives_the_same(
    digits_models: Models, digits_rows: NDArray[np.uint8]
) -> None:
    file = io.BytesIO()
    np.save(file, np.asfortranarray(digits_rows[:4].astype(">i4")))
    wanted = embed(digits_models, encode_npy(digits_rows[:4])).content
    assert embed(digits_models, file.getvalue()).content == wanted


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
    "raw of no rows": ({"body": b"", "kind": RAW}, 422, "invalid_rows"),
    "raw of a row and a byte": ({"body": bytes(65), "kind": RAW}, 400, "malformed_body"),
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
    "no image": ({"body": b"GIF89a", "kind": "image/png"}, 422, "invalid_rows"),
    "no boundary": ({"body": b"", "kind": "multipart/form-data"}, 400, "malformed_body"),
    "no parts": ({"body": b"--b--\r\n", "kind": "multipart/form-data; boundary=b"}, 400, "malformed_body"),
    "no type": ({"body": encode_npy(ROW), "kind": ""}, 415, "unsupported_media_type"),
    "compressed": ({"body": encode_npy(ROW), "content_encoding": "gzip"}, 415, "unsupported_media_type"),
    "Accept": ({"body": encode_npy(ROW), "accept": "text/html"}, 406, "not_acceptable"),
    "model": ({"body": encode_npy(ROW), "path": "?model=other"}, 404, "unknown_model"),
    "version": ({"body": encode_npy(ROW), "path": "?model=digits&version=1"}, 404, "unknown_model"),
    "output": ({"body": encode_npy(ROW), "path": "?output=median"}, 400, "invalid_parameter"),
    "parameter": ({"body": encode_npy(ROW), "path": "?modle=digits"}, 400, "invalid_parameter"),
    "parameter twice": ({"body": encode_npy(ROW), "path": "?model=digits&model=x"}, 400, "invalid_parameter"),
    "priority": ({"body": encode_npy(ROW), "path": "?priority=-1"}, 400, "invalid_parameter"),
    "timeout": ({"body": encode_npy(ROW), "path": "?timeout_ms=soon"}, 400, "invalid_parameter"),
    "two models": (
        {"body": as_json(ROW, model="digits"), "kind": JSON, "path": "?model=other"},
        400,
        "invalid_parameter",
    ),
    "too many rows": ({"body": encode_npy(np.repeat(ROW, 501, axis=0))}, 413, "too_large"),
    "too many bytes": ({"body": b"x" * 100_001}, 413, "too_large"),
}


@pytest.mark.parametrize("case", BAD)
def test_embed_of_a_bad_request_says_why_and_the_next_one_works(digits_models: Models, case: str) -> None:
    request, status, kind = BAD[case]
    answer = embed(digits_models, **request)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, kind), error
    assert set(error) == {"type", "message", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    assert "got" in error["message"]
    assert embed(digits_models, encode_npy(ROW)).status_code == 200


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=200),
    kind=st.sampled_from([NPY, JSON, RAW, "image/png", "multipart/form-data; boundary=b"]),
    path=st.text("?&=%modeloutput ", max_size=12),
)
def test_embed_of_anything_answers_200_or_4xx(digits_models: Models, body: bytes, kind: str, path: str) -> None:
    query = "?" + path.replace("?", "")
    assert embed(digits_models, body, kind=kind, path=query).status_code in {200, 400, 404, 413, 415, 422}


def test_embed_with_a_hostile_model_name_quotes_it_safely(digits_models: Models) -> None:
    answer = embed(digits_models, encode_npy(ROW), path="?model=%00%0d%0aSet-Cookie:%20a%ff")
    assert answer.status_code == 404
    assert "set-cookie" not in answer.headers


def test_embed_where_two_models_are_served_needs_the_name(both_models: Models) -> None:
    rows = np.zeros((1, 2), dtype=np.float32)
    assert "'digits', 'rest'" in embed(both_models, encode_npy(rows)).json()["error"]["message"]
    assert decode_npy(embed(both_models, encode_npy(rows), path="?model=rest").content).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("accept", [NPY, JSON])
def test_embed_with_nan_among_the_features_fails_and_names_the_row(both_models: Models, accept: str) -> None:
    rows = np.array([[0, 0], [0, 2]], dtype=np.float32)
    answer = embed(both_models, encode_npy(rows), path="?model=rest", accept=accept)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "non_finite_output")
    assert "row 1" in answer.json()["error"]["message"]


def test_embeddings_in_the_form_of_openai_s_api_give_the_bits_in_base64_and_as_numbers(
    digits_models: Models, encoder: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    wanted = encoder.embed(digits_rows[:2])
    uris = ["data:image/png;base64," + base64.b64encode(as_png(row)).decode() for row in digits_rows[:2]]
    asked = {"model": "digits", "input": uris}
    plain = ask(digits_models, "POST", "/v1/embeddings", json=asked).json()
    packed = ask(digits_models, "POST", "/v1/embeddings", json={**asked, "encoding_format": "base64"}).json()
    np.testing.assert_array_equal(np.array([item["embedding"] for item in plain["data"]], np.float32), wanted)
    assert b"".join(base64.b64decode(item["embedding"]) for item in packed["data"]) == wanted.tobytes()
    assert plain["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


def test_models_lists_what_a_client_needs(both_models: Models, encoder: OnnxEncoder) -> None:
    listed = ask(both_models, "GET", "/v1/models").json()
    assert (listed["object"], [card["id"] for card in listed["data"]]) == ("list", ["digits", "rest"])
    assert listed["data"][0] == {
        "id": "digits",
        "object": "model",
        "created": 0,
        "owned_by": "vaefeat",
        "digest": encoder.digest,
        "versions": [encoder.digest.removeprefix("sha256:")],
        "input": encoder.input.to_dict(),
        "outputs": encoder.outputs,
        "classes": [],
        "latent_dim": encoder.latent_dim,
        "active_units": encoder.active_units,
        "provider": encoder.provider,
        "precision": "float32",
        "mode": encoder.mode.to_dict(),
        "proved": True,
        "limits": {"max_rows": 500, "max_body_bytes": 100_000},
    }
    assert ask(both_models, "GET", "/v1/models/digits").json() == listed["data"][0]


def test_index_names_routes_and_no_models(digits_models: Models) -> None:
    told = ask(digits_models, "GET", "/").json()
    assert "models" not in told  # whose names are for those who have a key
    assert "POST /v1/embed" in told["routes"]
    assert "http://app/v1/embed" in told["example"]


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [("GET", "/v3", 404, "not_found"), ("GET", "/v1/embed", 405, "method_not_allowed")],
)
def test_unknown_address_or_method_is_answered_in_the_envelope(
    digits_models: Models, method: str, path: str, status: int, kind: str
) -> None:
    answer = ask(digits_models, method, path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)


def test_readyz_and_embed_are_503_before_the_models_are_warm_and_200_after(digits_models: Models) -> None:
    service = Service(digits_models, LIMITS, lanes=1)

    async def talk() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(Application(service)), base_url="http://a"
        ) as client:
            answers = []
            for _ in range(2):
                answers += [
                    await client.get("/readyz"),
                    await client.post("/v1/embed", content=encode_npy(ROW), headers={"content-type": NPY}),
                ]
                await service.start()
                while not service.ready:
                    await asyncio.sleep(0.002)
            await service.stop()
            return answers

    before, refused, after, answered = asyncio.run(talk())
    assert (before.status_code, before.json()) == (503, {"ready": False, "failed": False, "reason": "warming up"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert (after.status_code, after.json()) == (200, {"ready": True, "providers": ["CPUExecutionProvider"]})
    assert answered.status_code == 200


def test_readyz_of_an_encoder_that_fails_its_first_row_stays_503_and_says_why(unready_models: Models) -> None:
    answer = ask(unready_models, "GET", "/readyz")
    assert answer.status_code == 503
    assert answer.json()["failed"]
    assert "NaN or infinity" in answer.json()["reason"]


class Gate:
    """Holds a model's batches back: one that takes as long as a test wants."""

    def __init__(self) -> None:
        self.closed = False
        self.begun, self._opened = threading.Event(), threading.Event()

    def open(self) -> None:
        self._opened.set()

    def pass_through(self) -> None:
        if self.closed:
            self.begun.set()
            assert self._opened.wait(30)


@pytest.fixture
def gate(digits_models: Models, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    (model,) = digits_models.current
    compute = model.compute

    def late(rows: NDArray[Any], outputs: Any) -> list[NDArray[np.float32]]:
        gate.pass_through()
        return compute(rows, outputs)

    monkeypatch.setattr(model, "compute", late)
    yield gate
    gate.open()


def post(client: httpx.AsyncClient) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(client.post("/v1/embed", content=encode_npy(ROW), headers={"content-type": NPY}))


def test_livez_while_a_batch_is_computed_answers_and_the_batch_too(digits_models: Models, gate: Gate) -> None:
    async def talk(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        gate.closed = True
        batch = post(client)
        await asyncio.to_thread(gate.begun.wait)
        alive = await client.get("/livez")
        gate.open()
        return alive, await batch

    alive, batch = within(digits_models, talk)
    assert (alive.status_code, batch.status_code) == (200, 200)


def test_embed_over_the_most_requests_at_a_time_answers_503_and_recovers(digits_models: Models, gate: Gate) -> None:
    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        gate.closed = True
        first = post(client)
        await asyncio.to_thread(gate.begun.wait)
        second = await post(client)
        gate.open()
        return [await first, second, await post(client)]

    first, second, third = within(digits_models, talk, limits=Limits(max_in_flight=1))
    assert (first.status_code, second.status_code, third.status_code) == (200, 503, 200)
    assert second.json()["error"]["type"] == "overloaded"
    assert second.headers["retry-after"] == "1"


def test_embed_that_takes_too_long_answers_504(digits_models: Models, gate: Gate) -> None:
    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        gate.closed = True
        answer = await post(client)
        gate.open()
        return answer

    answer = within(digits_models, talk, limits=Limits(compute_timeout_s=0.05))
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize(("size", "status"), [(100_000, 415), (100_001, 413)])
def test_a_body_s_length_is_looked_at_before_its_type_up_to_the_limit(
    digits_models: Models, size: int, status: int
) -> None:
    assert ask(digits_models, "POST", "/v1/embed", content=bytes(size)).status_code == status


def test_a_body_without_a_length_is_answered_411(digits_models: Models) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield encode_npy(ROW)

    answer = ask(digits_models, "POST", "/v1/embed", content=parts(), headers={"content-type": NPY})
    assert (answer.status_code, answer.json()["error"]["type"]) == (411, "length_required")


def test_a_defect_is_answered_500_without_its_cause_which_is_logged(
    digits_models: Models, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(rows: object, outputs: object) -> None:
        raise ZeroDivisionError("a secret of the server")

    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        monkeypatch.setattr(digits_models.current[0], "compute", crash)
        headers = {"content-type": NPY, "x-request-id": "crash-1"}
        return await client.post("/v1/embed", content=encode_npy(ROW), headers=headers)

    with caplog.at_level(logging.ERROR, logger="serving"):
        answer = within(digits_models, talk)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "internal_error"
    assert "secret" not in answer.text
    assert "crash-1" in [vars(record)["fields"]["request_id"] for record in caplog.records]
    assert "ZeroDivisionError" in caplog.text
