"""Ray Serve with ``@serve.batch``, as its pages have it: ``python ray_server.py MODEL PORT``.

HAProxy and the throughput flags are set by who starts this, because Ray reads them when it is imported. A batch does
not wait, because a lone request would; batches are computed in threads, as the page on asyncio has it
(https://docs.ray.io/en/master/serve/advanced-guides/asyncio-best-practices.html), one for each processor.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading

import ray
from peer_session import Encoder
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response


class Embedding:
    """Raw bytes in, raw bytes out."""

    def __init__(self, model: str, batches: int) -> None:
        self._encoder = Encoder(model)
        self._embed = serve.batch(max_batch_size=32, batch_wait_timeout_s=0, max_concurrent_batches=batches)(
            self._embed_all
        )

    async def _embed_all(self, bodies: list[bytes]) -> list[bytes]:
        return await asyncio.to_thread(self._encoder.split, bodies)

    async def __call__(self, request: Request) -> Response:
        """Embed a body of rows."""
        return Response(await self._embed(await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        _temp_dir=os.environ["PEER_FOLDER"],
        log_to_driver=False,
        logging_level="ERROR",
    )
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])}, logging_config=quiet)
    deployment = serve.deployment(max_ongoing_requests=128, ray_actor_options={"num_cpus": 1})(Embedding)
    serve.run(deployment.bind(sys.argv[1], int(sys.argv[3])), route_prefix="/embed", logging_config=quiet)
    stop.wait()
    serve.shutdown()
    ray.shutdown()
