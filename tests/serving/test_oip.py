from __future__ import annotations

import base64
import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from serving.errors import CodecError, RequestError
from serving.protocols.oip import (
    InferRequest,
    decode_infer,
    parse_json_length,
)
from vaefeat.errors import InputError
from vaefeat.input_spec import InputSpec

IMAGE = InputSpec(kind="image", shape=(1, 2, 3), dtype="uint8", low=0.0, high=255.0)
VECTOR = InputSpec(kind="vector", shape=(4,), dtype="float32", low=-1.0, high=1.0)
OUTPUTS = {"hidden": 5, "logvar": 2, "mean": 2}
DTYPES = {
    "BOOL": "?",
    **{f"UINT{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
}


def decoded(
    body: bytes, json_length: int | None = None, *, spec: InputSpec = IMAGE, max_rows: int = 10
) -> InferRequest:
    return decode_infer(body, json_length=json_length, spec=spec, outputs=OUTPUTS, max_rows=max_rows)


def request(body: bytes | None = None, /, **changes: Any) -> tuple[bytes, int | None]:
    """One image as JSON, or with `body` as bytes, changed as told: a key of the input, or one of the request."""
    tensor: dict[str, Any] = {"name": "rows", "shape": [1, 1, 2, 3], "datatype": "UINT8"}
    if body is None:
        tensor["data"] = [1, 2, 3, 4, 5, 6]
    else:
        tensor["parameters"] = {"binary_data_size": len(body)}
    fields = {key: value for key, value in changes.items() if key in {"id", "inputs", "outputs", "extra", "request"}}
    if "request" in fields:
        fields["parameters"] = fields.pop("request")
    tensor |= {key: value for key, value in changes.items() if key not in {*fields, "request"}}
    tensor = {key: value for key, value in tensor.items() if value is not ...}
    text = json.dumps({"inputs": [tensor], **fields}).encode()
    return (text, None) if body is None else (text + body, len(text))


def packed(images: list[bytes]) -> bytes:
    """BYTES as the specification has them."""
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


@st.composite
def rows(draw: st.DrawFn, spec: InputSpec) -> tuple[str, NDArray[Any]]:
    """Rows of any datatype, shaped or flat."""
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    row = draw(st.sampled_from([spec.shape, (spec.n_features,)]))
    return datatype, draw(hnp.arrays(np.dtype(DTYPES[datatype]), (draw(st.integers(1, 4)), *row)))


@given(rows(IMAGE), st.integers(0, 7))
def test_decode_infer_of_binary_rows_gives_their_bits_whatever_their_offset(
    drawn: tuple[str, NDArray[Any]], padding: int
) -> None:
    datatype, array = drawn
    body, length = request(array.tobytes(), shape=list(array.shape), datatype=datatype, id="x" * padding)
    got = decoded(body, length).rows
    assert got is not None
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert got.tobytes() == array.tobytes()
    assert got.flags.aligned


@given(rows(VECTOR), st.booleans())
def test_decode_infer_of_json_rows_gives_their_bits_nested_or_flat(
    drawn: tuple[str, NDArray[Any]], nested: bool
) -> None:
    datatype, array = drawn
    body, _ = request(shape=list(array.shape), datatype=datatype, data=(array if nested else array.ravel()).tolist())
    if datatype == "FP16" or not np.isfinite(array).all():  # json writes NaN, which JSON has not
        with pytest.raises(CodecError):
            decoded(body, spec=VECTOR)
        return
    got = decoded(body, spec=VECTOR).rows
    assert got is not None
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert got.tobytes() == array.tobytes()


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5), st.booleans())
def test_decode_infer_of_images_gives_every_file_back(images: list[bytes], binary: bool) -> None:
    told = {"name": "images", "datatype": "BYTES", "shape": [len(images)]}
    if binary:
        body, length = request(packed(images), **told)
    else:
        body, length = request(**told, data=[base64.b64encode(image).decode() for image in images])
    got = decoded(body, length)
    assert (got.images, got.rows) == (images, None)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(1), st.just(2), st.just(3))))
def test_decode_infer_of_a_raw_body_gives_rows_and_a_binary_mean(array: NDArray[np.uint8]) -> None:
    got = decoded(array.tobytes(), 0)
    assert got.rows is not None
    np.testing.assert_array_equal(got.rows, array, strict=True)
    assert (got.outputs, got.id, got.priority, got.timeout_s) == ((("mean", True),), None, 0, None)


