"""How a process with both HTTP and gRPC ends: calls are answered, and streams that never end do not hold it up."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

import serving.protocols.oip_messages as messages
from serving.http_server import make_application, make_server, serving_grpc
from serving.models import Models
from serving.service import Service
from serving.settings import Limits, ServiceSettings
from vaefeat.encoder import OnnxEncoder


def test_calls_that_wait_when_the_process_is_to_end_are_answered_and_watchers_let_go(
    digits_models: Models, digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/grpc"
    settings = ServiceSettings(bundles=(), grpc_address=address, limits=Limits(max_batch_rows=2))
    gate = threading.Event()

    async def talk() -> tuple[list[bytes], float]:
        service = Service(digits_models, settings.limits, lanes=1)
        app = make_application(service, settings)
        server = make_server(app, settings)
        model = digits_models.find("digits")
        compute = model.compute
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            async with serving_grpc(app, settings), grpc.aio.insecure_channel(address) as channel:
                while not service.ready:
                    await asyncio.sleep(0.005)
                model.compute = lambda *arguments: (gate.wait(60), compute(*arguments))[1]  # type: ignore[method-assign]
                watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
                await watch.read()
                infer = channel.unary_unary(
                    "/inference.GRPCInferenceService/ModelInfer",
                    request_serializer=messages.ModelInferRequest.SerializeToString,
                    response_deserializer=messages.ModelInferResponse.FromString,
                )
                calls = [infer(request(digits_rows[i : i + 2])) for i in range(0, 8, 2)]
                while service.batcher.queued_rows < 6:
                    await asyncio.sleep(0.005)
                server.should_exit = True
                await asyncio.sleep(0.5)
                gate.set()
                began = time.monotonic()
                answers = await asyncio.gather(*calls)
                await serving
                took_s = time.monotonic() - began
                model.compute = compute  # type: ignore[method-assign]
        return [answer.raw_output_contents[0] for answer in answers], took_s

    computed, took_s = asyncio.run(talk())
    wanted = OnnxEncoder(digits_bundle).embed(digits_rows[:8])
    assert b"".join(computed) == wanted.tobytes()
    assert took_s < 30, "the stream held it up"


def request(rows: NDArray[np.uint8]) -> object:
    tensor = {"name": "rows", "datatype": "UINT8", "shape": list(rows.shape)}
    return messages.ModelInferRequest(model_name="digits", inputs=[tensor], raw_input_contents=[rows.tobytes()])
