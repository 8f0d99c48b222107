"""BentoML: ``bentoml serve bentoml_server:EmbeddingService``.

A worker for each processor, as https://docs.bentoml.com/en/latest/build-with-bentoml/parallelize-requests.html has it
for CPUs. Bytes come in as a file, which is the type for ``application/octet-stream``; adaptive batching does not join
files, so there is none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import bentoml
from bentoml.validators import ContentType
from peer_session import Encoder


@bentoml.service(workers=int(os.environ.get("PEER_WORKERS", "1")), logging={"access": {"enabled": False}})
class EmbeddingService:
    """Raw bytes in, raw bytes out."""

    def __init__(self) -> None:
        self._encoder = Encoder(os.environ["PEER_MODEL"])

    @bentoml.api(route="/embed")
    def embed(
        self, rows: Annotated[Path, ContentType("application/octet-stream")], /
    ) -> Annotated[bytes, ContentType("application/octet-stream")]:
        """Embed a body of rows."""
        return self._encoder.means(self._encoder.rows(rows.read_bytes())).tobytes()
