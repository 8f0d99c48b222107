from __future__ import annotations

import asyncio
import hashlib
import io
import pickle
import struct
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from serving.errors import CodecError, RequestError, SetupError
from serving.guard.keys import KeyRing
from serving.guard.rates import RateLimiter
from serving.models import Models
from serving.protocols import oip_messages as messages
from serving.protocols.oip_grpc import decode_model_infer, start_grpc
from serving.served_model import Place
from serving.service import Service
from serving.settings import Limits
from serving.watching.recorder import Recorder
from vaefeat import OnnxEncoder, VAEFeatures, export_pipeline
from vaefeat.input_spec import InputSpec

IMAGE = InputSpec(kind="image", shape=(1, 2, 3), dtype="uint8", low=0.0, high=255.0)
OUTPUTS = {"mean": 2, "logvar": 2}
INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
NAMES = np.array(["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"])


def decoded(message: Any) -> Any:
    return decode_model_infer(message, spec=IMAGE, outputs=OUTPUTS, max_rows=10)


def request(raw: bytes | None = None, /, **changes: Any) -> Any:
    """One image as raw bytes or with typed contents, changed as told: a field of the input, or of the request."""
    of_request = {key: changes.pop(key) for key in list(changes) if key in {"inputs", "outputs", "id", "raws"}}
    tensor: dict[str, Any] = {"name": "rows", "datatype": "UINT8", "shape": [1, 6], **changes}
    raws = of_request.pop("raws", [] if raw is None else [raw])
    return messages.ModelInferRequest(**{"inputs": [tensor], "raw_input_contents": raws, **of_request})


RAW = bytes(range(6))


def test_messages_have_the_public_numbers_and_types_on_the_wire() -> None:
    parameter = messages.InferParameter(uint64_param=3)
    assert parameter.SerializeToString() == b"\x28\x03"
    contents = messages.InferTensorContents(fp32_contents=[1.0], bytes_contents=[b"ab"])
    assert contents.SerializeToString() == b"\x32\x04" + struct.pack("<f", 1.0) + b"\x42\x02ab"
    message = request(b"\x07", id="i", outputs=[{"name": "mean"}])
    message.model_name, message.model_version = "m", "v"
    message.parameters["p"].CopyFrom(parameter)
    wire = b"".join([
        b"\x0a\x01m", b"\x12\x01v", b"\x1a\x01i",
        b"\x22\x07" + b"\x0a\x01p" + b"\x12\x02\x28\x03",
        b"\x2a\x11" + b"\x0a\x04rows" + b"\x12\x05UINT8" + b"\x1a\x02\x01\x06",
        b"\x32\x06" + b"\x0a\x04mean",
        b"\x3a\x01\x07",
    ])  # fmt: skip
    assert message.SerializeToString(deterministic=True) == wire
    assert messages.ModelInferRequest.FromString(wire) == message


def test_messages_can_be_handed_to_another_process() -> None:
    message = request(RAW)
    assert pickle.loads(pickle.dumps(message)) == message


def test_messages_of_another_name_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="ModelStreamInfer"):
        _ = messages.ModelStreamInfer


CONTENTS = [
    ("BOOL", "bool_contents", "?"), ("INT8", "int_contents", "i1"), ("INT16", "int_contents", "<i2"),
    ("INT32", "int_contents", "<i4"), ("INT64", "int64_contents", "<i8"), ("UINT8", "uint_contents", "u1"),
    ("UINT16", "uint_contents", "<u2"), ("UINT32", "uint_contents", "<u4"), ("UINT64", "uint64_contents", "<u8"),
    ("FP32", "fp32_contents", "<f4"), ("FP64", "fp64_contents", "<f8"),
]  # fmt: skip


@pytest.mark.parametrize(("datatype", "field", "dtype"), CONTENTS)
def test_decode_model_infer_gives_the_same_rows_from_raw_and_typed_contents(
    datatype: str, field: str, dtype: str
) -> None:
    array = np.arange(12).reshape(2, 1, 2, 3) % 2 if datatype == "BOOL" else np.arange(12).reshape(2, 1, 2, 3)
    array = array.astype(dtype)
    shape = {"datatype": datatype, "shape": list(array.shape)}
    for message in (request(array.tobytes(), **shape), request(**shape, contents={field: array.ravel().tolist()})):
        np.testing.assert_array_equal(decoded(message).rows, array, strict=True)