def test_decode_infer_with_everything_reads_everything() -> None:
    asked = [{"name": "logvar", "parameters": {"binary_data": False}}, {"name": "mean"}]
    given_parameters = {"binary_data_output": True, "priority": 2, "timeout": 1500, "sequence_id": 7}
    body, _ = request(id="a-7", outputs=asked, request=given_parameters)
    got = decoded(body)
    assert (got.id, got.priority, got.timeout_s) == ("a-7", 2, 0.0015)
    assert got.outputs == (("logvar", False), ("mean", True))


@pytest.mark.parametrize("nothing", [{}, {"outputs": []}, {"outputs": None, "request": None, "id": None}])
def test_decode_infer_that_asks_for_no_output_asks_for_the_mean_in_json(nothing: dict[str, Any]) -> None:
    got = decoded(request(**nothing)[0])
    assert (got.outputs, got.id, got.timeout_s) == ((("mean", False),), None, None)


BLOB = bytes(range(6))
IMAGES = {"name": "images", "datatype": "BYTES"}


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        # The one input
        (request(inputs=[]), "0 inputs"),
        (request(inputs={}), "inputs {}"),
        (request(inputs=[{"name": "rows"}, {"name": "rows"}]), "2 inputs"),
        (request(inputs=[[]]), "JSON object"),
        (request(name="pixels"), "an input named 'pixels', wanted 'rows'.*'images'"),
        (request(name=None), "an input named None"),
        (request(name=["rows"]), "an input named"),
        (request(datatype="BF16"), "datatype 'BF16'"),
        (request(datatype="BYTES"), "datatype 'BYTES'"),
        (request(datatype=[1]), "datatype"),
        (request(datatype="FP16"), "FP16 in JSON"),
        (request(dtype="UINT8"), r"keys \['dtype'\]"),
        # Shapes
        (request(shape=...), "shape None"),
        (request(shape=[]), r"shape \[\]"),
        (request(shape=6), "shape 6"),
        (request(shape=[6]), r"shape \[6\]"),
        (request(shape=[1, 2, 3]), r"wanted that of uint8 rows of shape \(n, 1, 2, 3\), or flat \(n, 6\)"),
        (request(shape=[1.0, 6]), r"shape \[1.0, 6\]"),
        (request(shape=[True, 6]), r"shape \[True, 6\]"),
        (request(shape=["1", 6]), "shape"),
        (request(shape=[0, 6], data=[]), "0 rows, wanted at least one"),
        (request(shape=[-1, 6]), "-1 rows"),
        (request(BLOB, shape=[2**62, 2**62, 2**62]), "shape"),
        # Data in JSON
        (request(data=...), "neither data nor binary_data_size"),
        (request(parameters={"binary_data_size": 6}), "both data and binary_data_size"),
        (request(data=..., parameters={"binary_data_size": 6}), "Inference-Header-Content-Length"),
        (request(data=6), "type int"),
        (request(data="123456"), "type str"),
        (request(data=[1, 2, 3]), "3 values"),
        (request(data=[[1, 2, 3], [4, 5, 6]]), r"nested as \[2, 3\]"),
        (request(data=[[1, 2], [3, 4], [5]]), "different lengths"),
        (request(data=[[1, 2, 3], 4, 5, 6]), "different lengths or depths"),
        (request(data=[[1, 2, 3], "456"]), "different lengths or depths"),
        (request(data=[1, 2, 3, 4, 5, "6"]), "UINT8 cannot hold"),
        (request(data=[1, 2, 3, 4, 5, None]), "UINT8 cannot hold"),
        (request(data=[1, 2, 3, 4, 5, [6]]), "UINT8 cannot hold"),
        (request(data=[1, 2, 3, 4, 5, 6.5]), "UINT8 cannot hold"),
        (request(data=[1, 2, 3, 4, 5, 256]), "UINT8 cannot hold"),
        (request(data=[1, 2, 3, 4, 5, -1]), "UINT8 cannot hold"),
        (request(datatype="BOOL"), "BOOL values up to 6"),
        (request(datatype="FP64", data=[float("nan")] * 6), "not JSON"),
        ((b'{"inputs":[{"name":"rows","shape":[1,6],"datatype":"FP64","data":[1e999,2,3,4,5,6]}]}', None), "not JSON"),
        ((b'{"inputs":[{"name":"rows","data":' + b"[" * 2000 + b"]" * 2000 + b"}]}", None), "depth limit"),
        ((b"[" * 100_000, None), r"more \["),
        ((b'{"id": "\xff"}', None), "not JSON"),
        ((b"", None), "not JSON"),
        ((b"null", None), "got the request as None"),
        ((request()[0] + b"x", None), "not JSON"),
        # Bytes behind it
        ((request(BLOB)[0][:-1], request(BLOB)[1]), "binary_data_size 6 and 5 bytes"),
        ((request(BLOB)[0] + b"x", request(BLOB)[1]), "binary_data_size 6 and 7 bytes"),
        (request(BLOB, parameters={"binary_data_size": -6}), "binary_data_size -6"),
        (request(BLOB, parameters={"binary_data_size": 6.0}), "binary_data_size 6.0"),
        (request(BLOB, parameters={"binary_data_size": True}), "binary_data_size True"),
        (request(BLOB, parameters={"binary_data_size": "6"}), "binary_data_size '6'"),
        (request(BLOB, parameters=[]), r"parameters \[\]"),
        (request(BLOB, parameters={"shared_memory_region": "r"}), "shared_memory_region"),
        (request(BLOB, data=[1] * 6), "both data"),
        (request(BLOB, data=[1] * 6, parameters={}), "6 bytes after the JSON"),
        (request(BLOB[:5]), "got 5 bytes for UINT8 of shape"),
        (request(BLOB, datatype="INT16"), "wanted 12"),
        (request(BLOB, datatype="BOOL"), "BOOL values up to 5"),
        # Images
        (request(packed([b"a"]), **IMAGES, shape=[1, 1]), "one file each"),
        (request(packed([b"a"]), **IMAGES, shape=[2]), "got 1 items of BYTES, wanted 2"),
        (request(packed([b"a", b"b"]), **IMAGES, shape=[1]), "more than 1 items"),
        (request(packed([b"abc"])[:-1], **IMAGES, shape=[1]), "item 0 reaches past the end"),
        (request(packed([b"abc"])[:3], **IMAGES, shape=[1]), "item 0 reaches past the end"),
        (request(b"\xff\xff\xff\xffabc", **IMAGES, shape=[1]), "item 0 reaches past the end"),
        (request(**IMAGES, shape=[1], data=["YQ="]), "image 0 that is not base64"),
        (request(**IMAGES, shape=[1], data=["Y Q=="]), "image 0 that is not base64"),
        (request(**IMAGES, shape=[1], data=["é"]), "image 0 that is not base64"),
        (request(**IMAGES, shape=[1], data=[7]), "image 0 of type int"),
        (request(**IMAGES, shape=[2], data=["YQ=="]), "1 items, wanted a list of 2"),
        (request(**IMAGES, shape=[1], data="YQ=="), "data of type str"),
        (request(name="images"), "images of datatype 'UINT8'"),
        # The rest of the request
        (request(outputs=[{"name": "std"}]), "output 'std', wanted one of"),
        (request(outputs=[{"name": "mean"}, {"name": "mean"}]), "'mean' twice"),
        (request(outputs=["mean"]), "JSON object"),
        (request(outputs="mean"), "outputs 'mean'"),
        (request(outputs=[{"name": "mean", "parameters": {"classification": 3}}]), "classification"),
        (request(outputs=[{"name": "mean", "parameters": {"binary_data": 1}}]), "binary_data 1"),
        (request(request={"binary_data_output": "yes"}), "binary_data_output 'yes'"),
        (request(request={"priority": -1}), "priority -1"),
        (request(request={"priority": 2**32}), "priority"),
        (request(request={"timeout": 0.5}), "timeout 0.5"),
        (request(request={"timeout": -1}), "timeout -1"),
        (request(request=7), "parameters 7"),
        (request(id=7), "id 7"),
        (request(id="x" * 1025), "id 'x"),
        (request(extra=1), r"keys \['extra'\]"),
        # Raw bodies
        ((b"", 0), "raw body of 0 bytes"),
        ((b"1234567", 0), "raw body of 7 bytes"),
    ],
)  # fmt: skip
def test_decode_infer_of_something_else_says_what_is_wrong(sent: tuple[bytes, int | None], told: str) -> None:
    with pytest.raises(CodecError, match=told):
        decoded(*sent)


