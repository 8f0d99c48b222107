"""Where replicas turn to the process that started them, over a Unix socket in a private folder.

It hands them the listening socket and its standard error, for their logs to be lines of one stream without Ray's marks,
and passes changes of what is served on to all of them: that one was asked for, or that a signal was. Each says how that
went: whoever asked hears that every replica has made the change, or which have not. One change is made at a time, by
whoever's turn it is, so that all make them in one order; a replica that comes later is told what was decided before. In
the end the desk has them all accept no more.

All replicas accept from one queue of connections, which the starting process keeps open: while a replica is replaced,
connections wait in it instead of being refused, and a replica that goes leaves none behind. The desk hands out the
counts by which they share them out (:mod:`serving.accepting`), and takes back what a replica that has gone left there.

Messages are one letter from the caller. To a replica that listens they are a line: a number, and a list of changes in
JSON or a word; the number comes back in a line with what went wrong behind it, or nothing. A caller whose turn it is
sends a change in a line, and gets a list of what went wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Self, TextIO

import orjson

from serving.accepting import Counts, Share
from serving.changes import RELOAD, Change, Tell
from serving.errors import ModelError

__all__ = ["Desk", "Told", "fetch", "orders", "turn"]

_log = logging.getLogger("serving")
#: What a caller says: hand me the sockets; let me change what is served; tell me what others change.
_FETCH, _CHANGE, _LISTEN = b"F", b"C", b"L"
#: The answer to the second of these, once it is the caller's turn.
_YOUR_TURN = b"!"
#: The word behind a number: accept no further connection.
_REFUSE = b"refuse"
#: Of a replica's place among the counts of connections, in the answer to its first word.
_PLACE_BYTES = 2
#: Longest line; a list of failures has a line of some hundred characters for each replica.
_LINE_BYTES = 2**20
#: In which a caller has to say what it wants, and the desk to answer.
_TIMEOUT_S = 30.0
#: In which every replica has to have made a change.
_RELOAD_S = 60.0
#: In which every replica has to have stopped accepting.
_REFUSE_S = 1.0
#: Before the next try, where the process has no file left for a caller.
_NO_FILES_S = 0.2


class _Replica:
    """A replica that listens."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        #: By number of the change: what went wrong, or nothing.
        self.answers: dict[int, str] = {}


class Told:
    """A change that replicas were told of, by :meth:`Desk.tell`.

    Parameters
    ----------
    number : int
    replicas : list
        Those that were there.
    """

    def __init__(self, number: int, replicas: list[_Replica]) -> None:
        self.number, self.replicas = number, replicas