def test_decode_model_infer_with_everything_reads_everything() -> None:
    images = [b"one", b"", b"three"]
    packed = b"".join(struct.pack("<I", len(image)) + image for image in images)
    told = {"name": "images", "datatype": "BYTES", "shape": [3], "outputs": [{"name": "logvar"}, {"name": "mean"}]}
    for message in (request(packed, **told), request(**told, contents={"bytes_contents": images})):
        message.id = "7"
        message.parameters["priority"].uint64_param = 2
        message.parameters["timeout"].int64_param = 1500
        message.parameters["unknown"].string_param = "is left alone"
        got = decoded(message)
        assert (got.images, got.rows, got.id, got.priority, got.timeout_s) == (images, None, "7", 2, 0.0015)
        assert got.outputs == (("logvar", True), ("mean", True))
    nothing = decoded(request(RAW))
    assert (nothing.id, nothing.priority, nothing.timeout_s, nothing.outputs) == (None, 0, None, (("mean", True),))


def with_parameter(name: str, **value: Any) -> Any:
    message = request(RAW)
    message.parameters[name].CopyFrom(messages.InferParameter(**value))
    return message


def with_input_parameter(name: str) -> Any:
    message = request(RAW)
    message.inputs[0].parameters[name].string_param = "x"
    return message


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (request(RAW, inputs=[]), "0 inputs"),
        (request(RAW, inputs=[{"name": "rows"}, {"name": "images"}]), "2 inputs"),
        (request(RAW, name="x"), "an input named 'x'"),
        (request(RAW, shape=[]), "shape"),
        (request(RAW, shape=[-1, 6]), "-1 rows"),
        (request(RAW, shape=[2**62, 2**62]), "shape"),
        (request(RAW[:5]), "got 5 bytes"),
        (request(raws=[RAW, RAW]), "2 raw_input_contents"),
        (request(RAW, contents={"uint_contents": list(RAW)}), "and contents of the input"),
        (request(), r"contents \[\], wanted uint_contents for UINT8"),
        (request(contents={"int_contents": list(RAW)}), r"contents \['int_contents'\], wanted uint_contents"),
        (request(contents={"uint_contents": [1]}), "1 values"),
        (request(contents={"uint_contents": [256] * 6}), "UINT8 cannot hold"),
        (request(datatype="FP16", contents={"fp32_contents": [1.0] * 6}), "wanted them for FP16"),
        (request(name="images", datatype="BYTES", shape=[2], contents={"bytes_contents": [b"a"]}), "1 items of BYTES"),
        (request(RAW, outputs=[{"name": "x"}]), "output 'x'"),
        (with_parameter("priority", int64_param=-1), "priority -1"),
        (with_parameter("priority", string_param="high"), "priority 'high'"),
        (with_parameter("timeout", double_param=1.5), "timeout 1.5"),
        (with_input_parameter("shared_memory_region"), "shared_memory_region"),
    ],
)
def test_decode_model_infer_of_something_else_says_what_is_wrong(message: Any, told: str) -> None:
    with pytest.raises(CodecError, match=told):
        decoded(message)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4))
def test_decode_model_infer_of_mutated_bytes_gives_a_request_or_an_error_of_ours(
    mutations: list[tuple[int, int]],
) -> None:
    body = bytearray(request(RAW, outputs=[{"name": "mean"}]).SerializeToString())
    for position, value in mutations:
        body[position % len(body)] = value
    try:
        message = messages.ModelInferRequest.FromString(bytes(body))
    except Exception:  # protobuf's own, which gRPC answers itself
        return
    try:
        assert decoded(message).outputs
    except (CodecError, RequestError):
        pass


