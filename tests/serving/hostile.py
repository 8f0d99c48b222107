"""What the tests with hostile input share: a form check for each door, and the good request that comes after."""

from __future__ import annotations

import httpx
import numpy as np
from numpy.typing import NDArray

from serving.codec import encode_npy
from serving.media import NPY
from tests.serving.running import Running

ROWS: NDArray[np.uint8] = np.arange(192, dtype=np.uint8).reshape(3, 1, 8, 8) % 17
#: Far more than any message of ours, far less than what a client could have repeated to it.
LONGEST_ERROR = 4096


def told(path: str, answer: httpx.Response) -> str:
    """Check the form in which a door tells errors, and give the message."""
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.content) < LONGEST_ERROR
    error = answer.json()["error"]
    if path == "/v2" or path.startswith("/v2/"):
        assert set(answer.json()) == {"error"}
        assert isinstance(error, str)
        return error
    openai = {"param", "code"} if path.startswith(("/v1/embeddings", "/v1/models")) else set()
    assert set(error) == {"type", "message", "request_id"} | openai
    assert error["request_id"] == answer.headers["x-request-id"]
    assert isinstance(error["message"], str)
    return error["message"]


def assert_sound(service: Running, wanted: NDArray[np.float32]) -> None:
    """Send the good request, compare every bit, and see that nothing is left of what came before."""
    answer = httpx.post(f"{service.url}/v1/embed", content=encode_npy(ROWS), headers={"content-type": NPY})
    assert answer.status_code == 200
    assert answer.content == encode_npy(wanted)
    assert service.service.ready
    assert service.service.batcher.queued_rows == service.service.batcher.queued_bytes == 0
    assert service.service.room.used == 0
