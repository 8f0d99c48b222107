"""Where replicas turn to the process that started them, over a Unix socket in a private folder.

It hands them the listening socket and its standard error, for their logs to be lines of one stream without Ray's marks,
and passes it on to all of them when one was told to load a model, or a signal was.

All replicas accept from one queue of connections, which the starting process keeps open: while a replica is replaced,
connections wait in it instead of being refused, and a replica that goes leaves none behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self, TextIO

__all__ = ["Desk", "ask_for_reload", "fetch", "reloads"]

#: What a caller says: hand me the sockets; have all replicas load again; tell me when I am to load again.
_FETCH, _RELOAD, _LISTEN = b"F", b"R", b"L"
_TIMEOUT_S = 30.0


class Desk:
    """Answers replicas; a context manager.

    Parameters
    ----------
    path : Path
        Of the Unix socket, in a folder that is this user's alone.
    listener : socket
        What is handed out.
    """

    def __init__(self, path: Path, listener: socket.socket) -> None:
        self._listener = listener
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._lock = threading.Lock()
        self._told: list[socket.socket] = []
        self._thread = threading.Thread(target=self._answer, name="desk", daemon=True)

    def reload(self) -> None:
        """Have every replica load its models again."""
        with self._lock:
            for replica in self._told.copy():
                try:
                    replica.sendall(_RELOAD)
                except OSError:  # it has gone
                    self._told.remove(replica)
                    replica.close()

    def count_replicas(self) -> int:
        """Count the replicas that answer requests now."""
        with self._lock:
            # They send nothing, so what can be read is the end.
            for replica in select.select(self._told, [], [], 0)[0]:
                self._told.remove(replica)
                replica.close()
            return len(self._told)

    def _answer(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                caller, _ = self._socket.accept()
                with contextlib.suppress(OSError):
                    self._serve(caller)

    def _serve(self, caller: socket.socket) -> None:
        caller.settimeout(_TIMEOUT_S)
        asked = caller.recv(1)
        if asked == _LISTEN:
            with self._lock:
                self._told.append(caller)
            caller.sendall(_LISTEN)
            return
        with caller:
            if asked == _RELOAD:
                self.reload()
            elif asked == _FETCH:
                socket.send_fds(caller, [_FETCH], [self._listener.fileno(), sys.stderr.fileno()])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A thread in accept is woken by shutdown, not by close.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._lock:
            for replica in self._told:
                replica.close()


def fetch(path: Path) -> tuple[socket.socket, TextIO]:
    """Ask a desk for its listening socket and standard error; they are the same ones in this process, too.

    Raises
    ------
    OSError
        Nobody is there.
    """
    with _connected(path) as desk:
        desk.sendall(_FETCH)
        _, (listening, errors), _, _ = socket.recv_fds(desk, 1, 2)
    listener = socket.socket(fileno=listening)
    listener.setblocking(False)
    return listener, os.fdopen(errors, "w", buffering=1)


def ask_for_reload(path: Path) -> None:
    """Have every replica load its models again.

    Raises
    ------
    OSError
        Nobody is there.
    """
    with _connected(path) as desk:
        desk.sendall(_RELOAD)


async def reloads(path: Path) -> AsyncIterator[None]:
    """Yield at once, and then whenever the models are to be loaded again; ends with the desk.

    At once, because a bundle may have come between the loading of the models and this.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(_LISTEN)
        while await reader.read(1):
            yield
    finally:
        writer.close()


def _connected(path: Path) -> socket.socket:
    desk = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    desk.settimeout(_TIMEOUT_S)
    desk.connect(str(path))
    return desk
