"""How answers begin on a connection of ours: status line and headers, as bytes."""

from __future__ import annotations

import http

from serving.errors import RequestError, envelope
from serving.exchange import Headers, new_request_id

__all__ = ["CLOSE", "write_head", "write_refusal"]

#: The header that ends a connection.
CLOSE = (b"connection", b"close")
_STATUS = {status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in http.HTTPStatus}


def write_head(status: int, headers: Headers, *, date: bytes, closes: bool, version: str) -> list[bytes]:
    """Write the head of an answer, in pieces for a join.

    Parameters
    ----------
    status : int
    headers : list of (bytes, bytes)
    date : bytes
        A whole line.
    closes : bool
        The connection ends with this answer.
    version : str
        Of HTTP, that the client speaks: 1.0 has to be told that the connection goes on.
    """
    parts = [_STATUS[status], *[b"%b: %b\r\n" % header for header in headers], date]
    if closes:
        if CLOSE not in headers:
            parts.append(b"connection: close\r\n")
    elif version == "1.0":
        parts.append(b"connection: keep-alive\r\n")
    parts.append(b"\r\n")
    return parts


def write_refusal(error: RequestError, *, date: bytes) -> bytes:
    """Write the whole answer to what never became an exchange; the connection ends with it."""
    request_id = new_request_id()
    body = envelope(error, request_id)
    more = b"".join(b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in error.headers.items())
    fields = b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %s\r\nconnection: close\r\n"
    return _STATUS[error.status] + fields % (len(body), request_id) + more + date + b"\r\n" + body
