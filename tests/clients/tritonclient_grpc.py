"""Triton's gRPC clients, as installed: python tritonclient_grpc.py ADDRESS FOLDER [KEY]."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

address, folder = sys.argv[1], Path(sys.argv[2])
headers = {"authorization": f"Bearer {sys.argv[3]}"} if len(sys.argv) > 3 else None
rows, mean, logvar = (np.load(folder / f"{name}.npy") for name in ("rows", "mean", "logvar"))
images = np.array([path.read_bytes() for path in sorted(folder.glob("*.png"))], dtype=object)


def tensor(name: str, values: np.ndarray, datatype: str) -> triton.InferInput:
    described = triton.InferInput(name, list(values.shape), datatype)
    described.set_data_from_numpy(values)
    return described


with triton.InferenceServerClient(address) as client:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.get_server_metadata(headers=headers).name == "vaefeat"
    metadata = client.get_model_metadata("digits", headers=headers, as_json=True)
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["rows", "images"]
    (version,) = metadata["versions"]

    for coding in (None, "gzip", "deflate"):
        answer = client.infer(
            "digits",
            [tensor("rows", rows, "UINT8")],
            model_version=version,
            outputs=[triton.InferRequestedOutput(name) for name in ("logvar", "mean")],
            request_id="run 7",
            priority=1,
            timeout=10_000_000,
            headers=headers,
            compression_algorithm=coding,
        )
        assert answer.as_numpy("mean").tobytes() == mean.tobytes()
        assert answer.as_numpy("logvar").tobytes() == logvar.tobytes()
        assert answer.get_response().id == "run 7"
        assert answer.get_response().parameters["digest"].string_param == f"sha256:{version}"

    answer = client.infer("digits", [tensor("images", images, "BYTES")], headers=headers)
    assert answer.as_numpy("mean").tobytes() == mean[: len(images)].tobytes()

    for model, sent, told, status in [
        ("digits", tensor("rows", rows[:, 0], "UINT8"), "wanted that of uint8 rows", "StatusCode.INVALID_ARGUMENT"),
        ("letters", tensor("rows", rows, "UINT8"), "wanted one of 'digits'", "StatusCode.NOT_FOUND"),
    ]:
        try:
            client.infer(model, [sent], headers=headers)
        except InferenceServerException as error:
            assert told in error.message(), error
            assert error.status() == status, error
        else:
            raise AssertionError(f"nothing was said of {told}")


async def infer(client: triton_aio.InferenceServerClient, start: int, stop: int) -> None:
    answer = await client.infer("digits", [tensor("rows", rows[start:stop], "UINT8")], headers=headers)
    assert answer.as_numpy("mean").tobytes() == mean[start:stop].tobytes(), (start, stop)


async def main() -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        await asyncio.gather(*(infer(client, start, start + 1 + start % 9) for start in range(20)))


asyncio.run(main())
