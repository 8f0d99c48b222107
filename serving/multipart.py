"""Files out of a multipart/form-data body, parsed by the python-multipart library."""

from __future__ import annotations

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from serving.errors import CodecError

__all__ = ["split_parts"]


def split_parts(body: bytes, content_type: bytes) -> list[bytes]:
    """Give the contents of all parts, in their order.

    Raises
    ------
    CodecError
        No boundary, or a body that was cut off or is none.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise CodecError("got multipart/form-data without a boundary; send it as curl -F file=@image.png does")
    parts: list[bytes] = []
    ended: list[bool] = []
    current: list[bytes] = []

    def take(data: bytes, start: int, end: int) -> None:
        current.append(data[start:end])

    def finish() -> None:
        parts.append(b"".join(current))
        current.clear()

    parser = MultipartParser(
        boundary,
        {"on_part_data": take, "on_part_end": finish, "on_end": lambda: ended.append(True)},
        max_size=float(len(body) + 1),
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise CodecError(f"got a multipart body that cannot be read: {error}") from error
    if not ended or not parts:
        raise CodecError(f"got a multipart body with {len(parts)} parts that does not end; it was cut off")
    return parts
