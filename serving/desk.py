"""Where replicas turn to the process that started them, over a Unix socket in a private folder.

It hands them the listening socket and its standard error, for their logs to be lines of one stream without Ray's marks,
and takes note when one of them was told to load a model, so that all do.

All replicas accept from one queue of connections, which the starting process keeps open: while a replica is replaced,
connections wait in it instead of being refused, and a version that takes over leaves none behind.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Self, TextIO

__all__ = ["Desk", "ask_for_reload", "fetch"]

_FETCH, _RELOAD = b"F", b"R"
_TIMEOUT_S = 30.0


class Desk:
    """Answers replicas; a context manager.

    Parameters
    ----------
    path : Path
        Of the Unix socket, in a folder that is this user's alone.
    listener : socket
        What is handed out.
    reload : Event
        Set when a replica asks for it.
    """

    def __init__(self, path: Path, listener: socket.socket, *, reload: threading.Event) -> None:
        self._listener, self._reload = listener, reload
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._answer, name="desk", daemon=True)

    def _answer(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                caller, _ = self._socket.accept()
                with caller, contextlib.suppress(OSError):
                    caller.settimeout(_TIMEOUT_S)
                    if caller.recv(1) == _RELOAD:
                        self._reload.set()
                    else:
                        socket.send_fds(caller, [_FETCH], [self._listener.fileno(), sys.stderr.fileno()])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A thread in accept is woken by shutdown, not by close.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def fetch(path: Path) -> tuple[socket.socket, TextIO]:
    """Ask a desk for its listening socket and standard error; they are the same ones in this process, too.

    Raises
    ------
    OSError
        Nobody is there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as desk:
        desk.settimeout(_TIMEOUT_S)
        desk.connect(str(path))
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
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as desk:
        desk.settimeout(_TIMEOUT_S)
        desk.connect(str(path))
        desk.sendall(_RELOAD)