class Desk:
    """Answers replicas; a context manager.

    Parameters
    ----------
    path : Path
        Of the Unix socket, in a folder that is this user's alone.
    listener : socket
        What is handed out.
    reload_s : float
        Time in which every replica has to have made a change, in seconds.
    """

    def __init__(self, path: Path, listener: socket.socket, *, reload_s: float = _RELOAD_S) -> None:
        self._listener, self._reload_s = listener, reload_s
        self._counts = Counts()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._closed, self._refusing = threading.Event(), threading.Event()
        #: Over the replicas, and when one has answered or gone.
        self._news = threading.Condition()
        self._replicas: list[_Replica] = []
        self._count = 0
        #: By model: what was decided that its folder does not say.
        self._decided: dict[str, Change] = {}
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._answer, name="desk", daemon=True)

    def tell(self, change: Change = RELOAD) -> Told:
        """Have every replica make a change, without waiting for it."""
        return self._tell(_listed([change]), change)

    def _tell(self, word: bytes, change: Change | None = None) -> Told:
        with self._news:
            self._count += 1
            # Whoever comes from now on is told by _listen_to.
            if change is not None and change.verb in ("choose", "unload"):
                self._decided[change.model] = change
            elif change is not None and change.verb == "load":
                self._decided.pop(change.model, None)
            for replica in self._replicas.copy():
                try:
                    # Never waits: a replica that has not taken thousands of such lines does not live.
                    replica.connection.send(b"%d %b\n" % (self._count, word), socket.MSG_DONTWAIT)
                except OSError:
                    self._replicas.remove(replica)
            return Told(self._count, self._replicas.copy())

    def collect(self, told: Told) -> list[str]:
        """Wait until every replica that was told has answered, or has gone; at most so long as the desk was made with.

        Returns
        -------
        list of str
            What went wrong: a line for each replica that could not, and for those that did not answer.
        """
        with self._news:
            self._news.wait_for(lambda: not self._silent(told), self._reload_s)
            failures = [one.answers[told.number] for one in told.replicas if one.answers.get(told.number)]
            if silent := len(self._silent(told)):
                failures.append(
                    f"{silent} of {len(told.replicas)} processes did not answer within {self._reload_s:g} s, and may "
                    "serve what they served before; do it again"
                )
            for replica in told.replicas:
                replica.answers = {n: answer for n, answer in replica.answers.items() if n > told.number}
            return list(dict.fromkeys(failures))

    def _silent(self, told: Told) -> list[_Replica]:
        return [one for one in told.replicas if one in self._replicas and told.number not in one.answers]

    def refuse(self) -> None:
        """Have connections refused from now on; those that there are stay.

        Replicas stop accepting first: to one that still did, a socket that was shut down would be an error. A
        connection that comes between the two is reset.
        """
        self._refusing.set()
        told = self._tell(_REFUSE)
        with self._news:
            self._news.wait_for(lambda: not self._silent(told), _REFUSE_S)
        # Closing it would close this process's copy alone.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def count_replicas(self) -> int:
        """Count the replicas that are there now."""
        with self._news:
            return len(self._replicas)

    def _answer(self) -> None:
        while not self._closed.is_set():
            try:
                caller, _ = self._socket.accept()
            except OSError as error:
                # Files may be short for a moment; without a desk no replica would ever be replaced again.
                if not self._closed.wait(_NO_FILES_S):
                    _log.warning("a replica cannot be answered now: %s", error)
                continue
            # One that says nothing must not keep the others waiting.
            threading.Thread(target=self._serve, args=(caller,), name="desk-caller", daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        with caller, contextlib.suppress(OSError):
            caller.settimeout(_TIMEOUT_S)
            asked = caller.recv(1)
            if asked == _LISTEN:
                self._listen_to(caller)
            elif asked == _CHANGE:
                self._let_change(caller)
            elif asked == _FETCH and not self._refusing.is_set():
                self._hand_out(caller)

    def _hand_out(self, caller: socket.socket) -> None:
        with self._news:
            place = self._counts.enter()
        try:
            files = [self._listener.fileno(), sys.stderr.fileno(), self._counts.file]
            socket.send_fds(caller, [place.to_bytes(_PLACE_BYTES)], files)
            caller.settimeout(None)
            caller.recv(1)  # until it has gone
        finally:
            with self._news:
                self._counts.leave(place)

    def _let_change(self, caller: socket.socket) -> None:
        """Have one caller change what is served, until it hangs up, while the others wait."""
        caller.settimeout(None)  # it loads in between
        with self._turn, caller.makefile("rb") as lines:
            caller.sendall(_YOUR_TURN)
            for line in lines:
                caller.sendall(orjson.dumps(self.collect(self.tell(Change.from_json(line)))) + b"\n")

    def _listen_to(self, caller: socket.socket) -> None:
        caller.settimeout(None)
        replica = _Replica(caller)
        with self._news:
            if self._closed.is_set():
                return
            self._replicas.append(replica)
            caller.send(b"0 %b\n" % _listed([RELOAD, *self._decided.values()]), socket.MSG_DONTWAIT)
        try:
            with caller.makefile("r", encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    number, _, failure = line.rstrip("\n").partition(" ")
                    with self._news:
                        replica.answers[int(number)] = failure
                        self._news.notify_all()
        finally:
            with self._news:
                if replica in self._replicas:
                    self._replicas.remove(replica)
                self._news.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        # A thread in accept, or in recv, is woken by shutdown, not by close.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._news:
            for replica in self._replicas:
                with contextlib.suppress(OSError):
                    replica.connection.shutdown(socket.SHUT_RDWR)


def fetch(path: Path) -> tuple[socket.socket, Share, TextIO]:
    """Ask a desk for its listening socket, a share of the connections, and its standard error.

    Socket and standard error are the same ones in this process, too. The share ends with it.

    Raises
    ------
    OSError
        Nobody is there.
    """
    desk = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        desk.settimeout(_TIMEOUT_S)
        desk.connect(str(path))
        desk.sendall(_FETCH)
        place, (listening, errors, counts), _, _ = socket.recv_fds(desk, _PLACE_BYTES, 3)
    except BaseException:
        desk.close()
        raise
    listener = socket.socket(fileno=listening)
    listener.setblocking(False)
    share = Share(Counts(counts), int.from_bytes(place), held=desk)
    return listener, share, os.fdopen(errors, "w", buffering=1)


@asynccontextmanager
async def turn(path: Path) -> AsyncIterator[Tell]:
    """Wait for the turn to change what is served, and give what has every replica make a change.

    Raises
    ------
    ModelError
        The desk cannot be asked.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=_LINE_BYTES)
    except OSError as error:
        raise _not_asked(error) from error
    try:
        try:
            writer.write(_CHANGE)
            await reader.readexactly(1)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise _not_asked(error) from error

        async def tell(change: Change) -> None:
            done = "nothing was changed" if change.verb == "prove" else f"{change.model!r} was changed here"
            try:
                writer.write(change.to_json() + b"\n")
                # The desk keeps its own time, which is bounded.
                failures: list[str] = orjson.loads(await reader.readline())
            except (OSError, ValueError) as error:
                raise ModelError(f"{done}, but the other processes could not be told ({error}); do it again") from error
            if failures:
                what = "because it cannot be everywhere" if change.verb == "prove" else "but not everywhere"
                raise ModelError(f"{done}, {what}: {'; '.join(failures)}")

        yield tell
    finally:
        writer.close()


def _not_asked(error: Exception) -> ModelError:
    return ModelError(f"nothing was changed, because the other processes could not be asked ({error}); try again")


async def orders(
    path: Path, *, refuse: Callable[[], None]
) -> AsyncIterator[tuple[list[Change], Callable[[list[str]], None]]]:
    """Yield at once, and then whenever what is served is to be changed; ends with the desk.

    At once, because a bundle may have come between the loading of the models and this, and others have decided.

    Parameters
    ----------
    path : Path
    refuse : callable
        Called when no further connection is to be accepted; it returns once that is so.

    Yields
    ------
    list of Change
        To be made in this order.
    callable
        Tells the desk what could not be done, once the rest was.
    """
    reader, writer = await asyncio.open_unix_connection(path, limit=_LINE_BYTES)
    try:
        writer.write(_LISTEN)
        while line := await reader.readline():
            count, _, word = line.rstrip(b"\n").partition(b" ")
            number = int(count)
            if word == _REFUSE:
                refuse()
                writer.write(b"%d \n" % number)
                continue

            def answer(failures: list[str], number: int = number) -> None:
                writer.write(b"%d %s\n" % (number, " ".join("; ".join(failures).split()).encode()))

            yield [Change(**one) for one in orjson.loads(word)], answer
    finally:
        writer.close()


def _listed(changes: Sequence[Change]) -> bytes:
    return orjson.dumps([asdict(change) for change in changes])
