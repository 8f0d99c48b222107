from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from serving.protocols.oip import InferRequest, describe_server, encode_error
from serving.protocols.oip_outputs import InferEncoder, describe_model
from vaefeat.input_spec import InputSpec

IMAGE = InputSpec(kind="image", shape=(1, 2, 3), dtype="uint8", low=0.0, high=255.0)
VECTOR = InputSpec(kind="vector", shape=(4,), dtype="float32", low=-1.0, high=1.0)


@dataclass
class Model:
    """What the encoder reads of a served model; a real one takes a training run."""

    name: str = "digits"
    version: str = "ab" * 32
    digest: str = "sha256:" + "ab" * 32
    input: InputSpec = IMAGE
    outputs: Mapping[str, int] = field(default_factory=lambda: {"hidden": 5, "logvar": 2, "mean": 2})
    classes: tuple[str | int | float | bool, ...] = ()


@dataclass
class Features:
    features: Mapping[str, NDArray[np.float32]]
    errors: Mapping[int, str] = field(default_factory=dict)


def answer(
    features: Mapping[str, NDArray[np.float32]], asked: tuple[tuple[str, bool], ...], **more: Any
) -> tuple[dict[str, Any], bytes, dict[bytes, bytes]]:
    """Encode; give the JSON, what follows it, and the headers."""
    errors = more.pop("errors", {})
    request = InferRequest(more.get("id"), None, None, asked, 0, None)
    body, headers = InferEncoder(Model()).encode(request, Features(features, errors))  # type: ignore[arg-type]
    length = int(dict(headers).get(b"inference-header-content-length", len(body)))
    return json.loads(body[:length]), body[length:], dict(headers)


MEANS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.just(2)),
    elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
)


@given(MEANS, st.text(max_size=9) | st.none())
def test_infer_encoder_in_json_keeps_every_float32_exactly(means: NDArray[np.float32], id: str | None) -> None:
    text, rest, headers = answer({"mean": means}, (("mean", False),), id=id)
    assert (rest, headers) == (b"", {b"content-type": b"application/json"})
    assert text.get("id") == id
    assert (text["model_name"], text["model_version"]) == ("digits", "ab" * 32)
    assert text["parameters"] == {"digest": "sha256:" + "ab" * 32}
    (output,) = text["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("mean", "FP32", list(means.shape))
    assert np.asarray(output["data"], np.float32).reshape(output["shape"]).tobytes() == means.tobytes()


@given(MEANS)
def test_infer_encoder_with_some_outputs_as_bytes_puts_those_behind_in_order(means: NDArray[np.float32]) -> None:
    features = {"hidden": np.ones((len(means), 5), np.float32), "logvar": -means, "mean": means}
    asked = (("mean", True), ("hidden", False), ("logvar", True))
    text, rest, headers = answer(features, asked, id="7")
    assert headers[b"content-type"] == b"application/octet-stream"
    assert rest == means.tobytes() + (-means).tobytes()
    assert [output["name"] for output in text["outputs"]] == ["mean", "hidden", "logvar"]
    assert [output.get("parameters") for output in text["outputs"]] == [
        {"binary_data_size": means.nbytes}, None, {"binary_data_size": means.nbytes}
    ]  # fmt: skip
    assert text["outputs"][1]["data"] == [1.0] * 5 * len(means)


@pytest.mark.parametrize("binary", [True, False])
def test_infer_encoder_marks_failed_images_so_that_nobody_takes_them_for_features(binary: bool) -> None:
    means = np.zeros((3, 2), np.float32)
    text, rest, _ = answer({"mean": means}, (("mean", binary),), errors={1: 'not "PNG"'})
    assert json.loads(text["parameters"]["errors"]) == {"1": 'not "PNG"'}
    got = np.frombuffer(rest, np.float32) if binary else np.array(text["outputs"][0]["data"], np.float32)
    np.testing.assert_array_equal(got.reshape(3, 2), [[0, 0], [np.nan] * 2, [0, 0]])
    assert not np.isnan(means).any(), "the features are the batcher's"


def test_describe_model_puts_the_mean_first_and_images_where_rows_are_images() -> None:
    assert describe_model(Model(), versions=["ab", "cd"]) == {  # type: ignore[arg-type]
        "name": "digits",
        "versions": ["ab", "cd"],
        "platform": "onnx_onnxv1",
        "inputs": [
            {"name": "rows", "datatype": "UINT8", "shape": [-1, 1, 2, 3]},
            {"name": "images", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "mean", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "hidden", "datatype": "FP32", "shape": [-1, 5]},
            {"name": "logvar", "datatype": "FP32", "shape": [-1, 2]},
        ],
    }
    inputs = describe_model(Model(input=VECTOR), versions=["ab"])["inputs"]  # type: ignore[arg-type]
    assert inputs == [{"name": "rows", "datatype": "FP32", "shape": [-1, 4]}]


def test_describe_server_names_only_extensions_that_are_there() -> None:
    described = describe_server(extensions=("binary_tensor_data", "model_repository"))
    assert described.keys() == {"name", "version", "extensions"}
    assert described["extensions"] == ["binary_tensor_data", "model_repository"]


def test_encode_error_of_a_message_that_utf_8_cannot_hold_is_json_with_a_string() -> None:
    assert json.loads(encode_error("got '\udcff'")) == {"error": "got '\\udcff'"}
