"""Content codings (RFC 9110, section 8.4.1): gzip and deflate, read with a bound on what comes out.

A kilobyte can unfold to a megabyte, so a body is inflated no further than the limit that it would have had to keep
without compression.
"""

from __future__ import annotations

import zlib

from serving.errors import CodecError, RequestError, too_large

__all__ = ["asked_coding", "compress", "inflate"]

#: zlib's `wbits` of each coding; "deflate" is the zlib format, RFC 1950.
_WINDOW = {"gzip": 31, "x-gzip": 31, "deflate": 15}
#: Features are close to noise: more effort takes time and gains nothing.
_LEVEL = 1


def inflate(body: bytes, *, encoding: str, limit: int) -> bytes:
    """Undo a Content-Encoding.

    Parameters
    ----------
    body : bytes
        As it arrived.
    encoding : str
        The header's value.
    limit : int
        Most bytes that may come out.

    Raises
    ------
    CodecError
        Damaged, cut off, or with something after its end.
    RequestError
        413 for more than `limit` bytes, 415 for other codings and for several of them.
    """
    coding = encoding.strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in _WINDOW:
        raise RequestError(
            415,
            "unsupported_media_type",
            f"got Content-Encoding: {encoding[:40]}, wanted gzip or deflate, once, or a body that is not compressed",
        )
    stream = zlib.decompressobj(_WINDOW[coding])
    try:
        inflated = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise CodecError(f"got a body that is not {coding} ({error}), as its Content-Encoding says") from error
    if len(inflated) > limit:
        raise too_large(f"got a body of more than {limit} bytes when inflated, wanted at most that; send fewer rows")
    if not stream.eof:
        raise CodecError(f"got a {coding} body that was cut off, wanted all of it")
    if stream.unused_data:
        raise CodecError(f"got {len(stream.unused_data)} bytes after the end of the {coding} body, wanted one stream")
    return inflated


def asked_coding(accept_encoding: str) -> str | None:
    """Tell which coding a client asks for by naming it alone.

    HTTP libraries send lists such as ``gzip, deflate, br`` without anybody's asking. Float32 features shrink by a tenth
    and compressing them takes longer than computing them, so that such a list is answered without.
    """
    coding = accept_encoding.strip().lower()
    return coding if coding in ("gzip", "deflate") else None


def compress(body: bytes, *, coding: str) -> bytes:
    """Apply ``gzip`` or ``deflate``."""
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW[coding])
    return stream.compress(body) + stream.flush()
