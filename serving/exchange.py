"""One HTTP exchange, whatever carries it: a request's id, its body within bounds, an answer whole."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import orjson

from serving.errors import RequestError
from serving.guard.keys import presented
from serving.settings import Limits

if TYPE_CHECKING:
    from serving.guard.admission import Admission
    from serving.guard.keys import Key
    from serving.head import Head
    from serving.served_model import ServedModel
    from serving.service import Embedded

__all__ = ["Answer", "ClientGoneError", "Exchange", "Headers", "Wire", "json_answer", "new_request_id"]

Headers = list[tuple[bytes, bytes]]
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
#: An id of its own for each request costs a system call; a random beginning and a count are as unique.
_PROCESS = uuid.uuid4().hex[:20].encode()
_COUNT = itertools.count(1)
#: Past so many seconds a body must come at the pace at which all of it would be there in time.
_BODY_GRACE_S = 5.0


def new_request_id() -> bytes:
    """Make an id that no other request has."""
    return b"%s%x" % (_PROCESS, next(_COUNT))


class Answer(NamedTuple):
    """Status, headers (without length and id) and body."""

    status: int
    headers: Headers
    body: bytes | memoryview


def json_answer(values: Any, *, status: int = 200) -> Answer:
    """Put plain values into an answer."""
    return Answer(status, [(b"content-type", b"application/json")], orjson.dumps(values))


class ClientGoneError(Exception):
    """The client hung up before its body was complete; there is nobody to answer."""


class Wire(Protocol):
    """What carries an exchange: a connection of ours, or another server's ASGI."""

    async def body(self, exchange: Exchange, max_bytes: int) -> bytes | memoryview:
        """Give the whole body; what has come so far is told in ``received_bytes``.

        Raises
        ------
        ClientGoneError
        RequestError
            413: more than was announced and is allowed.
        """

    def watch(self, exchange: Exchange) -> None:
        """From now on, :meth:`Exchange.hang_up` when the client goes; only once the body is read."""

    def unwatch(self) -> None:
        """Stop that."""

    async def answer(self, exchange: Exchange, status: int, headers: Headers, body: bytes | memoryview) -> None:
        """Send a whole answer; `headers` have its length."""


class Exchange:
    """A request and the way to answer it.

    Parameters
    ----------
    scope : mapping
        ASGI's.
    wire : Wire
    head : Head, optional
        Where our own connection has read it; its scope is this one.

    Attributes
    ----------
    request_id : bytes
        The client's ``x-request-id`` if it is a plain one, else ours.
    announced_bytes : int
        Content-Length, or what the body has become.
    kept_bytes : int
        What room is kept for: the body, and the features of its rows.
    received_bytes : int
        What has come of the body.
    body_is_read : bool
    began : float
        :func:`time.perf_counter` when it came.
    key_digest : bytes or None
        Of the API key that is presented.
    route, model, version, key, served, embedded
        What is noted of it on the way, for logs and metrics.
    """

    __slots__ = (
        "_wire",
        "admission",
        "announced_bytes",
        "began",
        "body_is_read",
        "embedded",
        "gone",
        "headers",
        "is_late",
        "is_watched",
        "kept_bytes",
        "key",
        "key_digest",
        "model",
        "path",
        "received_bytes",
        "request_id",
        "route",
        "scope",
        "served",
        "span",
        "started",
        "task",
        "version",
    )

    def __init__(self, scope: Mapping[str, Any], wire: Wire, *, head: Head | None = None) -> None:
        self.began = time.perf_counter()
        self.scope, self._wire = scope, wire
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes]
        self.key_digest: bytes | None
        if head is not None:
            self.headers, self.key_digest = head.headers, head.key_digest
        else:
            self.headers = dict(scope["headers"])
            self.key_digest = presented(self.headers.get(b"authorization"), self.headers.get(b"x-api-key"))
        given = self.headers.get(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            self.request_id = given
        else:
            self.request_id = new_request_id()
        self.announced_bytes = 0
        self.received_bytes = self.kept_bytes = 0
        self.body_is_read = self.started = self.gone = self.is_late = self.is_watched = False
        self.route = "other"
        self.model = self.version = ""
        self.key: Key | None = None
        self.embedded: Embedded | None = None
        self.served: ServedModel | None = None
        self.admission: Admission | None = None
        self.span: Any = None
        self.task: asyncio.Task[Any] | None = None

    def note(self, model: ServedModel, embedded: Embedded) -> None:
        """Keep what logs and metrics tell of it."""
        self.model, self.version = model.name, model.version
        self.served, self.embedded = model, embedded

    def admit_rows(self, n_rows: int, *, n_bytes: int) -> None:
        """Keep room for the features of rows, and take the rows off the rate of the key that asks."""
        if self.admission is not None:
            self.admission.admit_rows(self, n_rows, n_bytes=n_bytes)

    def grow(self, n_bytes: int) -> None:
        """Keep room for a body that is larger than what was announced."""
        if self.admission is not None:
            self.admission.grow(self, n_bytes)

    async def body(self, limits: Limits) -> bytes | memoryview:
        """Read the whole body: bytes where it is small, else the memory that it was received into.

        That it comes in time is for :class:`serving.guard.admission.Admission` to see to: a timer for each body would
        cost as much as reading it.

        Raises
        ------
        RequestError, ClientGoneError
            As :meth:`Wire.body` has them.
        """
        content = await self._wire.body(self, limits.max_body_bytes)
        self.body_is_read = True
        return content

    def due(self, limits: Limits) -> float:
        """Give the time, on :func:`time.perf_counter`'s clock, until which more of the body must have come.

        Room is kept for all of it: a client that announces much and sends nothing must not hold that for long.
        """
        part = min(1.0, self.received_bytes / max(1, self.announced_bytes))
        return self.began + min(limits.body_timeout_s, _BODY_GRACE_S + part * limits.body_timeout_s)

    def give_up(self) -> None:
        """End whoever handles it, because its body is late."""
        self.is_late = True
        if self.task is not None:
            self.task.cancel()

    def lateness(self) -> RequestError:
        """Say that the body is late."""
        return RequestError(
            408,
            "body_timeout",
            f"got {self.received_bytes} bytes of a body within the time that the service allows, wanted all of it; "
            "send fewer rows at a time",
            headers={"connection": "close"},
        )

    def watch(self) -> None:
        """See to it that it ends when the client goes; only once the body is read."""
        if not self.is_watched:
            self.is_watched = True
            self._wire.watch(self)

    def unwatch(self) -> None:
        """Stop that."""
        if self.is_watched:
            self._wire.unwatch()

    def hang_up(self) -> None:
        """End whoever handles it, because the client has gone."""
        if not self.started and self.task is not None:
            self.gone = True
            self.task.cancel()

    async def answer(self, answer: Answer, timing: bytes | None = None) -> None:
        """Send an answer, with a Server-Timing header where there is one."""
        self.started = True
        body = answer.body
        headers = [
            *answer.headers,
            (b"x-request-id", self.request_id),
            (b"content-length", b"%d" % len(body)),
        ]
        if timing is not None:
            headers.append((b"server-timing", timing))
        await self._wire.answer(self, answer.status, headers, b"" if self.scope["method"] == "HEAD" else body)
