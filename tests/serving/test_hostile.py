"""Hostile bodies through every door of the running service."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from serving.codec import encode_npy
from serving.media import JSON, NPY, RAW
from serving.models import Models
from serving.openapi import describe_api
from serving.settings import Limits
from tests.serving.hostile import ROWS, assert_sound, told
from tests.serving.running import Running, running
from vaefeat.encoder import OnnxEncoder

LIMITS = Limits(max_rows=64, max_body_bytes=2**20, max_in_flight_bytes=4 * 2**20, max_queued_bytes=4 * 2**20)
EMBED, EMBEDDINGS, INFER = "/v1/embed", "/v1/embeddings", "/v2/models/digits/infer"
FORM = "multipart/form-data; boundary=b"


@pytest.fixture(scope="module")
def service(digits_models: Models) -> Iterator[Running]:
    with running(digits_models, limits=LIMITS) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def wanted(digits_bundle: Path) -> NDArray[np.float32]:
    return OnnxEncoder(digits_bundle, device="cpu").embed(ROWS)


def header(shape: str, dtype: str = "|u1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def infer(**changes: Any) -> bytes:
    """Make JSON for the Open Inference Protocol, with keys of the input changed or, with None, left out."""
    tensor = {"name": "rows", "datatype": "UINT8", "shape": [1, 64], "data": [0] * 64, **changes}
    return json.dumps({"inputs": [{key: value for key, value in tensor.items() if value is not None}]}).encode()


def binary(text: bytes, blob: bytes, length: object = None) -> tuple[dict[str, str], bytes]:
    sent = str(len(text)) if length is None else str(length)
    return {"inference-header-content-length": sent}, text + blob


def sized(blob: bytes, size: object, **changes: Any) -> tuple[dict[str, str], bytes]:
    return binary(infer(data=None, parameters={"binary_data_size": size}, **changes), blob)


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


NO_HEADERS: dict[str, str] = {}
Case = tuple[str, dict[str, str], bytes, set[int]]
CASES: dict[str, Case] = {
    "npy: shape overflows": (EMBED, {"content-type": NPY}, header("(9999999999999999, 99999999)"), {400}),
    "npy: shape of many digits": (EMBED, {"content-type": NPY}, header("(" + "9" * 190 + ",)"), {400}),
    "npy: announces more": (EMBED, {"content-type": NPY}, header("(10000, 1, 8, 8)") + bytes(64), {400}),
    "npy: announces less": (EMBED, {"content-type": NPY}, header("(1, 1, 8, 8)") + bytes(65), {400}),
    "npy: zero rows of nothing": (EMBED, {"content-type": NPY}, header("(0, 99999999999)"), {422}),
    "npy: header length past the end": (EMBED, {"content-type": NPY}, b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", {400}),
    "npy: header to be evaluated": (EMBED, {"content-type": NPY}, header("(1,)", "|O' + __import__('os')"), {400}),
    "npy: objects": (EMBED, {"content-type": NPY}, header("(1,)", "|O") + pickle.dumps([1]), {400}),
    "npy: pickle": (EMBED, {"content-type": NPY}, pickle.dumps(ROWS), {400}),
    "npy: infinity": (EMBED, {"content-type": NPY}, encode_npy(np.full((1, 64), np.inf, np.float32)), {422}),
    "npy: too many rows": (EMBED, {"content-type": NPY}, encode_npy(np.zeros((65, 64), np.uint8)), {413}),
    "raw: a byte too few": (EMBED, {"content-type": RAW}, bytes(63), {400}),
    "raw: none": (EMBED, {"content-type": RAW}, b"", {422}),
    "raw: too many rows": (EMBED, {"content-type": RAW}, bytes(65 * 64), {413}),
    "json: NaN": (EMBED, {"content-type": JSON}, b'{"rows": [[NaN]]}', {400}),
    "json: 1e999": (EMBED, {"content-type": JSON}, b'{"rows": [[1e999]]}', {400}),
    "json: -1e999": (EMBED, {"content-type": JSON}, b'{"rows": [[-1e999]]}', {400}),
    "json: integer of many digits": (EMBED, {"content-type": JSON}, b'{"rows": [[' + b"9" * 5000 + b"]]}", {400, 422}),
    "json: deep": (EMBED, {"content-type": JSON}, b'{"rows": ' + deep(1000) + b"}", {400}),
    "json: deeper": (EMBED, {"content-type": JSON}, b'{"rows": ' + deep(100_000) + b"}", {400}),
    "json: lone surrogate": (EMBED, {"content-type": JSON}, b'{"rows": [[1]], "model": "\\udfff"}', {400}),
    "json: no UTF-8": (EMBED, {"content-type": JSON}, b'{"rows": [[1]], "model": "\xff"}', {400}),
    "json: empty lists": (EMBED, {"content-type": JSON}, b'{"rows": [' + b"[]," * 300_000 + b"[]]}", {400}),
    "json: one long row": (EMBED, {"content-type": JSON}, b'{"rows": [[' + b"1," * 500_000 + b"1]]}", {400}),
    "json: objects": (EMBED, {"content-type": JSON}, b'{"rows": [' + b"{}," * 300_000 + b"{}]}", {400}),
    "json: one long key": (EMBED, {"content-type": JSON}, b'{"' + b"k" * 900_000 + b'": 1}', {400}),
    "json: one long model": (
        EMBED,
        {"content-type": JSON},
        b'{"rows": [[1]], "model": "' + b"m" * 900_000 + b'"}',
        {404},
    ),
    "json: bare number": (EMBED, {"content-type": JSON}, b"1", {400}),
    "json: only whitespace": (EMBED, {"content-type": JSON}, b" " * 900_000, {400}),
    "multipart: without end": (EMBED, {"content-type": FORM}, b"--b\r\n\r\n" + b"x" * 900_000, {400}),
    "multipart: empty": (EMBED, {"content-type": FORM}, b"", {400}),
    "multipart: tiny parts": (EMBED, {"content-type": FORM}, b"--b\r\n\r\n\r\n" * 80_000 + b"--b--\r\n", {413}),
    "multipart: headers without end": (EMBED, {"content-type": FORM}, b"--b\r\n" + b"a: b\r\n" * 100_000, {400}),
    "multipart: one long header": (EMBED, {"content-type": FORM}, b"--b\r\na:" + b"b" * 900_000, {400}),
    "multipart: long boundary": (EMBED, {"content-type": FORM + "b" * 300}, b"--b--\r\n", {400}),
    "multipart: odd boundary": (EMBED, {"content-type": 'multipart/form-data; boundary="'}, b"--b--", {400}),
    "unknown type": (EMBED, {"content-type": "application/x-pickle"}, pickle.dumps([1]), {415}),
    "long type": (EMBED, {"content-type": "a/" + "b" * 20_000}, b"", {415}),
    "long accept": (EMBED, {"content-type": NPY, "accept": "x/y," * 5_000}, b"", {406}),
    "long parameter": (EMBED + "?a" + "=b" * 10_000, {"content-type": NPY}, b"", {400}),
    "many parameters": (EMBED + "?" + "".join(f"{i}=&" for i in range(5000)), {"content-type": NPY}, b"", {400}),
    "gzip at a door that takes none": (EMBED, {"content-type": NPY, "content-encoding": "gzip"}, b"", {415}),
    "gzip at another": (EMBEDDINGS, {"content-encoding": "gzip"}, gzip.compress(b"{}"), {415}),
    "openai: no JSON": (EMBEDDINGS, NO_HEADERS, b"nonsense", {400}),
    "openai: a list": (EMBEDDINGS, NO_HEADERS, b"[]", {400}),
    "openai: nothing": (EMBEDDINGS, NO_HEADERS, b"{}", {400}),
    "openai: unknown model": (EMBEDDINGS, NO_HEADERS, b'{"model": "gpt", "input": [[1]]}', {404}),
    "openai: text": (EMBEDDINGS, NO_HEADERS, b'{"input": "hello"}', {400}),
    "openai: address": (EMBEDDINGS, NO_HEADERS, b'{"input": "http://127.0.0.1/x.png"}', {400}),
    "openai: file address": (EMBEDDINGS, NO_HEADERS, b'{"input": {"image": "file:///etc/passwd"}}', {400}),
    "openai: no base64": (EMBEDDINGS, NO_HEADERS, b'{"input": "data:image/png;base64,###"}', {400}),
    "openai: pickle in base64": (
        EMBEDDINGS,
        NO_HEADERS,
        json.dumps({"input": "data:image/png;base64," + base64.b64encode(pickle.dumps(1)).decode()}).encode(),
        {422},
    ),
    "openai: numbers as texts": (EMBEDDINGS, NO_HEADERS, json.dumps({"input": [[1] + ["2"] * 63]}).encode(), {400}),
    "openai: null among numbers": (EMBEDDINGS, NO_HEADERS, json.dumps({"input": [[1] + [None] * 63]}).encode(), {400}),
    "openai: ragged": (EMBEDDINGS, NO_HEADERS, b'{"input": [[1, 2], [3]]}', {400}),
    "openai: deep option": (EMBEDDINGS, NO_HEADERS, b'{"input": [[1]], "modality": ' + deep(1000) + b"}", {400}),
    "openai: deep encoding": (EMBEDDINGS, NO_HEADERS, b'{"input": [[1]], "encoding_format":' + deep(20) + b"}", {400}),
    "openai: deep messages": (EMBEDDINGS, NO_HEADERS, b'{"messages": ' + deep(1000) + b"}", {400}),
    "openai: messages of text": (
        EMBEDDINGS,
        NO_HEADERS,
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}',
        {400},
    ),
    "openai: one long key": (EMBEDDINGS, NO_HEADERS, b'{"' + b"k" * 900_000 + b'": 1}', {400}),
    "openai: many keys": (
        EMBEDDINGS,
        NO_HEADERS,
        b"{" + b",".join(b'"%d":1' % i for i in range(90_000)) + b"}",
        {400},
    ),
    "openai: many numbers": (EMBEDDINGS, NO_HEADERS, b'{"input": [' + b"1," * 500_000 + b"1]}", {400}),
    "openai: many items": (EMBEDDINGS, NO_HEADERS, json.dumps({"input": [[0] * 64] * 65}).encode(), {413}),
    "openai: dimensions": (EMBEDDINGS, NO_HEADERS, json.dumps({"input": [0] * 64, "dimensions": 3}).encode(), {400}),
    "openai: lone surrogate": (EMBEDDINGS, NO_HEADERS, b'{"input": "\\ud800"}', {400}),
    "oip: no JSON": (INFER, NO_HEADERS, b"nonsense", {400}),
    "oip: nothing": (INFER, NO_HEADERS, b"", {400}),
    "oip: unknown model": ("/v2/models/other/infer", NO_HEADERS, infer(), {404}),
    "oip: unknown version": ("/v2/models/digits/versions/7/infer", NO_HEADERS, infer(), {404}),
    "oip: wrong name": (INFER, NO_HEADERS, infer(name="row"), {400}),
    "oip: wrong datatype": (INFER, NO_HEADERS, infer(datatype="COMPLEX"), {400}),
    "oip: datatype of another type": (INFER, NO_HEADERS, infer(datatype=["UINT8"]), {400}),
    "oip: negative shape": (INFER, NO_HEADERS, infer(shape=[-1, 64]), {400}),
    "oip: no shape": (INFER, NO_HEADERS, infer(shape=None), {400}),
    "oip: shape of booleans": (INFER, NO_HEADERS, infer(shape=[True, 64]), {400}),
    "oip: shape overflows": (INFER, NO_HEADERS, infer(shape=[2**62, 2**62]), {400}),
    "oip: shape of many": (INFER, NO_HEADERS, infer(shape=[1] * 100_000), {400}),
    "oip: zero rows": (INFER, NO_HEADERS, infer(shape=[0, 64], data=[]), {400}),
    "oip: too many rows": (INFER, NO_HEADERS, infer(shape=[65, 64], data=[0] * 65 * 64), {413}),
    "oip: too few values": (INFER, NO_HEADERS, infer(data=[0] * 63), {400}),
    "oip: values of another type": (INFER, NO_HEADERS, infer(data=["a"] * 64), {400}),
    "oip: values over the datatype": (INFER, NO_HEADERS, infer(data=[256] * 64), {400}),
    "oip: values the rows do not take": (INFER, NO_HEADERS, infer(datatype="FP32", data=[0.5] * 64), {400}),
    "oip: NaN in JSON": (INFER, NO_HEADERS, infer(data=[float("nan")] * 64), {400}),
    "oip: deep data": (INFER, NO_HEADERS, infer(data="@").replace(b'"@"', deep(1000)), {400}),
    "oip: two inputs": (INFER, NO_HEADERS, json.dumps({"inputs": [{}, {}]}).encode(), {400}),
    "oip: many inputs": (INFER, NO_HEADERS, b'{"inputs": [' + b"{}," * 200_000 + b"{}]}", {400}),
    "oip: length past the end": (INFER, *binary(infer(), b"", 10**6), {400}),
    "oip: negative length": (INFER, *binary(infer(), b"", -1), {400}),
    "oip: length of many digits": (INFER, *binary(infer(), b"", "9" * 5000), {400}),
    "oip: length in the middle of the JSON": (INFER, *binary(infer(), b"", 17), {400}),
    "oip: raw of a byte too many": (INFER, {"inference-header-content-length": "0"}, bytes(65), {400}),
    "oip: raw of nothing": (INFER, {"inference-header-content-length": "0"}, b"", {400}),
    "oip: binary cut off": (INFER, *sized(bytes(63), 64), {400}),
    "oip: binary with more": (INFER, *sized(bytes(65), 64), {400}),
    "oip: negative size": (INFER, *sized(bytes(64), -64), {400}),
    "oip: size as text": (INFER, *sized(bytes(64), "64"), {400}),
    "oip: size that overflows": (INFER, *sized(bytes(64), 2**64), {400}),
    "oip: binary of a larger shape": (INFER, *sized(bytes(64), 64, shape=[2, 64]), {400}),
    "oip: FP32 with NaN": (INFER, *sized(np.full(64, np.nan, "<f4").tobytes(), 256, datatype="FP32"), {400}),
    "oip: BOOL of 7": (INFER, *sized(bytes([7] * 64), 64, datatype="BOOL"), {400}),
    "oip: data and size": (INFER, *binary(infer(parameters={"binary_data_size": 64}), bytes(64)), {400}),
    "oip: BYTES past the end": (INFER, *sized(b"\xff" * 8, 8, name="images", datatype="BYTES", shape=[1]), {400}),
    "oip: BYTES of no image": (INFER, *sized(bytes(4), 4, name="images", datatype="BYTES", shape=[1]), {400}),
    "oip: shared memory": (INFER, NO_HEADERS, infer(parameters={"shared_memory_region": "x"}), {400}),
    "oip: gzip of nonsense": (INFER, {"content-encoding": "gzip"}, b"nonsense", {400}),
    "oip: gzip cut off": (INFER, {"content-encoding": "gzip"}, gzip.compress(infer())[:-5], {400}),
    "oip: gzip with more behind": (INFER, {"content-encoding": "gzip"}, gzip.compress(infer()) + b"x", {400}),
    "oip: deflate bomb": (INFER, {"content-encoding": "deflate"}, zlib.compress(bytes(2**28), 9), {413}),
    "oip: gzip in gzip": (INFER, {"content-encoding": "gzip, gzip"}, b"", {415}),
    "oip: brotli": (INFER, {"content-encoding": "br"}, b"", {415}),
    "oip: long coding": (INFER, {"content-encoding": "x" * 20_000}, b"", {415}),
    "load: no JSON": ("/v2/repository/models/digits/load", NO_HEADERS, b"{", {400}),
    "load: a number": ("/v2/repository/models/digits/load", NO_HEADERS, b"1", {400}),
    "load: parameters that are a number": (
        "/v2/repository/models/digits/load",
        NO_HEADERS,
        b'{"parameters": 1}',
        {400},
    ),
    "load: a version outside of its place": (
        "/v2/repository/models/digits/load",
        NO_HEADERS,
        b'{"version": "1"}',
        {400},
    ),
    "load: a misspelt version": (
        "/v2/repository/models/digits/load",
        NO_HEADERS,
        b'{"parameters": {"versoin": "1"}}',
        {400},
    ),
    "load: Triton's config": (
        "/v2/repository/models/digits/load",
        NO_HEADERS,
        b'{"parameters": {"config": "{}"}}',
        {400},
    ),
    "load: unknown version": (
        "/v2/repository/models/digits/load",
        NO_HEADERS,
        b'{"parameters": {"version": "1"}}',
        {404},
    ),
    "load: long": ("/v2/repository/models/digits/load", NO_HEADERS, b" " * 900_000, {413}),
    "load: unknown": ("/v2/repository/models/..%2f..%2fetc/load", NO_HEADERS, b"", {404}),
    "unload: unknown": ("/v2/repository/models/%00/unload", NO_HEADERS, b"", {404}),
    "unload: the only one": ("/v2/repository/models/digits/unload", NO_HEADERS, b"", {409}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_body_is_refused_in_the_door_s_form_and_the_next_request_works(
    service: Running, client: httpx.Client, wanted: NDArray[np.float32], case: str
) -> None:
    path, headers, body, statuses = CASES[case]
    answer = client.post(path, content=body, headers=headers)
    assert answer.status_code in statuses, answer.text
    assert told(path, answer).startswith(("got ", "model "))
    assert_sound(service, wanted)


def test_hostile_bodies_again_and_again_leave_memory_flat(service: Running, client: httpx.Client) -> None:
    process = psutil.Process()

    def send_all(times: int) -> int:
        for _ in range(times):
            for path, headers, body, _ in CASES.values():
                client.post(path, content=body, headers=headers)
        return int(process.memory_info().rss)

    send_all(2)  # threads, arenas and caches are there now
    before = send_all(1)
    assert send_all(4) - before < 24 * 2**20


ROUTES = sorted({place for place in describe_api()["paths"]})


@settings(max_examples=150, deadline=None)
@given(
    place=st.sampled_from(ROUTES),
    method=st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"]),
    model=st.sampled_from(["digits", "%00", "..", "a" * 3000, "%F0%9F", "%2F", "digits%0d%0ax:y"]),
    kind=st.sampled_from([NPY, JSON, RAW, FORM, "image/png", "image/webp", "", "\x80"]),
    body=st.binary(max_size=300),
    length=st.none() | st.integers(0, 400),
)
def test_random_bytes_to_every_route_are_answered_and_never_with_500(
    service: Running,
    client: httpx.Client,
    place: str,
    method: str,
    model: str,
    kind: str,
    body: bytes,
    length: int | None,
) -> None:
    path = place.replace("{model}", model).replace("{version}", "0" * 64)
    headers = [(b"content-type", kind.encode("latin-1"))]
    if length is not None:
        headers.append((b"inference-header-content-length", b"%d" % length))
    answer = client.request(method, path, content=body, headers=headers)
    assert answer.status_code in {200, 400, 404, 405, 409, 413, 415, 422}, answer.text
    if answer.status_code >= 400 and method != "HEAD":
        told(answer.url.path, answer)  # from which the client has taken the dots


@settings(max_examples=150, deadline=None)
@given(
    datatype=st.sampled_from(["UINT8", "FP32", "BOOL", "INT64", "FP16", "FP64", "BYTES", "UINT32"]),
    name=st.sampled_from(["rows", "images"]),
    shape=st.lists(st.integers(-2, 70) | st.sampled_from([2**31, 2**63]), max_size=4),
    size=st.integers(-1, 300),
    blob=st.binary(max_size=300),
    cut=st.integers(-3, 3),
)
def test_random_binary_tensors_are_answered_with_200_or_4xx(
    client: httpx.Client, datatype: str, name: str, shape: list[int], size: int, blob: bytes, cut: int
) -> None:
    parameters = {"binary_data_size": size}
    text = infer(name=name, datatype=datatype, shape=shape, data=None, parameters=parameters)
    headers, body = binary(text, blob, len(text) + cut)
    answer = client.post(INFER, content=body, headers=headers)
    assert answer.status_code in {200, 400, 413}, answer.text
