"""Who may call over gRPC, decided before a message is read.

gRPC reads a message whole before it calls a handler that takes one message. A handler that takes a stream of them is
called with the metadata alone, and until it asks for a message HTTP/2's flow control keeps all but a window of it with
the client. On the wire a stream of one message is that message, so every call is handled as a stream here, of which the
first is read: with a key where one is needed, and with room for it.

How long a message is, gRPC tells nobody before it is there. So room for the largest that is allowed is kept while one
is read, and for what it is afterwards, until it is answered. Who finds none waits, which costs nothing but the window.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.errors import CodecError, RequestError, as_request_error, overloaded
from serving.guard.keys import require_scope
from serving.protocols.oip_call import CLIENT_GONE, InferCall, refuse

if TYPE_CHECKING:
    from serving.guard.keys import Key, KeyRing
    from serving.service import Service
    from serving.watching.recorder import Recorder

__all__ = ["CallGuard", "MessageRoom", "Reader", "key_of"]

#: For so long a call waits for room for its message, in seconds.
_TURN_S = 5.0
#: Calls that no key is asked for have messages of a few bytes: room for two large ones, and little time.
_PROBE_MESSAGES, _PROBE_S = 2, 2.0


def key_of(context: Any, keys: KeyRing | None) -> Key | None:
    """Find out who calls, and whether that key may; None where no key is needed.

    Raises
    ------
    RequestError
        401, 403.
    """
    if keys is None:
        return None
    metadata = {name: value.encode() for name, value in context.invocation_metadata() if isinstance(value, str)}
    return require_scope(keys.identify(metadata.get("authorization"), metadata.get("x-api-key")), "embed")


class MessageRoom:
    """Bytes that messages may take; belongs to one event loop.

    Parameters
    ----------
    most, largest : int
        Of all together, and of one.
    """

    def __init__(self, most: int, *, largest: int) -> None:
        self._most, self.largest = max(most, largest), largest
        self.used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Keep room for a message that nobody knows the length of.

        Raises
        ------
        RequestError
            503: there was none for some seconds.
        """
        try:
            async with asyncio.timeout(_TURN_S):
                while self.used + self.largest > self._most:
                    turn = asyncio.get_running_loop().create_future()
                    self._waiting.append(turn)
                    await turn
        except TimeoutError:
            raise overloaded("messages take all the memory that there is for them") from None
        self.used += self.largest

    def give_back(self, n_bytes: int) -> None:
        """Give room back, to those who wait."""
        self.used -= n_bytes
        while self._waiting:
            # All of them: how many find room is for them to see, and few ever wait.
            if not (turn := self._waiting.popleft()).done():
                turn.set_result(None)


@dataclass(frozen=True)
class Reader:
    """How the message of one call is read.

    Parameters
    ----------
    parse : callable
        From bytes to a message.
    keyed : bool
        Whether a key is needed.
    empty : bool
        The message says nothing, and is not read at all.
    infers : bool
        The call is put into figures and logs.
    """

    parse: Callable[[bytes], Any]
    keyed: bool = True
    empty: bool = False
    infers: bool = False


class CallGuard:
    """Reads the messages of one gRPC server.

    Parameters
    ----------
    service : Service
        Its limits bound what messages take together, and the time in which one must have come.
    max_message_bytes : int
        Largest message.
    keys : KeyRing, optional
        Without it nobody is asked for a key.
    recorder : Recorder, optional
    """

    def __init__(
        self, service: Service, *, max_message_bytes: int, keys: KeyRing | None, recorder: Recorder | None
    ) -> None:
        self._service, self._keys, self._recorder = service, keys, recorder
        self._room = MessageRoom(service.limits.max_in_flight_bytes, largest=max_message_bytes)
        self._probes = MessageRoom(_PROBE_MESSAGES * max_message_bytes, largest=max_message_bytes)

    def unary(self, call: Callable[[Any, Any], Any], reader: Reader) -> Callable[[Any, Any], Any]:
        """Make a handler of a stream from one of a message."""

        async def guarded(stream: Any, context: Any) -> Any:
            message, room, n_bytes = await self._admitted(stream, context, reader)
            try:
                return await call(message, context)
            finally:
                room.give_back(n_bytes)

        return guarded

    def streaming(self, call: Callable[[Any, Any], AsyncIterator[Any]], reader: Reader) -> Callable[[Any, Any], Any]:
        """Make a handler of a stream from one of a message whose answers are a stream."""

        async def guarded(stream: Any, context: Any) -> AsyncIterator[Any]:
            message, room, n_bytes = await self._admitted(stream, context, reader)
            # It is going to be answered for hours, and is a name.
            room.give_back(n_bytes)
            async for answer in call(message, context):
                yield answer

        return guarded

    async def _admitted(self, stream: Any, context: Any, reader: Reader) -> tuple[Any, MessageRoom, int]:
        """Give the message, and where how much room is kept for it; or end the call."""
        room = self._room if reader.keyed else self._probes
        if reader.empty:
            return reader.parse(b""), room, 0
        try:
            if reader.keyed:
                key_of(context, self._keys)
            if reader.infers:
                self._service.require_ready()
            await room.take()
            n_bytes = room.largest
            try:
                content = await self._read(stream, self._service.limits.body_timeout_s if reader.keyed else _PROBE_S)
                message = _parsed(content, reader.parse)
                n_bytes = room.largest - len(content)
            finally:
                room.give_back(n_bytes)
            return message, room, room.largest - n_bytes
        except asyncio.CancelledError:
            self._note(context, reader, CLIENT_GONE)
            raise
        except (RequestError, CodecError) as error:
            refusal = as_request_error(error)
            self._note(context, reader, refusal.status, refusal)
            await refuse(context, refusal)
            raise AssertionError from error  # refuse never returns

    async def _read(self, stream: Any, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                content: bytes = await anext(stream)
        except StopAsyncIteration:
            raise CodecError("got a call without a message, wanted one") from None
        except TimeoutError:
            raise RequestError(
                408, "body_timeout", "got no whole message within the time that the service allows; send fewer rows"
            ) from None
        return content

    def _note(self, context: Any, reader: Reader, status: int, refusal: RequestError | None = None) -> None:
        if self._recorder is not None and reader.infers:
            call = InferCall(context, n_bytes=0, rates=None)
            self._recorder.begin(call)
            self._recorder.end(call, status, failure=refusal)


def _parsed(content: bytes, parse: Callable[[bytes], Any]) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return parse(content)
    except DecodeError as error:
        raise CodecError(f"got bytes that are not the call's message: {error}") from error
