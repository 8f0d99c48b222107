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
from serving.room import Room
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
    """Passes bytes on between a client and a server, counts them, and may stop after some, or pass no answers on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.to_server = 0
        self.most = 2**40
        self.passes_answers = True
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
                while not self.passes_answers:
                    await asyncio.sleep(0.02)
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


def test_messages_wait_for_a_place_and_for_room_and_are_refused_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_TURN_S", 0.1)

    async def main() -> None:
        room = Room(25)
        messages = MessageRoom(room, largest=10, at_a_time=2)

        async def read(gate: asyncio.Event) -> None:
            async with messages.reading():
                await gate.wait()

        gate = asyncio.Event()
        reading = [asyncio.create_task(read(gate)) for _ in range(2)]
        await asyncio.sleep(0)
        assert room.used == 20
        with pytest.raises(RequestError) as refused:
            await read(gate)  # there is no third place
        assert refused.value.status == 503
        gate.set()
        await asyncio.gather(*reading)
        assert room.used == 0
        room.count(16)  # as bodies over HTTP do
        monkeypatch.setattr(calls, "_TURN_S", 0.1)
        with pytest.raises(RequestError):
            await read(gate)
        monkeypatch.setattr(calls, "_TURN_S", 60.0)
        waiting = asyncio.create_task(read(gate))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        room.give_back(1)
        await waiting
        assert room.used == 15
        # One that is larger than everything is taken alone.
        await MessageRoom(Room(5), largest=10, at_a_time=1).reading().__aenter__()

    asyncio.run(main())


def test_calls_give_all_their_room_back_however_they_end(
    digits_models: Models, digits_rows: NDArray[np.uint8], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms: list[Room] = []
    made = MessageRoom.__init__

    def remember(messages: MessageRoom, room: Room, **options: Any) -> None:
        made(messages, room, **options)
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
        assert rooms[0] is service.room, "HTTP's bodies are in it, too"
        assert [room.used for room in rooms] == [0, 0]

    relayed(digits_models, folder, talk, max_message_bytes=MIB)


def test_answers_that_a_client_does_not_take_are_counted_until_it_does(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], folder: Path
) -> None:
    models = Models.from_bundles([digits_bundle], place=Place(device="cpu", threads=1))
    (model,) = models.current
    gate, compute = threading.Event(), model.compute
    n_rows = 16_000
    rows = np.tile(digits_rows[:100], (n_rows // 100, 1, 1, 1))
    tensor = {"name": "rows", "datatype": "UINT8", "shape": list(rows.shape)}
    outputs = [{"name": "hidden"}]
    asked = messages.ModelInferRequest(inputs=[tensor], raw_input_contents=[rows.tobytes()], outputs=outputs)
    n_bytes = n_rows * 4 * model.outputs["hidden"]
    assert n_bytes > 2 * MIB, "more than lies in sockets"

    async def talk(channel: grpc.aio.Channel, relay: Relay, service: Service) -> None:
        # Not before: the service computes something itself before it is ready.
        model.compute = lambda *arguments: (gate.wait(20), compute(*arguments))[1]  # type: ignore[method-assign]
        call = channel.unary_unary(INFER)(asked.SerializeToString())
        while not service.batcher.busy:
            await asyncio.sleep(0.005)
        assert service.room.used >= rows.nbytes + n_bytes, "the message, and the features that are to come"
        relay.passes_answers = False
        gate.set()
        while service.batcher.busy or service.batcher.queued_rows:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.3)
        standing = service.room.used
        relay.passes_answers = True
        assert n_bytes <= standing < rows.nbytes + n_bytes
        answer = messages.ModelInferResponse.FromString(await call)
        assert len(answer.raw_output_contents[0]) == n_bytes
        await asyncio.sleep(0.1)
        assert service.room.used == 0

    async def in_time(*arguments: Any) -> None:
        async with asyncio.timeout(20):
            await talk(*arguments)

    relayed(models, folder, in_time)


def test_calls_without_a_key_leave_places_to_those_with_one(
    digits_models: Models, digits_rows: NDArray[np.uint8], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.protocols.oip_grpc._MAX_CALLS", 5)
    monkeypatch.setattr(calls, "_MOST_PROBES", 3)
    tensor = {"name": "rows", "datatype": "UINT8", "shape": [1, 1, 8, 8]}
    good = messages.ModelInferRequest(inputs=[tensor], raw_input_contents=[digits_rows[:1].tobytes()])

    async def talk(channel: grpc.aio.Channel, relay: Relay, service: Service) -> None:
        watching = [channel.unary_stream("/grpc.health.v1.Health/Watch")(b"") for _ in range(3)]
        for one in watching:
            await one.read()
        assert await code_of(channel.unary_unary(CHECK)(b"")) == "UNAVAILABLE"
        await channel.unary_unary(INFER)(good.SerializeToString(), metadata=(("x-api-key", "ci"),))
        watching[0].cancel()
        await asyncio.sleep(0.1)
        await channel.unary_unary(CHECK)(b"")

    relayed(digits_models, folder, talk, keys=a_key(folder))


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
