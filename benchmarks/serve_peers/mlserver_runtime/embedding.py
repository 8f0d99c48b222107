"""MLServer: a runtime of its own, as https://docs.seldon.ai/mlserver/user-guide/custom describes."""

from __future__ import annotations

import asyncio
import os

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from peer_session import Encoder


class EmbeddingModel(MLModel):
    """Rows in, means out, as JSON: its REST server has no other form."""

    async def load(self) -> bool:
        """Open the model."""
        self._encoder = Encoder(os.environ["PEER_MODEL"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Embed the rows of one request, or of a batch of them."""
        rows = NumpyCodec.decode_input(payload.inputs[0]).astype(np.uint8, copy=False)
        rows = rows.reshape(-1, *self._encoder.shape)
        means = await asyncio.to_thread(self._encoder.means, rows)
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=[NumpyCodec.encode_output("mean", means)])
