"""What gRPC calls cost before anybody knows who calls, and what their messages may take together."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from serving.errors import RequestError
from serving.guard import calls
from serving.guard.calls import MessageRoom
from serving.guard.keys import KeyRing
from serving.models import Models
from serving.protocols import oip_messages as messages
from serving.protocols.oip_grpc import start_grpc
from serving.served_model import Place
from serving.service import Service
from serving.settings import Limits
from serving.watching.recorder import Recorder

INFER = "/inference.GRPCInferenceService/ModelInfer"
CHECK = "/grpc.health.v1.Health/Check"
MIB = 2**20


@contextlib.asynccontextmanager
async def started(models: Models, address: str, *, limits: Limits | None = None, **options: Any) -> AsyncIterator[Any]:
    service = Service(models, limits or Limits(), lanes=1)
    await service.start()
    while not service.ready:
        await asyncio.sleep(0.005)
    server = await start_grpc(service, address, **{"max_message_bytes": 64 * MIB, **options})
    try:
        yield service
    finally:
        await server.stop(None)
        await service.stop()


class Relay:
    """Passes bytes on between a client and a server, counts them, and may stop after some."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.to_server = 0
        self.most = 2**40
        self.connections: list[Any] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(self._path)

        async def up() -> None:
            while data := await reader.read(65536):
                self.to_server += len(data)
                while self.to_server > self.most:
                    await asyncio.sleep(0.02)
                inner_writer.write(data)
                await inner_writer.drain()

        async def down() -> None:
            while data := await inner_reader.read(65536):
                writer.write(data)
                await writer.drain()

        self.connections.append(asyncio.current_task())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(up())
                group.create_task(down())
        except* ConnectionError:
            pass
        finally:
            for one in (inner_writer, writer):
                one.close()
                with contextlib.suppress(ConnectionError):
                    await one.wait_closed()


def relayed(
    models: Models, folder: Path, talk: Callable[[grpc.aio.Channel, Relay, Service], Awaitable[None]], **options: Any
) -> None:
    """Talk to a server through a relay."""

    async def exchange() -> None:
        relay = Relay(folder / "grpc")
        async with started(models, f"unix:{folder}/grpc", **options) as service:
            between = await asyncio.start_unix_server(relay, folder / "relay")
            channel_options = [("grpc.max_send_message_length", -1)]
            async with grpc.aio.insecure_channel(f"unix:{folder}/relay", options=channel_options) as channel:
                await talk(channel, relay, service)
            between.close()
            for connection in relay.connections:
                connection.cancel()
            await asyncio.gather(*relay.connections, return_exceptions=True)

    asyncio.run(exchange())


