"""FastAPI over ONNX Runtime, as people write it: ``python fastapi_server.py MODEL PORT WORKERS``.

FastAPI's page on concurrency (https://fastapi.tiangolo.com/async/) has blocking work done in the thread pool, that on
workers (https://fastapi.tiangolo.com/deployment/server-workers/) a process for each processor; both numbers of
workers are measured. uvloop and httptools are what ``uvicorn[standard]`` installs.
"""

from __future__ import annotations

import os
import sys

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from peer_session import Encoder

app = FastAPI()
_encoder = Encoder(os.environ["PEER_MODEL"])


def _embed(body: bytes) -> bytes:
    return _encoder.means(_encoder.rows(body)).tobytes()


@app.post("/embed")
async def embed(request: Request) -> Response:
    """Embed a body of rows."""
    return Response(await run_in_threadpool(_embed, await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    uvicorn.run(
        "fastapi_server:app",
        host="127.0.0.1",
        port=int(sys.argv[2]),
        workers=int(sys.argv[3]),
        http="httptools",
        loop="uvloop",
        access_log=False,
        log_level="warning",
    )