@pytest.mark.parametrize("length", [0, None])
def test_decode_infer_of_too_many_rows_is_answered_413(length: int | None) -> None:
    body = bytes(6 * 11) if length == 0 else request(shape=[11, 6], data=[1] * 66)[0]
    with pytest.raises(RequestError, match="got 11 rows, wanted at most 10") as refused:
        decoded(body, length)
    assert refused.value.status == 413


def test_decode_infer_of_images_for_a_bundle_of_vectors_names_what_it_takes() -> None:
    body, length = request(packed([b"a"]), **IMAGES, shape=[1])
    with pytest.raises(CodecError, match=r"wanted 'rows', float32 rows of shape \(n, 4\)$"):
        decoded(body, length, spec=VECTOR)


def test_decode_infer_leaves_values_to_the_input_spec_which_refuses_infinity() -> None:
    body, _ = request(shape=[1, 4], datatype="FP32", data=[1e300, 0, 0, 0])
    got = decoded(body, spec=VECTOR).rows
    assert got is not None
    with pytest.raises(InputError, match="infinite"):
        VECTOR.prepare(got)


@pytest.mark.parametrize(
    "filler", [b"[]", b"{}", b'""', b"1", b'["' + b"x" * 2**20 + b'",' + b"1," * 2**17 + b"1]"]
)  # fmt: skip
def test_decode_infer_of_json_that_would_unfold_keeps_memory_flat(filler: bytes) -> None:
    data = filler if len(filler) > 9 else b"[" + b",".join([filler] * (2**21 // len(filler))) + b"]"
    body = b'{"inputs":[{"name":"rows","shape":[10,6],"datatype":"UINT8","data":' + data + b"}]}"
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decoded(body)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body) + 2**20
    finally:
        tracemalloc.stop()


@settings(max_examples=500)
@given(
    st.sampled_from([request(), request(BLOB), request(packed([b"ab", b"c"]), **IMAGES, shape=[2])]),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_decode_infer_of_mutated_bytes_gives_a_request_or_an_error_of_ours(
    sent: tuple[bytes, int | None], mutations: list[tuple[int, int]]
) -> None:
    body, length = bytearray(sent[0]), sent[1]
    for position, value in mutations:
        body[position % len(body)] = value
    try:
        got = decoded(bytes(body), length)
    except (CodecError, RequestError):
        return
    assert (got.rows is None) != (got.images is None)
    assert got.outputs


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "data", "shape"]), inner),
    max_leaves=8,
)


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.sampled_from(["rows", "images"]) | JSON,
            "shape": st.just([1, 6]) | JSON,
            "datatype": st.sampled_from([*DTYPES, "BYTES"]) | JSON,
            "data": JSON,
            "parameters": JSON,
        },
    ),
    JSON,
    JSON,
)
def test_decode_infer_of_any_json_raises_nothing_but_errors_of_ours(
    tensor: dict[str, Any], outputs: Any, parameters: Any
) -> None:
    for fields in ({"inputs": [tensor]}, {"inputs": [tensor], "outputs": outputs, "parameters": parameters}):
        try:
            decoded(json.dumps(fields).encode())
        except (CodecError, RequestError):
            pass


@given(st.binary(max_size=100), st.integers(0, 100) | st.none())
def test_decode_infer_of_any_bytes_raises_nothing_but_errors_of_ours(body: bytes, length: int | None) -> None:
    try:
        decoded(body, None if length is None else min(length, len(body)))
    except (CodecError, RequestError):
        pass


@pytest.mark.parametrize(("header", "length"), [(None, None), (b"0", 0), (b"9", 9), (b"007", 7)])
def test_parse_json_length_of_a_number_within_the_body_gives_it(header: bytes | None, length: int | None) -> None:
    assert parse_json_length(header, body_length=9) == length


@pytest.mark.parametrize("header", [b"", b"-1", b"+1", b"1_0", b"1.0", b" 1", b"x", b"10", b"9" * 5000, "²".encode()])
def test_parse_json_length_of_anything_else_raises_codec_error(header: bytes) -> None:
    with pytest.raises(CodecError, match="Inference-Header-Content-Length"):
        parse_json_length(header, body_length=9)
