"""The protobuf messages of ``inference.GRPCInferenceService`` and ``grpc.health.v1.Health``, made when imported.

Names, numbers and types are those of the public protocols. They live in a pool of their own, because a process may also
hold a client's generated classes of the same names, and one pool takes each name once. Classes are attributes of this
module: ``oip_messages.ModelInferRequest``.

References
----------
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/open_inference_grpc.proto,
https://github.com/grpc/grpc/blob/master/src/proto/grpc/health/v1/health.proto
"""

from __future__ import annotations

import re
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

__all__ = ["NOT_SERVING", "SERVICE_UNKNOWN", "SERVING"]

#: Fields by message, as a .proto file writes them; a name within a name is a nested message.
_INFERENCE: dict[str, tuple[str, ...]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("bool live = 1",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("bool ready = 1",),
    "ModelReadyRequest": ("string name = 1", "string version = 2"),
    "ModelReadyResponse": ("bool ready = 1",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("string name = 1", "string version = 2", "repeated string extensions = 3"),
    "ModelMetadataRequest": ("string name = 1", "string version = 2"),
    "ModelMetadataResponse": (
        "string name = 1",
        "repeated string versions = 2",
        "string platform = 3",
        "repeated ModelMetadataResponse.TensorMetadata inputs = 4",
        "repeated ModelMetadataResponse.TensorMetadata outputs = 5",
    ),
    "ModelMetadataResponse.TensorMetadata": ("string name = 1", "string datatype = 2", "repeated int64 shape = 3"),
    "InferParameter": (
        "oneof bool bool_param = 1",
        "oneof int64 int64_param = 2",
        "oneof string string_param = 3",
        "oneof double double_param = 4",
        "oneof uint64 uint64_param = 5",
    ),
    "InferTensorContents": (
        "repeated bool bool_contents = 1",
        "repeated int32 int_contents = 2",
        "repeated int64 int64_contents = 3",
        "repeated uint32 uint_contents = 4",
        "repeated uint64 uint64_contents = 5",
        "repeated float fp32_contents = 6",
        "repeated double fp64_contents = 7",
        "repeated bytes bytes_contents = 8",
    ),
    "ModelInferRequest": (
        "string model_name = 1",
        "string model_version = 2",
        "string id = 3",
        "map InferParameter parameters = 4",
        "repeated ModelInferRequest.InferInputTensor inputs = 5",
        "repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6",
        "repeated bytes raw_input_contents = 7",
    ),
    "ModelInferRequest.InferInputTensor": (
        "string name = 1",
        "string datatype = 2",
        "repeated int64 shape = 3",
        "map InferParameter parameters = 4",
        "InferTensorContents contents = 5",
    ),
    "ModelInferRequest.InferRequestedOutputTensor": ("string name = 1", "map InferParameter parameters = 2"),
    "ModelInferResponse": (
        "string model_name = 1",
        "string model_version = 2",
        "string id = 3",
        "map InferParameter parameters = 4",
        "repeated ModelInferResponse.InferOutputTensor outputs = 5",
        "repeated bytes raw_output_contents = 6",
    ),
    "ModelInferResponse.InferOutputTensor": (
        "string name = 1",
        "string datatype = 2",
        "repeated int64 shape = 3",
        "map InferParameter parameters = 4",
        "InferTensorContents contents = 5",
    ),
}
#: The status is an enumeration there; on the wire that is an int32.
_HEALTH: dict[str, tuple[str, ...]] = {
    "HealthCheckRequest": ("string service = 1",),
    "HealthCheckResponse": ("int32 status = 1",),
}
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3

_FIELD = re.compile(r"(?:(repeated|map|oneof) )?([\w.]+) (\w+) = (\d+)")


def _classes(package: str, messages: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Make the classes of one package; nested messages stand after those that they are in."""
    file = FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    found: dict[str, Any] = {}
    for path, fields in messages.items():
        outer, _, name = path.rpartition(".")
        message = found[outer].nested_type.add(name=name) if outer else file.message_type.add(name=name)
        for line in fields:
            _add_field(message, line, scope=f".{package}.", path=path)
        found[path] = message
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    classes: dict[str, Any] = {}
    for path in messages:
        classes[path] = GetMessageClass(pool.FindMessageTypeByName(f"{package}.{path}"))
        # Ray's gRPC proxy hands requests to replicas by the place that their class is found in.
        classes[path].__module__ = __name__
    return classes


def _add_field(message: DescriptorProto, line: str, *, scope: str, path: str) -> None:
    match = _FIELD.fullmatch(line)
    assert match, line
    label, type_name, name, number = match.groups()
    field = message.field.add(name=name, number=int(number), label=FieldDescriptorProto.LABEL_OPTIONAL)
    if label == "oneof":
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if label in ("repeated", "map"):
        field.label = FieldDescriptorProto.LABEL_REPEATED
    if label == "map":
        # On the wire, a map is repeated entries of a nested message.
        entry = message.nested_type.add(name="ParametersEntry")
        entry.options.map_entry = True
        _add_field(entry, "string key = 1", scope=scope, path=path)
        _add_field(entry, f"{type_name} value = 2", scope=scope, path=path)
        type_name = f"{path}.ParametersEntry"
    if type_name[0].isupper():
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, scope + type_name
    else:
        field.type = FieldDescriptorProto.Type.Value(f"TYPE_{type_name.upper()}")


_ALL = {**_classes("inference", _INFERENCE), **_classes("grpc.health.v1", _HEALTH)}


def __getattr__(name: str) -> Any:
    """Give a message's class by its name."""
    try:
        return _ALL[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
