"""The Open Inference Protocol v2 over gRPC, and gRPC's own health protocol.

The six calls of ``inference.GRPCInferenceService`` and both of ``grpc.health.v1.Health``, on the same
:class:`serving.service.Service` as everything else.

References
----------
See :mod:`serving.protocols.oip_messages`; https://grpc.io/docs/guides/health-checking.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

import serving.protocols.oip_messages as messages
from serving.errors import CodecError, RequestError, SetupError
from serving.guard.calls import CallGuard, Reader, key_of
from serving.protocols.oip import (
    InferRequest,
    default_outputs,
    describe_server,
    parse_priority,
    parse_timeout,
    refuse_parameters,
)
from serving.protocols.oip_call import InferCall, told_to
from serving.protocols.oip_outputs import (
    as_bytes,
    describe_model,
    failures_text,
    labels_of,
    marked_failures,
    output_tensors,
)
from serving.protocols.tensors import (
    IMAGES,
    check_input,
    check_outputs,
    images_from_bytes,
    rows_from_bytes,
    rows_from_numbers,
)
from vaefeat.predictor import LABEL

if TYPE_CHECKING:
    from serving.guard.keys import KeyRing
    from serving.guard.rates import RateLimiter
    from serving.served_model import ServedModel
    from serving.service import Embedded, Service
    from serving.watching.recorder import Recorder
    from vaefeat.input_spec import InputSpec

__all__ = [
    "HealthServicer",
    "InferenceServicer",
    "add_GRPCInferenceServiceServicer_to_server",
    "add_HealthServicer_to_server",
    "decode_model_infer",
    "encode_model_infer",
    "start_grpc",
]

_INFERENCE_SERVICE = "inference.GRPCInferenceService"
_HEALTH_SERVICE = "grpc.health.v1.Health"
#: What the health of can be asked for.
_KNOWN = ("", _INFERENCE_SERVICE)
_CALLS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
#: The field of InferTensorContents that holds values of a datatype.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
#: Calls that are answered at the same time; further ones are RESOURCE_EXHAUSTED.
_MAX_CALLS = 64
_WINDOW_BYTES = 65_536
#: How often Watch looks whether something changed, in seconds.
_WATCH_EVERY_S = 0.5


def decode_model_infer(
    message: Any, *, spec: InputSpec, outputs: Collection[str], max_rows: int
) -> InferRequest:  # the message's class is made at run time
    """Read a ModelInferRequest; parameters as :func:`serving.protocols.oip.decode_infer`.

    Raises
    ------
    CodecError
        Anything that is not such a request.
    RequestError
        413 for more than `max_rows`.
    """
    if len(message.inputs) != 1:
        raise CodecError(f"got {len(message.inputs)} inputs, wanted one")
    (tensor,) = message.inputs
    refuse_parameters(tensor.parameters, "the input")
    name, datatype, shape = tensor.name, tensor.datatype, list(tensor.shape)
    n = check_input(name, datatype, shape, spec=spec, max_rows=max_rows)
    rows, images = None, None
    if message.raw_input_contents:
        raw = _only_raw(message, tensor)
        if name == IMAGES:
            images = images_from_bytes(raw, n=n)
        else:
            rows = rows_from_bytes(raw, datatype=datatype, shape=shape, spec=spec)
    else:
        values = _typed_contents(tensor, datatype)
        if name != IMAGES:
            rows = rows_from_numbers([values], datatype=datatype, shape=shape, spec=spec)
        elif len(values) == n:
            images = list(values)
        else:
            raise CodecError(f"got {len(values)} items of BYTES, wanted {n}, as the shape says")
    names = [output.name for output in message.outputs]
    check_outputs(names, outputs=outputs)
    for output in message.outputs:
        refuse_parameters(output.parameters, "an output")
    return InferRequest(
        message.id or None,
        rows,
        images,
        tuple((name, True) for name in names or default_outputs(outputs)),
        parse_priority(_parameter(message, "priority")),
        parse_timeout(_parameter(message, "timeout")),
    )


def _only_raw(message: Any, tensor: Any) -> bytes:
    if len(message.raw_input_contents) != 1 or tensor.HasField("contents"):
        raise CodecError(
            f"got {len(message.raw_input_contents)} raw_input_contents"
            f"{' and contents of the input' if tensor.HasField('contents') else ''}, wanted one for the one input, "
            "or its contents in their place"
        )
    raw: bytes = message.raw_input_contents[0]
    return raw


def _typed_contents(tensor: Any, datatype: str) -> Any:
    field = _CONTENTS.get(datatype)
    if field is None:
        raise CodecError(f"got no raw_input_contents, wanted them for {datatype}, which contents have no field for")
    filled = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if filled != [field]:
        raise CodecError(
            f"got the contents {filled}, wanted {field} for {datatype}, or raw_input_contents in their place"
        )
    return getattr(tensor.contents, field)


def _parameter(message: Any, name: str) -> Any:
    # Asking a map for what is not there would put it there.
    if name not in message.parameters:
        return None
    parameter = message.parameters[name]
    choice = parameter.WhichOneof("parameter_choice")
    return None if choice is None else getattr(parameter, choice)


def encode_model_infer(model: ServedModel, request: InferRequest, embedded: Embedded) -> Any:
    """Write a ModelInferResponse with raw contents.

    The features of images that could not be decoded are NaN, as :class:`serving.protocols.oip_outputs.InferEncoder` has
    it; where labels are asked for, such images are an error.
    """
    response = messages.ModelInferResponse(
        model_name=model.name, model_version=model.version, id=request.id or "", parameters={}
    )
    response.parameters["digest"].string_param = model.digest
    if embedded.errors:
        response.parameters["errors"].string_param = failures_text(embedded)
    tensors = output_tensors(model)
    for name, _ in request.outputs:
        tensor = labels_of(embedded, model.classes) if name == LABEL else marked_failures(embedded, name)
        response.outputs.add(name=name, datatype=tensors[name][0], shape=tensor.shape)
        response.raw_output_contents.append(bytes(as_bytes(tensor)))
    return response


class InferenceServicer:
    """The calls of ``inference.GRPCInferenceService``, by their names there.

    Parameters
    ----------
    service : Service
    keys : KeyRing, optional
        One with the scope ``embed`` is asked for by everything but what probes call: ServerLive, ServerReady and
        ModelReady. It travels in the metadata, as ``authorization: Bearer KEY`` or ``x-api-key: KEY``.
    rates : RateLimiter, optional
        Slows keys down to their rates.
    recorder : Recorder, optional
        Puts calls to infer into figures, logs and traces.
    """

    def __init__(
        self,
        service: Service,
        *,
        keys: KeyRing | None = None,
        rates: RateLimiter | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._service, self._keys, self._rates, self._recorder = service, keys, rates, recorder

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """Answer, which is the news."""
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Tell whether every model works."""
        return messages.ServerReadyResponse(ready=self._service.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Tell whether one model works."""
        async with told_to(context):
            try:
                self._service.find(request.name, request.version)
            except RequestError as error:
                # Probes have no key, and are not told what else there is.
                raise RequestError(error.status, error.kind, "got a model or version that is not served here") from None
            return messages.ModelReadyResponse(ready=self._service.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """Describe the server; of the protocol's extensions, only parameters and priorities are for gRPC."""
        async with told_to(context):
            key_of(context, self._keys)
            return messages.ServerMetadataResponse(**describe_server(extensions=("parameters", "schedule_policy")))

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """Describe a model."""
        async with told_to(context):
            key_of(context, self._keys)
            model = self._service.find(request.name, request.version)
            return messages.ModelMetadataResponse(**describe_model(model, versions=self._service.versions(model.name)))

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Embed rows or images."""
        call = InferCall(context, n_bytes=request.ByteSize(), room=self._service.room, rates=self._rates)
        if self._recorder is not None:
            self._recorder.begin(call)
        async with told_to(context, self._recorder, call):
            try:
                return await self._infer(request, context, call)
            finally:
                call.leave()

    async def _infer(self, request: Any, context: Any, call: InferCall) -> Any:
        call.key = key_of(context, self._keys)
        call.admit_bytes()
        model = self._service.find(request.model_name or None, request.model_version)
        call.model, call.version = model.name, model.version
        limits = self._service.limits
        decode = partial(decode_model_infer, request, spec=model.input, outputs=model.names, max_rows=limits.max_rows)
        # Typed contents are read number by number; many would hold up everybody else.
        inline = request.raw_input_contents or call.announced_bytes <= limits.inline_bytes
        asked = decode() if inline else await self._service.off_loop(decode)
        call.embedded = await self._service.embed(
            model,
            asked.batch,
            outputs=tuple(name for name, _ in asked.outputs),
            priority=asked.priority,
            timeout_s=_sooner(asked.timeout_s, context.time_remaining()),
            caller=call,
        )
        call.served = model
        return encode_model_infer(model, asked, call.embedded)


def _sooner(timeout_s: float | None, deadline_s: float | None) -> float | None:
    given = [seconds for seconds in (timeout_s, deadline_s) if seconds is not None]
    return min(given, default=None)


class HealthServicer:
    """Both calls of ``grpc.health.v1.Health``: the whole server is known as "", and the inference service by its name.

    Parameters
    ----------
    service : Service
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Check(self, request: Any, context: Any) -> Any:
        """Tell how it is now."""
        if (status := self._status(request.service)) == messages.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"got service {request.service[:80]!r}, wanted {_KNOWN}")
        return messages.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Tell how it is now, and whenever that changes, until the service stops."""
        told = None
        while not self._service.stopping:
            if (status := self._status(request.service)) != told:
                told = status
                yield messages.HealthCheckResponse(status=status)
            await asyncio.sleep(_WATCH_EVERY_S)

    def _status(self, name: str) -> int:
        if name not in _KNOWN:
            return messages.SERVICE_UNKNOWN
        return messages.SERVING if self._service.ready else messages.NOT_SERVING


def add_GRPCInferenceServiceServicer_to_server(servicer: Any, server: Any) -> None:
    """Register what has the calls of :class:`InferenceServicer`, as generated code does.

    Ray Serve's ``grpc_servicer_functions`` takes this function.
    """
    _register(server, _INFERENCE_SERVICE, {name: _unary(getattr(servicer, name), name) for name in _CALLS})


def add_HealthServicer_to_server(servicer: Any, server: Any) -> None:
    """Register what has the calls of :class:`HealthServicer`, for Ray Serve as well."""
    check = _unary(servicer.Check, "HealthCheck")
    watch = grpc.unary_stream_rpc_method_handler(servicer.Watch, check.request_deserializer, check.response_serializer)
    _register(server, _HEALTH_SERVICE, {"Check": check, "Watch": watch})


def _unary(call: Any, messages_of: str) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        call,
        request_deserializer=getattr(messages, f"{messages_of}Request").FromString,
        response_serializer=getattr(messages, f"{messages_of}Response").SerializeToString,
    )


def _add_guarded(guard: CallGuard, inference: InferenceServicer, health: HealthServicer, server: Any) -> None:
    """Register both services' calls behind a guard, which reads their messages."""

    def guarded(call: Any, messages_of: str, **reading: bool) -> Any:
        reader = Reader(getattr(messages, f"{messages_of}Request").FromString, **reading)
        serializer = getattr(messages, f"{messages_of}Response").SerializeToString
        return grpc.stream_unary_rpc_method_handler(guard.unary(call, reader), response_serializer=serializer)

    def of_inference(name: str, **reading: bool) -> tuple[str, Any]:
        return name, guarded(getattr(inference, name), name, **reading)

    calls = [
        of_inference("ServerLive", keyed=False, empty=True),
        of_inference("ServerReady", keyed=False, empty=True),
        of_inference("ModelReady", keyed=False),
        of_inference("ServerMetadata"),
        of_inference("ModelMetadata"),
        of_inference("ModelInfer", infers=True),
    ]
    _register(server, _INFERENCE_SERVICE, dict(calls))
    check = guarded(health.Check, "HealthCheck", keyed=False)
    reader = Reader(messages.HealthCheckRequest.FromString, keyed=False)
    watch = grpc.stream_stream_rpc_method_handler(
        guard.streaming(health.Watch, reader), response_serializer=check.response_serializer
    )
    _register(server, _HEALTH_SERVICE, {"Check": check, "Watch": watch})


