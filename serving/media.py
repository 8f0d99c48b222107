"""Which form a body has and which form its answer takes: Content-Type and Accept."""

from __future__ import annotations

from collections.abc import Mapping

from serving.errors import RequestError

__all__ = ["IMAGES", "JSON", "MULTIPART", "NPY", "RAW", "answer_type", "body_type", "require_plain"]

NPY = "application/x-npy"
JSON = "application/json"
RAW = "application/octet-stream"
MULTIPART = "multipart/form-data"
IMAGES = ("image/png", "image/jpeg", "image/webp")
_BODIES = (NPY, JSON, RAW, MULTIPART, *IMAGES)
_ANSWERS = (NPY, JSON, RAW)


def body_type(headers: Mapping[bytes, bytes]) -> str:
    """Read Content-Type and Content-Encoding.

    Raises
    ------
    RequestError
        415 for anything but what is listed above, and for what is compressed.
    """
    require_plain(headers)
    media_type = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if media_type not in _BODIES:
        got = f"Content-Type: {media_type[:80]}" if media_type else "no Content-Type"
        raise _unsupported(f"got {got}, wanted one of {', '.join(_BODIES)}; with curl: -H 'Content-Type: {NPY}'")
    return media_type


def require_plain(headers: Mapping[bytes, bytes]) -> None:
    """Refuse a body that is compressed.

    Raises
    ------
    RequestError
        415.
    """
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding != "identity":
        raise _unsupported(f"got Content-Encoding: {encoding[:40]}, wanted a body that is not compressed")


def answer_type(accept: str | None, *, default: str) -> str:
    """Choose the form of an answer by an Accept header (RFC 9110, section 12.5.1).

    Parameters
    ----------
    accept : str, optional
        The header; everything is acceptable without it.
    default : str
        Chosen among equals.

    Raises
    ------
    RequestError
        406 where none is acceptable.
    """
    if accept is None or not accept.strip():
        return default
    offers = (default, *(offered for offered in _ANSWERS if offered != default))
    qualities = {offered: _quality(accept, offered) for offered in offers}
    best = max(qualities, key=lambda offered: qualities[offered])  # the first of equals, which is the default
    if qualities[best] <= 0:
        wanted = ", ".join(_ANSWERS)
        raise RequestError(406, "not_acceptable", f"got Accept: {accept[:200]}, wanted it to allow one of {wanted}")
    return best


def _quality(accept: str, offered: str) -> float:
    """Quality that Accept gives to one type; the most specific range that matches it decides."""
    main = offered.partition("/")[0]
    specificity, quality = -1, 0.0
    for part in accept.lower().split(","):
        media_range, *parameters = (piece.strip() for piece in part.split(";"))
        rank = {"*/*": 0, f"{main}/*": 1, offered: 2}.get(media_range, -1)
        if rank > specificity:
            specificity, quality = rank, _weight(parameters)
    return quality


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def _unsupported(message: str) -> RequestError:
    return RequestError(415, "unsupported_media_type", message)
