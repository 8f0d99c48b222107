"""KServe's REST client, as installed: python kserve_rest.py URL FOLDER."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

url, folder = sys.argv[1], Path(sys.argv[2])
rows, mean = (np.load(folder / f"{name}.npy") for name in ("rows", "mean"))


def request(binary_in: bool, binary_out: bool) -> InferRequest:
    tensor = InferInput("rows", list(rows.shape), "UINT8")
    tensor.set_data_from_numpy(rows, binary_data=binary_in)
    wanted = RequestedOutput("mean", {"binary_data": binary_out})
    return InferRequest("digits", [tensor], request_outputs=[wanted], request_id="run 7")


async def main() -> None:
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, "digits")
    for binary_in in (True, False):
        for binary_out in (True, False):
            answer = await client.infer(url, request(binary_in, binary_out), model_name="digits")
            assert answer.id == "run 7"
            got = answer.outputs[0].as_numpy()
            assert got.dtype == np.float32
            assert got.tobytes() == mean.tobytes()
    try:
        await client.infer(url, request(True, True), model_name="letters")
    except httpx.HTTPStatusError as error:
        assert error.response.status_code == 404
        assert "wanted one of 'digits'" in str(error)
    else:
        raise AssertionError("a model that is not there answered")
    await client.close()


asyncio.run(main())
