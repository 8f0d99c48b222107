"""Files out of a multipart/form-data body, parsed by the python-multipart library."""

from __future__ import annotations

import logging

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from serving.errors import CodecError, too_large

__all__ = ["split_parts"]


# What it warns of is what the client sent, and the client is told.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


def split_parts(body: bytes, content_type: bytes, *, max_parts: int) -> list[bytes]:
    """Give the contents of all parts, in their order.

    Parameters
    ----------
    body : bytes
    content_type : bytes
        The header, which says what stands between the parts.
    max_parts : int
        The parser takes microseconds and a hundred bytes for a part of ten, so they are counted first.

    Raises
    ------
    CodecError
        No boundary, or a body that was cut off or is none.
    RequestError
        413.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise CodecError("got multipart/form-data without a boundary; send it as curl -F file=@image.png does")
    if body.count(b"--" + boundary) > max_parts + 1:  # one stands behind the last part
        raise too_large(
            f"got a multipart body of more than {max_parts} parts, wanted at most that; send fewer at a time"
        )
    parts: list[bytes] = []
    ended: list[bool] = []
    current: list[bytes] = []

    def take(data: bytes, start: int, end: int) -> None:
        current.append(data[start:end])

    def finish() -> None:
        parts.append(b"".join(current))
        current.clear()

    try:
        parser = MultipartParser(
            boundary,
            {"on_part_data": take, "on_part_end": finish, "on_end": lambda: ended.append(True)},
            max_size=float(len(body) + 1),
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise CodecError(f"got a multipart body that cannot be read: {error}") from error
    if not ended or not parts:
        raise CodecError(f"got a multipart body with {len(parts)} parts that does not end; it was cut off")
    return parts