def _register(server: Any, name: str, handlers: dict[str, Any]) -> None:
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    server.add_registered_method_handlers(name, handlers)


async def start_grpc(
    service: Service,
    address: str,
    *,
    max_message_bytes: int,
    keys: KeyRing | None = None,
    rates: RateLimiter | None = None,
    recorder: Recorder | None = None,
    shared: bool = False,
) -> grpc.aio.Server:
    """Serve both protocols.

    Parameters
    ----------
    service : Service
    address : str
        Host and port, ``127.0.0.1:8001``.
    max_message_bytes : int
        Largest request. What requests take together, :class:`serving.guard.calls.CallGuard` bounds.
    keys : KeyRing, optional
    rates : RateLimiter, optional
    recorder : Recorder, optional
        As for :class:`InferenceServicer`.
    shared : bool
        Whether other processes serve at the same port; connections are shared out among them.

    Returns
    -------
    grpc.aio.Server
        Running; ``await server.stop(grace_s)`` ends it.

    Raises
    ------
    SetupError
        The address cannot be bound.
    """
    server = grpc.aio.server(
        maximum_concurrent_rpcs=_MAX_CALLS,
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # What a client may send of a message before the guard reads it; by default it grows with the connection.
            ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
            ("grpc.http2.bdp_probe", 0),
            # Of two services on one port, each would get some of the connections, without a word.
            ("grpc.so_reuseport", int(shared)),
        ],
    )
    inference = InferenceServicer(service, keys=keys, rates=rates, recorder=recorder)
    guard = CallGuard(service, max_message_bytes=max_message_bytes, keys=keys, recorder=recorder)
    _add_guarded(guard, inference, HealthServicer(service), server)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise SetupError(f"got {address}, which gRPC cannot listen on ({error}); choose another port") from error
    await server.start()
    return server
