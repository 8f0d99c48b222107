"""``POST /v1/embeddings`` in the form of OpenAI's API, with images where that has texts.

An item of ``input`` is a data URI (``data:image/png;base64,...``), an object ``{"image": data URI or base64}``, or a
list of numbers, which is a row. ``messages`` in vLLM's form hold one image each, an ``image_url`` that is a data URI.
Addresses are never fetched. Unlike in the original, what is not known is refused instead of ignored.

Source: OpenAI's API reference, "Create embeddings"; vLLM's "OpenAI-compatible server", embeddings of images; the
official client asks for base64 where its caller says nothing and decodes little-endian float32.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from serving.errors import CodecError, RequestError, shown
from serving.protocols.number_lists import count, read_numbers

__all__ = ["EmbeddingsRequest", "decode_embeddings", "encode_embeddings", "error_form"]

_KEYS = {"model", "input", "messages", "encoding_format", "dimensions", "modality", "user"}
_DATA_URI = re.compile(r"data:([a-zA-Z0-9.+/-]{0,64})((?:;[a-zA-Z0-9=._+-]{1,64})*),")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
#: Objects, lists, keys and texts that one item may bring along, which is what bounds the memory of a parsed body.
_MARKS_PER_ITEM = 12
_FEW_MARKS = 64


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """What a request asks for.

    Attributes
    ----------
    model : str or None
    batch : ndarray or list of bytes
        Rows of numbers, or encoded images.
    as_base64 : bool
    dimensions : int or None
    """

    model: str | None
    batch: NDArray[Any] | list[bytes]
    as_base64: bool
    dimensions: int | None


def decode_embeddings(body: bytes, *, max_items: int, max_values: int) -> EmbeddingsRequest:
    """Read a request.

    Parameters
    ----------
    body : bytes
        JSON.
    max_items : int
        Most items that are read.
    max_values : int
        Most numbers that all rows may hold together.

    Raises
    ------
    CodecError
        Not such a request.
    RequestError
        400: text or an address where an image belongs, an unknown key or an option that there is none of.
    """
    # Before it is parsed: lists of two bytes and numbers of one take tens of times that in memory.
    marks = _FEW_MARKS + _MARKS_PER_ITEM * max_items
    if (
        count(body, b"{") + count(body, b"[") > marks
        or count(body, b":") > marks
        or count(body, b'"') > 2 * marks
        or count(body, b",") > marks + max_values
    ):
        raise CodecError(f"got more lists, objects, texts or numbers than {max_items} items need; send fewer at a time")
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise CodecError(f"got a body that is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CodecError(f'got a {type(values).__name__}, wanted an object with "model" and "input"')
    if unknown := sorted(values.keys() - _KEYS):
        raise _refused(f"got the unknown keys {shown(unknown)}, wanted only {sorted(_KEYS)}", unknown[0][:80])
    return EmbeddingsRequest(
        _text(values, "model"),
        _items(values, max_items),
        _encoding(values),
        _dimensions(values),
    )


def encode_embeddings(features: NDArray[np.float32], *, model: str, digest: str, as_base64: bool) -> bytes:
    """Write the answer: one embedding for each row, in order.

    Parameters
    ----------
    features : ndarray of shape (n, d)
        Finite.
    model, digest : str
    as_base64 : bool
        Each vector as base64 of little-endian float32; else as a list of numbers.
    """
    if as_base64:
        plain: list[Any] = [base64.b64encode(row.tobytes()).decode() for row in features.astype("<f4", copy=False)]
    else:
        plain = list(np.ascontiguousarray(features))
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(plain)]
    # The client insists on usage; an item counts as one token.
    usage = {"prompt_tokens": len(data), "total_tokens": len(data)}
    answer = {"object": "list", "data": data, "model": model, "usage": usage, "digest": digest}
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def error_form(error: RequestError, request_id: bytes) -> bytes:
    """Write an error as OpenAI's clients expect it, with the request's id."""
    message = error.message.encode("utf-8", "backslashreplace").decode()
    told = {
        "message": message,
        "type": error.kind,
        "param": error.param,
        "code": error.kind,
        "request_id": request_id.decode(),
    }
    return orjson.dumps({"error": told})


def _items(values: Mapping[str, Any], max_items: int) -> NDArray[Any] | list[bytes]:
    if ("input" in values) == ("messages" in values):
        raise _refused('got "input" and "messages" together or neither, wanted one of them', "input")
    if values.get("modality", "image") != "image":
        raise _refused(f'got modality={shown(values["modality"])}, wanted "image"', "modality")
    if "messages" in values:
        return [_image(item, f"messages[{i}]") for i, item in enumerate(_conversations(values["messages"]))]
    given = values["input"]
    if isinstance(given, str | dict):
        given = [given]
    if not isinstance(given, list) or not given:
        raise _refused(f"got input={shown(given)}, wanted one item or a list of some", "input")
    if isinstance(given[0], int | float):
        given = [given]
    if len(given) > max_items:
        raise RequestError(413, "too_large", f"got {len(given)} items, wanted at most {max_items}; send them in parts")
    if isinstance(given[0], list):
        return _rows(given)
    return [_image(item, f"input[{i}]") for i, item in enumerate(given)]


def _rows(given: list[Any]) -> NDArray[Any]:
    if not all(isinstance(row, list) for row in given):
        raise _refused("got lists of numbers among other items, wanted one kind", "input")
    if len(set(map(len, given))) > 1:
        raise CodecError("got rows of different lengths, wanted one length for all")
    try:
        return read_numbers(given, (len(given), len(given[0]))).astype(np.float64, copy=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise _refused(
            "got lists that do not hold numbers, wanted a flat list of numbers for each row", "input"
        ) from error


def _conversations(messages: Any) -> list[Any]:
    """Give the one image of each conversation: a list of messages is one, a list of such lists are several."""
    if not isinstance(messages, list) or not messages:
        raise _refused(f"got messages={shown(messages)}, wanted a list", "messages")
    several = messages if isinstance(messages[0], list) else [messages]
    found = []
    for position, conversation in enumerate(several):
        where = f"messages[{position}]"
        if not isinstance(conversation, list):
            raise _refused(f"got {where} that is no list of messages", "messages")
        parts = [part for message in conversation for part in _content(message, where)]
        if len(parts) != 1:
            raise _refused(f"got {len(parts)} parts in {where}, wanted exactly one image", "messages")
        found.append(parts[0])
    return found


def _content(message: Any, where: str) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        raise _refused(
            f'got a message in {where} without a list as its content, wanted {{"content": [...]}}', "messages"
        )
    found = []
    for part in content:
        address = part.get("image_url") if isinstance(part, dict) and part.get("type") == "image_url" else None
        url = address.get("url") if isinstance(address, dict) else address
        if not isinstance(url, str):
            raise _refused(f"got a part in {where} that is no image_url: only images are embedded", "messages")
        found.append(url)
    return found


def _image(item: Any, where: str) -> bytes:
    bare = isinstance(item, dict)
    if bare:
        if item.keys() != {"image"}:
            raise _refused(f'got {where} with the keys {shown(sorted(item))}, wanted {{"image": "data:..."}}', "input")
        item = item["image"]
    if not isinstance(item, str):
        raise _refused(f"got {where} of type {type(item).__name__}, wanted a data URI of an image", "input")
    found = _DATA_URI.match(item)
    if found is None and _ADDRESS.match(item):
        raise _refused(f"got an address as {where}, which is never fetched; send a data URI", "input")
    if found is None and not bare:
        raise _refused(
            f"got text as {where}, wanted an image as data:image/png;base64,...; text is not embedded", "input"
        )
    if found is not None and not found[2].endswith(";base64"):
        raise _refused(f"got a data URI that is not base64 as {where}, wanted data:image/png;base64,...", "input")
    encoded = item if found is None else item[found.end() :]
    try:
        return binascii.a2b_base64(encoded.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise CodecError(f"got {where} that is not base64: {error}") from error


def _encoding(values: Mapping[str, Any]) -> bool:
    encoding = values.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise _refused(f'got encoding_format={shown(encoding)}, wanted "float" or "base64"', "encoding_format")
    return bool(encoding == "base64")


def _dimensions(values: Mapping[str, Any]) -> int | None:
    dimensions = values.get("dimensions")
    if dimensions is not None and (not isinstance(dimensions, int) or isinstance(dimensions, bool)):
        raise _refused(f"got dimensions={shown(dimensions)}, wanted a whole number", "dimensions")
    return dimensions


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise _refused(f"got {key} of type {type(value).__name__}, wanted a string", key)
    return value


def _refused(message: str, param: str) -> RequestError:
    return RequestError(400, "invalid_parameter", message, param=param)
