"""The head of an HTTP/1.1 request: request line and headers, parsed once for those that come again and again.

httptools (llhttp, Node's parser, in its strict mode) reads it; what it does not decide and RFC 9112 leaves open is
decided here. A client that keeps its connection sends the same head with every request, so heads are remembered by
their bytes: a dict's look-up costs a tenth of parsing. Those that hold a key are remembered by their hash, and without
it: what lies in memory for long must be worth nothing to whoever gets to read it.
"""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import unquote

import httptools

from serving.errors import RequestError
from serving.guard.keys import presented

__all__ = ["Head", "HeadParser", "Heads", "head_too_large", "no_http"]

#: Heads that are remembered, and how long they may be.
_MOST_REMEMBERED = 512
_LONGEST_REMEMBERED = 1024
#: No server of ours has an address that wants more; int() takes quadratic time.
_LONGEST_NUMBER = 18
#: As many as other servers take; each costs some hundred bytes, however short it is.
_MOST_HEADERS = 128
#: Headers that say who asks: they are read once, and kept nowhere.
_SECRETS = frozenset((b"authorization", b"x-api-key", b"proxy-authorization", b"cookie"))


class Head:
    """What a request's head says; the same one serves many requests, so nobody may change it.

    Attributes
    ----------
    scope : dict
        ASGI's: ``type``, ``http_version``, ``method``, ``path``, ``raw_path``, ``query_string``, ``headers``.
        Without those that hold secrets.
    headers : dict of bytes to bytes
        Names in lower case; the last of equal ones.
    key_digest : bytes or None
        Of the API key that it presents, as :func:`serving.guard.keys.presented` gives it.
    n_bytes : int
        Of the body.
    is_measured : bool
        Whether the body's end is known: not of one that is sent in chunks.
    keeps_alive : bool
        Whether the client may send another request on this connection.
    expects : bool
        The client waits for ``100 Continue`` before it sends the body.
    """

    __slots__ = ("expects", "headers", "is_measured", "keeps_alive", "key_digest", "n_bytes", "scope")

    def __init__(self, scope: dict[str, Any], *, keeps_alive: bool, key_digest: bytes | None) -> None:
        self.scope, self.key_digest = scope, key_digest
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.is_measured = b"transfer-encoding" not in self.headers
        length = self.headers.get(b"content-length", b"0")
        self.n_bytes = int(length) if len(length) <= _LONGEST_NUMBER else 10**_LONGEST_NUMBER
        self.keeps_alive = keeps_alive and self.is_measured
        # Of HTTP/1.0, which knows no such answer, it is not heeded (RFC 9110, section 10.1.1).
        expects = self.headers.get(b"expect", b"").lower() == b"100-continue"
        self.expects = expects and scope["http_version"] != "1.0"


class HeadParser:
    """Reads one head, in one piece or several.

    Attributes
    ----------
    head : Head or None
        Once it is complete.
    secrets : dict of bytes to bytes
        Headers that are left out of it.
    """

    def __init__(self) -> None:
        self.head: Head | None = None
        self.secrets: dict[bytes, bytes] = {}
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._n_headers = 0
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> None:
        """Take the next bytes, and none that belong to the body.

        Raises
        ------
        RequestError
            400: this is no HTTP/1.1; 431: more headers than anybody needs.
        """
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # nothing else is spoken here, and a server may go on in HTTP/1.1 (RFC 9110, section 7.8)
        except httptools.HttpParserError as error:
            # An error of a callback's hides behind one of the parser's.
            if self._n_headers > _MOST_HEADERS:
                raise head_too_large(f"more than {_MOST_HEADERS} headers") from error
            raise no_http() from error

    def on_url(self, url: bytes) -> None:
        """Take a part of the address."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header."""
        self._n_headers += 1
        if self._n_headers > _MOST_HEADERS:
            raise ValueError("too many headers")
        name, value = name.lower(), value.rstrip(b" \t")
        if name in _SECRETS:
            self.secrets[name] = value
        else:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Put it together."""
        url = httptools.parse_url(self._url)
        if not url.path:
            raise ValueError("no path")
        parser = self._parser
        version = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise ValueError("another HTTP")
        hosts = sum(name == b"host" for name, _ in self._headers)
        if hosts > 1 or (not hosts and version == "1.1"):
            raise ValueError("not one Host")  # RFC 9112, section 3.2
        scope = {
            "type": "http",
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "path": unquote(url.path.decode("ascii")) if b"%" in url.path else url.path.decode("ascii"),
            "raw_path": url.path,
            "query_string": url.query or b"",
            "headers": self._headers,
        }
        key_digest = presented(self.secrets.get(b"authorization"), self.secrets.get(b"x-api-key"))
        self.head = Head(scope, keeps_alive=parser.should_keep_alive(), key_digest=key_digest)


class Heads:
    """Heads by their bytes, and those with secrets by their hash."""

    def __init__(self) -> None:
        self._remembered: dict[bytes, Head] = {}

    def parse(self, data: bytes) -> Head:
        """Parse a head that is complete, with the empty line at its end.

        Raises
        ------
        RequestError
            As :meth:`HeadParser.feed`.
        """
        head = self._remembered.get(data)
        if head is not None:
            return head
        hashed = hashlib.sha256(data).digest()
        head = self._remembered.get(hashed)
        if head is not None:
            return head
        parser = HeadParser()
        parser.feed(data)
        if parser.head is None:
            raise no_http()
        if len(data) <= _LONGEST_REMEMBERED:
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[hashed if parser.secrets else data] = parser.head
        return parser.head


def head_too_large(what: str) -> RequestError:
    """Answer 431."""
    return RequestError(431, "head_too_large", f"got a request line and headers of {what}, wanted fewer")


def no_http() -> RequestError:
    """Answer 400."""
    return RequestError(400, "malformed_request", "got bytes that are no HTTP request, wanted HTTP/1.1 with one Host")
