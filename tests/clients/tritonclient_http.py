"""Triton's HTTP client, as installed: python tritonclient_http.py URL FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

url, folder = sys.argv[1].removeprefix("http://"), Path(sys.argv[2])
rows, mean, logvar = (np.load(folder / f"{name}.npy") for name in ("rows", "mean", "logvar"))
images = np.array([path.read_bytes() for path in sorted(folder.glob("*.png"))], dtype=object)


def tensor(name: str, values: np.ndarray, datatype: str, **how: bool) -> triton.InferInput:
    described = triton.InferInput(name, list(values.shape), datatype)
    described.set_data_from_numpy(values, **how)
    return described


with triton.InferenceServerClient(url) as client:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("digits")
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["rows", "images"]
    assert metadata["outputs"][0] == {"name": "mean", "datatype": "FP32", "shape": [-1, mean.shape[1]]}
    (version,) = metadata["versions"]
    assert client.get_model_metadata("digits", model_version=version) == metadata

    for binary_in in (True, False):
        for binary_out in (True, False):
            for coding in (None, "gzip", "deflate"):
                answer = client.infer(
                    "digits",
                    [tensor("rows", rows, "UINT8", binary_data=binary_in)],
                    outputs=[triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("logvar", "mean")],
                    request_id="run 7",
                    request_compression_algorithm=coding,
                    response_compression_algorithm=coding,
                )
                assert answer.as_numpy("mean").tobytes() == mean.tobytes()
                assert answer.as_numpy("logvar").tobytes() == logvar.tobytes()
                assert answer.get_response()["id"] == "run 7"
                assert answer.get_response()["model_version"] == version
                assert answer.get_response()["parameters"]["digest"] == f"sha256:{version}"

    # Without outputs, the client asks for bytes of whatever there is.
    flat = tensor("rows", rows.reshape(len(rows), -1).astype(np.float32), "FP32")
    answer = client.infer("digits", [flat], model_version=version, priority=1, timeout=10_000_000)
    assert answer.as_numpy("mean").tobytes() == mean.tobytes()
    assert answer.as_numpy("logvar") is None

    answer = client.infer("digits", [tensor("images", images, "BYTES")])
    assert answer.as_numpy("mean").tobytes() == mean[: len(images)].tobytes()

    damaged = images.copy()
    damaged[1] = b"no image"
    answer = client.infer("digits", [tensor("images", damaged, "BYTES")])
    assert answer.as_numpy("mean")[::2].tobytes() == mean[: len(images) : 2].tobytes()
    assert np.isnan(answer.as_numpy("mean")[1]).all()
    assert '"1"' in answer.get_response()["parameters"]["errors"]

    for model, sent, told, status in [
        ("digits", tensor("rows", rows[:, 0], "UINT8"), "wanted that of uint8 rows", "400"),
        ("digits", tensor("rows", rows.astype(np.float32) + 0.5, "FP32"), "whole numbers from 0 to 255", "400"),
        ("digits", tensor("images", images[:0], "BYTES"), "at least one", "400"),
        ("letters", tensor("rows", rows, "UINT8"), "wanted one of 'digits'", "404"),
    ]:
        try:
            client.infer(model, [sent])
        except InferenceServerException as error:
            assert told in error.message(), error
            assert error.status() == status, error
        else:
            raise AssertionError(f"nothing was said of {told}")
