"""What is refused from a request's head alone, by every route that computes rows alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.batch import Job
from serving.guard.keys import KeyRing
from serving.settings import Limits

LIMITS = Limits(max_body_bytes=10_000, max_in_flight_bytes=20_000, max_in_flight=3, max_queued_rows=4)
PATHS = ["/v1/embed", "/v1/predict", "/v1/embeddings", "/v2/models/digits/infer"]
KEY, LENGTH = (b"x-api-key", b"ci"), (b"content-length", b"100")
CASES: dict[str, tuple[list[tuple[bytes, bytes]], int]] = {
    "no key": ([LENGTH], 401),
    "another key": ([LENGTH, (b"authorization", b"Bearer of news")], 401),
    "a key for something else": ([LENGTH, (b"x-api-key", b"metrics")], 403),
    "in chunks": ([KEY, (b"transfer-encoding", b"chunked")], 411),
    "too large": ([KEY, (b"content-length", b"10001")], 413),
    "more than the rate": ([KEY, (b"content-length", b"3000")], 429),
    "no room for the body": ([KEY, LENGTH], 503),
    "too many requests": ([KEY, LENGTH], 503),
    "no place in any queue": ([KEY, LENGTH], 503),
    "not ready": ([KEY, LENGTH], 503),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_request_that_its_head_says_enough_of_is_refused_with_its_body_unread(
    talk: Callable[..., Any], digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path, path: str, case: str
) -> None:
    headers, wanted = CASES[case]
    kind = b"application/json" if path.endswith("embeddings") else b"application/octet-stream"
    scope = {"type": "http", "path": path, "method": "POST", "query_string": b""}
    answers: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body is read")

    async def send(message: dict[str, Any]) -> None:
        answers.append(message)

    async def conversation(client: Any) -> None:
        service, admission = client.app.service, client.app.admission
        if case == "more than the rate":
            admission.rates.take(admission.keys.identify(None, b"ci"), bytes=2000)
        if case == "no room for the body":
            service.room.count(LIMITS.max_in_flight_bytes - 99)
        if case == "too many requests":
            admission._present = dict.fromkeys(range(LIMITS.max_in_flight))
        if case == "no place in any queue":
            rows, model = digits_rows[: LIMITS.max_queued_rows], service.find(None)
            job = Job(model, rows, ("mean",), bulk=False, deadline=1e9, queued=0.0, future=None)  # type: ignore[arg-type]
            service.batcher.queue.add(job)
        if case == "not ready":
            service.ready = False
        await client.app({**scope, "headers": [*headers, (b"content-type", kind)]}, receive, send)
        admission._present = {}
        service.batcher.queue.clear()

    tables = ""
    for name, allowed in (("ci", "embed"), ("metrics", "metrics")):
        digest = hashlib.sha256(name.encode()).hexdigest()
        tables += f'[keys.{name}]\nsha256 = "{digest}"\nscopes = ["{allowed}"]\nbytes_per_s = 1000\n'
    file = tmp_path / "keys.toml"
    file.write_text(tables)
    file.chmod(0o600)
    talk(conversation, digits_bundle, limits=LIMITS, keys=KeyRing.from_file(file))
    start, body = answers
    assert start["status"] == wanted, body
    assert "error" in json.loads(body["body"])
    assert (wanted in (429, 503)) == ("retry-after" in {name.decode() for name, _ in start["headers"]})
