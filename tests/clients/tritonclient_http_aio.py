"""Triton's asynchronous HTTP client, as installed: python tritonclient_http_aio.py URL FOLDER."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import tritonclient.http.aio as triton

url, folder = sys.argv[1].removeprefix("http://"), Path(sys.argv[2])
rows, mean = (np.load(folder / f"{name}.npy") for name in ("rows", "mean"))


async def infer(client: triton.InferenceServerClient, start: int, stop: int) -> None:
    part = triton.InferInput("rows", [stop - start, *rows.shape[1:]], "UINT8")
    part.set_data_from_numpy(rows[start:stop])
    coding = ("gzip", "deflate", None)[start % 3]
    answer = await client.infer(
        "digits", [part], request_compression_algorithm=coding, response_compression_algorithm=coding
    )
    assert answer.as_numpy("mean").tobytes() == mean[start:stop].tobytes(), (start, stop)


async def main() -> None:
    async with triton.InferenceServerClient(url) as client:
        assert await client.is_server_ready()
        assert (await client.get_model_metadata("digits"))["name"] == "digits"
        # Parts of different sizes at the same time: each must get its own rows back.
        await asyncio.gather(*(infer(client, start, start + 1 + start % 9) for start in range(len(rows) - 9)))


asyncio.run(main())