class Client:
    """The calls of a server, by raw gRPC: no generated code takes part."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def __call__(self, call: str, request: Any = None, *, service: str = INFERENCE, **options: Any) -> Any:
        name = {"Check": "HealthCheck"}.get(call, call)
        request = getattr(messages, f"{name}Request")() if request is None else request
        answer = getattr(messages, f"{name}Response").FromString
        method = self._channel.unary_unary(f"/{service}/{call}", type(request).SerializeToString, answer)
        return await method(request, **options)

    def watch(self, name: str) -> Any:
        answer = messages.HealthCheckResponse.FromString
        method = self._channel.unary_stream(f"/{HEALTH}/Watch", messages.HealthCheckRequest.SerializeToString, answer)
        return method(messages.HealthCheckRequest(service=name))


def within(digits_bundle: Path, talk: Callable[[Client, Service], Awaitable[None]], **options: Any) -> None:
    """Talk to a service of the digits over gRPC, once it is ready."""

    async def exchange() -> None:
        models = Models.from_bundles([digits_bundle], place=Place(device="cpu", threads=1))
        service = Service(models, Limits(max_rows=100), lanes=1)
        await service.start()
        while not service.ready:
            assert not service.failure
            await asyncio.sleep(0.01)
        with tempfile.TemporaryDirectory() as folder:  # the path of a Unix socket must be short
            address = f"unix:{folder}/grpc"
            server = await start_grpc(service, address, **{"max_message_bytes": 2**20, **options})
            async with grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
                await talk(Client(channel), service)
            await server.stop(None)
        await service.stop()

    asyncio.run(exchange())


def digits(rows: NDArray[np.uint8], **more: Any) -> Any:
    tensor = {"name": "rows", "datatype": "UINT8", "shape": list(rows.shape)}
    return messages.ModelInferRequest(model_name="digits", inputs=[tensor], raw_input_contents=[rows.tobytes()], **more)


def test_model_infer_of_a_pipeline_gives_labels_and_probabilities(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    pipe = make_pipeline(VAEFeatures(digits_bundle, device="cpu"), LogisticRegression(max_iter=2000))
    pipe.fit(digits_rows, NAMES[load_digits().target])
    export_pipeline(pipe, tmp_path, X=digits_rows, name="digits")
    rows = digits_rows[:5]

    async def talk(client: Client, service: Service) -> None:
        described = await client("ModelMetadata", messages.ModelMetadataRequest(name="digits"))
        answer = await client("ModelInfer", digits(rows))
        for output, more in zip(answer.outputs, ([], [10]), strict=True):
            assert list(output.shape) == [5, *more]
        told = [[(o.name, o.datatype) for o in message.outputs] for message in (described, answer)]
        assert told == [[("label", "BYTES"), ("probabilities", "FP32")]] * 2
        labels, probabilities = answer.raw_output_contents
        wanted = [name.encode() for name in pipe.predict(rows)]
        assert labels == b"".join(struct.pack("<I", len(name)) + name for name in wanted)
        got = np.frombuffer(probabilities, "<f4").reshape(5, 10)
        np.testing.assert_allclose(got, pipe.predict_proba(rows), rtol=0, atol=1e-6)

    within(tmp_path, talk)


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_model_infer_gives_the_bits_of_the_local_encoder(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    local = OnnxEncoder(digits_bundle, device="cpu")
    rows = digits_rows[:33]

    async def talk(client: Client, service: Service) -> None:
        answer = await client("ModelInfer", digits(rows, id="a", outputs=[{"name": "logvar"}, {"name": "mean"}]))
        assert (answer.id, answer.model_name, answer.model_version) == ("a", "digits", local.digest.split(":")[1])
        assert answer.parameters["digest"].string_param == local.digest
        assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [
            ("logvar", "FP32", [33, 8]),
            ("mean", "FP32", [33, 8]),
        ]
        for name, raw in zip(("logvar", "mean"), answer.raw_output_contents, strict=True):
            assert raw == local.embed(rows, output=name).tobytes()

    within(digits_bundle, talk)


def test_model_infer_is_in_the_figures_well_or_badly_answered(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    route = "/inference.GRPCInferenceService/ModelInfer"
    recorder = Recorder(Models({}, place=Place()), routes=[route])

    async def talk(client: Client, service: Service) -> None:
        await client("ModelInfer", digits(digits_rows[:5]))
        with pytest.raises(grpc.RpcError):
            await client("ModelInfer", messages.ModelInferRequest(model_name="digits"))

    within(digits_bundle, talk, recorder=recorder)
    figures = recorder.metrics.render()[0].decode()
    counts = {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(figures)
        for sample in family.samples
        if sample.name == "vaefeat_requests_total"
    }
    assert counts == {(route, "200"): 1, (route, "400"): 1}
    assert 'vaefeat_refused_total{reason="malformed_body"} 1' in figures


def test_model_infer_of_images_marks_the_one_that_cannot_be_read(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    local = OnnxEncoder(digits_bundle, device="cpu")
    files = [png(digits_rows[0, 0]), b"no image", png(digits_rows[2, 0])]
    tensor = {"name": "images", "datatype": "BYTES", "shape": [3], "contents": {"bytes_contents": files}}

    async def talk(client: Client, service: Service) -> None:
        answer = await client("ModelInfer", messages.ModelInferRequest(model_name="digits", inputs=[tensor]))
        means = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(3, 8)
        assert means[[0, 2]].tobytes() == local.embed(digits_rows[[0, 2]]).tobytes()
        assert np.isnan(means[1]).all()
        assert answer.parameters["errors"].string_param.startswith('{"1":')

    within(digits_bundle, talk)


def test_metadata_and_readiness_are_told_over_grpc(digits_bundle: Path) -> None:
    async def talk(client: Client, service: Service) -> None:
        assert (await client("ServerLive")).live
        assert (await client("ServerReady")).ready
        assert (await client("ModelReady", messages.ModelReadyRequest(name="digits"))).ready
        assert (await client("ServerMetadata")).name == "vaefeat"
        model = await client("ModelMetadata", messages.ModelMetadataRequest(name="digits"))
        assert list(model.versions) == [service.find("digits").version]
        assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [
            ("rows", "UINT8", [-1, 1, 8, 8]),
            ("images", "BYTES", [-1]),
        ]
        assert model.outputs[0].name == "mean"
        for name, status in (("", messages.SERVING), (INFERENCE, messages.SERVING)):
            request = messages.HealthCheckRequest(service=name)
            assert (await client("Check", request, service=HEALTH)).status == status
        service.fail("the test says so")
        assert not (await client("ServerReady")).ready
        assert (await client("Check", service=HEALTH)).status == messages.NOT_SERVING

    within(digits_bundle, talk)


def test_watch_tells_when_the_health_changes(digits_bundle: Path) -> None:
    async def talk(client: Client, service: Service) -> None:
        known, unknown = client.watch(""), client.watch("other")
        assert (await known.read()).status == messages.SERVING
        assert (await unknown.read()).status == messages.SERVICE_UNKNOWN
        service.fail("the test says so")
        assert (await asyncio.wait_for(known.read(), 10)).status == messages.NOT_SERVING
        known.cancel()
        unknown.cancel()

    within(digits_bundle, talk)


async def refused(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call
    return refusal.value


def test_refusals_have_the_codes_that_clients_act_on(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    async def talk(client: Client, service: Service) -> None:
        cases: list[tuple[Any, str, str]] = [
            (digits(digits_rows[:1, 0, :2]), "INVALID_ARGUMENT", "shape"),
            (digits(digits_rows[:101]), "INVALID_ARGUMENT", "at most 100"),
            (digits(digits_rows[:1], model_version="ab"), "NOT_FOUND", "version 'ab'"),
            (digits(digits_rows[:1], outputs=[{"name": "std"}]), "INVALID_ARGUMENT", "'std'"),
        ]
        for message, code, told in cases:
            error = await refused(client("ModelInfer", message))
            assert (error.code().name, told in (error.details() or "")) == (code, True), error
        error = await refused(client("ModelReady", messages.ModelReadyRequest(name="x" * 9000)))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        error = await refused(client("Check", messages.HealthCheckRequest(service="x"), service=HEALTH))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        too_large = messages.ModelInferRequest(raw_input_contents=[bytes(2**21)])
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            error = await refused(client("ModelInfer", too_large, compression=compression))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await client("ModelInfer", digits(digits_rows[:1]))).outputs[0].name == "mean"

    within(digits_bundle, talk)


def test_keys_and_rates_hold_over_grpc(digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    tables = {"ci": ("embed", "rows_per_s = 5"), "ops": ("admin", "")}
    file.write_text("\n".join(
        f'[keys.{name}]\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\nscopes = ["{scope}"]\n{more}'
        for name, (scope, more) in tables.items()
    ))  # fmt: skip
    file.chmod(0o600)

    async def talk(client: Client, service: Service) -> None:
        one = digits(digits_rows[:1])
        assert (await client("ServerReady")).ready, "probes have no keys"
        for metadata, code in [
            ((), "UNAUTHENTICATED"),
            ((("authorization", "Bearer other"),), "UNAUTHENTICATED"),
            ((("x-api-key", "ops"),), "PERMISSION_DENIED"),
        ]:
            for call, request in (("ModelInfer", one), ("ServerMetadata", None)):
                error = await refused(client(call, request, metadata=metadata))
                assert error.code().name == code
        known = (("authorization", "Bearer ci"),)
        await client("ModelInfer", digits(digits_rows[:50]), metadata=known)
        error = await refused(client("ModelInfer", one, metadata=known))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata() or ())["retry-after"].isdigit()

    within(digits_bundle, talk, keys=KeyRing(file), rates=RateLimiter())


def test_a_deadline_that_has_passed_is_deadline_exceeded(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    async def talk(client: Client, service: Service) -> None:
        message = digits(digits_rows[:1])
        message.parameters["timeout"].int64_param = 1
        error = await refused(client("ModelInfer", message))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    within(digits_bundle, talk)


def test_an_address_that_is_taken_is_a_setup_error(digits_bundle: Path) -> None:
    async def talk(client: Client, service: Service) -> None:
        with pytest.raises(SetupError, match="choose another port"):
            await start_grpc(service, "no-such-host.invalid:1", max_message_bytes=1)

    within(digits_bundle, talk)
