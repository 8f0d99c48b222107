"""Answers of the Open Inference Protocol: tensors of features, labels and probabilities, and their description.

Features and probabilities are FP32. Labels are BYTES where classes are texts, else INT64, FP64 or BOOL.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from serving.errors import RequestError
from serving.protocols.oip import InferRequest, default_outputs
from serving.protocols.tensors import IMAGES, ROWS, tensor_of
from vaefeat.predictor import LABEL, PROBABILITIES

if TYPE_CHECKING:
    from serving.served_model import ServedModel
    from serving.service import Embedded

__all__ = [
    "InferEncoder",
    "as_bytes",
    "describe_model",
    "failures_text",
    "labels_of",
    "marked_failures",
    "output_tensors",
]

_Classes = tuple[str | int | float | bool, ...]


def output_tensors(model: ServedModel) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Give the datatype of each output, and its shape for one row."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    if model.classes:
        datatype = {"U": "BYTES", "i": "INT64", "f": "FP64", "b": "BOOL"}[_values(model.classes).dtype.kind]
        tensors = {LABEL: (datatype, ()), PROBABILITIES: ("FP32", (len(model.classes),))}
    return {name: ("FP32", (width,)) for name, width in model.outputs.items() if name not in tensors} | tensors


class InferEncoder:
    """Writes the answers of one model; what is the same in all of them is written once.

    Parameters
    ----------
    model : ServedModel
    """

    def __init__(self, model: ServedModel) -> None:
        fields = {"model_name": model.name, "model_version": model.version, "parameters": {"digest": model.digest}}
        self._start = orjson.dumps(fields)[:-2]  # still within the parameters
        self._classes = model.classes
        self._outputs = {
            name: orjson.dumps({"name": name, "datatype": datatype})[:-1] + b',"shape":['
            for name, (datatype, _) in output_tensors(model).items()
        }

    def encode(self, request: InferRequest, embedded: Embedded) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Write an answer.

        Parameters
        ----------
        request : InferRequest
        embedded : Embedded
            With all the outputs that `request` names.

        Raises
        ------
        RequestError
            400: an image could not be decoded, and labels are asked for.

        Returns
        -------
        body : bytes
            Data in JSON are flat lists of the shortest decimals that read back as the same float32. The features of an
            image that could not be decoded are NaN as bytes and null in JSON, so that nobody takes them for features;
            the parameter ``errors`` holds JSON text, the message of each by its index.
        headers : list of (bytes, bytes)
            Content-Type, and Inference-Header-Content-Length where there are bytes after the JSON.
        """
        parts = [self._start]
        if embedded.errors:
            parts += [b',"errors":', orjson.dumps(failures_text(embedded))]
        parts.append(b"}")
        if request.id is not None:
            parts += [b',"id":', orjson.dumps(request.id)]
        separator, blobs = b',"outputs":[', []
        for name, binary in request.outputs:
            tensor = labels_of(embedded, self._classes) if name == LABEL else marked_failures(embedded, name)
            parts += [separator, self._outputs[name], b",".join(b"%d" % size for size in tensor.shape), b"]"]
            if binary:
                blob = as_bytes(tensor)
                parts.append(b',"parameters":{"binary_data_size":%d}}' % len(blob))
                blobs.append(blob)
            else:
                flat = tensor.tolist() if name == LABEL else tensor.ravel()
                parts += [b',"data":', orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY), b"}"]
            separator = b","
        parts.append(b"]}")
        text = b"".join(parts)
        if not blobs:
            return text, [(b"content-type", b"application/json")]
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"inference-header-content-length", b"%d" % len(text)),
        ]
        return b"".join([text, *blobs]), headers


def marked_failures(embedded: Embedded, output: str) -> NDArray[np.float32]:
    """Features of one output, C-contiguous, with NaN for the images that could not be decoded."""
    features = np.ascontiguousarray(embedded.features[output], np.dtype("<f4"))
    if embedded.errors:
        features = features.copy()
        features[list(embedded.errors)] = np.nan
    return features


def failures_text(embedded: Embedded) -> str:
    """JSON text with the message of each failed image by its index; a parameter's value can be no object."""
    return orjson.dumps(embedded.errors, option=orjson.OPT_NON_STR_KEYS).decode()


def labels_of(embedded: Embedded, classes: _Classes) -> NDArray[Any]:
    """Labels (n,), little-endian numbers or texts.

    Raises
    ------
    RequestError
        400: an image could not be decoded; unlike numbers, labels have no value that stands for none.
    """
    if embedded.errors:
        position, message = next(iter(sorted(embedded.errors.items())))
        raise RequestError(
            400, "invalid_rows", f"item {position} cannot be read, so that it has no label: {message}; leave it out"
        )
    labels: NDArray[Any] = _values(classes)[embedded.features[LABEL]]
    return labels


def as_bytes(tensor: NDArray[Any]) -> bytes | memoryview:
    """Give a tensor's bytes; texts have their length in bytes before them, four bytes little-endian."""
    if tensor.dtype.kind != "U":
        return tensor.reshape(-1).view(np.uint8).data
    encoded = [text.encode() for text in tensor.tolist()]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)


def _values(classes: _Classes) -> NDArray[Any]:
    values = np.array(classes)
    return values.astype(values.dtype.newbyteorder("<"))


def describe_model(model: ServedModel, *, versions: Iterable[str]) -> dict[str, Any]:
    """Metadata of a model, in the words of the protocol.

    Parameters
    ----------
    model : ServedModel
    versions : iterable of str
        All that are served under its name.
    """
    datatype, shape = tensor_of(model.input)
    inputs = [{"name": ROWS, "datatype": datatype, "shape": [-1, *shape]}]
    if model.input.kind == "image":
        inputs.append({"name": IMAGES, "datatype": "BYTES", "shape": [-1]})
    tensors = output_tensors(model)
    # The default outputs first, which sorting by "is none of them" gives.
    names = sorted(tensors, key=lambda name: name not in default_outputs(tensors))
    return {
        "name": model.name,
        "versions": list(versions),
        "platform": "onnx_onnxv1",
        "inputs": inputs,
        "outputs": [{"name": name, "datatype": tensors[name][0], "shape": [-1, *tensors[name][1]]} for name in names],
    }
