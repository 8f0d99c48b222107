"""The Open Inference Protocol v2 over REST: bodies in and out, JSON and the binary tensor extension.

A request to infer is JSON that describes one input tensor. Its values stand in the JSON, or follow it as bytes; then
the header ``Inference-Header-Content-Length`` says where the JSON ends, and 0 says that there is none and the whole
body is the tensor. Answers have the same two forms.

References
----------
Open Inference Protocol v2, https://github.com/kserve/open-inference-protocol; the binary tensor, parameters and
schedule policy extensions, https://github.com/triton-inference-server/server/tree/main/docs/protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from serving.errors import CodecError, shown
from serving.protocols.number_lists import count
from serving.protocols.tensors import (
    IMAGES,
    ROWS,
    check_input,
    check_outputs,
    images_from_bytes,
    images_from_texts,
    rows_from_bytes,
    rows_from_values,
    tensor_of,
)
from vaefeat import __version__

if TYPE_CHECKING:
    from vaefeat.input_spec import InputSpec

__all__ = [
    "EXTENSIONS",
    "InferRequest",
    "decode_infer",
    "default_outputs",
    "describe_server",
    "encode_error",
    "parse_json_length",
    "parse_priority",
    "parse_timeout",
    "refuse_parameters",
]

#: Of the protocol's extensions, those that are here whatever else the service has.
EXTENSIONS = ("binary_tensor_data", "parameters", "schedule_policy")
_MAX_ID = 1024
#: kserve's client repeats in the body what the address says; the address counts.
_REQUEST_KEYS = {"id", "parameters", "inputs", "outputs", "model_name", "model_version"}
_INPUT_KEYS = {"name", "shape", "datatype", "parameters", "data"}
_OUTPUT_KEYS = {"name", "parameters"}
#: They would change the answer's form, so that to pass over them would be wrong.
_REFUSED = ("classification", "shared_memory_region")
#: Shorter JSON cannot take much memory, whatever it holds; everything beside rows and images fits into it.
_SHORT_JSON = 4096


@dataclass(frozen=True, slots=True)
class InferRequest:
    """What a client asks for. Either `rows` or `images` is there.

    Parameters
    ----------
    id : str, optional
        Echoed in the answer.
    rows : ndarray of shape (n, *row) or (n, n_features), optional
        Of the right shape; :meth:`InputSpec.prepare` has yet to look at the values.
    images : list of bytes, optional
        Encoded images, not looked at yet.
    outputs : tuple of (str, bool)
        Name of each output, and whether it is wanted as bytes; never empty.
    priority : int
        0 for the default, 1 for the highest.
    timeout_s : float, optional
        Time that the client gives the answer, in seconds.
    """

    id: str | None
    rows: NDArray[Any] | None
    images: list[bytes] | None
    outputs: tuple[tuple[str, bool], ...]
    priority: int
    timeout_s: float | None

    @property
    def batch(self) -> NDArray[Any] | list[bytes]:
        """Rows or images, whichever is there."""
        batch = self.images if self.rows is None else self.rows
        assert batch is not None
        return batch


def parse_json_length(header: bytes | None, *, body_length: int) -> int | None:
    """Read ``Inference-Header-Content-Length``.

    Parameters
    ----------
    header : bytes, optional
        Its value.
    body_length : int
        Bytes in the body, once it is inflated.

    Returns
    -------
    int or None
        Bytes of JSON at the start of the body, 0 for a raw tensor without JSON; None where the body is all JSON.

    Raises
    ------
    CodecError
        Not a number, negative, or more than the body has.
    """
    if header is None:
        return None
    # int() alone would take signs, underscores and a million digits.
    if not (header.isdigit() and len(header) < 20):
        raise CodecError(f"got Inference-Header-Content-Length: {shown(header)}, wanted the number of bytes of JSON")
    if (length := int(header)) > body_length:
        raise CodecError(f"got Inference-Header-Content-Length: {length} and a body of {body_length} bytes")
    return length


def decode_infer(
    body: bytes, *, json_length: int | None, spec: InputSpec, outputs: Collection[str], max_rows: int
) -> InferRequest:
    """Read the body of a request to infer.

    Parameters
    ----------
    body : bytes
        The whole body, inflated.
    json_length : int, optional
        From :func:`parse_json_length`. With 0, the body is `rows` in the bundle's own dtype, as many as there are.
    spec : InputSpec
        What the bundle takes.
    outputs : collection of str
        What it gives.
    max_rows : int
        Most rows or images in one request.

    Raises
    ------
    CodecError
        Anything that is not such a request.
    RequestError
        413 for more than `max_rows`.
    """
    if json_length == 0:
        raw = _raw_rows(body, spec=spec, max_rows=max_rows)
        return InferRequest(None, raw, None, tuple((name, True) for name in default_outputs(outputs)), 0, None)
    fields = _parse(body if json_length is None else body[:json_length], spec=spec, max_rows=max_rows)
    parameters = _parameters(fields, "the request")
    tensor = _only_input(fields.get("inputs"))
    shape = tensor.get("shape")
    if not isinstance(shape, list):
        raise CodecError(f"got the shape {shown(shape)}, wanted a list of integers, the number of rows first")
    name, datatype = tensor.get("name", ""), tensor.get("datatype", "")
    n = check_input(name, datatype, shape, spec=spec, max_rows=max_rows)
    start = _blob_start(tensor, json_length=json_length, body_length=len(body))
    rows: NDArray[Any] | None = None
    images: list[bytes] | None = None
    if name == IMAGES:
        images = images_from_texts(tensor["data"], n=n) if start is None else images_from_bytes(body, offset=start, n=n)
    elif start is None:
        rows = rows_from_values(tensor["data"], datatype=datatype, shape=shape, spec=spec)
    else:
        rows = rows_from_bytes(body, offset=start, datatype=datatype, shape=shape, spec=spec)
    return InferRequest(
        _request_id(fields.get("id")),
        rows,
        images,
        _asked_outputs(fields.get("outputs"), _flag(parameters, "binary_data_output", default=False), outputs),
        parse_priority(parameters.get("priority")),
        parse_timeout(parameters.get("timeout")),
    )


def default_outputs(outputs: Collection[str]) -> tuple[str, ...]:
    """Give what is answered where a request names no output: the mean, or all that a pipeline has."""
    return ("mean",) if "mean" in outputs else tuple(outputs)


def _raw_rows(body: bytes, *, spec: InputSpec, max_rows: int) -> NDArray[Any]:
    n, rest = divmod(len(body), spec.row_bytes)
    if rest or not n:
        raise CodecError(f"got a raw body of {len(body)} bytes, wanted {spec} of {spec.row_bytes} bytes each")
    datatype, shape = tensor_of(spec)
    check_input(ROWS, datatype, [n, *shape], spec=spec, max_rows=max_rows)
    return rows_from_bytes(body, datatype=datatype, shape=[n, *shape], spec=spec)


def _parse(text: bytes, *, spec: InputSpec, max_rows: int) -> dict[str, Any]:
    """Parse JSON after a look at how much memory it could take.

    An empty list takes two bytes on the wire and sixty in memory.
    """
    if len(text) > _SHORT_JSON:
        lists_in_a_row = 1 + int(np.cumprod(spec.shape[:-1], dtype=np.int64).sum())
        bounds = {b"[": max_rows * lists_in_a_row, b",": max_rows * spec.n_features, b'"': 2 * max_rows, b"{": 0}
        for mark, bound in bounds.items():
            if count(text, mark) > bound + _SHORT_JSON:
                raise CodecError(
                    f"got JSON with more {mark.decode()} than {max_rows} rows take, wanted one input and at most "
                    f"{max_rows} rows in it; send them in several requests"
                )
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise CodecError(
            f"got a body that is not JSON ({error}); NaN and Infinity have no JSON form, and bytes after the JSON "
            "need the header Inference-Header-Content-Length"
        ) from error
    return _object(fields, _REQUEST_KEYS, "the request")


def _object(value: object, known: set[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CodecError(f"got {what} as {shown(value)}, wanted a JSON object")
    # A misspelt key would otherwise be an answer to another question.
    if not value.keys() <= known:
        raise CodecError(f"got the keys {shown(sorted(value.keys() - known))} in {what}, wanted {sorted(known)}")
    return value


def _parameters(fields: dict[str, Any], what: str) -> dict[str, Any]:
    """Parameters of a request or tensor. Those that are not known have no effect, as the protocol has it."""
    parameters = fields.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise CodecError(f"got the parameters {shown(parameters)} of {what}, wanted a JSON object")
    refuse_parameters(parameters, what)
    return parameters


def refuse_parameters(parameters: Collection[str], what: str) -> None:
    """Refuse parameters that would change what values or answers mean.

    Raises
    ------
    CodecError
    """
    for name in _REFUSED:
        if name in parameters:
            raise CodecError(f"got the parameter {name!r} of {what}, which is not served; leave it out")


def _only_input(inputs: object) -> dict[str, Any]:
    if not isinstance(inputs, list) or len(inputs) != 1:
        got = f"{len(inputs)} inputs" if isinstance(inputs, list) else f"inputs {shown(inputs)}"
        raise CodecError(f"got {got}, wanted a list of one input, {ROWS!r} or, for a bundle of images, {IMAGES!r}")
    return _object(inputs[0], _INPUT_KEYS, "the input")


def _blob_start(tensor: dict[str, Any], *, json_length: int | None, body_length: int) -> int | None:
    """Offset of the input's bytes in the body; None where its values stand in the JSON."""
    size = _parameters(tensor, "the input").get("binary_data_size")
    following = 0 if json_length is None else body_length - json_length
    if (size is None) == (tensor.get("data") is None):
        has = "neither data nor binary_data_size" if size is None else "both data and binary_data_size"
        raise CodecError(f"got an input with {has}, wanted one of them")
    if size is not None and (type(size) is not int or size != following):
        hint = "; say with Inference-Header-Content-Length where the JSON ends" if json_length is None else ""
        raise CodecError(f"got binary_data_size {shown(size)} and {following} bytes after the JSON{hint}")
    if size is None and following:
        raise CodecError(f"got {following} bytes after the JSON, wanted none, or binary_data_size in place of data")
    return None if size is None else json_length


