"""OpenAI's client, as installed: python openai_embeddings.py URL FOLDER."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openai

url, folder = sys.argv[1], Path(sys.argv[2])
mean = np.load(folder / "mean.npy")
files = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
uris = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in files]

with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
    assert [model.id for model in client.models.list()] == ["digits"]
    assert client.models.list().data[0].object == "model"

    # The client asks for base64 when its caller says nothing, and decodes it.
    for answer in (
        client.embeddings.create(model="digits", input=uris),
        client.embeddings.create(model="digits", input=uris, encoding_format="float"),
        client.embeddings.create(model="digits", input=uris, dimensions=mean.shape[1]),
    ):
        assert answer.model == "digits"
        assert [item.index for item in answer.data] == list(range(len(uris)))
        got = np.array([item.embedding for item in answer.data], dtype=np.float32)
        assert got.tobytes() == mean[: len(uris)].tobytes()
        assert answer.usage.total_tokens >= 0
    assert len(client.embeddings.create(model="digits", input=uris[0]).data) == 1

    refused: list[tuple[dict[str, Any], type[openai.APIStatusError]]] = [
        ({"model": "digits", "input": "a text"}, openai.BadRequestError),
        ({"model": "digits", "input": "http://127.0.0.1:1/x.png"}, openai.BadRequestError),
        ({"model": "digits", "input": uris, "dimensions": 3}, openai.BadRequestError),
        ({"model": "letters", "input": uris}, openai.NotFoundError),
    ]
    for arguments, kind in refused:
        try:
            client.embeddings.create(**arguments)
        except kind as error:
            assert "got " in error.message, error
            assert error.type, error
        else:
            raise AssertionError(f"nothing was said of {arguments}")
