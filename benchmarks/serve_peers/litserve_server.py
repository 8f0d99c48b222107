"""LitServe: ``python litserve_server.py MODEL PORT WORKERS``.

Its pages recommend batching (https://lightning.ai/docs/litserve/features/batching), a worker for each processor that
computes, and the queue on ZeroMQ for more than a hundred requests a second (docstring of ``LitServer``). A batch waits
1 ms at most, because a lone request would wait for all of it; 0 would make the workers spin.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import litserve
from fastapi import Body, Response
from peer_session import Encoder


class EncoderAPI(litserve.LitAPI):
    """Raw bytes in, raw bytes out."""

    def setup(self, device: str) -> None:
        """Open the model, in each worker."""
        self._encoder = Encoder(os.environ["PEER_MODEL"])

    # No lazy annotations here: LitServe reads the type as an object.
    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe's types are not here
        """Take the body as it is."""
        return request

    decode_request.__annotations__["request"] = Annotated[bytes, Body(media_type="application/octet-stream")]

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """Leave bodies apart: they are joined where their rows are."""
        return inputs

    def predict(self, bodies: list[bytes]) -> list[bytes]:
        """Embed the rows of all bodies at once."""
        return self._encoder.split(bodies)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """Give what is apart already."""
        return output

    def encode_response(self, output):  # type: ignore[no-untyped-def]  # LitServe's types are not here
        """Answer with the bytes."""
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    api = EncoderAPI(max_batch_size=32, batch_timeout=0.001, api_path="/embed")
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=int(sys.argv[3]), fast_queue=True)
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", generate_client_file=False, access_log=False
    )