def _request_id(value: object) -> str | None:
    if value is None or (isinstance(value, str) and len(value) <= _MAX_ID):
        return value
    raise CodecError(f"got the id {shown(value)}, wanted a string of at most {_MAX_ID} characters")


def _flag(parameters: dict[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise CodecError(f"got {name} {shown(value)}, wanted true or false")
    return value


def _asked_outputs(asked: object, binary: bool, outputs: Collection[str]) -> tuple[tuple[str, bool], ...]:
    if asked is None or asked == []:
        return tuple((name, binary) for name in default_outputs(outputs))
    if not isinstance(asked, list):
        raise CodecError(f"got the outputs {shown(asked)}, wanted a list of objects with a name")
    tensors = [_object(output, _OUTPUT_KEYS, "an output") for output in asked]
    check_outputs([tensor.get("name") for tensor in tensors], outputs=outputs)
    return tuple(
        (tensor["name"], _flag(_parameters(tensor, "an output"), "binary_data", default=binary)) for tensor in tensors
    )


def parse_priority(value: object) -> int:
    """Read the parameter ``priority``; None is 0, the default.

    Raises
    ------
    CodecError
    """
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value < 2**32:
        raise CodecError(f"got priority {shown(value)}, wanted 0 for the default, 1 for the highest, or more for less")
    return value


def parse_timeout(value: object) -> float | None:
    """Read the parameter ``timeout``, microseconds; None and 0 are no timeout.

    Raises
    ------
    CodecError
    """
    if value is None or (type(value) is int and value == 0):
        return None
    if type(value) is not int or value < 0:
        raise CodecError(f"got timeout {shown(value)}, wanted a whole number of microseconds")
    return value / 1e6


def describe_server(*, extensions: Iterable[str] = EXTENSIONS) -> dict[str, Any]:
    """Metadata of the server, in the words of the protocol."""
    return {"name": "vaefeat", "version": __version__, "extensions": list(extensions)}


def encode_error(message: str) -> bytes:
    """Write the body of any failure: ``{"error": "text"}``, which is all that the protocol's clients read."""
    # A message may quote what the client sent, so it may hold what UTF-8 cannot.
    return orjson.dumps({"error": message.encode("utf-8", "backslashreplace").decode()})
