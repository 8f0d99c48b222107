"""Where replicas turn to the process that started them, over a Unix socket in a private folder.

It hands them the listening socket and its standard error, for their logs to be lines of one stream without Ray's marks,
and passes it on to all of them when one was told to load a model, or a signal was. Each says how that went: whoever
asked hears that every replica has loaded, or which have not. In the end it has them all accept no more.

All replicas accept from one queue of connections, which the starting process keeps open: while a replica is replaced,
connections wait in it instead of being refused, and a replica that goes leaves none behind. The desk hands out the
counts by which they share them out (:mod:`serving.accepting`), and takes back what a replica that has gone left there.

Messages are one letter from the caller; and, to a replica that listens, a number in a line, with a word behind it where
it is not about loading, which comes back in a line with what went wrong behind it, or nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Self, TextIO

import orjson

from serving.accepting import Counts, Share
from serving.errors import ModelError

__all__ = ["Desk", "Told", "ask_for_reload", "fetch", "reloads"]

_log = logging.getLogger("serving")
#: What a caller says: hand me the sockets; have all replicas load again; tell me when I am to load again.
_FETCH, _RELOAD, _LISTEN = b"F", b"R", b"L"
#: The word behind a number: accept no further connection.
_REFUSE = b" refuse"
#: Of a replica's place among the counts of connections, in the answer to its first word.
_PLACE_BYTES = 2
#: In which a caller has to say what it wants, and the desk to answer.
_TIMEOUT_S = 30.0
#: In which every replica has to have loaded its models again.
_RELOAD_S = 60.0
#: In which every replica has to have stopped accepting.
_REFUSE_S = 1.0
#: Before the next try, where the process has no file left for a caller.
_NO_FILES_S = 0.2


class _Replica:
    """A replica that listens."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        #: By number of the reload: what went wrong, or nothing.
        self.answers: dict[int, str] = {}


class Told:
    """A reload that replicas were told of, by :meth:`Desk.tell`.

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
        Time in which every replica has to have loaded its models again, in seconds.
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
        self._thread = threading.Thread(target=self._answer, name="desk", daemon=True)

    def tell(self) -> Told:
        """Have every replica load its models again, without waiting for it."""
        return self._tell(b"")

    def _tell(self, word: bytes) -> Told:
        with self._news:
            self._count += 1
            for replica in self._replicas.copy():
                try:
                    # Never waits: a replica that has not taken thousands of such lines does not live.
                    replica.connection.send(b"%d%b\n" % (self._count, word), socket.MSG_DONTWAIT)
                except OSError:
                    self._replicas.remove(replica)
            return Told(self._count, self._replicas.copy())

    def collect(self, told: Told) -> list[str]:
        """Wait until every replica that was told has loaded, or has gone; at most so long as the desk was made with.

        Returns
        -------
        list of str
            What went wrong: a line for each replica that could not load, and for those that did not answer.
        """
        with self._news:
            self._news.wait_for(lambda: not self._silent(told), self._reload_s)
            failures = [one.answers[told.number] for one in told.replicas if one.answers.get(told.number)]
            if silent := len(self._silent(told)):
                failures.append(
                    f"{silent} of {len(told.replicas)} processes did not answer within {self._reload_s:g} s, and may "
                    "serve what they served before; load it again"
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
            elif asked == _RELOAD:
                caller.sendall(orjson.dumps(self.collect(self.tell())))
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

    def _listen_to(self, caller: socket.socket) -> None:
        caller.settimeout(None)
        replica = _Replica(caller)
        with self._news:
            if self._closed.is_set():
                return
            self._replicas.append(replica)
            caller.send(b"0\n", socket.MSG_DONTWAIT)
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


async def ask_for_reload(path: Path) -> None:
    """Have every replica load its models again, and wait until all have.

    Raises
    ------
    ModelError
        Not all have, and why.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(_RELOAD)
            # The desk keeps its own time, which is bounded.
            failures: list[str] = orjson.loads(await reader.read())
        finally:
            writer.close()
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelError(
            f"the model was loaded here, but the other processes could not be told ({error}); load it again"
        ) from error
    if failures:
        raise ModelError(f"the model was loaded, but not everywhere: {'; '.join(failures)}")


async def reloads(path: Path, *, refuse: Callable[[], None]) -> AsyncIterator[Callable[[list[str]], None]]:
    """Yield at once, and then whenever the models are to be loaded again; ends with the desk.

    At once, because a bundle may have come between the loading of the models and this.

    Parameters
    ----------
    path : Path
    refuse : callable
        Called when no further connection is to be accepted; it returns once that is so.

    Yields
    ------
    callable
        Tells the desk what could not be loaded, once the rest was.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(_LISTEN)
        while line := await reader.readline():
            count, word, _ = line.rstrip(b"\n").partition(_REFUSE)
            number = int(count)
            if word:
                refuse()
                writer.write(b"%d \n" % number)
                continue

            def answer(failures: list[str], number: int = number) -> None:
                writer.write(b"%d %s\n" % (number, " ".join("; ".join(failures).split()).encode()))

            yield answer
    finally:
        writer.close()