async def code_of(call: Awaitable[Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call
    return str(refusal.value.code().name)


def a_key(folder: Path) -> KeyRing:
    file = folder / "keys.toml"
    digest = hashlib.sha256(b"ci").hexdigest()
    file.write_text(f'[keys.ci]\nsha256 = "{digest}"\nscopes = ["embed"]\n')
    file.chmod(0o600)
    return KeyRing(file)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("g")  # a Unix socket's path must be short


def test_messages_without_a_key_are_not_read(digits_models: Models, folder: Path) -> None:
    message = messages.ModelInferRequest(raw_input_contents=[bytes(16 * MIB)]).SerializeToString()

    async def talk(channel: grpc.aio.Channel, relay: Relay, service: Service) -> None:
        many = [code_of(channel.unary_unary(INFER)(message)) for _ in range(4)]
        assert await asyncio.gather(*many) == ["UNAUTHENTICATED"] * 4
        assert relay.to_server < MIB
        # With a key it is read, and only then found to be no good.
        assert await code_of(channel.unary_unary(INFER)(message, metadata=(("x-api-key", "ci"),))) == "INVALID_ARGUMENT"
        assert relay.to_server > 16 * MIB

    relayed(digits_models, folder, talk, keys=a_key(folder))


def test_messages_that_come_slowly_take_the_room_of_the_largest_and_give_it_back(
    digits_models: Models, digits_rows: NDArray[np.uint8], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_TURN_S", 0.3)
    tensor = {"name": "rows", "datatype": "UINT8", "shape": [1, 1, 8, 8]}
    good = messages.ModelInferRequest(inputs=[tensor], raw_input_contents=[digits_rows[:1].tobytes()])
    large = messages.ModelInferRequest(inputs=[tensor], raw_input_contents=[bytes(MIB // 2)])

    async def talk(channel: grpc.aio.Channel, relay: Relay, service: Service) -> None:
        relay.most = MIB // 4
        slow = asyncio.ensure_future(channel.unary_unary(INFER)(large.SerializeToString()))
        while relay.to_server < relay.most:
            await asyncio.sleep(0.01)
        direct = f"unix:{folder}/grpc"
        async with grpc.aio.insecure_channel(direct) as other:
            assert await code_of(other.unary_unary(INFER)(good.SerializeToString())) == "UNAVAILABLE"
            answer = await other.unary_unary(CHECK)(b"")  # probes have room of their own
            assert messages.HealthCheckResponse.FromString(answer).status == messages.SERVING
            # The wait for a whole message is bounded; then there is room again.
            assert await code_of(slow) == "DEADLINE_EXCEEDED"
            await other.unary_unary(INFER)(good.SerializeToString())

    limits = Limits(max_in_flight_bytes=MIB, body_timeout_s=3.0)
    relayed(digits_models, folder, talk, limits=limits, max_message_bytes=MIB)


def test_room_is_for_the_length_of_a_message_once_it_is_read_and_for_nothing_once_it_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "_TURN_S", 0.1)

    async def main() -> None:
        room = MessageRoom(25, largest=10)
        await room.take()
        await room.take()
        with pytest.raises(RequestError) as refused:
            await room.take()
        assert refused.value.status == 503
        monkeypatch.setattr(calls, "_TURN_S", 60.0)
        waiting = asyncio.create_task(room.take())
        await asyncio.sleep(0)
        room.give_back(4)  # it was 6 long
        await asyncio.sleep(0)
        assert not waiting.done()
        room.give_back(1)
        await waiting
        assert room.used == 25
        for n_bytes in (6, 9, 10):
            room.give_back(n_bytes)
        assert room.used == 0
        # One that is larger than everything is taken alone.
        alone = MessageRoom(5, largest=10)
        await alone.take()

    asyncio.run(main())


def test_calls_give_all_their_room_back_however_they_end(
    digits_models: Models, digits_rows: NDArray[np.uint8], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms: list[MessageRoom] = []
    made = MessageRoom.__init__

    def remember(room: MessageRoom, *arguments: Any, **options: Any) -> None:
        made(room, *arguments, **options)
        rooms.append(room)

    monkeypatch.setattr(MessageRoom, "__init__", remember)
    tensor = {"name": "rows", "datatype": "UINT8", "shape": [1, 1, 8, 8]}
    good = messages.ModelInferRequest(inputs=[tensor], raw_input_contents=[digits_rows[:1].tobytes()])

    async def talk(channel: grpc.aio.Channel, relay: Relay, service: Service) -> None:
        infer = channel.unary_unary(INFER)
        await infer(good.SerializeToString())
        assert await code_of(infer(b"\xff\xff\xff")) == "INVALID_ARGUMENT"
        assert await code_of(infer(b"")) == "INVALID_ARGUMENT"  # no inputs
        empty = channel.stream_unary(INFER)
        assert await code_of(empty(iter(()))) == "INVALID_ARGUMENT"  # no message
        assert await code_of(infer(bytes(2 * MIB))) == "RESOURCE_EXHAUSTED"
        await channel.unary_unary(CHECK)(b"")
        async with asyncio.timeout(60):
            while any(room.used for room in rooms):
                await asyncio.sleep(0.01)
        assert [room.used for room in rooms] == [0, 0]

    relayed(digits_models, folder, talk, max_message_bytes=MIB)


def test_calls_that_are_cancelled_are_in_the_figures(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], folder: Path
) -> None:
    models = Models.from_bundles([digits_bundle], place=Place(device="cpu", threads=1))
    recorder = Recorder(models, routes=[INFER])
    gate = threading.Event()
    tensor = {"name": "rows", "datatype": "UINT8", "shape": [1, 1, 8, 8]}
    good = messages.ModelInferRequest(inputs=[tensor], raw_input_contents=[digits_rows[:1].tobytes()])

    async def talk(channel: grpc.aio.Channel, relay: Relay, service: Service) -> None:
        model = models.find("digits")
        compute = model.compute
        model.compute = lambda *arguments: (gate.wait(60), compute(*arguments))[1]  # type: ignore[method-assign]
        call = channel.unary_unary(INFER)(good.SerializeToString())
        while not service.batcher.busy:
            await asyncio.sleep(0.005)
        call.cancel()
        while ("499", 1.0) not in counted(recorder):
            await asyncio.sleep(0.005)
        gate.set()

    def counted(recorder: Recorder) -> list[tuple[str, float]]:
        families = text_string_to_metric_families(recorder.metrics.render()[0].decode())
        samples = [sample for family in families for sample in family.samples]
        return [(s.labels["status"], s.value) for s in samples if s.name == "vaefeat_requests_total"]

    async def in_time(*arguments: Any) -> None:
        async with asyncio.timeout(60):
            await talk(*arguments)

    relayed(models, folder, in_time, recorder=recorder)
