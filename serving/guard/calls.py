"""Who may call over gRPC, decided before a message is read.

gRPC reads a message whole before it calls a handler that takes one message. A handler that takes a stream of them is
called with the metadata alone, and until it asks for a message HTTP/2's flow control keeps all but a window of it with
the client. On the wire a stream of one message is that message, so every call is handled as a stream here, of which the
first is read: with a key where one is needed, and with room for it.

How long a message is, gRPC tells nobody before it is there. So room for the largest that is allowed is kept while one
is read, and for what it is afterwards, until it is answered; then for the answer, until the client has it. It is the
room that HTTP's bodies are in. Who finds none waits, which costs nothing but the window; and so few messages are read
at a time that what is kept for them without being there is half of all room at most.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.errors import CodecError, RequestError, as_request_error, overloaded
from serving.guard.keys import require_scope
from serving.protocols.oip_call import CLIENT_GONE, InferCall, refuse
from serving.room import Room

if TYPE_CHECKING:
    from serving.guard.keys import Key, KeyRing
    from serving.service import Service
    from serving.watching.recorder import Recorder

__all__ = ["CallGuard", "MessageRoom", "Reader", "key_of"]

#: For so long a call waits for room for its message, in seconds.
_TURN_S = 5.0
#: Calls that no key is asked for have messages of a few bytes: room for two large ones, and little time.
_PROBE_MESSAGES, _PROBE_S = 2, 2.0
#: So many of them at a time, those that watch the service's health among them: others need the server's calls, too.
_MOST_PROBES = 16


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
    """Where messages are read into, each of which may be the largest until it is there.

    Parameters
    ----------
    room : Room
    largest : int
        Bytes of the largest message.
    at_a_time : int
        Messages that are read at the same time.
    """

    def __init__(self, room: Room, *, largest: int, at_a_time: int) -> None:
        self.room, self._largest = room, largest
        self._places = asyncio.Semaphore(at_a_time)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Keep room for a message that nobody knows the length of, while it is read.

        Raises
        ------
        RequestError
            503: there was none for some seconds.
        """
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(_TURN_S):
                    await stack.enter_async_context(self._places)
                    await self.room.wait(self._largest)
            except TimeoutError:
                raise overloaded("messages take all the memory that there is for them") from None
            stack.callback(self.room.give_back, self._largest)
            yield


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
        room = service.room
        at_a_time = max(1, room.most // 2 // max_message_bytes)
        self._messages = MessageRoom(room, largest=max_message_bytes, at_a_time=at_a_time)
        # Of their own, or whoever has no key could take the room of those who have one.
        probes = Room(_PROBE_MESSAGES * max_message_bytes)
        self._probes = MessageRoom(probes, largest=max_message_bytes, at_a_time=_PROBE_MESSAGES)
        self._n_probes = 0

    def unary(self, call: Callable[[Any, Any], Any], reader: Reader) -> Callable[[Any, Any], Any]:
        """Make a handler of a stream from one of a message."""

        async def guarded(stream: Any, context: Any) -> Any:
            async with self._place(context, reader):
                message, room, n_bytes = await self._admitted(stream, context, reader)
                try:
                    answer = await call(message, context)
                finally:
                    room.give_back(n_bytes)
            size = answer.ByteSize()
            room.count(size)
            context.add_done_callback(lambda _: room.give_back(size))
            return answer

        return guarded

    def streaming(self, call: Callable[[Any, Any], AsyncIterator[Any]], reader: Reader) -> Callable[[Any, Any], Any]:
        """Make a handler of a stream from one of a message whose answers are a stream."""

        async def guarded(stream: Any, context: Any) -> AsyncIterator[Any]:
            async with self._place(context, reader):
                message, room, n_bytes = await self._admitted(stream, context, reader)
                # It is going to be answered for hours, and is a name.
                room.give_back(n_bytes)
                async for answer in call(message, context):
                    yield answer

        return guarded

    @asynccontextmanager
    async def _place(self, context: Any, reader: Reader) -> AsyncIterator[None]:
        """Keep a place for a call that no key is asked for; or end it."""
        if reader.keyed or reader.empty:
            yield
            return
        if self._n_probes >= _MOST_PROBES:
            await refuse(context, overloaded("as many calls without a key are open as are allowed"))
        self._n_probes += 1
        try:
            yield
        finally:
            self._n_probes -= 1

    async def _admitted(self, stream: Any, context: Any, reader: Reader) -> tuple[Any, Room, int]:
        """Give the message, and where how much room is kept for it; or end the call."""
        messages = self._messages if reader.keyed else self._probes
        if reader.empty:
            return reader.parse(b""), messages.room, 0
        try:
            if reader.keyed:
                key_of(context, self._keys)
            if reader.infers:
                self._service.require_ready()
            async with messages.reading():
                content = await self._read(stream, self._service.limits.body_timeout_s if reader.keyed else _PROBE_S)
                message = _parsed(content, reader.parse)
            messages.room.count(len(content))
            return message, messages.room, len(content)
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
            call = InferCall(context, n_bytes=0, room=None, rates=None)
            self._recorder.begin(call)
            self._recorder.end(call, status, failure=refusal)


def _parsed(content: bytes, parse: Callable[[bytes], Any]) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return parse(content)
    except DecodeError as error:
        raise CodecError(f"got bytes that are not the call's message: {error}") from error
